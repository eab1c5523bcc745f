"""``bench``: many equal requests, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ...errors import VmError
from .common import Failure, Tool, need_medium, reason

if TYPE_CHECKING:
    from ...block.jobs.job import Job

LONG = {
    "help": "h",
    "flush-interval:": "flush-interval",
    "image-opts": "image-opts",
    "pattern:": "pattern",
    "no-drain": "no-drain",
    "force-share": "U",
}

INT_MAX = (1 << 31) - 1


def run(args: list[str], tool: Tool) -> int:
    """``bench [-c COUNT] [-d DEPTH] [-s SIZE] [-S STEP] [-o OFFSET] [-w] [--pattern N] [--flush-interval N] FILE``."""
    format, image_opts, share, cache = None, False, False, "writeback"
    count, depth, offset, size, step, pattern, flush_interval = 75000, 64, 0, 4096, 0, 0, 0
    write = no_drain = False
    aio = "threads"
    options = tool.options(args, "hc:d:f:ni:o:qs:S:t:wU", LONG)
    for key, value in options:
        match key:
            case "c":
                count = _number(value, "request count")
            case "d":
                depth = _number(value, "queue depth")
            case "f":
                format = value
            case "n":
                aio = "native"
            case "i":
                aio = tool.engine(value, aio)
            case "o":
                offset = tool.size(value, "offset")
            case "q":
                tool.quiet = True
            case "s":
                size = tool.size(value, "buffer size", 1, INT_MAX)
            case "S":
                step = tool.size(value, "step_size", 1, INT_MAX)
            case "t":
                cache = value
            case "w":
                write = True
            case "U":
                share = True
            case "pattern":
                pattern = _number(value, "pattern byte", 255)
            case "flush-interval":
                flush_interval = _number(value, "flush interval")
            case "no-drain":
                no_drain = True
            case "image-opts":
                image_opts = True
    if len(options.rest) != 1:
        tool.usage("Expecting one image file name")
    if not write and flush_interval:
        raise Failure("--flush-interval is only available in write tests")
    if flush_interval and flush_interval < depth:
        raise Failure("Flush interval can't be smaller than depth")
    try:
        mode = tool.cache(cache)
    except Failure:
        raise Failure("Invalid cache mode") from None
    name = options.rest[0]
    from ...block.medium import present

    with tool.open(name, image_opts=image_opts, format=format, write=write, cache=mode, share=share, aio=aio) as node:
        if tool.peer and not present(node):
            return 1  # without a word
        need_medium(node, f"Could not get size of {name}")
        from ...block.file import engine_of
        from ...block.jobs.bench import Bench, Load
        from ...block.jobs.job import Job

        step = step or size
        print(
            f"Sending {count} {'write' if write else 'read'} requests, {size} bytes each, {depth} in parallel "
            f"(starting at offset {offset}, step size {step})"
        )
        if flush_interval:
            print(f"Sending flush every {flush_interval} requests")
        load = Load(count, depth, offset, size, step, write, pattern, flush_interval, not no_drain)
        job = Job()
        run = Bench(node, load, engine=engine_of(node), cache=mode, job=job)
        try:
            begin = time.perf_counter()
            with _interruptible(job):
                run.run()
        except OSError as error:
            raise Failure(f"Failed request: {reason(error)}") from error
        finally:
            run.close()
        print(f"Run completed in {time.perf_counter() - begin:3.3f} seconds.")
    return 0


@contextmanager
def _interruptible(job: Job) -> Iterator[None]:
    """Ctrl-C ends the *job* between two batches, where everything in flight is known, and is raised then."""
    import signal

    def stop(number: int, frame: object) -> None:
        job.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    except VmError:
        if job.cancelled:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _number(text: str, what: str, most: int = INT_MAX) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= most:
        raise Failure(f"Invalid {what} specified")
    return value
