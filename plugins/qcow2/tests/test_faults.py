"""Changes that fail half way, at every write of them: the image is sound, holds what it held, and needs no repair."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.jobs.compact import compact
from vm_core.block.jobs.convert import ConvertOptions, CopyError, convert
from vm_core.block.jobs.rebase import rebase
from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.block.raw import RawNode
from vm_core.errors import VmError
from vm_core.testing.faults import MODES, Disk, faults
from vm_core.testing.nodes import FailingNode, MemoryNode
from vm_core.testing.qemu import Qemu
from vm_qcow2.image import Qcow2

LONG = bool(os.environ.get("VM_LONG"))
KIB = 1024
SIZE = 1024 * KIB
BASE = RawNode(MemoryNode(b"\x77" * SIZE))


def opened(storage: Node, *, base: Node | None = None, readonly: bool = False) -> FormatNode:
    node = open_node({"driver": "qcow2", "file": storage, "backing": base}, readonly=readonly)
    assert isinstance(node, FormatNode)
    return node


def image(tmp_path: Path, *prepare: Callable[[FormatNode], None], base: Node | None = None, **options: str) -> bytes:
    """An image of small clusters, in which something was written and *prepare* was done."""
    path = tmp_path / "image"
    options = {"cluster_size": "512", **options}
    if base is not None:
        options |= {"backing_file": "base", "backing_fmt": "raw"}
    create_image(str(path), "qcow2", SIZE, options, check_backing=False)
    with open_node({"driver": "qcow2", "file.filename": str(path), "backing": base}, readonly=False) as node:
        assert isinstance(node, FormatNode)
        node.pwrite(0, b"a" * 100 * KIB)
        node.pwrite(900 * KIB, b"b" * 3 * KIB)
        for step in prepare:
            step(node)
    return path.read_bytes()


def snapshot(node: FormatNode) -> None:
    with node.quiesce() as driver:
        driver.snapshot_create("s")
    node.pwrite(10 * KIB, b"c" * 30 * KIB)
    node.pwrite(600 * KIB, b"d" * 8 * KIB)


def zeroes(node: FormatNode) -> None:
    node.zero(20 * KIB, 20 * KIB)


def bitmaps(node: FormatNode) -> None:
    with node.quiesce() as driver:
        driver.bitmap_add("one", 512)
        driver.bitmap_add("two", 4096)
    node.pwrite(40 * KIB, b"e" * 5 * KIB)


def leak(node: FormatNode) -> None:
    with node.quiesce() as driver:
        assert isinstance(driver, Qcow2)
        driver.allocator.allocate(5)
        driver.refcounts.settle()


def _driver(name: str, *args: Any, **named: Any) -> Callable[[FormatNode], None]:
    def act(node: FormatNode) -> None:
        with node.quiesce() as driver:
            getattr(driver, name)(*args, **named)
            driver.flush()

    act.__name__ = name
    return act


def _amend(**options: Any) -> Callable[[FormatNode], None]:
    return lambda node: node.amend(dict(options))


def _rebase(node: FormatNode) -> None:
    rebase(node, RawNode(MemoryNode(b"\x55" * SIZE)), workers=1)
    with node.quiesce() as driver:
        driver.change_backing("other", "raw")
        driver.flush()


def _write(node: FormatNode) -> None:
    node.pwrite(500 * KIB, b"x" * 40 * KIB)


#: Name: what is done, how the image is prepared, its options, and whether the guest's bytes stay what they are.
ACTS: dict[str, tuple[Callable[[FormatNode], None], list[Callable[[FormatNode], None]], dict[str, Any], bool]] = {
    "grow": (lambda node: node.truncate(16 * SIZE), [], {}, True),
    "grow with bitmaps": (lambda node: node.truncate(16 * SIZE), [bitmaps], {}, True),
    "grow: metadata": (lambda node: node.truncate_preallocated(SIZE + 300 * KIB, "metadata"), [], {}, True),
    "grow: falloc": (lambda node: node.truncate_preallocated(SIZE + 300 * KIB, "falloc"), [], {}, True),
    "grow: full": (lambda node: node.truncate_preallocated(SIZE + 300 * KIB, "full"), [], {}, True),
    "shrink": (lambda node: node.truncate(960 * KIB), [], {}, True),
    "version 3": (_amend(compat="1.1"), [], {"compat": "0.10"}, True),
    "version 2": (_amend(compat="0.10"), [zeroes, snapshot], {"base": BASE}, True),
    "refcounts": (_amend(refcount_bits=64), [snapshot], {}, True),
    "lazy refcounts": (_amend(lazy_refcounts=True), [], {}, True),
    "take a snapshot": (_driver("snapshot_create", "new"), [snapshot], {}, True),
    "apply a snapshot": (_driver("snapshot_apply", "s"), [snapshot], {}, False),
    "delete a snapshot": (_driver("snapshot_delete", "s"), [snapshot], {}, True),
    "add a bitmap": (_driver("bitmap_add", "new", 512), [bitmaps], {}, True),
    "remove a bitmap": (_driver("bitmap_remove", "one"), [bitmaps], {}, True),
    "merge bitmaps": (_driver("bitmap_merge", "two", 512, b"\xff" * 20), [bitmaps], {}, True),
    "repair leaks": (_driver("check", repair="leaks"), [leak], {}, True),
    "compact": (lambda node: compact(node, workers=1) and None, [zeroes, leak], {}, True),
    "rebase": (_rebase, [], {"base": BASE}, True),
    "write": (_write, [], {}, False),
    "write over a snapshot": (_write, [snapshot], {}, False),
}


def shown(data: bytes, base: Node | None) -> bytes:
    """The guest's bytes, as far as they were there before."""
    with opened(MemoryNode(data), base=base, readonly=True) as node:
        return node.pread(0, min(node.size, 960 * KIB))


