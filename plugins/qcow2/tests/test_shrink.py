"""Shrinking leaves what the peer leaves, byte for byte, but for old bytes of the guest beyond the new end."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.mapping import Kind
from vm_core.block.open import open_node
from vm_core.testing.qemu import LONG, Qemu

KIB = 1024
MIB = 1024 * KIB


def compare(path: Path, qemu: Qemu, size: int) -> None:
    """Shrink an image, and a copy with the peer, which leaves bytes beyond the end in a last cluster that is kept."""
    theirs = path.with_suffix(".peer")
    shutil.copy(path, theirs)
    qemu.img("resize", "-q", "--shrink", theirs, size)
    left: list[tuple[int, int]] = []
    with open_node(path, format="qcow2", readonly=False) as node:
        assert isinstance(node, FormatNode)
        if size % node.cluster_size:
            runs = node.format.map(size, -size % node.cluster_size)
            left = [(run.host, run.length) for run in runs if run.kind is Kind.DATA and run.writable]
        node.truncate(size)
    found = bytearray(theirs.read_bytes())
    for start, length in left:
        found[start : start + length] = bytes(len(found[start : start + length]))
    assert path.read_bytes() == found, size
    qemu.sound(path)


def span(options: dict[str, Any]) -> int:
    """The guest bytes under one L2 table."""
    cluster = int(options["cluster_size"])
    return cluster * cluster // (16 if "extended_l2" in options else 8)


OPTIONS: list[dict[str, Any]] = [
    {"cluster_size": 512},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "refcount_bits": 8},
    {"cluster_size": 2048, "compat": "0.10"},
    {"cluster_size": 4096, "lazy_refcounts": "on"},
    {"cluster_size": 4096, "refcount_bits": 64},
    {"cluster_size": 16384, "extended_l2": "on"},
    {"cluster_size": 65536},
]


@pytest.mark.parametrize("snapshot", [False, True], ids=["plain", "snapshot"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_as_the_peer_does_it(tmp_path: Path, qemu: Qemu, options: dict[str, Any], snapshot: bool) -> None:
    """To the border of an L2 table, beside it and anywhere else, whatever is written, shared, compressed or zero."""
    if snapshot and "compat" in options:
        pytest.skip("version 2 cannot be resized with snapshots")
    cluster, table = int(options["cluster_size"]), span(options)
    chance = random.Random(f"{options} {snapshot}")
    path = tmp_path / "disk.qcow2"
    for _ in range(40 if LONG else 4):
        size = chance.choice([3 * table, 2 * table + 3 * cluster, 5 * table, 4 * table + 512, table // 2])
        size = min(size, (40 if LONG else 12) * MIB)
        near = [table * number + off for number in (1, 2, 3) for off in (0, 512, -512, cluster, -cluster)]
        smaller = chance.choice([one for one in near if 0 < one < size] or [size // 2 // 512 * 512])
        if chance.random() < 0.3:
            smaller = chance.randrange(1, size // 512) * 512
        qemu.create(path, size, options)
        if chance.random() < 0.8:
            commands = [f"write -c -P 3 {chance.randrange(size // cluster) * cluster} {cluster}"]
            for _ in range(chance.randrange(0, 8)):
                offset = chance.randrange(size // 512) * 512
                length = min(size - offset, chance.choice([512, cluster, 8 * cluster, table // 2, 40 * KIB]))
                verb = chance.choice(["write -P 7", "write -P 9", "write -z", "write -zu", "discard"])
                commands.append(f"{verb} {offset} {length}")
            qemu.io(path, *commands)
        if snapshot:
            qemu.img("snapshot", "-c", "s", path)
            offset = chance.randrange(size // 512) * 512
            qemu.io(path, f"write -P 3 {offset} {min(size - offset, 4 * cluster)}")
        compare(path, qemu, smaller)


@pytest.mark.parametrize("snapshot", [False, True], ids=["plain", "snapshot"])
def test_the_tables_that_are_made_for_it(tmp_path: Path, qemu: Qemu, snapshot: bool) -> None:
    """The peer makes every table of what is cut off. That makes refcount blocks, and the refcount table move."""
    options = {"cluster_size": 512, "refcount_bits": 64}
    table = span(options)
    path = tmp_path / "disk.qcow2"
    for count in (5000, 700) if LONG else (150,):
        qemu.create(path, count * table, options)
        qemu.io(path, f"write -P 7 {5 * table} {20 * table}")
        if snapshot:
            qemu.img("snapshot", "-c", "s", path)
            qemu.io(path, f"write -P 8 {7 * table} {8 * table}")
        compare(path, qemu, 6 * table)


@pytest.mark.parametrize("options", [{}, {"extended_l2": "on"}, {"compat": "0.10"}], ids=str)
def test_what_was_cut_off_does_not_come_back(tmp_path: Path, qemu: Qemu, options: dict[str, Any]) -> None:
    """Bytes beyond the end in the last cluster are cleared, by shrinking or by growing, preallocated or not."""
    path, size = tmp_path / "disk.qcow2", 700 * KIB + 512
    for mode in ("off", "metadata", "falloc", "full"):
        qemu.create(path, MIB, options)
        qemu.io(path, "write -P 7 0 1M")
        if mode == "full":
            qemu.img("resize", "-q", "--shrink", path, size)
        else:
            compare(path, qemu, size)
        with open_node(path, format="qcow2", readonly=False) as node:
            assert isinstance(node, FormatNode)
            if mode == "off":
                node.truncate(MIB)
            else:
                node.truncate_preallocated(MIB, mode)
        assert qemu.read(path) == b"\7" * size + bytes(MIB - size)
        qemu.sound(path)


def test_a_last_cluster_of_which_parts_are_there(tmp_path: Path, qemu: Qemu) -> None:
    """Of a cluster with subclusters those beyond the end are cleared that are there."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, MIB, {"extended_l2": "on"})
    qemu.io(path, f"write -P 7 {640 * KIB} 3k", f"write -P 8 {650 * KIB} 1k")
    with open_node(path, format="qcow2", readonly=False) as node:
        node.truncate(641 * KIB)
        node.truncate(MIB)
    assert qemu.read(path) == bytes(640 * KIB) + b"\7" * KIB + bytes(383 * KIB)
    qemu.sound(path)
