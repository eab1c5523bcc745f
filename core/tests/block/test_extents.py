"""The walk sees through filters, raw windows and nested images; filters are drivers by the same hooks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.extents import walk
from vm_core.block.filter import Filter
from vm_core.block.formatnode import FormatNode
from vm_core.block.mapping import Kind
from vm_core.block.node import Buffer, Node
from vm_core.block.open import OpenContext, create_image, open_node
from vm_core.block.raw import RawNode
from vm_core.descriptors import FormatDriver, Option
from vm_core.errors import BlockError, ImageError, UsageError
from vm_core.hookspecs import hookimpl
from vm_core.plugins import registry
from vm_core.testing.nodes import MemoryNode, PassingNode
from vm_core.testing.toy import Toy

K = 1024


def toy(size: int = 64 * K, backing: Node | None = None, file: Node | None = None) -> FormatNode:
    storage = file or MemoryNode()
    Toy.create(storage, size, {"cluster_size": K})
    return FormatNode(Toy.open(storage, {}, OpenContext(readonly=False)), driver="toy", backing=backing)


def shape(node: Node, **how: Any) -> list[tuple[str, int, int, int, bool]]:
    return [(e.kind.name, e.offset // K, e.length // K, e.depth, e.allocated) for e in walk(node, **how)]


def test_depths_and_holes() -> None:
    """Each run tells at which level it was found, and whether anybody ever wrote it."""
    bottom = toy(32 * K)
    bottom.pwrite(0, b"b" * 8 * K)
    middle = toy(backing=bottom)
    middle.pwrite(4 * K, b"m" * 8 * K)
    top = toy(backing=middle)
    top.zero(6 * K, 2 * K)
    expected = [
        ("DATA", 0, 4, 2, True),
        ("DATA", 4, 2, 1, True),
        ("ZERO", 6, 2, 0, True),
        ("DATA", 8, 4, 1, True),
        ("ZERO", 12, 20, 2, False),
        ("ZERO", 32, 32, 2, False),
    ]
    found = shape(top)
    assert found[:4] == expected[:4]
    assert sum(length for _, _, length, _, _ in found) == 64
    assert [entry[0] for entry in found[4:]] == ["ZERO"] * len(found[4:])
    assert shape(top, base=middle) == [
        ("ZERO", 0, 6, 0, False),
        ("ZERO", 6, 2, 0, True),
        ("ZERO", 8, 56, 0, False),
    ]
    assert shape(top, offset=5 * K, length=2 * K) == [("DATA", 5, 1, 1, True), ("ZERO", 6, 1, 0, True)]


def test_filters_are_seen_through() -> None:
    """A filter on top, in the chain or below a format changes neither runs nor depths; storage lies below it."""
    plain_file, filtered_file = MemoryNode(), MemoryNode()
    plain = toy(backing=toy(), file=plain_file)
    below = toy()
    filtered = PassingNode(toy(backing=PassingNode(PassingNode(below)), file=PassingNode(filtered_file)))
    for node in (plain, filtered):
        node.pwrite(3 * K, b"x" * 5 * K)
        inner = node.file if isinstance(node, Filter) else node
        assert isinstance(inner, FormatNode)
        assert inner.backing is not None
        inner.backing.pwrite(10 * K, b"y" * 2 * K)
    assert shape(plain) == shape(filtered)
    data = next(e for e in walk(filtered) if e.kind is Kind.DATA and e.depth == 0)
    assert data.storage is filtered_file
    assert filtered.pread(0, 64 * K) == plain.pread(0, 64 * K)


def test_a_raw_window_into_another_image() -> None:
    """A window into an image that has a backing image gives that chain's runs, moved."""
    node = toy(backing=toy())
    node.pwrite(20 * K, b"x" * 4 * K)
    window = RawNode(node, offset=10 * K, size=30 * K)
    assert window.pread(9 * K, 6 * K) == bytes(K) + b"x" * 4 * K + bytes(K)
    assert [(kind, start, length) for kind, start, length, _, _ in shape(window)] == [
        ("ZERO", 0, 10),
        ("DATA", 10, 4),
        ("ZERO", 14, 16),
    ]


class Counting(Filter):
    """Counts reads, up to a limit."""

    driver = "counting"
    reads = 0
    limit = 0

    def configure(self, options: dict[str, Any], context: OpenContext) -> None:
        self.limit = options.pop("limit", 5)
        if self.limit < 0:
            raise UsageError("counting: limit cannot be negative")

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self.reads += 1
        if self.reads > self.limit:
            raise BlockError.of(5)
        super().read(offset, buffers)


