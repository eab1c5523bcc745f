"""Parents: by hint and content ID."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vm_core.block.extents import walk
from vm_core.block.gate import Gate
from vm_core.block.jobs.commit import commit
from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.errors import BlockError, GateError, ImageError
from vm_core.testing.qemu import Qemu

MIB = 1 << 20


def chain(folder: Path, qemu: Qemu, *, ours: bool, hint: str = "base.vmdk", **options: Any) -> tuple[Path, Path]:
    """A base image full of ones and an overlay, a MiB longer, of it."""
    folder.mkdir(exist_ok=True)
    base, overlay = folder / "base.vmdk", folder / "top.vmdk"
    qemu.create(base, 4 * MIB)
    qemu.io(base, "write -P 1 0 4M")
    given = {"backing_file": hint, "backing_fmt": "vmdk", **options}
    if ours:
        create_image(str(overlay), "vmdk", 5 * MIB, given, gate=Gate.follow())
    else:
        qemu.create(overlay, 5 * MIB, given)
    return base, overlay


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("subformat", ["monolithicSparse", "twoGbMaxExtentSparse"])
def test_overlays(tmp_path: Path, qemu: Qemu, ours: bool, subformat: str) -> None:
    """An overlay shows its parent, and keeps what is written, here and for the peer; both see the same chain."""
    _, overlay = chain(tmp_path, qemu, ours=ours, subformat=subformat)
    model = bytearray(b"\1" * (4 * MIB) + bytes(MIB))
    with open_node(str(overlay), readonly=False) as node:
        assert node.pread(0, 5 * MIB) == model
        for offset, length in ((100, 1000), (70_000, 200_000), (4 * MIB - 700, 5000), (5 * MIB - 1, 1)):
            node.pwrite(offset, b"\2" * length)
            model[offset : offset + length] = b"\2" * length
        node.zero(MIB, 300_000)
        model[MIB : MIB + 300_000] = bytes(300_000)
        assert node.pread(0, 5 * MIB) == model
    assert qemu.read(overlay) == model
    qemu.io(overlay, "write -P 3 2M 1000k")
    model[2 * MIB : 2 * MIB + 1000 * 1024] = b"\3" * 1024000
    with open_node(str(overlay)) as node:
        assert node.pread(0, 5 * MIB) == model
        assert node.info() == qemu.info(overlay)["format-specific"]["data"]
    qemu.sound(overlay)


@pytest.mark.parametrize("by", ["us", "peer"])
def test_a_parent_that_changed(tmp_path: Path, qemu: Qemu, by: str) -> None:
    """Writing to a parent breaks its children: what only it has cannot be read any more, as with the peer."""
    base, overlay = chain(tmp_path, qemu, ours=True)
    with open_node(str(overlay), readonly=False) as node:
        node.pwrite(0, b"\2" * 65536)
    if by == "us":
        with open_node(str(base), readonly=False) as node:
            node.pwrite(0, b"\1")
    else:
        qemu.io(base, "write -P 1 0 512")
    with open_node(str(overlay)) as node:
        assert node.pread(0, 65536) == b"\2" * 65536
        with pytest.raises(BlockError, match="Invalid argument"):
            node.pread(65536, 512)
    code = qemu.run("convert", "-f", "vmdk", "-O", "raw", overlay, tmp_path / "x")
    assert code.returncode == 1


def test_a_parent_that_is_only_read_stays_one(tmp_path: Path, qemu: Qemu) -> None:
    """Opening for writing changes nothing before the first write."""
    base, overlay = chain(tmp_path, qemu, ours=True)
    before = base.read_bytes()
    with open_node(str(base), readonly=False) as node:
        node.pread(0, 512)
        node.flush()
    assert base.read_bytes() == before
    assert qemu.read(overlay)[:1] == b"\1"


def resolved(overlay: Path, **options: Any) -> str:
    with open_node(str(overlay), **options) as node:
        assert node.backing is not None
        assert node.pread(MIB, 4) == b"\1\1\1\1"
        return node.backing.filename


def test_hints_that_moved(tmp_path: Path, qemu: Qemu) -> None:
    """Where the hint leads nowhere, the parent is beside the image: by its old name, then by its content ID."""
    old = tmp_path / "old"
    chain(old, qemu, ours=True, hint=str(old / "base.vmdk"))
    new = tmp_path / "new"
    old.rename(new)
    assert resolved(new / "top.vmdk") == str(new / "base.vmdk")
    (new / "base.vmdk").rename(new / "renamed.vmdk")
    (new / "other.vmdk").write_bytes(b"no image")
    qemu.create(new / "another.vmdk", "1M")
    assert resolved(new / "top.vmdk") == str(new / "renamed.vmdk")
    (new / "renamed.vmdk").unlink()
    with pytest.raises(GateError, match="outside the image's own directory"):
        open_node(str(new / "top.vmdk"))
    with pytest.raises(ImageError, match=r"Could not open backing file: Could not open '.*base\.vmdk': No such file"):
        open_node(str(new / "top.vmdk"), gate=Gate.follow())


def test_hints_of_windows(tmp_path: Path, qemu: Qemu) -> None:
    """A path with a drive and backslashes is looked for beside the image by its last part."""
    _, overlay = chain(tmp_path, qemu, ours=True, hint="base.vmdk")
    data = overlay.read_bytes()
    path = rb'parentFileNameHint="C:\Virtual Machines\x\base.vmdk"'
    old = b'parentFileNameHint="base.vmdk"'
    end = data.index(b"\0", 512)
    text = data[512:end].replace(old, path)
    overlay.write_bytes(data[:512] + text.ljust(20 * 512, b"\0") + data[512 + 20 * 512 :])
    assert resolved(overlay) == str(tmp_path / "base.vmdk")


def test_a_parent_elsewhere_needs_leave(tmp_path: Path, qemu: Qemu) -> None:
    """A hint out of the image's directory is followed where that directory is trusted."""
    (tmp_path / "a").mkdir()
    base, overlay = chain(tmp_path / "b", qemu, ours=True)
    moved = tmp_path / "a" / "base.vmdk"
    base.rename(moved)
    overlay.unlink()
    qemu.create(overlay, "5M", {"backing_file": "../a/base.vmdk", "backing_fmt": "vmdk"})
    with pytest.raises(ImageError, match="outside the image's own directory"):
        open_node(str(overlay))
    assert resolved(overlay, gate=Gate.default(str(tmp_path / "a"))).endswith("a/base.vmdk")
    assert resolved(overlay, gate=Gate.follow()).endswith("a/base.vmdk")