def leaks(data: bytes, *, dead: bool = False) -> int:
    """Leaked clusters; that there are no corruptions. On a *dead* disk bits COPIED may be missing, which is safe."""
    with opened(MemoryNode(data), readonly=True) as node, node.quiesce() as driver:
        found = driver.check()
    said = [one for one in found["messages"] if not one.startswith("Leaked")]
    if not dead or not all("OFLAG_COPIED" in one and one.endswith("refcount=1") for one in said):
        assert not found.get("corruptions"), found["messages"]
    assert not found["check-errors"]
    return int(found.get("leaks", 0))


def do(disk: Disk, base: Node | None, act: Callable[[FormatNode], None]) -> bool:
    """Whether it goes well, closing included."""
    try:
        with opened(disk.node, base=base) as node:
            act(node)
    except (OSError, VmError):
        return False
    return True


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ACTS)
def test_failures(tmp_path: Path, name: str, mode: str) -> None:
    """What fails at some write leaves a sound image with the former contents; nothing leaks if the disk can tell."""
    act, prepare, options, same = ACTS[name]
    base = options.get("base")
    before = image(tmp_path, *prepare, **options)
    had = leaks(before)
    content = shown(before, base)
    count = 0
    for disk in faults(before, mode, limit=0 if LONG else 14):
        went_well = do(disk, base, act)
        assert not (disk.failed and went_well and mode == "dead"), "the failure was not told"
        after = disk.data()
        found = leaks(after, dead=mode == "dead")
        if mode == "full":
            assert found <= had
            if not went_well and same and name != "rebase":
                # A larger table of refcounts or L1 table may stay.
                assert len(after) <= len(before) + 8 * KIB
        if mode == "once":
            assert found <= had
        if same:
            with opened(MemoryNode(after), readonly=True) as node:
                reference = node.format.backing_reference
            other = reference is not None and reference.filename == "other"
            assert shown(after, RawNode(MemoryNode(b"\x55" * SIZE)) if other else base) == content
        count += disk.failed
    assert count or mode == "full"


@pytest.mark.parametrize("name", ["add a bitmap", "merge bitmaps", "remove a bitmap"])
def test_bitmaps_are_not_lost(tmp_path: Path, name: str) -> None:
    """On a full disk the bitmaps that were there stay what they were, and in use by nobody."""
    act, prepare, _, _ = ACTS[name]
    before = image(tmp_path, *prepare)
    with opened(MemoryNode(before), readonly=True) as node:
        known = list(node.format.bitmaps())
        bits = {one["name"]: node.format.bitmap_load(one["name"]) for one in known}
    for disk in faults(before, "full", limit=0 if LONG else 14):
        if do(disk, None, act):
            continue
        with opened(MemoryNode(disk.data()), readonly=True) as node:
            for one in node.format.bitmaps():
                assert one in known
                assert node.format.bitmap_load(one["name"]) == bits[one["name"]]
            assert len(node.format.bitmaps()) >= len(known) - (name == "remove a bitmap")


