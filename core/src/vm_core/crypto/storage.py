"""The node that encrypts: sectors of 512 bytes over a part of another node.

A format whose data is encrypted names such a node as the storage of its runs; nothing above knows. The sectors'
numbers, of which their vectors are made, go up with the place in the storage, from any first one: LUKS counts from
where its payload begins, qcow2's LUKS from the start of the file, qcow2's older method by guest offset, which takes a
*view* for each distance between guest and host (:meth:`CryptNode.view`).

Requests that are no whole sectors are served by reading, changing and writing whole ones, under a lock on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from typing import TYPE_CHECKING

from ..block.mapping import Kind, Mapping
from ..block.node import Buffer, Node
from ..block.rangelock import RangeLock
from ..block.vectors import PIECE, cut, gather, scatter, total, zero_views
from .ciphers import SECTOR

if TYPE_CHECKING:
    from .ciphers import SectorCipher

#: Bytes that are encrypted and then written at a time.
STEP = 1024 * 1024
#: Views kept.
VIEWS = 4096


class CryptNode(Node):
    """The bytes in clear of *file* from byte *offset* on, whose first sector has the number *first*."""

    driver = "crypt"
    #: Where the bytes lie in the storage below means nothing to who does not have the key.
    opaque = True
    request_alignment = SECTOR

    def __init__(
        self, file: Node, cipher: SectorCipher, *, offset: int = 0, first: int = 0, lock: RangeLock | None = None
    ) -> None:
        self.file = file
        self.cipher = cipher
        self.offset = offset
        self.first = first
        self.filename = file.filename
        self._lock = lock or RangeLock()
        self._views: dict[int, CryptNode] = {}

    def view(self, shift: int) -> CryptNode:
        """The same storage with sectors numbered *shift* higher."""
        found = self._views.get(shift)
        if found is None:
            if len(self._views) >= VIEWS:
                self._views.clear()
            found = CryptNode(self.file, self.cipher, offset=self.offset, first=self.first + shift, lock=self._lock)
            self._views[shift] = found
        return found

    @property
    def readonly(self) -> bool:  # type: ignore[override]
        """Whether the storage is read-only."""
        return self.file.readonly

    @property
    def size(self) -> int:
        return max(0, self.file.size - self.offset)

    # Reading

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        if offset % SECTOR or any(buffer.nbytes % SECTOR for buffer in buffers):
            self._read_bounced(offset, buffers)
            return
        place, decrypt = self.offset + offset, self.cipher.decrypt
        sector = self.first + offset // SECTOR
        for buffer in buffers:
            size = buffer.nbytes
            for start in range(0, size, PIECE):
                piece = buffer[start : start + PIECE]
                self.file.read(place, (piece,))
                decrypt(sector, piece, piece)
                place += piece.nbytes
                sector += piece.nbytes // SECTOR

    def _read_bounced(self, offset: int, buffers: Sequence[Buffer]) -> None:
        length = total(buffers)
        done = 0
        while done < length:
            start = (offset + done) // SECTOR * SECTOR
            end = min(-(-(offset + length) // SECTOR) * SECTOR, start + STEP)
            data = memoryview(bytearray(end - start))
            self.read(start, (data,))
            inside = min(length, end - offset) - done
            skip = offset + done - start
            scatter(data[skip : skip + inside], cut(buffers, done, inside))
            done += inside

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        length = total(buffers)
        if offset % SECTOR or length > PIECE or any(buffer.nbytes % SECTOR for buffer in buffers):
            return False
        if not self.file.read_nowait(self.offset + offset, buffers):
            return False
        sector = self.first + offset // SECTOR
        for buffer in buffers:
            self.cipher.decrypt(sector, buffer, buffer)
            sector += buffer.nbytes // SECTOR
        return True

    # Writing

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        length = total(buffers)
        if not length:
            return
        end = offset + length
        start, stop = offset // SECTOR * SECTOR, -(-end // SECTOR) * SECTOR
        aligned = start == offset and stop == end
        # Locked by places in the storage, which all views share.
        with self._lock.mutex:
            take = self._lock.shared if aligned else self._lock.exclusive
            ticket = take(self.offset + start, self.offset + stop)
        try:
            if not aligned:
                buffers = self._whole_sectors(offset, end, start, stop, buffers)
            self._write_sectors(start, stop - start, buffers, fua)
        finally:
            self._lock.release(ticket)

    def _whole_sectors(self, offset: int, end: int, start: int, stop: int, buffers: Sequence[Buffer]) -> list[Buffer]:
        """*buffers*, for the range from *offset* to *end*, with what else is in its first and last sector."""
        whole = list(buffers)
        if start < offset:
            whole.insert(0, memoryview(self.pread(start, SECTOR))[: offset - start])
        if end < stop:
            whole.append(memoryview(self.pread(stop - SECTOR, SECTOR))[end - stop :])
        return whole

    def _write_sectors(self, offset: int, length: int, buffers: Sequence[Buffer], fua: bool) -> None:
        done = 0
        data = memoryview(bytearray(min(length, STEP)))
        while done < length:
            step = min(STEP, length - done)
            piece = data[:step]
            parts = cut(buffers, done, step)
            source = parts[0] if len(parts) == 1 else memoryview(gather(parts))
            self.cipher.encrypt(self.first + (offset + done) // SECTOR, source, piece)
            self.file.write(self.offset + offset + done, (piece,), fua=fua)
            done += step

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        """Write zeroes, encrypted."""
        while length > 0:
            step = min(length, STEP - offset % STEP)
            self.write(offset, zero_views(step), fua=fua)
            offset += step
            length -= step

    def discard(self, offset: int, length: int) -> None:
        """Nothing: which sectors are in use is not for everybody to see."""

    def flush(self) -> None:
        self.file.flush()

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        inside = max(0, min(length, self.size - offset))
        if inside:
            yield Mapping(Kind.DATA, offset, inside, self, offset, not self.readonly)
        if inside < length:
            yield Mapping(Kind.EOF, offset + inside, length - inside)

    def truncate(self, size: int) -> None:
        """Change the size. Bytes gained are whatever the key makes of zeroes."""
        self.file.truncate(self.offset + size)

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        """Set host space aside. Unlike in other nodes it reads as whatever the key makes of zeroes."""
        self.file.reserve(self.offset + offset, length, full=full)

    def allocated(self) -> int:
        return self.file.allocated()

    def children(self) -> Dict[str, Node]:
        return {"file": self.file}

    def event(self, name: str) -> None:
        self.file.event(name)

    def invalidate(self) -> None:
        self.file.invalidate()

    def close(self) -> None:
        """Nothing: the storage belongs to who put this over it."""
