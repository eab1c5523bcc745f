"""vm-img beside qemu-img: the work of ``convert`` and its relatives, each by its name.

The figures are medians of interleaved runs of whole programs with the same arguments, start-up included.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from .images import PASSPHRASE, Images
from .measured import Contest, contest, run

Bench = Callable[[Images, int], Contest]


def ours() -> str:
    """Our vm-img: the one that belongs to this interpreter."""
    return str(Path(sys.executable).with_name("vm-img"))


def _convert(
    title: str,
    goal: float,
    source: Callable[[Images], Path],
    format: str,
    *arguments: str,
    secret: bool = False,
) -> Bench:
    def bench(images: Images, rounds: int) -> Contest:
        target = images.path("target")
        path = source(images)
        words: list[str | Path] = ["convert", *arguments, "-O", format, path, target]
        if secret:
            words = ["convert", "--object", f"secret,id=s,data={PASSPHRASE}", *arguments, "-O", format]
            words += ["--image-opts", f"driver=luks,key-secret=s,file.filename={path}", target]
        before = images.path("target").unlink
        return contest(
            title,
            goal,
            [images.img, *words],
            [ours(), *words],
            rounds=rounds,
            before=lambda: before(missing_ok=True),
        )

    return bench


def _qcow2(images: Images) -> Path:
    return images.converted("base.qcow2", "qcow2")


def _fragmented(images: Images) -> Path:
    return images.converted("fragmented.qcow2", "qcow2", "-W", "-m", "16")


def _raw(images: Images) -> Path:
    return images.raw()


def _other(format: str) -> Callable[[Images], Path]:
    return lambda images: images.converted(f"base.{format}", format)


def _zlib(images: Images) -> Path:
    return images.converted("zlib.qcow2", "qcow2", "-c")


def _zstd(images: Images) -> Path:
    return images.converted("zstd.qcow2", "qcow2", "-c", "-o", "compression_type=zstd")


def _stream(images: Images) -> Path:
    return images.converted("stream.vmdk", "vmdk", "-o", "subformat=streamOptimized")


def _luks(images: Images) -> Path:
    secret = f"secret,id=s,data={PASSPHRASE}"
    return images.converted("base.luks", "luks", "--object", secret, "-o", "key-secret=s,iter-time=10")


def _read_only(title: str, goal: float, *words: str, sources: tuple[Callable[[Images], Path], ...]) -> Bench:
    def bench(images: Images, rounds: int) -> Contest:
        paths = [source(images) for source in sources]
        return contest(title, goal, [images.img, *words, *paths], [ours(), *words, *paths], rounds=rounds)

    return bench


def _overlay(images: Images) -> tuple[Path, Path, Path]:
    """A chain to commit and rebase: base, overlay with a quarter of the clusters changed, another base."""
    base, overlay, other = _qcow2(images), images.path("overlay.qcow2"), images.path("other.qcow2")
    if not other.exists():
        images.qemu("create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", overlay)
        writes = [f"write -q -P {at % 251 + 1} {at}M 1M" for at in range(0, 2000, 4)]
        commands = [word for write in writes for word in ("-c", write)]
        subprocess.run(["qemu-io", *commands, overlay], check=True, stdout=subprocess.DEVNULL)
        copied = images.path("other.part")
        images.qemu("convert", "-O", "qcow2", base, copied)
        writes = [f"write -q -P {at % 241 + 1} {at}M 1M" for at in range(1, 2000, 8)]
        commands = [word for write in writes for word in ("-c", write)]
        subprocess.run(["qemu-io", *commands, copied], check=True, stdout=subprocess.DEVNULL)
        copied.rename(other)
    return base, overlay, other


def _commit(images: Images, rounds: int) -> Contest:
    base, overlay, _ = _overlay(images)
    copies = images.path("commit-base.qcow2"), images.path("commit-top.qcow2")

    def before() -> None:
        subprocess.run(["cp", base, copies[0]], check=True)
        subprocess.run(["cp", overlay, copies[1]], check=True)
        images.qemu("rebase", "-u", "-b", copies[0], "-F", "qcow2", copies[1])

    words = ["commit", copies[1]]
    try:
        return contest("commit 500 MiB", 1.0, [images.img, *words], [ours(), *words], rounds=rounds, before=before)
    finally:
        for copy in copies:
            copy.unlink(missing_ok=True)


def _rebase(images: Images, rounds: int) -> Contest:
    _, overlay, other = _overlay(images)
    copy = images.path("rebase-top.qcow2")

    def before() -> None:
        subprocess.run(["cp", overlay, copy], check=True)

    words = ["rebase", "-b", other, "-F", "qcow2", copy]
    try:
        return contest("rebase", 1.0, [images.img, *words], [ours(), *words], rounds=rounds, before=before)
    finally:
        copy.unlink(missing_ok=True)


def _metadata(images: Images) -> Path:
    path = images.path("metadata.qcow2")
    if not path.exists():
        images.qemu("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", path, "64G")
    return path


def _scattered(images: Images) -> Path:
    """Every other cluster of 4 KiB holds data, as if a guest had used the image for years."""
    path, raw = images.path("scattered.qcow2"), images.path("scattered.raw")
    if not path.exists():
        with raw.open("wb", buffering=0) as file:
            for cluster in range(0, 200_000, 2):
                os.pwrite(file.fileno(), bytes((cluster % 251 + 1,)) * 4096, cluster * 4096)
            file.truncate(1 << 30)
        part = path.with_suffix(".part")
        images.qemu("convert", "-O", "qcow2", "-o", "cluster_size=4k", raw, part)
        raw.unlink()
        part.rename(path)
    return path


def _start(title: str, *words: str | Path) -> Callable[[Images, int], Contest]:
    """Start-up: processor time over that of a bare interpreter, in thousandths of a second in both columns' stead."""

    def bench(images: Images, rounds: int) -> Contest:
        path = _qcow2(images)
        program = Path(ours()).with_name(str(words[0]))
        found = contest(
            title,
            None,
            [sys.executable, "-c", "pass"],
            [program, *words[1:], path],
            rounds=max(rounds, 11),
        )
        return found

    return bench


