"""``vm-img bench`` beside ``qemu-img bench``: 4 KiB reads through each host-I/O engine, alone and 64 at a time.

Both programs send the same requests; the figures are those of whole runs, start-up included, as everywhere here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .images import Images
from .measured import Contest, contest
from .tools import BENCHES as TOOLS
from .tools import Bench, ours


def _raw(images: Images) -> Path:
    return images.raw()


def _qcow2(images: Images) -> Path:
    return images.converted("base.qcow2", "qcow2")


_SOURCES: dict[str, Callable[[Images], Path]] = {"raw": _raw, "qcow2": _qcow2}


def _bench(format: str, engine: str, cache: str, depth: int) -> Bench:
    count = 300_000 if cache == "writeback" else 60_000 if depth > 1 else 12_000

    def bench(images: Images, rounds: int) -> Contest:
        path = _SOURCES[format](images)
        words = ["bench", "-f", format, "-i", engine, "-t", cache, "-d", str(depth), "-c", str(count), path]
        title = f"{count // 1000}k reads, {format}, {engine}, cache={cache}, depth {depth}"
        return contest(title, 1.0, [images.img, *words], [ours(), *words], rounds=rounds)

    return bench


BENCHES: dict[str, Bench] = {
    f"{format}-{engine}-{cache}-{depth}": _bench(format, engine, cache, depth)
    for format in _SOURCES
    for engine in ("threads", "io_uring", "native")
    for cache in ("writeback", "none")
    for depth in (1, 64)
    if (engine, cache) != ("native", "writeback")
}

assert not BENCHES.keys() & TOOLS.keys()
