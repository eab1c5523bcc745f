"""The driver.

Source: "The QCOW Image Format" by Mark McLoughlin (version 1). All numbers are big-endian. An L2 entry is 0 for a
cluster that is not there, else its offset in the file; with bit 63 set the cluster is a raw deflate stream, whose
length stands in the ``cluster_bits`` bits below.

Nothing is ever freed: new tables and clusters go to the end of the file. What a cluster's entry says reaches the disk
only after the cluster itself: entries wait in memory for :meth:`Qcow.flush` (or until many tables wait), which makes
the data stable, then the L2 tables, then the L1 table that points to new ones.
"""

from __future__ import annotations

import errno
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vm_core.block.format import BackingReference, Format
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.structs import Record, raw, u8, u32, u64
from vm_core.block.tables import dump, load
from vm_core.errors import BlockError, ImageError, UsageError

if TYPE_CHECKING:
    from vm_core.block.node import Node
    from vm_core.block.open import OpenContext

    from .encryption import Encryption

COMPRESSED = 1 << 63
MAX_L1 = (1 << 31) // 8
MAX_BACKING_NAME = 1023
#: L2 tables kept in memory, and those that may wait to be written.
KEPT_TABLES = 256
WAITING_TABLES = 64


class Header(Record):
    """The first 48 bytes."""

    magic: bytes = raw(0, 4, default=b"QFI\xfb")
    version: int = u32(4, default=1)
    backing_file_offset: int = u64(8)
    backing_file_size: int = u32(16)
    mtime: int = u32(20, doc="of the backing file, in seconds; not used")
    size: int = u64(24, doc="virtual size in bytes")
    cluster_bits: int = u8(32)
    l2_bits: int = u8(33, doc="entries of an L2 table, as a power of two")
    crypt_method: int = u32(36, doc="0 none, 1 AES")
    l1_table_offset: int = u64(40)


def _unlock(file: Node, header: Header, options: dict[str, Any], context: OpenContext) -> Encryption | None:
    """What encrypts the image, None where it is not encrypted; takes ``encrypt.*`` out of *options*."""
    if not header.crypt_method and not any(name.startswith("encrypt.") for name in options):
        return None
    from .encryption import unlock

    return unlock(file, bool(header.crypt_method), options, context)


