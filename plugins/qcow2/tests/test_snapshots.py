"""Internal snapshots: taken, applied, deleted and shown as the peer does, byte for byte; safe at every power cut."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from qcow2_layout import Layout

from vm_core.block.formatnode import FormatNode
from vm_core.block.open import open_node
from vm_core.errors import BlockError, ImageError, UsageError, VmError
from vm_core.testing.nodes import MemoryNode
from vm_core.testing.qemu import LONG, Qemu

KIB = 1024
MIB = 1024 * KIB


def opened(path: Path, **options: Any) -> FormatNode:
    """The image, open for writing unless told otherwise."""
    options.setdefault("readonly", False)
    node = open_node(path, format="qcow2", **options)
    assert isinstance(node, FormatNode)
    return node


def act(path: Path, what: str, name: str) -> None:
    """Let our driver create, apply or delete a snapshot."""
    with opened(path) as node:
        assert isinstance(node, FormatNode)
        with node.quiesce() as format:
            getattr(format, f"snapshot_{what}")(name)


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512, "refcount_bits": 8},
        {"cluster_size": 1024, "compat": "0.10"},
        {"cluster_size": 4096, "refcount_bits": 64, "lazy_refcounts": "on"},
        {"cluster_size": 65536},
        {"cluster_size": 16384, "extended_l2": "on"},
        {"cluster_size": 4096, "refcount_bits": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_as_the_peer_does_it(tmp_path: Path, qemu: Qemu, options: dict[str, Any], seed: int) -> None:
    """The same operations by us and by the peer leave the same clusters in use, with the same bytes in them."""
    chance = random.Random(seed)
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    size = chance.choice([MIB, 700 * KIB, 3 * MIB])
    qemu.create(ours, size, options)
    names: list[str] = []
    for number in range(60 if LONG else 25):
        what = chance.choice(["data", "data", "create", "apply", "delete", "resize"])
        if what == "data":
            offset = chance.randrange(size // 512) * 512
            length = min(size - offset, chance.randrange(1, 200) * 512)
            verb = chance.choice(["write -P 7", "write -P 9", "write -z", "discard"])
            qemu.io(ours, f"{verb} {offset} {length}")
            continue
        if what == "resize":
            if options.get("compat") != "0.10":
                size = chance.choice([MIB, 700 * KIB, 3 * MIB])
                qemu.img("resize", "-q", "--shrink", ours, size)
            continue
        if what == "create":
            name = f"snapshot {number}"
        elif names:
            name = chance.choice(names)
        else:
            continue
        shutil.copy(ours, theirs)
        peer_text = qemu.img("snapshot", f"-{what[0]}", name, theirs, ok=(0, 1))
        worked = json.loads(qemu.img("info", "--output=json", theirs)).get("snapshots", [])
        before = ours.read_bytes()
        try:
            act(ours, what, name)
        except (OSError, VmError):
            assert what != "delete", peer_text
            if what == "create":
                # Too many references for the refcount's width: the peer refuses as well, we leave nothing behind.
                assert len(worked) == len(names)
            qemu.sound(ours)
            ours.write_bytes(before)
            continue
        qemu.sound(ours)
        assert Layout(ours) == Layout(theirs), f"{number}: {what} {name}"
        qemu.img("compare", ours, theirs)
        names = [one["name"] for one in worked]
        size = json.loads(qemu.img("info", "--output=json", ours))["virtual-size"]


def test_the_list_is_the_peers(tmp_path: Path, qemu: Qemu) -> None:
    """Each field as QEMU's SnapshotInfo has it, odd names included; a name may occur twice, an id does not."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, MIB)
    for name in ("plain", "plain", "", "tab\there", "ümlaut", "x" * 1000, "7"):
        act(path, "create", name)
    with opened(path, readonly=True) as node:
        assert isinstance(node, FormatNode)
        mine = list(node.format.snapshots())
    assert mine == json.loads(qemu.img("info", "--output=json", path))["snapshots"]
    assert [one["id"] for one in mine] == list("1234567")
    act(path, "delete", "7")  # by name, as qemu-img does
    act(path, "delete", "plain")
    with opened(path, readonly=True) as node:
        assert isinstance(node, FormatNode)
        assert [one["id"] for one in node.format.snapshots()] == list("23456")
    with opened(path) as node:
        assert isinstance(node, FormatNode)
        with node.quiesce() as format:
            format.snapshot_delete(None, id="5")
            format.snapshot_create("undecodable \udcff")
    with opened(path, readonly=True) as node:
        assert isinstance(node, FormatNode)
        assert [one["id"] for one in node.format.snapshots()] == ["2", "3", "4", "6", "7"]
        assert node.format.snapshots()[-1]["name"] == "undecodable \udcff"


