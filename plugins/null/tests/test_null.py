"""The null drivers do what the peer's do."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import pytest

from vm_core.block.mapping import Kind
from vm_core.block.open import open_node
from vm_core.errors import VmError
from vm_core.testing.iopeer import assert_same, needs_peer


def commands(*lines: str) -> list[str]:
    return [word for line in lines for word in ("-c", line)]


ALL = commands(
    "length",
    "info",
    "map",
    "write 0 512",
    "read 0 512",
    "write -z 0 512",
    "discard 0 512",
    "flush",
    "write -c 0 512",
    "write -b 0 512",
    "read -b 0 512",
    "truncate 1M",
    "read 8G 1",
)


@needs_peer
@pytest.mark.parametrize(
    "words",
    [
        ["-f", "raw", *ALL, "null-co://"],
        ["-f", "raw", *ALL, "null-aio://"],
        ["--image-opts", *ALL, "driver=null-co,size=1M,read-zeroes=on"],
        ["--image-opts", *ALL, "driver=null-aio,size=1000"],
        [*commands("length"), "null-co://100M"],
        [*commands("length"), 'json:{"driver":"raw","file":{"driver":"null-co","latency-ns":"-1"}}'],
        [*commands("length"), 'json:{"driver":"raw","file":{"driver":"null-co","foo":"-1"}}'],
        ["--image-opts", *commands("read -P 0 0 4k"), "driver=null-co,read-zeroes=on"],
    ],
    ids=range(8),
)
def test_like_the_peer(words: list[str], tmp_path: Path) -> None:
    """Commands have the same results, and wrong options the same messages."""
    assert_same(tmp_path, (), words)


@pytest.mark.parametrize("size", range(0, 200_000, 7919))
def test_lengths_are_rounded_to_sectors(size: int, tmp_path: Path) -> None:
    """Whatever the size, it is the one that was asked for."""
    with open_node({"driver": "null-co", "size": size}) as node:
        assert node.size == size


def test_latency() -> None:
    """Each request takes as long as was asked for."""
    with open_node({"driver": "null-co", "latency-ns": 30_000_000}) as node:
        before = monotonic()
        node.pread(0, 1)
        node.flush()
        assert monotonic() - before >= 0.06


def test_zeroes() -> None:
    """With read-zeroes=on the disk is known to be zeroes; without, nobody wrote it and memory stays as it is."""
    with open_node({"driver": "null-co", "read-zeroes": "on"}) as node:
        assert [run.kind for run in node.map(0, node.size)] == [Kind.ZERO]
        data = bytearray(b"x" * 10)
        node.read(0, [memoryview(data)])
        assert data == bytes(10)
    with open_node({"driver": "null-co"}) as node:
        assert [run.kind for run in node.map(0, node.size)] == [Kind.UNALLOCATED]
        data = bytearray(b"x" * 10)
        node.read(0, [memoryview(data)])
        assert data == b"x" * 10


def test_names() -> None:
    """A disk with options is called by json:, which opens it again."""
    with open_node("null-co://", format="raw") as node:
        assert node.filename == "null-co://"
    with open_node({"driver": "null-co", "size": 512}) as node:
        assert node.filename == 'json:{"driver": "null-co", "size": 512}'
        with open_node(node.filename) as again:
            assert again.size == 512


def test_read_only() -> None:
    """A disk that was opened read-only refuses changes."""
    with open_node("null-co://", format="raw") as node, pytest.raises((OSError, VmError)):
        node.pwrite(0, b"x")
