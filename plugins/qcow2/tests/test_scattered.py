"""Checking images whose L2 tables are full of short runs."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from vm_core.block.open import open_node
from vm_core.testing.qemu import LONG, Qemu
from vm_qcow2 import scattered

CLUSTER = 4096
ENTRIES = CLUSTER // 8
COPIED, ZERO, COMPRESSED = 1 << 63, 1, 1 << 62


def scatter(path: Path, qemu: Qemu, seed: int) -> list[int]:
    """An image of three L2 tables with a cluster here and there; returns where the tables are."""
    rng = random.Random(seed)
    qemu.create(path, 3 * ENTRIES * CLUSTER, {"cluster_size": CLUSTER})
    places = rng.sample(range(3 * ENTRIES), 700)
    if seed % 3 == 0:
        places.sort()
    with open_node(str(path), readonly=False) as node:
        for place in places[:500]:
            node.write(place * CLUSTER, (memoryview(bytes((place % 251 + 1,)) * CLUSTER),))
    if seed % 2:
        qemu.img("snapshot", "-c", "one", path)
        with open_node(str(path), readonly=False) as node:
            for place in places[300:]:
                node.write(place * CLUSTER, (memoryview(bytes((place % 241 + 1,)) * CLUSTER),))
    data = path.read_bytes()
    (start,) = struct.unpack_from(">Q", data, 40)
    return [entry & ~COPIED for entry in struct.unpack_from(">3Q", data, start) if entry]


def damage(path: Path, tables: list[int], rng: random.Random) -> None:
    """Up to three entries that are wrong, each in another way."""
    with path.open("r+b") as file:
        for _ in range(rng.randrange(4)):
            where = rng.choice(tables) + 8 * rng.randrange(ENTRIES)
            file.seek(where)
            (entry,) = struct.unpack(">Q", file.read(8))
            file.seek(rng.choice(tables) + 8 * rng.randrange(ENTRIES))
            (other,) = struct.unpack(">Q", file.read(8))
            choices = [entry ^ COPIED, other, entry + 512, entry | 2, entry | ZERO, 0, COPIED]
            file.seek(where)
            file.write(struct.pack(">Q", rng.choice(choices)))


@pytest.mark.parametrize("seed", range(60 if LONG else 12))
def test_tells_what_the_peer_tells(tmp_path: Path, qemu: Qemu, seed: int) -> None:
    """Of scattered tables, sound, shared with a snapshot or damaged, a check tells the figures that qemu-img tells."""
    path = tmp_path / "disk.qcow2"
    tables = scatter(path, qemu, seed)
    if seed > 2:
        damage(path, tables, random.Random(seed))
    theirs = qemu.check(path)
    with open_node(str(path), check=True) as node:
        ours = node.format.check()  # type: ignore[attr-defined]
    for key in ("corruptions", "leaks", "check-errors", "total-clusters", "allocated-clusters", "fragmented-clusters"):
        assert ours.get(key, 0) == theirs.get(key, 0), (key, ours, theirs)
    assert ours["image-end-offset"] == theirs["image-end-offset"]


@pytest.mark.parametrize("seed", range(3))
def test_takes_such_tables_as_a_whole(tmp_path: Path, qemu: Qemu, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table of these images goes the short way, and the long way comes to the same result."""
    path = tmp_path / "disk.qcow2"
    scatter(path, qemu, seed)
    taken: list[bool] = []
    plain = scattered.plain_entries

    def watch(*arguments: object) -> list[int] | None:
        found = plain(*arguments)  # type: ignore[arg-type]
        taken.append(found is not None)
        return found

    monkeypatch.setattr(scattered, "plain_entries", watch)
    with open_node(str(path)) as node:
        short = node.format.check()  # type: ignore[attr-defined]
    assert len(taken) >= 6
    assert all(taken)
    monkeypatch.setattr(scattered, "plain_entries", lambda *arguments: None)
    with open_node(str(path)) as node:
        assert node.format.check() == short  # type: ignore[attr-defined]
