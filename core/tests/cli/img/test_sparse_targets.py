"""Converted images take no more of the host's disk than qemu-img's: zeroes within clusters are not written either."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from vm_core.errors import PluginError
from vm_core.plugins import find

from .peer import QEMU_IMG, QEMU_IO, needs_peer, ours

pytestmark = needs_peer

TARGETS = (
    ("vpc", ""),
    ("vpc", "subformat=fixed"),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vhdx", ""),
    ("vhdx", "subformat=fixed"),
    ("vmdk", ""),
    ("vmdk", "subformat=monolithicFlat"),
    ("parallels", ""),
    ("qcow2", ""),
    ("qcow2", "cluster_size=2M"),
    ("qcow2", "preallocation=metadata"),
)
#: Bytes of the source: not whole clusters of anything.
SIZE = (9 << 20) + 5 * 4096
#: Blocks that a file may take more: the host's own metadata of a file in many pieces.
MARGIN = 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of data, of zeroes and of nothing, of one page to a quarter of a MiB."""
    path = tmp_path_factory.mktemp("source") / "s.raw"
    chance = random.Random(4)
    with path.open("wb") as file:
        file.truncate(SIZE)
        at = 0
        while at < SIZE:
            length = min(chance.randint(1, 64) * 4096, SIZE - at)
            kind = chance.random()
            if kind < 0.5:
                file.seek(at)
                file.write(chance.randbytes(length) if kind < 0.3 else bytes(length))
            at += length
    return path


def _blocks(folder: Path) -> int:
    found = 0
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file)  # until then blocks are only promised
            found += os.fstat(file.fileno()).st_blocks
    return found


@pytest.mark.parametrize("how", ["", "-C", "-S 64k", "-n", "-n --target-is-zero"])
@pytest.mark.parametrize(("fmt", "options"), TARGETS)
def test_as_sparse_as_the_peers(tmp_path: Path, source: Path, fmt: str, options: str, how: str) -> None:
    """Whatever is asked of the search for zeroes, and whether the target is new or has old contents."""
    try:
        find("format", fmt)
    except PluginError:
        pytest.skip(f"{fmt} is not installed")
    if os.stat(source).st_blocks * 512 >= SIZE:
        pytest.skip("the file system has no holes")
    new = "-n" not in how
    taken = []
    for name in ("theirs", "ours"):
        folder = tmp_path / name
        folder.mkdir()
        target = folder / "t"
        if not new:
            # A vpc image would be rounded up to whole cylinders otherwise, and differ in size.
            size = str(SIZE if fmt != "vpc" else 16 << 20)
            made = [QEMU_IMG, "create", "-q", "-f", fmt, *(["-o", options] if options else []), str(target), size]
            subprocess.run(made, check=True)
            if "--target-is-zero" not in how:
                old = "write -q -P 9 1M 300k"
                subprocess.run([QEMU_IO, "-f", fmt, "-c", old, str(target)], check=True, stdout=subprocess.DEVNULL)
        words = ["convert", "-f", "raw", "-O", fmt, *how.split(), *(["-o", options] if options and new else [])]
        words += [str(source), str(target)]
        if name == "theirs":
            subprocess.run([QEMU_IMG, *words], check=True)
        else:
            assert ours(words, tmp_path).code == 0
        taken.append(_blocks(folder))
        done = subprocess.run(
            [QEMU_IMG, "compare", "-f", "raw", "-F", fmt, str(source), str(target)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout
    assert taken[1] <= taken[0] * 1.03 + MARGIN


def test_zeroes_asked_for_are_written(tmp_path: Path, source: Path) -> None:
    """With -S 0 every cluster is there in full."""
    for fmt, options in TARGETS:
        try:
            find("format", fmt)
        except PluginError:
            continue
        target = tmp_path / "t"
        words = ["convert", "-S", "0", "-f", "raw", "-O", fmt, *(["-o", options] if options else [])]
        assert ours([*words, str(source), str(target)], tmp_path).code == 0
        assert _blocks(tmp_path) * 512 >= SIZE
        for path in tmp_path.iterdir():
            path.unlink()
