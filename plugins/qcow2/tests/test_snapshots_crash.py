"""Power cuts while a snapshot is taken, applied or deleted: what the guest sees is whole, and so is each snapshot.

An image that was cut off may be written before anybody has checked it. That must not reach into a snapshot, so no table
on disk may say of a shared cluster that it is not shared. The reverse, a cluster of one user that is said to be
shared, makes the next write copy it and nothing else; the peer's check tells of it, and that is the worst there may be.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.open import open_node
from vm_core.testing.nodes import MemoryNode, RecordingNode
from vm_core.testing.qemu import LONG, Qemu
from vm_core.testing.replay import PowerCut, power_cuts
from vm_qcow2.image import Qcow2

KIB = 1024
MIB = 1024 * KIB

#: What a check may tell of: a count of one, and a table that says more.
HARMLESS = re.compile(r"^ERROR OFLAG_COPIED .*_entry=([0-9a-f]+) refcount=1$")


def contents(image: bytes) -> bytes:
    """What the guest reads."""
    with open_node({"driver": "qcow2", "file": MemoryNode(image, readonly=True), "backing": None}) as node:
        return node.pread(0, node.size)


def kept(image: bytes, snapshot: str, size: int) -> bytes:
    """What a snapshot of an image that was of this size holds."""
    file = MemoryNode(image)
    # A snapshot is shown in the size that the image has now.
    file.pwrite(24, size.to_bytes(8, "big"))
    file.readonly = True
    with open_node({"driver": "qcow2", "file": file, "backing": None, "snapshot.name": snapshot}) as node:
        return node.pread(0, node.size)


def names(image: bytes) -> list[str]:
    """The snapshots that are listed."""
    return [one.name for one in Qcow2(MemoryNode(image, readonly=True), "cut", readonly=True).snapshot_table.entries]


def harmful(messages: str) -> list[str]:
    """The errors among a check's messages that are more than a count of one that is not marked."""
    found = []
    for line in messages.splitlines():
        if line.startswith("ERROR"):
            match = HARMLESS.match(line)
            if match is None or int(match[1], 16) >> 63:
                found.append(line)
    return found


