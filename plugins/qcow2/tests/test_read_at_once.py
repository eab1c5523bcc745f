"""Compressed clusters that adjoin are read at once: the bytes, and what is told of damage, are as if one by one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from vm_core.block.extents import walk
from vm_core.block.formatnode import FormatNode
from vm_core.block.jobs.convert import CopyError, convert
from vm_core.block.mapping import Kind, Mapping
from vm_core.block.node import Node
from vm_core.block.open import open_node
from vm_core.errors import BlockError
from vm_core.testing.nodes import FailingNode
from vm_core.testing.qemu import Qemu

SIZE = 6 << 20


def image(tmp_path: Path, qemu: Qemu, *, type: str, cluster: int, order: str) -> tuple[Path, bytes]:
    """A compressed image by the peer, whose clusters were written in this order, and what is in it."""
    dice = random.Random(cluster)
    data = b"".join(dice.randbytes(dice.choice([8, 64, 300])) * 4096 for _ in range(64))[:SIZE]
    data += bytes(SIZE - len(data))
    (tmp_path / "data").write_bytes(data)
    path = tmp_path / "disk.qcow2"
    options = ["-o", f"cluster_size={cluster},compression_type={type}"]
    if order == "in order":
        qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", *options, str(tmp_path / "data"), str(path))
        return path, data
    qemu.img("create", "-q", "-f", "qcow2", *options, str(path), str(SIZE))
    places = list(range(0, SIZE, cluster))
    dice.shuffle(places)
    for batch in range(0, len(places), 200):
        qemu.io(path, *[f"write -q -c -s {tmp_path}/data {at} {cluster}" for at in places[batch : batch + 200]])
    content = data[:cluster] * len(places)
    return path, content


def runs(node: FormatNode) -> list[Mapping]:
    return [
        Mapping(one.kind, one.offset, one.length, one.storage, one.host, False, one.token)
        for one in walk(node)
        if one.kind is Kind.SPECIAL
    ]


@pytest.mark.parametrize("type", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster", [4096, 65536, 1 << 20])
@pytest.mark.parametrize("order", ["in order", "shuffled"])
def test_the_bytes(tmp_path: Path, qemu: Qemu, type: str, cluster: int, order: str) -> None:
    """Whatever way the clusters lie, all at once are what each is by itself, in fewer reads where they adjoin."""
    if type == "zstd":
        pytest.importorskip("zstandard")
    path, data = image(tmp_path, qemu, type=type, cluster=cluster, order=order)
    with open_node(str(path)) as node:
        assert isinstance(node, FormatNode)
        special = runs(node)
        assert len(special) > 2
        reads: list[int] = []

        def note(operation: str, offset: int, length: int) -> int:
            reads.append(length)
            return 0

        file = node.format.file
        node.format.file = FailingNode(file, note)
        together = list(node.transform_each(special))
        at_once = len(reads)
        assert together == [node.transform(run) for run in special]
        for run, found in zip(special, together, strict=True):
            assert found == data[run.offset : run.offset + run.length]
        if order == "in order" and cluster < 1 << 20:
            assert at_once * 4 < len(reads)
        node.format.file = file


def test_damage_is_told_where_it_is(tmp_path: Path, qemu: Qemu) -> None:
    """A cluster in the middle that cannot be decompressed is the one that is named, with its offset in the image."""
    path, _ = image(tmp_path, qemu, type="zlib", cluster=65536, order="in order")
    with open_node(str(path)) as node:
        assert isinstance(node, FormatNode)
        victim = runs(node)[5]
        host, length = node.format.geometry.compressed_extent(victim.token)  # type: ignore[attr-defined]
    with path.open("r+b") as file:
        file.seek(host)
        file.write(b"\xff" * (length - 512))
    target: Node
    (tmp_path / "target").write_bytes(b"")
    with open_node(str(path)) as node, open_node(str(tmp_path / "target"), format="raw", readonly=False) as target:
        target.truncate(SIZE)
        with pytest.raises(CopyError) as caught:
            convert([node], target)
    assert caught.value.offset == victim.offset


def test_data_within_other_data(tmp_path: Path, qemu: Qemu) -> None:
    """Where an entry points into the data of the cluster before it, that one is read whole; the other is damaged."""
    data = random.Random(3).randbytes(20000).ljust(65536, b"x") * 2
    (tmp_path / "data").write_bytes(data)
    path = tmp_path / "disk.qcow2"
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", str(tmp_path / "data"), str(path))
    with open_node(str(path)) as node:
        assert isinstance(node, FormatNode)
        host, length = node.format.geometry.compressed_extent(runs(node)[0].token)  # type: ignore[attr-defined]
        assert length > 20000
        table = node.format.tables.get(0).offset  # type: ignore[attr-defined]
    with path.open("r+b") as file:
        file.seek(table + 8)
        file.write((1 << 62 | host + 256).to_bytes(8, "big"))
    with open_node(str(path)) as node:
        assert isinstance(node, FormatNode)
        found = node.transform_each(runs(node)[:2])
        assert next(found) == data[:65536]
        with pytest.raises(BlockError, match="cannot be decompressed"):
            next(found)