def test_bitmap_that_lacks_a_write_is_lost(tmp_path: Path) -> None:
    """A bitmap in which a write of the guest is missing, since it could not be stored, is not taken for a good one."""
    before = image(tmp_path, bitmaps)
    lost = 0
    for disk in faults(before, "full"):
        with suppress(OSError), opened(disk.node) as node:
            node.pwrite(0, b"z" * 512)  # in place
            with node.quiesce() as driver:
                driver.bitmap_enable("two", enabled=False)
        with opened(MemoryNode(disk.data()), readonly=True) as node:
            assert node.pread(0, 512) == b"z" * 512
            for one in node.format.bitmaps():
                if "in-use" in one["flags"]:
                    lost += 1
                else:
                    assert node.format.bitmap_load(one["name"])[1][0] & 1
    assert lost


@pytest.mark.parametrize("name", ["grow: full", "refcounts", "take a snapshot", "delete a snapshot", "add a bitmap"])
def test_peer_agrees(tmp_path: Path, qemu: Qemu, name: str) -> None:
    """qemu-img finds neither errors nor leaks in what a full disk leaves."""
    act, prepare, options, _ = ACTS[name]
    before = image(tmp_path, *prepare, **options)
    path = tmp_path / "after"
    for disk in faults(before, "full", limit=0 if LONG else 8):
        do(disk, None, act)
        path.write_bytes(disk.data())
        qemu.sound(path)


@pytest.mark.parametrize("size", [1000, 100, 65536 + 511])
def test_sizes_between_sectors(tmp_path: Path, qemu: Qemu, size: int) -> None:
    """A size in the header that is no multiple of 512 counts as the next smaller one, as for the peer."""
    path = tmp_path / "image.qcow2"
    qemu.create(path, 1024 * KIB)
    qemu.io(path, "write -P 5 0 1M")
    with path.open("r+b") as file:
        file.seek(24)
        file.write(size.to_bytes(8, "big"))
    before = path.read_bytes()
    with open_node({"driver": "qcow2", "file.filename": str(path)}, readonly=False) as node:
        assert node.size == qemu.info(path)["virtual-size"] == size // 512 * 512
        assert node.pread(0, node.size) == qemu.read(path)
        with pytest.raises(OSError):
            node.pwrite(node.size, b"x")
    assert path.read_bytes() == before


def test_failed_write_leaves_no_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A write for which there is no room says so; closing has nothing to add, and the file is as long as before."""
    before = image(tmp_path)
    disk = Disk(before, "full", 1)
    node = opened(disk.node)
    with pytest.raises(OSError, match="No space left"):
        node.pwrite(500 * KIB, b"x" * 40 * KIB)
    node.close()
    assert capfd.readouterr().err == ""
    assert len(disk.data()) == len(before)
    assert not leaks(disk.data())


def test_convert_tells_what_only_its_end_finds(tmp_path: Path) -> None:
    """Tables that cannot be written are a failure of convert, not only of closing: then all is in the image."""
    before = image(tmp_path)
    source = RawNode(MemoryNode(b"q" * 30 * KIB + bytes(200 * KIB) + b"r" * 30 * KIB))
    failures = 0
    for disk in faults(before, "once"):
        node = opened(disk.node)
        told = ""
        try:
            convert([source], node, ConvertOptions(zero_init=True))
        except CopyError as error:
            told = str(error)
        if told:
            assert "error while writing at byte" in told
        else:
            assert shown(disk.data(), None)[230 * KIB : 260 * KIB] == b"r" * 30 * KIB
        with suppress(OSError):
            node.close()
        failures += bool(told)
    assert failures


def test_header_that_may_not_be_stable_is_put_back(tmp_path: Path) -> None:
    """A new size of which nobody knows whether it reached the disk is taken back."""
    before = image(tmp_path)
    last = [0]

    def decide(operation: str, offset: int, length: int) -> int:
        if operation == "write":
            last[0] = offset
        fail = operation == "flush" and last[0] == 24  # where the size is
        last[0] = last[0] * (not fail)
        return errno.EIO if fail else 0

    storage = MemoryNode(before)
    with opened(FailingNode(storage, decide)) as node:
        with pytest.raises(OSError, match="Failed to update the image size"):
            node.truncate(SIZE + KIB)
        assert node.size == SIZE
    with opened(MemoryNode(storage.data()), readonly=True) as node:
        assert node.size == SIZE
