"""Bench: many equal requests against one image, several at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ..node import Node
from . import pipeline
from .job import Job


class Load(NamedTuple):
    """What to send: *requests* of *size* bytes, *depth* at a time, each *step* bytes behind the last."""

    requests: int
    depth: int
    offset: int
    size: int
    step: int
    write: bool = False
    #: The byte that is written.
    pattern: int = 0
    #: A flush after this many writes; 0: none.
    flush_interval: int = 0
    #: A flush waits for the writes before it to be done, and those after it for the flush.
    drain: bool = True


def bench(node: Node, load: Load, *, job: Job | None = None) -> None:
    """Send all requests; positions start again at the beginning past the image's end. Raises BlockError, Cancelled."""
    job = job or Job()
    workers = max(1, min(load.depth, pipeline.MAX_WORKERS, load.requests))
    size = node.size
    job.start(load.requests)

    def make_buffer() -> memoryview:
        return memoryview(bytearray([load.pattern]) * load.size)

    def work(offset: int, buffer: memoryview) -> None:
        if offset < 0:
            node.flush()
            return
        if load.write:
            node.write(offset, (buffer,))
        else:
            node.read(offset, (buffer,))
        job.advance(1)

    def offsets(first: int, stop: int) -> Iterator[int]:
        for number in range(first, stop):
            if load.flush_interval and not load.drain and number and number % load.flush_interval == 0:
                yield -1
            position = load.offset + number * load.step
            yield position % size if size else 0

    portion = load.flush_interval if load.flush_interval and load.drain else load.requests
    for first in range(0, load.requests, max(portion, 1)):
        stop = min(first + portion, load.requests)
        pipeline.run(offsets(first, stop), work, workers=min(workers, stop - first), make_state=make_buffer)
        if load.flush_interval and (load.drain or stop == load.requests):
            node.flush()
    job.finish()
