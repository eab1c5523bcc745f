"""Differencing images: the parent is found by its UUID, and nothing else is taken for it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from vdi_images import build

from vm_core.block.gate import Gate
from vm_core.block.open import create_image, open_node
from vm_core.errors import GateError, ImageError

KIB = 1024
BASE, CHILD = b"\xaa" * 16, b"\xbb" * 16
MODIFIED = b"\xcc" * 16


def chain(folder: Path, below: Path | None = None, block: int = 64 * KIB) -> bytes:
    """``base.vdi`` (in *below*, if given) and ``child.vdi``; returns what a guest finds in the child."""
    chance = random.Random(4)
    base, child = chance.randbytes(20 * block), chance.randbytes(20 * block)
    absent = frozenset(chance.sample(range(20), 9))
    child = bytearray(child)
    child[3 * block : 4 * block] = bytes(block)
    path = (below or folder) / "base.vdi"
    path.write_bytes(build(base, block, chance, uuid=BASE, modified=MODIFIED))
    absent -= {3}
    (folder / "child.vdi").write_bytes(
        build(bytes(child), block, chance, uuid=CHILD, link=BASE, parent=MODIFIED, absent=absent, kind=4)
    )
    for n in absent:
        child[n * block : (n + 1) * block] = base[n * block : (n + 1) * block]
    return bytes(child)


def test_the_parent_beside_the_image_is_found(tmp_path: Path) -> None:
    """Whatever its name; other images and things that only look like images are passed over."""
    data = chain(tmp_path)
    (tmp_path / "a.vdi").write_bytes(b"no image")
    (tmp_path / "b.vdi").mkdir()
    (tmp_path / "c.vdi").write_bytes(build(b"x" * KIB))
    with open_node(str(tmp_path / "child.vdi")) as node:
        assert node.backing is not None
        assert node.backing.filename == str(tmp_path / "base.vdi")
        assert node.pread(0, node.size) == data
        for offset in range(0, len(data) - 5000, 33_000):
            assert node.pread(offset, 5000) == data[offset : offset + 5000]


def test_writing_copies_what_the_parent_has(tmp_path: Path) -> None:
    """Writes and zeroes go to the image, the parent stays as it is."""
    model = bytearray(chain(tmp_path))
    before = (tmp_path / "base.vdi").read_bytes()
    chance = random.Random(8)
    for _ in range(3):
        with open_node(str(tmp_path / "child.vdi"), readonly=False) as node:
            for _ in range(20):
                length = chance.choice([1, 512, 5000, 200_000])
                offset = chance.randrange(len(model) - length)
                if chance.random() < 0.7:
                    data = chance.randbytes(length)
                    node.pwrite(offset, data)
                    model[offset : offset + length] = data
                else:
                    node.zero(offset, length)
                    model[offset : offset + length] = bytes(length)
        with open_node(str(tmp_path / "child.vdi")) as node:
            assert node.pread(0, node.size) == model
    assert (tmp_path / "base.vdi").read_bytes() == before


def test_the_folder_above_needs_leave(tmp_path: Path) -> None:
    """VirtualBox keeps the first parent one folder up: the gate decides."""
    below = tmp_path / "Snapshots"
    below.mkdir()
    data = chain(below, tmp_path)
    with pytest.raises(ImageError, match=r"\{aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa\}\.vdi"):
        open_node(str(below / "child.vdi"))
    for gate in (Gate.default(str(tmp_path)), Gate.follow()):
        with open_node(str(below / "child.vdi"), gate=gate) as node:
            assert node.pread(0, node.size) == data
    with pytest.raises(GateError):
        open_node(str(below / "child.vdi"), gate=Gate.none())


def test_the_user_can_name_the_parent(tmp_path: Path) -> None:
    """``backing=`` goes before any search, and ``backing=`` empty opens the image alone."""
    other = tmp_path / "other"
    other.mkdir()
    data = chain(tmp_path, other)
    spec = {"driver": "vdi", "file": {"driver": "file", "filename": str(tmp_path / "child.vdi")}}
    with open_node({**spec, "backing": {"driver": "vdi", "file": {"filename": str(other / "base.vdi")}}}) as node:
        assert node.pread(0, node.size) == data
    with open_node({**spec, "backing": None}) as node:
        assert node.backing is None
        assert len(node.pread(0, node.size)) == len(data)


def test_a_changed_parent_is_refused(tmp_path: Path) -> None:
    """A parent with another modification UUID holds other bytes than those the image was made on."""
    data = chain(tmp_path)
    path = tmp_path / "base.vdi"
    image = bytearray(path.read_bytes())
    image[408:424] = b"\xdd" * 16
    path.write_bytes(image)
    with pytest.raises(ImageError, match=r"'base\.vdi' has been changed since .*backing\.file\.filename"):
        open_node(str(tmp_path / "child.vdi"))
    spec = f"driver=vdi,file.filename={tmp_path}/child.vdi,backing.driver=vdi,backing.file.filename={path}"
    with open_node(spec) as node:
        assert node.pread(0, node.size) == data


def test_an_image_that_is_its_own_parent_is_a_loop(tmp_path: Path) -> None:
    """Two images that name each other end in one error."""
    for name, uuid, link in (("a.vdi", BASE, CHILD), ("b.vdi", CHILD, BASE)):
        image = bytearray(build(b"x" * KIB, 512, uuid=uuid, link=link, kind=4))
        struct.pack_into("16s", image, 440, b"")
        (tmp_path / name).write_bytes(image)
    with pytest.raises(ImageError, match="loop"):
        open_node(str(tmp_path / "a.vdi"))


def test_plain_images_look_for_nothing(tmp_path: Path) -> None:
    """An image without a parent has none, whatever lies beside it."""
    chain(tmp_path)
    create_image(str(tmp_path / "plain.vdi"), "vdi", 1 << 20)
    with open_node(str(tmp_path / "plain.vdi")) as node:
        assert node.backing is None


def test_of_copies_the_unchanged_one_is_the_parent(tmp_path: Path) -> None:
    """A copy with the same UUID that was changed does not stand in the parent's way, whatever its name."""
    data = chain(tmp_path)
    copy = build(b"x" * KIB, uuid=BASE, modified=b"\xdd" * 16)
    (tmp_path / "a-copy.vdi").write_bytes(copy)
    with open_node(str(tmp_path / "child.vdi")) as node:
        assert node.backing is not None
        assert node.backing.filename == str(tmp_path / "base.vdi")
        assert node.pread(0, node.size) == data
    (tmp_path / "base.vdi").unlink()
    with pytest.raises(ImageError, match=r"the parent 'a-copy\.vdi' has been changed since"):
        open_node(str(tmp_path / "child.vdi"))
