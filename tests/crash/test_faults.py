"""Disks that are full or fail, for every format that is written, at every write of common changes.

After each failure the image opens, is sound, and what was not to change is what it was; the failure was told.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.jobs.compact import compact
from vm_core.block.jobs.convert import convert
from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.block.raw import RawNode
from vm_core.errors import ImageError, UsageError, VmError
from vm_core.testing.faults import MODES, Disk, faults
from vm_core.testing.nodes import MemoryNode

LONG = bool(os.environ.get("VM_LONG"))
KIB = 1024
SIZE = 4096 * KIB

#: Format → options. On a disk that is gone some leave a mark, which the next check takes away.
FORMATS: dict[str, dict[str, str]] = {
    "qcow2": {},
    "qed": {},
    "vmdk": {},
    "vdi": {},
    "vpc": {},
    "vhdx": {"block_size": "1M"},
    "qcow": {},
    "parallels": {},
}
MARKS = "image was not closed correctly"


class Act(NamedTuple):
    """A change, and the guest bytes, from the first to before the second, that it leaves alone."""

    do: Callable[[FormatNode], object]
    start: int
    stop: int


def _write(node: FormatNode) -> None:
    node.pwrite(2500 * KIB, b"x" * 70 * KIB)
    node.flush()
    node.pwrite(0, b"y" * 512)


def _repair(node: FormatNode) -> None:
    with node.quiesce() as driver:
        driver.check(repair="all")


def _convert(node: FormatNode) -> None:
    convert([RawNode(MemoryNode(b"q" * 300 * KIB + bytes(200 * KIB) + b"r" * 300 * KIB))], node)


ACTS = {
    "write": Act(_write, 512, 2500 * KIB),
    "zero": Act(lambda node: node.zero(64 * KIB, 128 * KIB), 192 * KIB, SIZE),
    "discard": Act(lambda node: node.discard(64 * KIB, 128 * KIB), 192 * KIB, SIZE),
    "grow": Act(lambda node: node.truncate(SIZE * 8), 0, SIZE),
    "repair": Act(_repair, 0, SIZE),
    "compact": Act(lambda node: compact(node, workers=1), 0, SIZE),
    "convert -n": Act(_convert, 0, 0),  # the target may be emptied first
}


def opened(format: str, storage: Node, *, readonly: bool = False) -> FormatNode:
    node = open_node({"driver": format, "file": storage}, readonly=readonly)
    assert isinstance(node, FormatNode)
    return node


def shown(format: str, data: bytes, start: int, stop: int) -> bytes:
    with opened(format, MemoryNode(data), readonly=True) as node:
        return node.pread(start, stop - start)


def check(format: str, data: bytes, mode: str) -> int:
    """Leaks; that there is nothing worse."""
    with opened(format, MemoryNode(data), readonly=True) as node, node.quiesce() as driver:
        try:
            found = driver.check()
        except (UsageError, NotImplementedError):
            return 0
    said = [one for one in found.get("messages", ()) if not (MARKS in one and mode != "full")]
    assert not said or not found.get("corruptions"), said
    assert not found["check-errors"]
    return int(found.get("leaks", 0))


def do(disk: Disk, format: str, act: Act) -> bool:
    """Whether it goes well, closing included."""
    try:
        with opened(format, disk.node) as node:
            act.do(node)
    except (OSError, VmError):
        return False
    return True


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("format", FORMATS)
def test_failing_disks(tmp_path: Path, format: str, name: str, mode: str) -> None:
    """Wherever a change fails, the image is sound and shows what it showed."""
    path = tmp_path / "image"
    create_image(str(path), format, SIZE, dict(FORMATS[format]))
    with open_node({"driver": format, "file.filename": str(path)}, readonly=False) as node:
        node.pwrite(0, b"a" * 200 * KIB)
        node.pwrite(3000 * KIB, b"b" * 10 * KIB)
    before = path.read_bytes()
    act = ACTS[name]
    content = shown(format, before, act.start, act.stop)
    for disk in faults(before, mode, limit=0 if LONG else 2 if (format, name) == ("qed", "compact") else 6):
        went_well = do(disk, format, act)
        after = disk.data()
        assert not (disk.failed and went_well and mode == "dead"), "the failure was not told"
        leaks = check(format, after, mode)
        if mode == "full" and format != "qed":  # where only what lies last can be given back, as for the peer
            assert not leaks
        assert shown(format, after, act.start, act.stop) == content


@pytest.mark.parametrize("format", FORMATS)
def test_creating_on_a_full_disk(tmp_path: Path, format: str) -> None:
    """An image for which there is no room fails with one error, of which the program makes one line."""
    from vm_core.plugins import find

    driver = find("format", format).load()  # type: ignore[attr-defined]
    for room in (1, 2, 3, 5, 9, 40):
        storage = MemoryNode(limit=room << 15)
        told = ""
        try:
            driver.create(storage, SIZE, {})
        except (OSError, VmError) as error:
            told = str(error)
        assert "\n" not in told
        if not told:
            assert opened(format, storage).size >= SIZE


@pytest.mark.parametrize(
    ("format", "options", "told"),
    [
        ("vpc", {"subformat": "fixed"}, "Unable to write VHD header: No space left on device"),
        ("vmdk", {"subformat": "monolithicFlat"}, "Could not write description: No space left on device"),
    ],
)
def test_words_of_creation(tmp_path: Path, format: str, options: dict[str, str], told: str) -> None:
    """Where a format's image ends up as one small write that does not fit, the peer's sentence says so."""
    from vm_core.plugins import find

    storage = MemoryNode(limit=1)
    storage.filename = str(tmp_path / "image")
    with pytest.raises(ImageError) as caught:
        find("format", format).load().create(storage, SIZE, dict(options))  # type: ignore[attr-defined]
    assert caught.value.reason == told
