"""A small format with everything the contract has, against which the core is tested, and the kit that tests formats.

On disk (little-endian): a header of one sector, the table of one 8-byte entry a cluster, then clusters.

    magic "TOYF"                                        0
    cluster size, power of two                          4
    virtual size in bytes                               8
    length of the backing file's name                  16
    length of the backing format's name                18
    both names                                         20

An entry is 0 (unallocated), 1 (zeroes) or a file offset, with bit 63 set where the cluster is stored inverted (the
stand-in for compression) and bit 62 where it is frozen (as by a snapshot: never overwritten nor given back). The
table is written at a flush, after the data it points to; clusters that were given back are used again only after
that. So every moment leaves an image that opens and has all that was flushed.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vm_core.block.format import BackingReference, Format
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.node import Node
from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.errors import BlockError, ImageError
from vm_core.hookspecs import hookimpl

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext

HEADER = struct.Struct("<4sIQHH")
SECTOR = 512
UNALLOCATED, ZERO = 0, 1
INVERTED = 1 << 63
FROZEN = 1 << 62
PLACE = ~(INVERTED | FROZEN)
MAX_TABLE = 1 << 16
_INVERSE = bytes(range(255, -1, -1))

DRIVER = FormatDriver(
    name="toy",
    summary="the format of core's own tests",
    implementation="vm_core.testing.toy:Toy",
    signatures=(Signature(0, b"TOYF"),),
    capabilities=frozenset({"write", "create", "backing", "resize"}),
    options=(Option("backing", "node", "backing image"),),
    create_options=(
        Option("size", "size", "virtual size"),
        Option("cluster_size", "size", "bytes a cluster", 4096),
        Option("backing_file", "str", "backing image"),
        Option("backing_fmt", "str", "its format"),
    ),
)


@hookimpl
def vm_format_drivers() -> Sequence[FormatDriver]:
    return [DRIVER]


class Toy(Format):
    """One open toy image."""

    def __init__(self, file: Node, cluster: int, size: int, backing: BackingReference | None, readonly: bool) -> None:
        self.file = file
        self.cluster_size = cluster
        self.backing_reference = backing
        self.readonly = readonly
        self._size = size
        count = -(-size // cluster)
        data = file.pread(SECTOR, count * 8)
        self._table = list(struct.unpack(f"<{count}Q", data))
        self._dirty: set[int] = set()
        self._resized = False
        start = -(-(SECTOR + MAX_TABLE * 8) // cluster) * cluster
        used = {entry & PLACE for entry in self._table if entry > ZERO}
        if any(host % cluster or host < start or host + cluster > max(file.size, 1) + cluster for host in used):
            raise ImageError(file.filename, "toy: an entry points outside the file")
        if len(used) != sum(entry > ZERO for entry in self._table):
            raise ImageError(file.filename, "toy: two entries point to the same cluster")
        self._end = max(used, default=start - cluster) + cluster
        self._free = [host for host in range(start, self._end, cluster) if host not in used]
        #: Frozen clusters that the table no longer names.
        self._kept: set[int] = set()
        #: Given back since the last flush.
        self._released: list[int] = []

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Toy:
        head = file.pread(0, SECTOR)
        magic, cluster, size, name_length, format_length = HEADER.unpack_from(head)
        if magic != b"TOYF":
            raise ImageError(file.filename, "toy: not a toy image")
        if cluster < SECTOR or cluster > 1 << 21 or cluster & (cluster - 1):
            raise ImageError(file.filename, f"toy: cluster size {cluster} is no power of two from 512 to 2 MiB")
        if size > MAX_TABLE * cluster:
            raise ImageError(file.filename, f"toy: size {size} needs a table of more than {MAX_TABLE} entries")
        if SECTOR + -(-size // cluster) * 8 > file.size:
            raise ImageError(file.filename, "toy: the table reaches past the end of the file")
        end = HEADER.size + name_length
        if end + format_length > SECTOR:
            raise ImageError(file.filename, "toy: names are too long")
        try:
            name = head[HEADER.size : end].decode()
            fmt = head[end : end + format_length].decode()
        except UnicodeDecodeError:
            raise ImageError(file.filename, "toy: the backing file's name is not UTF-8") from None
        backing = BackingReference(name, fmt or None) if name else None
        return cls(file, cluster, size, backing, context.readonly)

    @property
    def size(self) -> int:
        return self._size

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        end = offset + length
        assert 0 <= offset < end <= self._size, "the core maps what lies inside the image"
        pending: Mapping | None = None
        while offset < end:
            index, start = divmod(offset, self.cluster_size)
            count = min(self.cluster_size - start, end - offset)
            entry = self._table[index]
            if entry == UNALLOCATED:
                found = Mapping(Kind.UNALLOCATED, offset, count)
            elif entry == ZERO:
                found = Mapping(Kind.ZERO, offset, count)
            elif entry & INVERTED:
                found = Mapping(Kind.SPECIAL, offset, count, token=(entry & PLACE) + start)
            else:
                writable = not (self.readonly or entry & FROZEN)
                found = Mapping(Kind.DATA, offset, count, self.file, (entry & PLACE) + start, writable)
            if pending is not None and _adjoins(pending, found):
                pending = pending._replace(length=pending.length + count)
            else:
                if pending is not None:
                    yield pending
                pending = found
            offset += count
        if pending is not None:
            yield pending

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping] | None:
        return list(self.map(offset, length))

    def read_special(self, mapping: Mapping) -> bytes:
        return self.file.pread(mapping.token, mapping.length).translate(_INVERSE)

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        result: list[Allocation] = []
        cluster, end = self.cluster_size, offset + length
        try:
            while offset < end:
                index, start = divmod(offset, cluster)
                count = min(cluster - start, end - offset)
                entry = self._table[index]
                if entry > ZERO and not entry & (INVERTED | FROZEN):
                    result.append(Allocation(offset, count, self.file, entry + start, False))
                else:
                    host, zeroed = self._take()
                    result.append(Allocation(index * cluster, cluster, self.file, host, True, zeroed))
                offset += count
        except BaseException:
            self.abort([one for one in result if one.fresh])
            raise
        return result

    def _take(self) -> tuple[int, bool]:
        if self._free:
            return self._free.pop(), False
        host, self._end = self._end, self._end + self.cluster_size
        return host, host >= self.file.size

    def commit(self, allocations: Sequence[Allocation]) -> None:
        for one in allocations:
            self._set(one.offset // self.cluster_size, one.host)

    def abort(self, allocations: Sequence[Allocation]) -> None:
        self._free.extend(one.host for one in allocations)

    def _set(self, index: int, entry: int) -> None:
        former = self._table[index]
        if former & FROZEN:
            self._kept.add(former & PLACE)
        elif former > ZERO:
            self._released.append(former & PLACE)
        self._table[index] = entry
        self._dirty.add(index)

    def store_inverted(self, offset: int, data: bytes) -> None:
        """Store one cluster the other way (call with the node quiesced)."""
        if len(data) != self.cluster_size or offset % self.cluster_size:
            raise BlockError.of(errno.EINVAL)
        host, _ = self._take()
        self.file.pwrite(host, data.translate(_INVERSE))
        self._set(offset // self.cluster_size, host | INVERTED)

    def freeze(self) -> None:
        """Let no allocated cluster be overwritten any more (call with the node quiesced)."""
        for index, entry in enumerate(self._table):
            if entry > ZERO:
                self._table[index] = entry | FROZEN
                self._dirty.add(index)

    def zero(self, offset: int, length: int, *, unmap: bool) -> bool:
        for index in range(offset // self.cluster_size, -(-(offset + length) // self.cluster_size)):
            if self._table[index] != ZERO:
                self._set(index, ZERO)
        return True

    def discard(self, offset: int, length: int) -> None:
        self.zero(offset, length, unmap=True)

    def flush(self) -> None:
        if self._dirty or self._resized:
            self.file.flush()
            if self._resized:
                self.file.pwrite(SECTOR, struct.pack(f"<{len(self._table)}Q", *self._table))
                self.file.flush()
                self.file.pwrite(8, struct.pack("<Q", self._size))
            for index in sorted(self._dirty):
                if index < len(self._table):
                    self.file.pwrite(SECTOR + index * 8, struct.pack("<Q", self._table[index]))
        self.file.flush()
        self._dirty.clear()
        self._resized = False
        self._free.extend(self._released)
        self._released.clear()

    def truncate(self, size: int) -> None:
        count = -(-size // self.cluster_size)
        if count > MAX_TABLE:
            raise ImageError(self.file.filename, f"toy: size {size} needs a table of more than {MAX_TABLE} entries")
        if size < self._size:
            for index in range(count, len(self._table)):
                self._set(index, UNALLOCATED)
        if size > self._size and self._size % self.cluster_size:
            raise ImageError(self.file.filename, "toy: only images of whole clusters grow")
        self._table = self._table[:count] + [ZERO] * (count - len(self._table))
        self._size = size
        self._resized = True

    def reopen(self, *, readonly: bool) -> None:
        if readonly:
            self.flush()
        self.readonly = readonly

    def close(self) -> None:
        if not self.readonly:
            self.flush()

    def check(self, *, repair: str = "") -> dict[str, Any]:
        used = [entry & PLACE for entry in self._table if entry > ZERO]
        known = {*used, *self._free, *self._released, *self._kept}
        start = -(-(SECTOR + MAX_TABLE * 8) // self.cluster_size) * self.cluster_size
        leaks = (self._end - start) // self.cluster_size - len(known)
        twice = len(used) + len(self._free) + len(self._released) + len(self._kept) - len(known)
        return {"corruptions": twice, "leaks": leaks, "check-errors": 0}

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        cluster = options.pop("cluster_size", 4096)
        name = (options.pop("backing_file", None) or "").encode()
        fmt = (options.pop("backing_fmt", None) or "").encode()
        if HEADER.size + len(name) + len(fmt) > SECTOR:
            raise ImageError(file.filename, "toy: names are too long")
        count = -(-size // cluster)
        if cluster < SECTOR or cluster & (cluster - 1) or count > MAX_TABLE:
            raise ImageError(file.filename, f"toy: cannot be {size} bytes in clusters of {cluster}")
        file.pwrite(0, (HEADER.pack(b"TOYF", cluster, size, len(name), len(fmt)) + name + fmt).ljust(SECTOR, b"\0"))
        file.truncate(SECTOR + count * 8)


def _adjoins(one: Mapping, two: Mapping) -> bool:
    return one.kind is two.kind and (
        one.kind in (Kind.UNALLOCATED, Kind.ZERO) or (one.kind is Kind.DATA and one.host + one.length == two.host)
    )