BENCHES: dict[str, Bench] = {
    "qcow2-raw": _convert("qcow2 to raw", 0.4, _qcow2, "raw"),
    "fragmented-raw": _convert("fragmented qcow2 to raw", 0.4, _fragmented, "raw"),
    "raw-qcow2": _convert("raw to qcow2", 0.9, _raw, "qcow2"),
    "raw-raw": _convert("raw to raw", 1.0, _raw, "raw"),
    "vmdk-raw": _convert("vmdk to raw", 0.5, _other("vmdk"), "raw"),
    "vdi-raw": _convert("vdi to raw", 0.5, _other("vdi"), "raw"),
    "vpc-raw": _convert("vhd to raw", 0.5, _other("vpc"), "raw"),
    "vhdx-raw": _convert("vhdx to raw", 0.5, _other("vhdx"), "raw"),
    "raw-vmdk": _convert("raw to vmdk", 0.8, _raw, "vmdk"),
    "stream-raw": _convert("streamOptimized vmdk to raw", 0.4, _stream, "raw"),
    "raw-stream": _convert("raw to streamOptimized vmdk", 0.25, _raw, "vmdk", "-o", "subformat=streamOptimized"),
    "raw-vdi": _convert("raw to vdi", 0.8, _raw, "vdi"),
    "raw-vpc": _convert("raw to vhd", 0.8, _raw, "vpc"),
    "raw-vhdx": _convert("raw to vhdx", 0.8, _raw, "vhdx"),
    "compress-zlib": _convert("raw to qcow2, zlib", 0.25, _raw, "qcow2", "-c"),
    "compress-zstd": _convert("raw to qcow2, zstd", 0.4, _raw, "qcow2", "-c", "-o", "compression_type=zstd"),
    "decompress-zlib": _convert("zlib qcow2 to raw", 0.4, _zlib, "raw"),
    "decompress-zstd": _convert("zstd qcow2 to raw", 0.4, _zstd, "raw"),
    "luks-raw": _convert("luks to raw", 0.5, _luks, "raw", secret=True),
    "compare": _read_only("compare raw and qcow2", 1.0, "compare", sources=(_raw, _qcow2)),
    "map": _read_only("map", 1.0, "map", "--output=json", sources=(_fragmented,)),
    "measure": _read_only("measure", 1.0, "measure", "-O", "qcow2", sources=(_fragmented,)),
    "commit": _commit,
    "rebase": _rebase,
    "check": _read_only("check, 64 GiB of metadata", 3.0, "check", sources=(_metadata,)),
    "check-scattered": _read_only("check, 100,000 clusters apart", 3.0, "check", sources=(_scattered,)),
    "map-scattered": _read_only("map, 100,000 clusters apart", 1.0, "map", "--output=json", sources=(_scattered,)),
    "scattered-raw": _convert("100,000 clusters apart to raw", 1.0, _scattered, "raw"),
    "start-info": _start("start of vm-img info beside bare python", "vm-img", "info"),
    "start-io": _start("start of vm-io -c read beside bare python", "vm-io", "-c", "read -q 0 4k"),
}

__all__ = ["BENCHES", "run"]
