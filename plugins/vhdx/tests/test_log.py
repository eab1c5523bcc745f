"""The log: what is replayed, what is not, and that power cuts at any moment lose nothing."""

from __future__ import annotations

import random
import struct
from contextlib import suppress
from pathlib import Path

import pytest
from vhdx_images import MIB, build, header, log_entry

from vm_core.block.node import Node
from vm_core.block.open import open_node
from vm_core.errors import ImageError
from vm_core.testing.nodes import FailingNode, MemoryNode, RecordingNode
from vm_core.testing.qemu import LONG, Qemu
from vm_core.testing.replay import power_cuts
from vm_vhdx.image import Vhdx

G, OTHER = b"G" * 16, b"O" * 16
KIB = 1 << 10
TABLE = 3 * MIB


def image(log: bytes, log_guid: bytes = G, log_length: int = MIB) -> bytes:
    """Four blocks of data, and a log."""
    data = bytearray(build(b"".join(bytes([n]) * MIB for n in b"abcd"), log=log, log_guid=log_guid))
    if log_length != MIB:
        for number, at in enumerate((64 * KIB, 128 * KIB)):
            data[at : at + 4096] = header(number + 1, data_write=b"w" * 16, log_guid=log_guid, log_length=log_length)
    return bytes(data)


def entries(number: int) -> bytes:
    """The first sector of a block allocation table of which all blocks are zero, marked with *number*."""
    return struct.pack("<4Q", 2, 2, 2, 2).ljust(4000, b"\0") + bytes([number]) * 96


def marked(node: Node) -> int:
    """Which of :func:`entries` is in the table."""
    return node.format.file.pread(TABLE + 4095, 1)[0]  # type: ignore[attr-defined]


def entry(number: int, sequence: int, tail: int, guid: bytes = G, size: int = 8 * MIB) -> bytes:
    return log_entry([(TABLE, entries(number))], guid=guid, sequence=sequence, tail=tail, size=size)


def ring(*pieces: tuple[int, bytes], length: int = MIB) -> bytes:
    """A log with *pieces* at their positions, round the end."""
    data = bytearray(length)
    for at, piece in pieces:
        for index in range(0, len(piece), 4096):
            position = (at + index) % length
            data[position : position + 4096] = piece[index : index + 4096]
    return bytes(data)


def broken(piece: bytes) -> bytes:
    return piece[:5000] + bytes([piece[5000] ^ 1]) + piece[5001:]


