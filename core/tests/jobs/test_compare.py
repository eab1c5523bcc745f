"""Compare: the first difference, by sector, however the images are made."""

from __future__ import annotations

import errno
import random

import pytest

from vm_core.block.jobs.compare import compare
from vm_core.block.node import Node
from vm_core.block.raw import RawNode
from vm_core.testing.nodes import FailingNode, MemoryNode

from .kit import K, contents, scribble, toy


def image(data: bytes | bytearray) -> Node:
    return RawNode(MemoryNode(bytes(data)))


@pytest.mark.parametrize("seed", range(20))
def test_equal_and_different(seed: int) -> None:
    """Equal images are found equal; a changed byte is found in its sector."""
    chance = random.Random(seed)
    size = chance.choice((64 * K, 6 * 1024 * K + 512))
    model = bytearray(size)
    node = toy(size)
    scribble(chance, node, model)
    assert compare(node, image(model)).difference is None
    assert compare(image(model), node, workers=1).difference is None
    at = chance.randrange(size)
    model[at] ^= 0xFF
    for one, two in ((node, image(model)), (image(model), node)):
        found = compare(one, two).difference
        assert found is not None
        assert (found.kind, found.offset) == ("content", at - at % 512)


def test_the_first_of_many_differences() -> None:
    """Of several differences the first is told, whichever worker comes first."""
    data = bytes(40 << 20)
    other = bytearray(data)
    for at in (39 << 20, 17 << 20, (9 << 20) + 5000, 23 << 20):
        other[at] = 1
    for _ in range(5):
        found = compare(image(data), image(other)).difference
        assert found is not None
        assert found.offset == (9 << 20) + 4608


def test_longer_images_end_in_zeroes() -> None:
    """Different sizes are told; the rest of the longer image must be zero."""
    assert compare(image(b"a" * 512), image(b"a" * 512 + bytes(512))) == (None, True)
    longer = image(b"a" * 512 + bytes(512) + b"b")
    for one, two in ((longer, image(b"a" * 512)), (image(b"a" * 512), longer)):
        found = compare(one, two)
        assert found.sizes_differ
        assert found.difference is not None
        assert found.difference.offset == 1024
    strict = compare(image(b"a" * 512), image(b"a" * 1024), strict=True)
    assert strict.difference is not None
    assert strict.difference.kind == "size"


def test_strict_compares_allocation() -> None:
    """In strict mode written zeroes are not the same as nothing."""
    one, two = toy(64 * K), toy(64 * K)
    one.zero(16 * K, 16 * K)
    assert compare(one, two).difference is None
    found = compare(one, two, strict=True).difference
    assert found is not None
    assert found.kind == "status"
    assert contents(one) == contents(two)


def test_read_errors_name_the_image() -> None:
    """An unreadable image is told with the offset and which of the two it is."""
    bad = RawNode(FailingNode(MemoryNode(b"x" * 64 * K), lambda what, at, length: errno.EIO if what == "read" else 0))
    found = compare(image(b"x" * 64 * K), bad).difference
    assert found is not None
    assert (found.kind, found.image, found.offset) == ("error", 1, 0)
    assert found.error is not None
    assert found.error.errno == errno.EIO