def test_errors_are_the_peers(tmp_path: Path, qemu: Qemu) -> None:
    """What is not there is not there, in QEMU's words; a failed creation leaves nothing behind."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, MIB, {"refcount_bits": 1})
    qemu.io(path, "write 0 64k")
    with pytest.raises(BlockError, match="Invalid argument"):
        act(path, "create", "no room in the refcounts")
    qemu.sound(path)
    with pytest.raises(ImageError, match="snapshot not found"):
        act(path, "delete", "nope")
    with pytest.raises(ImageError, match="Failed to load snapshot: No such file or directory"):
        act(path, "apply", "nope")
    node = opened(path, readonly=True)
    with pytest.raises(ImageError, match="Can't find snapshot"):
        node.format.snapshot_load(name="nope")
    node.close()
    node = opened(path)
    with pytest.raises(UsageError, match="read-only"):
        node.format.snapshot_load(name="nope")
    node.close()


def test_machine_state(tmp_path: Path, qemu: Qemu) -> None:
    """What lies behind the virtual disk is read and written as the peer does, and goes with the snapshots."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 16 * MIB, {"cluster_size": 1024})
    with opened(path) as node:
        node.write_vmstate(3000, [memoryview(b"\x11" * MIB)])
    qemu.io(path, f"read -b -P 0x11 3072 {MIB - 512}", "read -b -P 0 0 2560")
    act(path, "create", "a")
    qemu.io(path, "write -b -P 0x22 0 4k")
    with opened(path) as node:
        node.write_vmstate(1000, [memoryview(b"\x33" * 10)])
        data = bytearray(5000)
        node.read_vmstate(0, [memoryview(data)])
        assert data == b"\x22" * 1000 + b"\x33" * 10 + b"\x22" * 3086 + b"\x11" * 904
    qemu.sound(path)
    act(path, "apply", "a")
    qemu.io(path, "read -b -P 0 0 2560", "read -b -P 0x11 3072 8192")
    qemu.sound(path)


def test_opened_at_a_snapshot(tmp_path: Path, qemu: Qemu) -> None:
    """snapshot.id and snapshot.name show old contents, read-only."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 3 * MIB, {"cluster_size": 512})
    qemu.io(path, "write -P 5 0 64k")
    act(path, "create", "s")
    qemu.io(path, "write -P 6 0 64k")
    with open_node({"driver": "qcow2", "file.filename": str(path), "snapshot.name": "s"}) as node:
        assert node.pread(0, 64 * KIB) == b"\5" * (64 * KIB)
    with open_node({"driver": "qcow2", "file": {"filename": str(path)}, "snapshot": {"id": "1"}}) as node:
        assert node.pread(0, 64 * KIB) == b"\5" * (64 * KIB)
    with open_node(path) as node:
        assert node.pread(0, 64 * KIB) == b"\6" * (64 * KIB)


def test_applying_leaves_no_refcount_block_behind(tmp_path: Path, qemu: Qemu) -> None:
    """A table of several sectors goes through a copy; where that needs a refcount block, the peer still has none."""
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    for count in range(66) if LONG else (46, 47, 48, 49):
        qemu.create(ours, 3 * MIB, {"cluster_size": 512, "refcount_bits": 64})
        qemu.io(ours, "write -P 4 0 512", "write -P 5 2900k 512")
        qemu.img("snapshot", "-c", "s", ours)
        qemu.io(ours, f"write -P 6 0 {512 + count * 512}", "write -P 7 2900k 512")
        shutil.copy(ours, theirs)
        qemu.img("snapshot", "-a", "s", theirs)
        act(ours, "apply", "s")
        qemu.sound(ours)
        assert Layout(ours) == Layout(theirs), count


@pytest.mark.parametrize("refcount_bits", [16, 64])
def test_applying_shrinks_as_the_peer_does(tmp_path: Path, qemu: Qemu, refcount_bits: int) -> None:
    """A smaller snapshot of a large image: the same refcount blocks and refcount table as if it were shrunk first."""
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    table = 32 * KIB
    qemu.create(ours, 3 * table, {"cluster_size": 512, "refcount_bits": refcount_bits})
    qemu.io(ours, "write -P 4 0 64k")
    qemu.img("snapshot", "-c", "s", ours)
    qemu.img("resize", "-q", ours, (5000 if LONG else 150) * table)
    qemu.io(ours, f"write -P 5 {10 * table} {40 * table}")
    shutil.copy(ours, theirs)
    qemu.img("snapshot", "-a", "s", theirs)
    act(ours, "apply", "s")
    assert ours.read_bytes() == theirs.read_bytes()
    qemu.sound(ours)


# Malformed images


def _with_snapshots(path: Path, qemu: Qemu, count: int = 2) -> int:
    """An image with snapshots; returns where the first L1 table of them is."""
    qemu.create(path, MIB, {"cluster_size": 4096})
    qemu.io(path, "write 0 64k")
    for number in range(count):
        qemu.img("snapshot", "-c", f"s{number}", path)
    return int.from_bytes(path.read_bytes()[64:72], "big")


def _poke(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "value", "reason"),
    [
        (60, b"\xff\xff\xff\xff", "Snapshot table too large"),
        (60, b"\x00\x01\x00\x01", "Snapshot table too large"),
        (64, b"\xff" * 6 + b"\0\0", "Snapshot table offset invalid"),
        (64, b"\x12\x34\x56\x78\x90\xab\xcd\xef", "Snapshot table offset invalid"),
    ],
)
def test_a_table_that_cannot_be(tmp_path: Path, qemu: Qemu, offset: int, value: bytes, reason: str) -> None:
    """The image is refused in QEMU's words."""
    path = tmp_path / "disk.qcow2"
    _with_snapshots(path, qemu)
    _poke(path, offset, value)
    with pytest.raises(ImageError) as caught:
        opened(path, readonly=True)
    assert caught.value.peer == reason