SIZE = 8 * MIB
CASES: dict[str, tuple[bytes, int]] = {
    "one entry": (ring((0, entry(1, 1, 0))), 1),
    "somewhere": (ring((0x5000, entry(1, 99, 0x5000))), 1),
    "round the end": (ring((MIB - 4096, entry(1, 7, MIB - 4096))), 1),
    "two that belong together": (ring((0, entry(1, 5, 0)), (0x2000, entry(2, 6, 0))), 2),
    "two, of which the newer stands alone": (ring((0, entry(1, 5, 0)), (0x2000, entry(2, 6, 0x2000))), 2),
    "the newest is torn": (ring((0, entry(1, 5, 0)), (0x2000, broken(entry(2, 6, 0x2000)))), 1),
    "another log's": (ring((0, entry(1, 5, 0)), (0x2000, entry(2, 6, 0x2000, OTHER))), 1),
    "a gap in the numbers": (ring((0, entry(1, 5, 0)), (0x2000, entry(2, 7, 0)), (0x9000, entry(3, 2, 0x9000))), 1),
    "an older lap": (ring((0, entry(9, 50, 0)), (0x2000, entry(1, 3, 0x2000))), 9),
    "torn only": (ring((0, broken(entry(1, 5, 0)))), 0),
    "nothing": (ring(), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_replayed(tmp_path: Path, qemu: Qemu, case: str) -> None:
    """The newest sequence of whole entries with the header's GUID. The peer does the same where there is no doubt."""
    log, expected = CASES[case]
    path = tmp_path / "disk.vhdx"
    path.write_bytes(image(log))
    with open_node(str(path), readonly=False) as node:
        assert marked(node) == expected
        assert node.format.replayed == bool(expected)  # type: ignore[attr-defined]
        assert node.pread(0, 4) == (b"\0" * 4 if expected else b"aaaa")
    data = path.read_bytes()
    if expected:
        assert {data[at + 48 : at + 64] for at in (64 * KIB, 128 * KIB)} == {bytes(16)}
        open_node(str(path)).close()
    if case in ("a gap in the numbers", "an older lap"):
        return  # the peer takes the entry that comes last in the file
    path.write_bytes(image(log))
    qemu.img("check", "-q", "-f", "vhdx", "-r", "all", path)
    theirs = path.read_bytes()
    assert theirs[TABLE : TABLE + 4096] == data[TABLE : TABLE + 4096]


def test_zeroes_and_a_longer_file(tmp_path: Path) -> None:
    """An entry may say that a range is zero, and that the file has to be longer."""
    sectors: list[tuple[int, bytes | int]] = [(TABLE, entries(5)), (TABLE + 4096, 8192)]
    log = ring((0, log_entry(sectors, guid=G, sequence=1, tail=0, size=5 * MIB, last=11 * MIB)))
    data = bytearray(image(log))
    data[TABLE + 4096 : TABLE + 20_000] = b"x" * (20_000 - 4096)
    path = tmp_path / "disk.vhdx"
    path.write_bytes(data)
    with open_node(str(path), readonly=False) as node:
        assert marked(node) == 5
    after = path.read_bytes()
    assert len(after) == 11 * MIB
    assert after[TABLE + 4096 : TABLE + 12_288] == bytes(8192)
    assert after[TABLE + 12_288] == ord("x")


def test_read_only_is_refused_in_the_peers_words(tmp_path: Path, qemu: Qemu) -> None:
    """An image with a log is not read as if it had none; the words say what to do."""
    path = tmp_path / "disk.vhdx"
    path.write_bytes(image(CASES["one entry"][0]))
    words = qemu.error("info", "-f", "vhdx", path)
    with pytest.raises(ImageError) as caught:
        open_node(str(path))
    assert f"Could not open '{path}': {caught.value.peer}" == words
    assert "check -r all" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "log",
    [
        ring((0, log_entry([(1 << 60, 1 << 50)], guid=G, sequence=1, tail=0, size=SIZE))),
        ring((0, log_entry([(0, 1 << 63)], guid=G, sequence=1, tail=0, size=SIZE))),
        ring((0, log_entry([(1 << 50, b"x" * 4096)], guid=G, sequence=1, tail=0, size=SIZE))),
        ring((0, log_entry([(TABLE, b"x" * 4096)], guid=G, sequence=1, tail=0, size=1 << 62))),
        ring((0, log_entry([(TABLE, b"x" * 4096)], guid=G, sequence=1, tail=0, size=SIZE, last=1 << 62))),
    ],
    ids=["zeroes far away", "zeroes everywhere", "a sector far away", "a longer file before", "a file too long"],
)
def test_malicious_entries(log: bytes) -> None:
    """An entry that speaks of what lies outside the file is an error; the file is not blown up."""
    file = MemoryNode(image(log))
    with pytest.raises(ImageError):
        open_node({"driver": "vhdx", "file": file}, readonly=False)
    assert file.size < 9 * MIB


def test_a_log_full_of_false_entries_takes_no_time() -> None:
    """Entries that claim the whole log from every sector on are not all summed up."""
    import time

    false = b"".join(
        (struct.pack("<4sIIIQII16sQQ", b"loge", 1, MIB, n * 4096, n + 1, 0, 0, G, SIZE, SIZE)).ljust(4096, b"x")
        for n in range(256)
    )
    start = time.process_time()
    with pytest.raises(ImageError, match="full of damaged entries"):
        open_node({"driver": "vhdx", "file": MemoryNode(image(false))}, readonly=False)
    assert time.process_time() - start < 2


class Session:
    """An image in memory, changed at random while everything that reaches its storage is recorded."""

    def __init__(self, seed: int, log_length: int = MIB) -> None:
        self.chance = random.Random(seed)
        file = MemoryNode()
        Vhdx.create(file, 24 * MIB, {"block_size": MIB, "log_size": log_length})
        self.recorder = RecordingNode(file)
        self.node = open_node({"driver": "vhdx", "file": self.recorder}, readonly=False)
        self.model = bytearray(24 * MIB)
        self.touched: list[tuple[int, int, int]] = []
        self.since: dict[int, int] = {}
        self.marks: list[bytes] = []
        self.mark()

    def mark(self) -> None:
        self.marks.append(bytes(self.model))
        self.recorder.mark(self.marks[-1])
        self.since[id(self.marks[-1])] = self.recorder.now()

    def write(self) -> None:
        offset = self.chance.randrange(24 * MIB - 5000)
        data = self.chance.randbytes(self.chance.choice([10, 4096]))
        self.touched.append((self.recorder.now(), offset, len(data)))
        self.node.pwrite(offset, data)
        self.model[offset : offset + len(data)] = data

    def close(self) -> None:
        self.node.close()
        self.mark()


@pytest.mark.parametrize("seed", range(3 if LONG else 1))
def test_power_cuts(tmp_path: Path, qemu: Qemu, seed: int) -> None:
    """Whatever a power cut leaves has every byte that was flushed, after us or the peer has replayed the log."""
    session = Session(seed)
    for _ in range(4):
        for _ in range(3):
            session.write()
        session.node.flush()
        session.mark()
    session.close()
    path = tmp_path / "cut.vhdx"
    count = replayed = 0
    for number, cut in enumerate(power_cuts(session.recorder, seed=seed, variants=4, limit=60 if LONG else 16)):
        if cut.mark is None:
            continue
        count += 1
        file = MemoryNode(cut.image)
        with open_node({"driver": "vhdx", "file": file}, readonly=False) as node:
            found = node.pread(0, len(session.model))
            replayed += node.format.replayed  # type: ignore[attr-defined]
        expected = bytearray(cut.mark)
        for moment, offset, length in session.touched:
            if session.since[id(cut.mark)] <= moment <= cut.moment:
                expected[offset : offset + length] = found[offset : offset + length]
        assert found == expected, cut.story
        if number % (4 if LONG else 8) == 0:
            path.write_bytes(cut.image)
            qemu.img("check", "-q", "-f", "vhdx", "-r", "all", path)
            assert qemu.read(path) == found, cut.story
    assert count > 20
    assert replayed


def test_hundreds_of_flushes(tmp_path: Path, qemu: Qemu) -> None:
    """However often the table was changed, both we and the peer find its newest state after a power cut."""
    file = MemoryNode()
    Vhdx.create(file, 300 * MIB, {"block_size": MIB})
    node = open_node({"driver": "vhdx", "file": file}, readonly=False)
    path = tmp_path / "cut.vhdx"
    for number in range(150):
        node.pwrite(number * MIB, bytes([number + 1]) * 8)
        node.flush()
        if number in (1, 2, 77, 149):
            # As if the last sectors in place had been lost.
            data = bytearray(file.data())
            table = node.format.table  # type: ignore[attr-defined]
            start = table.region.offset + number * 8
            data[start : start + 8] = bytes(8)
            path.write_bytes(data)
            with open_node({"driver": "vhdx", "file": MemoryNode(data)}, readonly=False) as ours:
                found = [ours.pread(n * MIB, 8) for n in range(number + 1)]
            assert found == [bytes([n + 1]) * 8 for n in range(number + 1)]
            qemu.img("check", "-q", "-f", "vhdx", "-r", "all", path)
            with open_node(str(path)) as theirs:
                assert [theirs.pread(n * MIB, 8) for n in range(number + 1)] == found
    node.close()


def test_updates_larger_than_the_log_are_split() -> None:
    """More sectors of the table than half the log holds go through it in several entries."""
    file = MemoryNode()
    Vhdx.create(file, 4 << 40, {"block_size": MIB})
    recorder = RecordingNode(file)
    node = open_node({"driver": "vhdx", "file": recorder}, readonly=False)
    places = [number * 512 * MIB for number in range(300)]
    for place in places:
        node.pwrite(place, b"x")
    node.flush()
    entries_written = [
        change
        for change in recorder.changes
        if change.operation == "write" and MIB <= change.offset < 2 * MIB and change.data.startswith(b"loge")
    ]
    assert len(entries_written) > 1
    assert all(change.length <= MIB // 2 for change in entries_written)
    node.close()
    with open_node({"driver": "vhdx", "file": file}) as again:
        assert all(again.pread(place, 1) == b"x" for place in places)


def test_errors_on_the_way_can_be_retried() -> None:
    """Whichever write of a flush fails: the next flush brings everything to the disk."""
    import errno

    for failing in range(12):
        file = MemoryNode()
        Vhdx.create(file, 8 * MIB, {"block_size": MIB})
        count = -1

        def decide(operation: str, offset: int, length: int) -> int:
            nonlocal count
            if count >= 0 and operation in ("write", "flush"):
                count -= 1
                if count < 0:
                    return errno.EIO
            return 0

        node = open_node({"driver": "vhdx", "file": FailingNode(file, decide)}, readonly=False)
        node.pwrite(3 * MIB, b"hello")
        count = failing
        with suppress(OSError):
            node.flush()
        count = -1
        node.flush()
        copy = MemoryNode(file.data())
        with open_node({"driver": "vhdx", "file": copy}, readonly=False) as again:
            assert again.pread(3 * MIB, 5) == b"hello"
        node.close()
        with open_node({"driver": "vhdx", "file": MemoryNode(file.data())}) as again:
            assert again.pread(3 * MIB, 5) == b"hello"