class Plugin:
    """A plugin with a filter."""

    @hookimpl
    def vm_format_drivers(self) -> list[FormatDriver]:
        return [
            FormatDriver(
                name="counting",
                summary="counts reads",
                implementation=f"{__name__}:Counting",
                options=(Option("limit", "int", "reads allowed"),),
            )
        ]


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, __name__, sys.modules.get(__name__, type(sys)(__name__)))
    monkeypatch.setattr(sys.modules[__name__], "Counting", Counting, raising=False)
    plugin = Plugin()
    registry().register(plugin, "vm-counting")
    yield
    registry().unregister(plugin)


@pytest.mark.usefixtures("counting", "toy_driver")
def test_a_filter_is_a_driver(tmp_path: Path) -> None:
    """A filter is opened by its driver's name with typed options, above an image or below one."""
    path = tmp_path / "a.toy"
    create_image(str(path), "toy", 64 * K, {})
    above = f"driver=counting,limit=1,file.driver=toy,file.file.filename={path}"
    with open_node(above) as node:
        assert isinstance(node, Counting)
        assert node.driver == "counting"
        node.pread(0, 1)
        with pytest.raises(BlockError):
            node.pread(0, 1)
    below = f"driver=toy,file.driver=counting,file.file.filename={path}"
    with open_node(below, readonly=False) as node:
        assert node.driver == "toy"
        node.pwrite(0, b"x")
    with pytest.raises(UsageError, match="no option 'limits'"):
        open_node(above.replace("limit=", "limits="))
    with pytest.raises(UsageError, match="limit cannot be negative"):
        open_node(above.replace("limit=1", "limit=-1"))
    open_node(below, readonly=False).close()


@pytest.mark.usefixtures("toy_driver")
def test_reopen_a_format(tmp_path: Path) -> None:
    """A backing image can be made writable where it is, for a commit, and read-only again."""
    create_image(str(tmp_path / "base"), "toy", 64 * K, {})
    create_image(str(tmp_path / "top"), "toy", 64 * K, {"backing_file": "base", "backing_fmt": "toy"})
    with open_node(str(tmp_path / "top"), readonly=False) as top:
        base = top.backing
        assert base is not None
        with pytest.raises(BlockError):
            base.pwrite(0, b"x")
        base.reopen(readonly=False)
        base.pwrite(0, b"committed")
        base.reopen(readonly=True)
        with pytest.raises(BlockError):
            base.pwrite(0, b"x")
        assert top.pread(0, 9) == b"committed"
    (tmp_path / "base").chmod(0o400)
    with open_node(str(tmp_path / "base")) as node:
        assert node.pread(0, 9) == b"committed"


def test_other_systems() -> None:
    """Where there is neither fcntl nor positional I/O nor fallocate, opening, reading and writing raw images works."""
    code = (
        "import os, sys, tempfile, threading, warnings, re, contextlib\n"
        "path = os.path.join(tempfile.mkdtemp(), 'disk')\n"
        "for name in ('preadv', 'pwritev', 'pread', 'pwrite', 'RWF_DSYNC', 'RWF_NOWAIT', 'SEEK_DATA', 'SEEK_HOLE',\n"
        "             'fdatasync', 'O_DIRECT', 'O_CLOEXEC', 'O_NONBLOCK', 'sysconf'):\n"
        "    if hasattr(os, name): delattr(os, name)\n"
        "sys.modules['fcntl'] = None; sys.platform = 'win32'\n"
        "import vm_core\n"
        "vm_core.create(path, '1M')\n"
        "with vm_core.open(path, 'r+', format='raw') as image:\n"
        "    image.pwrite(1000, b'hello'); image.zero(0, 100); image.discard(0, 512); image.flush()\n"
        "    assert image.pread(999, 7) == b'\\0hello\\0'\n"
        "    assert [(r.start, r.length) for r in image.map()] == [(0, 1 << 20)]\n"
        "print('good')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "good\n", done.stderr


def test_formats_without_reopen_say_so() -> None:
    """The default refuses by name."""

    class Fixed(Toy):
        def reopen(self, *, readonly: bool) -> None:
            super(Toy, self).reopen(readonly=readonly)

    file = MemoryNode()
    Toy.create(file, 64 * K, {})
    node = FormatNode(Fixed.open(file, {}, OpenContext(readonly=False)), driver="toy")
    with pytest.raises(ImageError, match="cannot change between"):
        node.reopen(readonly=True)
    assert not node.readonly