class Qcow(Format):
    """One open image."""

    backing_format_failure = "unrecognized backing format '{}'"
    zero_parts = False

    def __init__(self, file: Node, header: Header, l1: array[int], name: str, readonly: bool) -> None:
        self.file = file
        self.readonly = readonly
        self.cluster_size = 1 << header.cluster_bits
        self._header = header
        self._name = name
        self._l1 = l1
        self._l1_dirty = False
        self._tables: OrderedDict[int, array[int]] = OrderedDict()
        self._waiting: set[int] = set()
        #: How guest data is encrypted, where it is.
        self._encryption: Encryption | None = None
        #: Where the next table or cluster goes: nothing of the image lies behind.
        self._end = file.size

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Qcow:
        def bad(reason: str) -> ImageError:
            return ImageError(context.filename, reason)

        header = Header.parse(file.pread(0, Header.LENGTH))
        if header.magic != b"QFI\xfb":
            raise bad("Image not in qcow format")
        if header.version != 1:
            text = f"qcow (v{header.version}) does not support qcow version {header.version}"
            raise bad(text + ". Try using the 'qcow2' driver instead." * (header.version in (2, 3)))
        if header.size <= 1:
            raise bad("Image size is too small (must be at least 2 bytes)")
        if not 9 <= header.cluster_bits <= 16:
            raise bad("Cluster size must be between 512 and 64k")
        if not 6 <= header.l2_bits <= 13:
            raise bad("L2 table size must be between 512 and 64k")
        if header.crypt_method > 1:
            raise bad("invalid encryption method in qcow header")
        encryption = _unlock(file, header, options, context)
        span = header.cluster_bits + header.l2_bits
        count = -(-header.size >> span)
        if header.size >= 1 << 63 or count > MAX_L1:
            raise bad("Image too large")
        if header.l1_table_offset + 8 * count > file.size:
            raise bad(
                f"L1 table of {count} entries at {header.l1_table_offset:#x} lies outside the file ({file.size} bytes)"
            )
        self = cls(
            file,
            header,
            load("Q", file.pread(header.l1_table_offset, 8 * count), "big"),
            context.filename,
            context.readonly,
        )
        self._encryption = encryption
        if header.backing_file_offset:
            if header.backing_file_size > MAX_BACKING_NAME:
                raise bad("Backing file name too long")
            where = header.backing_file_offset
            if where + header.backing_file_size > file.size:
                raise bad(f"the backing file's name at {where:#x} lies outside the file ({file.size} bytes)")
            name = file.pread(where, header.backing_file_size)
            self.backing_reference = BackingReference(name.decode("utf-8", "surrogateescape"))
        return self

    @property
    def size(self) -> int:
        return int(self._header.size)

    @property
    def encrypted(self) -> bool:  # type: ignore[override]
        """Whether guest data is encrypted."""
        return self._encryption is not None

    def _storage(self, guest: int, host: int) -> Node:
        """The node in which the bytes of the guest at *guest* lie at *host*."""
        return self.file if self._encryption is None else self._encryption.storage(guest, host)

    # Tables

    def _table(self, number: int) -> array[int] | None:
        """L2 table *number*, None where there is none."""
        table = self._tables.get(number)
        if table is not None:
            self._tables.move_to_end(number)
            return table
        where = self._l1[number]
        if not where:
            return None
        length = 8 << self._header.l2_bits
        if where + length > self.file.size:
            raise ImageError(self._name, f"L2 table {number} at {where:#x} lies outside the file")
        table = load("Q", self.file.pread(where, length), "big")
        self._keep(number, table)
        return table

    def _keep(self, number: int, table: array[int]) -> None:
        self._tables[number] = table
        if len(self._tables) > KEPT_TABLES:
            idle = next((one for one in self._tables if one not in self._waiting), None)
            if idle is not None:
                del self._tables[idle]

    def _set(self, cluster: int, entry: int) -> None:
        """Point guest *cluster* to *entry*."""
        number, index = cluster >> self._header.l2_bits, cluster & ((1 << self._header.l2_bits) - 1)
        table = self._table(number)
        assert table is not None
        table[index] = entry
        self._waiting.add(number)

    def _need_table(self, cluster: int) -> None:
        """Make the L2 table of guest *cluster*, at the end of the file, where there is none."""
        number = cluster >> self._header.l2_bits
        if self._table(number) is None:
            count = 1 << self._header.l2_bits
            self._l1[number] = self._take(8 * count)
            self._l1_dirty = True
            self._keep(number, array("Q", bytes(8 * count)))
            self._waiting.add(number)

    def _take(self, length: int) -> int:
        """Host space of *length* bytes at the end of the file, aligned to clusters."""
        start = -(-self._end // self.cluster_size) * self.cluster_size
        if start + length >= COMPRESSED >> self._header.cluster_bits:
            raise BlockError(errno.EFBIG, "the image file cannot grow any more")
        self._end = start + length
        return start

    # Reading

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        size, bits, l2_bits = self.cluster_size, self._header.cluster_bits, self._header.l2_bits
        end = offset + length
        writable = not self.readonly
        while offset < end:
            cluster = offset >> bits
            table = self._table(cluster >> l2_bits)
            if table is None:
                stop = min(end, ((cluster >> l2_bits) + 1) << (l2_bits + bits))
                yield Mapping(Kind.UNALLOCATED, offset, stop - offset)
                offset = stop
                continue
            index = cluster & ((1 << l2_bits) - 1)
            entry = table[index]
            stop = min(end, (cluster + 1) << bits)
            if entry & COMPRESSED:
                yield Mapping(Kind.SPECIAL, offset, stop - offset, token=entry)
            else:
                step = size if entry else 0
                limit = min(len(table) - index, -(-(end - (cluster << bits)) // size))
                count = 1
                while count < limit and table[index + count] == entry + count * step:
                    count += 1
                stop = min(end, (cluster + count) << bits)
                if entry:
                    if entry % size:
                        raise ImageError(self._name, f"cluster at {offset:#x} has the unaligned offset {entry:#x}")
                    host = entry + (offset & (size - 1))
                    yield Mapping(Kind.DATA, offset, stop - offset, self._storage(offset, host), host, writable)
                else:
                    yield Mapping(Kind.UNALLOCATED, offset, stop - offset)
            offset = stop

    def read_special(self, mapping: Mapping) -> bytes:
        bits = self._header.cluster_bits
        length = (mapping.token & (COMPRESSED - 1)) >> (63 - bits)
        host = mapping.token & ((1 << (63 - bits)) - 1)
        try:
            data = zlib.decompressobj(-12).decompress(self.file.pread(host, length), self.cluster_size)
        except zlib.error as error:
            raise BlockError(errno.EIO, f"compressed cluster at {host:#x}: {error}") from None
        if len(data) != self.cluster_size:
            raise BlockError(errno.EIO, f"compressed cluster at {host:#x} holds {len(data)} bytes")
        within = mapping.offset % self.cluster_size
        return data[within : within + mapping.length]

    # Writing

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        found: list[Allocation] = []
        size = self.cluster_size
        end = offset + length
        for run in self.map(offset, length):
            if run.kind is Kind.DATA:
                assert run.storage is not None
                found.append(Allocation(run.offset, run.length, run.storage, run.host, fresh=False))
                continue
            position = run.offset - run.offset % size
            stop = -(-(run.offset + run.length) // size) * size
            while position < stop:
                # Clusters of one table lie together; the table itself goes before them.
                cluster = position // size
                self._need_table(cluster)
                border = ((cluster >> self._header.l2_bits) + 1 << self._header.l2_bits) * size
                span = min(stop, border) - position
                old = self._end
                host = self._take(span)
                storage = self._storage(position, host)
                # Zeroes, too, are encrypted.
                zeroed = host >= old and storage is self.file
                found.append(Allocation(position, span, storage, host, fresh=True, zeroed=zeroed))
                position += span
        assert found[-1].offset + found[-1].length >= end
        return found

    def allocate_encoded(self, offset: int, length: int) -> Allocation:
        for run in self.map(offset, min(self.cluster_size, self.size - offset)):
            if run.kind is not Kind.UNALLOCATED:
                raise BlockError.of(errno.EIO)
        self._need_table(offset // self.cluster_size)
        host = self._end
        bits = self._header.cluster_bits
        if host + length >= 1 << (63 - bits):
            raise BlockError(errno.EFBIG, "the image file cannot grow any more")
        self._end += length
        entry = COMPRESSED | length << (63 - bits) | host
        return Allocation(offset, self.cluster_size, self.file, host, fresh=True, token=entry)

    def encode(self, offset: int, data: bytes | memoryview) -> bytes | None:
        machine = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, -12)
        stored = machine.compress(data) + machine.flush()
        return stored if len(stored) < self.cluster_size else None

    def commit(self, allocations: Sequence[Allocation]) -> None:
        size = self.cluster_size
        for allocation in allocations:
            if not allocation.fresh:
                continue
            first = allocation.offset // size
            if allocation.token is not None:
                self._set(first, allocation.token)
                continue
            for number in range(allocation.length // size):
                self._set(first + number, allocation.host + number * size)
        if len(self._waiting) > WAITING_TABLES:
            self.flush()

    def flush(self) -> None:
        if self._waiting or self._l1_dirty:
            self.file.flush()
            for number in sorted(self._waiting):
                self.file.pwrite(self._l1[number], dump(self._tables[number], "big"))
            self._waiting.clear()
            if self._l1_dirty:
                self.file.flush()
                self.file.pwrite(self._header.l1_table_offset, dump(self._l1, "big"))
                self._l1_dirty = False
        self.file.flush()

    def close(self) -> None:
        if not self.readonly:
            self.flush()

    def reopen(self, *, readonly: bool) -> None:
        if readonly:
            self.flush()
        self.readonly = readonly

    def empty(self) -> None:
        self.flush()
        self._l1 = array("Q", bytes(8 * len(self._l1)))
        self._tables.clear()
        self.file.pwrite(self._header.l1_table_offset, self._l1.tobytes())
        # Nothing points at what is cut off.
        self.file.flush()
        self._end = self._header.l1_table_offset + 8 * len(self._l1)
        self.file.truncate(self._end)

    # New images

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        from .encryption import wanted

        encrypted = wanted(options)
        backing = options.pop("backing_file", None)
        options.pop("backing_fmt", None)  # the format has no place for it
        if size <= 1:
            raise UsageError("Image size is too small, cannot be zero length")
        name = b""
        header = Header(size=size, cluster_bits=12, l2_bits=9, crypt_method=int(encrypted))
        position = Header.LENGTH
        if backing:
            name = str(backing).encode("utf-8", "surrogateescape")
            if len(name) > MAX_BACKING_NAME:
                raise UsageError("Backing file name too long")
            # Copy-on-write wants small clusters: each costs a read of the backing image.
            header.cluster_bits, header.l2_bits = 9, 12
            header.backing_file_offset, header.backing_file_size = position, len(name)
            position += len(name)
        header.l1_table_offset = position = -(-position // 8) * 8
        count = -(-size >> (header.cluster_bits + header.l2_bits))
        if count > MAX_L1:
            raise UsageError("Image too large")
        file.pwrite(0, (header.pack() + name).ljust(position, b"\0"))
        file.truncate(position + -(-8 * count // 512) * 512)