def test_extra_data(tmp_path: Path, qemu: Qemu) -> None:
    """Too much of it is refused with the command that mends it; unknown parts are kept."""
    path = tmp_path / "disk.qcow2"
    table = _with_snapshots(path, qemu)
    _poke(path, table + 36, (1025).to_bytes(4, "big"))
    with pytest.raises(ImageError) as caught:
        opened(path, readonly=True)
    assert caught.value.peer == (
        "Too much extra metadata in snapshot table entry 0\n"
        "You can force-remove this extra metadata with qemu-img check -r all"
    )
    _poke(path, table + 36, (25).to_bytes(4, "big"))  # takes the id's byte
    _poke(path, table + 12, (0).to_bytes(2, "big"))
    with opened(path) as node:
        assert isinstance(node, FormatNode)
        with node.quiesce() as format:
            format.snapshot_create("third")
    table = int.from_bytes(path.read_bytes()[64:72], "big")
    data = path.read_bytes()
    assert data[table + 36 : table + 40] == (25).to_bytes(4, "big")
    assert data[table + 64 : table + 65] == b"1"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [(0, bytes.fromhex("0000000000400200"), "offset invalid"), (8, b"\x10\0\0\0", "too large")],
)
def test_a_snapshot_with_a_bad_l1_table(tmp_path: Path, qemu: Qemu, field: int, value: bytes, reason: str) -> None:
    """The image opens; the snapshot cannot be used, and says why as QEMU does."""
    path = tmp_path / "disk.qcow2"
    table = _with_snapshots(path, qemu)
    _poke(path, table + field, value)
    with pytest.raises(OSError, match=f"Snapshot L1 table {reason}"):
        act(path, "delete", "s0")
    with pytest.raises(ImageError, match="Failed to load snapshot: ") as caught:
        act(path, "apply", "s0")
    assert caught.value.__notes__ == [f"Snapshot L1 table {reason}"]
    node = opened(path, readonly=True)
    with pytest.raises(ImageError, match=f"Snapshot L1 table {reason}"):
        node.format.snapshot_load(name="s0")
    node.close()


def test_fuzzed_tables(tmp_path: Path, qemu: Qemu) -> None:
    """Whatever the table and the L1 tables hold: one line, no traceback, nothing written over the guest's data."""
    path = tmp_path / "disk.qcow2"
    table = _with_snapshots(path, qemu, 3)
    whole = path.read_bytes()
    places = [table, *(int.from_bytes(whole[table + at : table + at + 8], "big") for at in (0, 72))]
    chance = random.Random(5)
    for _ in range(600 if LONG else 60):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 4)):
            at = chance.choice(places) + chance.randrange(0, 80)
            data[at] = chance.choice([0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)])
        for what, name in (("create", "new"), ("apply", "s1"), ("delete", "s0")):
            try:
                with open_node({"driver": "qcow2", "file": MemoryNode(bytes(data))}, readonly=False) as node:
                    assert isinstance(node, FormatNode)
                    with node.quiesce() as format:
                        getattr(format, f"snapshot_{what}")(name)
            except (OSError, VmError) as error:
                lines = str(error).splitlines()
            else:
                lines = []
            assert len(lines) < 2