class Case(NamedTuple):
    """An image, and what is done to it."""

    what: str
    options: dict[str, Any]
    #: The size at each of the snapshots, and at last.
    sizes: tuple[int, int, int]
    compressed: bool = False

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        sizes = "-".join(str(size // KIB) for size in self.sizes)
        return f"{self.what} {options} {sizes}{' compressed' if self.compressed else ''}"

    def make(self, path: Path, qemu: Qemu) -> dict[str, bytes]:
        """Make the image with snapshots "one" and "two"; returns what it holds in these and as "now"."""
        chance = random.Random(str(self))
        models: dict[str, bytes] = {}
        qemu.create(path, self.sizes[0], self.options)
        for name, size in zip(("one", "two", "now"), self.sizes, strict=True):
            if models and size != len(next(reversed(models.values()))):
                qemu.img("resize", "-q", "--shrink", path, size)
            commands = []
            for _ in range(6):
                offset = chance.randrange(size // 512) * 512
                verb = chance.choice(["write -P 7", "write -P 9", "write -P 11", "write -z", "discard"])
                commands.append(f"{verb} {offset} {min(size - offset, 30 * KIB)}")
            if self.compressed:
                grain = self.options["cluster_size"]
                commands += [f"discard {4 * grain * (len(models) + 1)} {2 * grain}"]
                commands += [f"write -c -P 0x{33 + at} {(4 * (len(models) + 1) + at) * grain} {grain}" for at in (0, 1)]
            qemu.io(path, *commands)
            models[name] = qemu.read(path)
            if name != "now":
                qemu.img("snapshot", "-c", name, path)
        return models


def recorded(case: Case, image: bytes) -> tuple[RecordingNode, bytes]:
    """Everything that reaches the storage while it is done, and what is there then."""
    storage = MemoryNode(image)
    recorder = RecordingNode(storage)
    node = open_node({"driver": "qcow2", "file": recorder}, readonly=False)
    assert isinstance(node, FormatNode)
    with node.quiesce() as format:
        if case.what == "create":
            format.snapshot_create("now")
        elif case.what == "apply":
            format.snapshot_apply("one")
        else:
            format.snapshot_delete("one")
    node.close()
    return recorder, storage.data()


def cuts(recorder: RecordingNode, limit: int) -> Iterator[PowerCut]:
    """The states to look at: each once."""
    seen: set[bytes] = set()
    for cut in power_cuts(recorder, seed=3, variants=8 if LONG else 5, limit=None if LONG else limit):
        if cut.image not in seen:
            seen.add(cut.image)
            yield cut


def written_over(image: bytes, seed: int) -> bytes:
    """The image after a guest has changed much of it, without a check in between."""
    chance = random.Random(seed)
    file = MemoryNode(image)
    with open_node({"driver": "qcow2", "file": file, "backing": None}, readonly=False) as node:
        size = node.size
        node.pwrite(0, b"\x55" * size)
        for _ in range(4):
            offset = chance.randrange(size // 512) * 512
            length = min(size - offset, 20 * KIB)
            chance.choice([node.zero, node.discard])(offset, length)
        node.flush()
        node.pwrite(0, b"\x66" * (size // 2))
    return file.data()


SMALL = {"cluster_size": 512}
CASES = [
    Case(what, options, (size,) * 3, compressed)
    for what in ("create", "apply", "delete")
    for options, size, compressed in (
        # The L1 table has several sectors.
        (SMALL, 3 * MIB, False),
        ({"cluster_size": 4096, "refcount_bits": 4}, MIB, False),
        ({"cluster_size": 65536}, MIB, False),
        ({"cluster_size": 1024, "compat": "0.10"}, MIB, False),
        ({"cluster_size": 16384, "extended_l2": "on"}, MIB, False),
        ({"cluster_size": 4096, "lazy_refcounts": "on"}, MIB, True),
    )
]
RESIZED = [
    Case("apply", options, sizes)
    for options, sizes in (
        (SMALL, (300 * KIB, 300 * KIB, 3 * MIB)),
        (SMALL, (3 * MIB, 3 * MIB, 300 * KIB)),
        ({"cluster_size": 512, "refcount_bits": 64}, (300 * KIB, MIB, 2 * MIB)),
        ({"cluster_size": 65536}, (MIB, 2 * MIB, 700 * KIB)),
        ({"cluster_size": 4096}, (3 * MIB, 512 * KIB, 5 * MIB + 512)),
        ({"cluster_size": 16384, "extended_l2": "on"}, (MIB, MIB, 300 * KIB)),
        ({"cluster_size": 4096, "lazy_refcounts": "on"}, (MIB, MIB, 3 * MIB)),
    )
]


@pytest.mark.parametrize("case", CASES + RESIZED, ids=str)
def test_power_cuts(tmp_path: Path, qemu: Qemu, case: Case) -> None:
    """At every moment the guest reads what it did before or will after; each listed snapshot is whole, and stays so
    whatever is written then."""
    path = tmp_path / "disk.qcow2"
    models = case.make(path, qemu)
    recorder, final = recorded(case, path.read_bytes())
    states = {models["now"]} | ({models["one"]} if case.what == "apply" else set())
    lazy = "lazy_refcounts" in case.options
    count = 0
    for cut in cuts(recorder, 25):
        count += 1
        listed = names(cut.image)
        assert set(listed) - {"now"} >= {"two"}
        assert contents(cut.image) in states, cut.story
        for name in listed:
            assert kept(cut.image, name, len(models[name])) == models[name], (name, cut.story)
        found = Qcow2(MemoryNode(cut.image, readonly=True), "cut", readonly=True).check()
        if not (lazy and Qcow2(MemoryNode(cut.image, readonly=True), "cut", readonly=True).dirty):
            # Else whoever opens the image for writing counts anew.
            assert not harmful("\n".join(found["messages"])), cut.story
        after = written_over(cut.image, count)
        for name in listed:
            assert kept(after, name, len(models[name])) == models[name], (name, cut.story)
        written = Qcow2(MemoryNode(after, readonly=True), "cut", readonly=True).check()
        assert not harmful("\n".join(written["messages"])), cut.story
        file = MemoryNode(cut.image)
        repaired = Qcow2(file, "cut", readonly=False, check=True)
        repaired.check(repair="all")
        repaired.close()
        clean = Qcow2(MemoryNode(file.data(), readonly=True), "cut", readonly=True).check()
        assert not clean.get("corruptions")
        assert not clean.get("leaks")
        if LONG or count % 16 == 3:
            judge(path, qemu, cut, listed, models, states, lazy=lazy)
    assert count > 5
    path.write_bytes(final)
    qemu.sound(path)
    assert qemu.read(path) == models["one" if case.what == "apply" else "now"]
    assert names(final) == {"create": ["one", "two", "now"], "apply": ["one", "two"], "delete": ["two"]}[case.what]


def judge(
    path: Path,
    qemu: Qemu,
    cut: PowerCut,
    listed: list[str],
    models: dict[str, bytes],
    states: set[bytes],
    *,
    lazy: bool,
) -> None:
    """The same with the peer: its check, its reading, its writing to the image that was cut."""
    path.write_bytes(cut.image)
    assert qemu.read(path) in states
    if not lazy:
        assert not harmful(qemu.img("check", path, ok=(0, 2, 3)))
    size = len(contents(cut.image))
    qemu.io(path, f"write -P 0x55 0 {size}", "discard 0 64k", "write -z 128k 64k", f"write -P 0x66 0 {size // 2}")
    raw = path.with_suffix(".raw")
    for name in listed:
        qemu.img("convert", "-U", "-f", "qcow2", "-O", "raw", "-l", f"snapshot.name={name}", path, raw)
        assert raw.read_bytes()[: len(models[name])] == models[name][:size], (name, cut.story)
    assert not harmful(qemu.img("check", path, ok=(0, 2, 3)))
    for name in listed:
        qemu.img("snapshot", "-a", name, path)
        assert qemu.read(path) == models[name], (name, cut.story)
