"""``bench``: many equal requests, and how long they take."""

from __future__ import annotations

import time

from .common import Failure, Tool, reason

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
    write = native = no_drain = False
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
                native = True
            case "i":
                if value not in ("threads", "native", "io_uring"):
                    raise Failure(f"Invalid aio option: {value}")
                native = value == "native"
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
    if native and not mode.direct:
        raise Failure(
            f"Could not open '{options.rest[0]}': aio=native was specified, but it requires cache.direct=on, "
            "which was not specified."
        )
    name = options.rest[0]
    with tool.open(name, image_opts=image_opts, format=format, write=write, cache=mode, share=share) as node:
        from ...block.jobs.bench import Load, bench

        step = step or size
        print(
            f"Sending {count} {'write' if write else 'read'} requests, {size} bytes each, {depth} in parallel "
            f"(starting at offset {offset}, step size {step})"
        )
        if flush_interval:
            print(f"Sending flush every {flush_interval} requests")
        load = Load(count, depth, offset, size, step, write, pattern, flush_interval, not no_drain)
        begin = time.perf_counter()
        try:
            bench(node, load)
        except OSError as error:
            raise Failure(f"Failed request: {reason(error)}") from error
        print(f"Run completed in {time.perf_counter() - begin:3.3f} seconds.")
    return 0


def _number(text: str, what: str, most: int = INT_MAX) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value <= most:
        raise Failure(f"Invalid {what} specified")
    return value
