"""The log: finding what has to be replayed, replaying it, writing to it (2.3).

Every change of the block allocation table is first written to the log as an entry: a header, a descriptor for each
sector of 4 KiB, and the sectors. When that is stable the sectors are written where they belong, and made stable too,
before the next entry. So at most one entry is ever needed: its ``tail`` is itself, and replaying it once more changes
nothing.

Entries lie in the two halves of the log in turns, so that a torn one leaves the one before it whole. That one is wiped
out when the sectors of the new one are in place: readers differ in which of several entries they take for the newest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vm_core.block.crc32c import crc32c
from vm_core.block.node import Node
from vm_core.block.structs import Record, raw, u32, u64

from . import guids
from .headers import MIB, Header, Headers, invalid, sealed

SECTOR = 4096
#: Log entries that are looked at cost at most so many times the log's length.
PATIENCE = 4
#: Bytes of the log that are read at a time.
_STEP = MIB
#: No file that an entry speaks of is larger: 64 TiB of data and all that belongs to it.
MAX_FILE = 128 << 40


class EntryHeader(Record, order="little"):
    """*Log Entry Header* (2.3.1.1). Descriptors follow, from 64 on."""

    signature: bytes = raw(0, 4, default=b"loge")
    checksum: int = u32(4, doc="CRC-32C over the whole entry with this field zero")
    length: int = u32(8, doc="bytes of the entry, a multiple of 4 KiB")
    tail: int = u32(12, doc="where in the log the oldest entry is that has to be replayed with this one")
    sequence: int = u64(16, doc="one more than that of the entry before")
    count: int = u32(24, doc="descriptors")
    guid: bytes = raw(32, 16, doc="the header's log_guid, else the entry does not count")
    flushed: int = u64(48, doc="bytes of the file that were stable when the entry was written")
    last: int = u64(56, doc="bytes that the file has to have")


class DataDescriptor(Record, order="little"):
    """*Data Descriptor* (2.3.1.3): a sector, whose first 8 and last 4 bytes are here."""

    signature: bytes = raw(0, 4, default=b"desc")
    trailing: bytes = raw(4, 4)
    leading: bytes = raw(8, 8)
    offset: int = u64(16, doc="where in the file the sector belongs")
    sequence: int = u64(24)


class ZeroDescriptor(Record, order="little"):
    """*Zero Descriptor* (2.3.1.2): zeroes."""

    signature: bytes = raw(0, 4, default=b"zero")
    length: int = u64(8)
    offset: int = u64(16)
    sequence: int = u64(24)


class Candidate(NamedTuple):
    """What may be an entry, at *position* in the log."""

    position: int
    header: EntryHeader


class Log:
    """The log of one image."""

    def __init__(self, file: Node, name: str, headers: Headers) -> None:
        self.file = file
        self.name = name
        self.headers = headers
        self.offset = headers.current.log_offset
        self.length = headers.current.log_length // SECTOR * SECTOR
        #: The number of the next entry.
        self._sequence = 1
        #: Where the entry before it is, if there is one.
        self._former: int | None = None

    @property
    def header(self) -> Header:
        return self.headers.current

    # Replaying

    def pending(self) -> list[bytes]:
        """The entries that have to be replayed, oldest first. Raises ImageError where the log is damaged.

        An entry counts if it is whole; of several sequences the one with the highest number counts (2.3.2).
        """
        if self.header.log_guid == guids.NONE or not self.length:
            return []
        if self.offset + self.length > self.file.size:
            raise invalid(
                self.name, f"the log at {self.offset:#x}, {self.length} bytes, reaches past the end of the file"
            )
        found = {one.position: one for one in self._candidates()}
        budget = PATIENCE * self.length
        sound: dict[int, bytes | None] = {}

        def entry(position: int) -> bytes | None:
            nonlocal budget
            if position not in sound:
                one = found.get(position)
                if one is None:
                    return None
                budget -= one.header.length
                if budget < 0:
                    raise invalid(self.name, f"the log at {self.offset:#x} is full of damaged entries")
                data = self._read(position, one.header.length)
                sound[position] = data if sealed(data) and self._fits(data) else None
            return sound[position]

        for head in sorted(found.values(), key=lambda one: -one.header.sequence):
            chain: list[bytes] = []
            position, sequence = head.header.tail, 0
            while (data := entry(position)) is not None:
                header = found[position].header
                if chain and header.sequence != sequence + 1:
                    break
                chain.append(data)
                sequence = header.sequence
                if position == head.position:
                    return chain
                if len(chain) > len(found):
                    break
                position = (position + header.length) % self.length
        return []

    def _candidates(self) -> list[Candidate]:
        """Whatever looks like an entry of the right log."""
        found: list[Candidate] = []
        guid = self.header.log_guid
        for base in range(0, self.length, _STEP):
            size = min(_STEP, self.length - base)
            data = self.file.pread(self.offset + base, size)
            # The first letters of all sectors at once: mostly there is none.
            letters = data[::SECTOR]
            at = letters.find(b"l")
            while at >= 0:
                header = EntryHeader.parse(data, at * SECTOR)
                if (
                    header.signature == b"loge"
                    and header.guid == guid
                    and header.sequence
                    and header.length % SECTOR == 0
                    and SECTOR <= header.length <= self.length
                    and header.tail % SECTOR == 0
                    and header.tail < self.length
                ):
                    found.append(Candidate(base + at * SECTOR, header))
                at = letters.find(b"l", at + 1)
        return found

    def _read(self, position: int, length: int) -> bytes:
        """Bytes of the log, which is a ring."""
        first = min(length, self.length - position)
        data = self.file.pread(self.offset + position, first)
        return data + self.file.pread(self.offset, length - first) if first < length else data

    @staticmethod
    def _fits(data: bytes) -> bool:
        """Whether descriptors and sectors of an entry are what its header says."""
        header = EntryHeader.parse(data)
        room = len(data) // SECTOR
        if EntryHeader.LENGTH + header.count * DataDescriptor.LENGTH > len(data):
            return False
        sector = -(-(EntryHeader.LENGTH + header.count * DataDescriptor.LENGTH) // SECTOR)
        high, low = (header.sequence >> 32).to_bytes(4, "little"), (header.sequence & 0xFFFFFFFF).to_bytes(4, "little")
        for index in range(header.count):
            one = DataDescriptor.parse(data, EntryHeader.LENGTH + index * DataDescriptor.LENGTH)
            if one.sequence != header.sequence or one.offset % SECTOR:
                return False
            if one.signature == b"desc":
                start = sector * SECTOR
                if sector >= room or data[start : start + 4] != b"data":
                    return False
                if data[start + 4 : start + 8] != high or data[start + SECTOR - 4 : start + SECTOR] != low:
                    return False
                sector += 1
            elif one.signature != b"zero":
                return False
        return True

    def replay(self, entries: Sequence[bytes]) -> None:
        """Bring what *entries* say to where it belongs, then mark the log as empty."""
        for data in entries:
            header = EntryHeader.parse(data)
            if header.last > MAX_FILE or header.flushed > self.file.size:
                raise invalid(self.name, "the file is shorter than it was when its log was written")
            if header.last > self.file.size:
                self.file.truncate(header.last)
            sector = -(-(EntryHeader.LENGTH + header.count * DataDescriptor.LENGTH) // SECTOR)
            for index in range(header.count):
                at = EntryHeader.LENGTH + index * DataDescriptor.LENGTH
                one = DataDescriptor.parse(data, at)
                if one.signature == b"desc":
                    start = sector * SECTOR
                    sector += 1
                    if one.offset + SECTOR > self.file.size:
                        raise self._outside(one.offset)
                    self.file.pwrite(one.offset, one.leading + data[start + 8 : start + SECTOR - 4] + one.trailing)
                else:
                    zero = ZeroDescriptor.parse(data, at)
                    if zero.offset + zero.length > self.file.size:
                        raise self._outside(zero.offset)
                    self.file.zero(zero.offset, zero.length)
        self.file.flush()
        self.clear()

    def _outside(self, offset: int) -> Exception:
        return invalid(self.name, f"the log tells of a sector at {offset:#x}, outside the file")

    def clear(self) -> None:
        """Mark the log as empty. All that was in it is where it belongs."""
        if self.header.log_guid != guids.NONE:
            self.header.log_guid = guids.NONE
            self.headers.update(both=True)
            self._former = None

    # Writing

    def write(self, sectors: Sequence[tuple[int, bytes]]) -> None:
        """Write sectors of 4 KiB, (offset, contents), through the log: all of them are stable when this returns.

        The data that they point at has to be stable already.
        """
        for group in self._groups(sectors):
            place = self._write_entry(group)
            for offset, contents in group:
                self.file.pwrite(offset, contents)
            if self._former is not None:
                self.file.pwrite(self.offset + self._former, bytes(SECTOR))
            self.file.flush()
            self._former = place

    def _groups(self, sectors: Sequence[tuple[int, bytes]]) -> list[Sequence[tuple[int, bytes]]]:
        """*sectors* in portions whose entries take at most half of the log."""
        room = self.length // 2 // SECTOR
        most = max(1, (room * SECTOR - SECTOR) // (SECTOR + DataDescriptor.LENGTH))
        return [sectors[start : start + most] for start in range(0, len(sectors), most)]

    def _write_entry(self, sectors: Sequence[tuple[int, bytes]]) -> int:
        """Write one entry and make it stable; returns where in the log it is."""
        sequence = self._sequence
        # In the half where the entry before is not.
        half = self.length // 2 // SECTOR * SECTOR
        place = half if self._former == 0 else 0
        high, low = (sequence >> 32).to_bytes(4, "little"), (sequence & 0xFFFFFFFF).to_bytes(4, "little")
        descriptors, bodies = [], []
        for offset, contents in sectors:
            one = DataDescriptor(trailing=contents[-4:], leading=contents[:8], offset=offset, sequence=sequence)
            descriptors.append(one.pack())
            bodies.append(b"data" + high + contents[8:-4] + low)
        head_length = -(-(EntryHeader.LENGTH + len(sectors) * DataDescriptor.LENGTH) // SECTOR) * SECTOR
        fresh = self.header.log_guid == guids.NONE
        guid = guids.new() if fresh else self.header.log_guid
        size = self.file.size
        header = EntryHeader(
            length=head_length + len(sectors) * SECTOR,
            tail=place,
            sequence=sequence,
            count=len(sectors),
            guid=guid,
            flushed=size,
            last=size,
        )

        def entry() -> bytes:
            return b"".join([(header.pack() + b"".join(descriptors)).ljust(head_length, b"\0"), *bodies])

        header.checksum = crc32c(entry())
        data = entry()
        self.file.pwrite(self.offset + place, data)
        self.file.flush()
        if fresh:
            # Only now: a header that names a log which has no whole entry would name nothing.
            self.header.log_guid = guid
            try:
                self.headers.update()
            except BaseException:
                self.header.log_guid = guids.NONE
                raise
        self._sequence += 1
        return place