def test_backing_options(tmp_path: Path, qemu: Qemu) -> None:
    """A parent given by hand has to have the content ID too; without one there are zeroes."""
    base, overlay = chain(tmp_path, qemu, ours=True)
    with open_node({"driver": "vmdk", "file.filename": str(overlay), "backing": None}) as node:
        assert node.pread(0, 512) == bytes(512)
    copy = tmp_path / "copy.vmdk"
    copy.write_bytes(base.read_bytes())
    given = {"driver": "vmdk", "file": {"filename": str(copy)}}
    with open_node({"driver": "vmdk", "file": {"filename": str(overlay)}, "backing": given}) as node:
        assert node.pread(0, 2) == b"\1\1"
    (tmp_path / "raw").write_bytes(b"\1" * MIB)
    raw = {"driver": "raw", "file": {"filename": str(tmp_path / "raw")}}
    with (
        open_node({"driver": "vmdk", "file": {"filename": str(overlay)}, "backing": raw}) as node,
        pytest.raises(BlockError, match="Invalid argument"),
    ):
        node.pread(0, 2)


def test_commit_leaves_a_chain_that_can_be_read(tmp_path: Path, qemu: Qemu) -> None:
    """Committing empties the overlay, gives its space back and notes the parent's new content ID.

    (The peer leaves an overlay that cannot be read.)
    """
    base, overlay = chain(tmp_path, qemu, ours=True)
    qemu.create(overlay, "4M", {"backing_file": "base.vmdk", "backing_fmt": "vmdk"})
    with open_node(str(overlay), readonly=False) as node:
        node.pwrite(MIB, b"\2" * MIB)
    size = overlay.stat().st_size
    with open_node(str(overlay), readonly=False, gate=Gate.follow()) as node:
        commit(node)
        assert node.pread(MIB, MIB) == b"\2" * MIB
    assert overlay.stat().st_size == size - MIB
    with open_node(str(overlay)) as node:
        assert node.pread(0, 4 * MIB) == b"\1" * MIB + b"\2" * MIB + b"\1" * 2 * MIB
        assert {extent.depth for extent in walk(node)} == {1}
    with open_node(str(overlay), readonly=False) as node:
        node.pwrite(0, b"\3" * 65536)
    assert qemu.read(overlay) == b"\3" * 65536 + b"\1" * (MIB - 65536) + b"\2" * MIB + b"\1" * 2 * MIB
    qemu.sound(overlay)
    qemu.sound(base)


def test_an_image_that_is_its_own_parent(tmp_path: Path, qemu: Qemu) -> None:
    """A loop is found."""
    _, overlay = chain(tmp_path, qemu, ours=True)
    (tmp_path / "base.vmdk").write_bytes(overlay.read_bytes())
    with pytest.raises(ImageError, match="loop"):
        open_node(str(overlay))


def test_long_chains(tmp_path: Path, qemu: Qemu) -> None:
    """Every link has the content ID of the one below."""
    chain(tmp_path, qemu, ours=True)
    model = bytearray(b"\1" * (4 * MIB))
    for number in range(8):
        name = "base.vmdk" if not number else f"{number - 1}.vmdk"
        path = tmp_path / f"{number}.vmdk"
        create_image(str(path), "vmdk", 4 * MIB, {"backing_file": name, "backing_fmt": "vmdk"})
        with open_node(str(path), readonly=False) as node:
            node.pwrite(number * 300_000, bytes([number + 2]) * 400_000)
            model[number * 300_000 : number * 300_000 + 400_000] = bytes([number + 2]) * 400_000
    with open_node(str(path)) as node:
        top: Node | None = node
        depth = 0
        while top is not None:
            top, depth = top.backing, depth + 1
        assert depth == 9
        assert node.pread(0, 4 * MIB) == model
    assert qemu.read(path) == model
