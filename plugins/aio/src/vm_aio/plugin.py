"""What this distribution brings."""

from __future__ import annotations

from collections.abc import Iterable

from vm_core.descriptors import BlockEngine, Option
from vm_core.hookspecs import hookimpl

_OPTIONS = (
    Option("entries", "int", "requests that the kernel is given at a time", 256),
    Option("workers", "int", "threads at most for what the kernel cannot do alone", 8),
)


@hookimpl
def vm_block_engines() -> Iterable[BlockEngine]:
    return [
        BlockEngine(
            name="io_uring",
            summary="Linux' io_uring: batches of reads and writes by one system call, cached or not",
            implementation="vm_aio.uring:UringEngine",
            options=_OPTIONS,
        ),
        BlockEngine(
            name="native",
            summary="Linux AIO: batches of reads and writes by one system call, for cache.direct=on",
            implementation="vm_aio.linuxaio:NativeEngine",
            options=_OPTIONS,
        ),
    ]
