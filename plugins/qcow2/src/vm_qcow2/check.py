"""Checking an image, and repairing it.

Every reference to a host cluster is counted anew – header, refcount structures, L1 and L2 tables of the image and of
its snapshots, data, bitmaps – and compared with the refcounts. A refcount too high is a *leak*: space lost, nothing
else. One too low is a *corruption*: the cluster could be given to something else. So is a COPIED bit that contradicts
the refcount (only in the active tables; elsewhere it means nothing), and an entry that points to where nothing can be.

Repair sets refcounts to what was counted (``leaks``: only downwards), makes refcount blocks that are missing or that
point nowhere, and sets the COPIED bits. It never touches what a guest sees.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from vm_core.block.structs import Record, u8, u16, u32, u64
from vm_core.errors import ImageError

from . import extensions, features
from .entries import BadEntryError, Run, State, runs
from .geometry import COPIED, L1_RESERVED, OFFSET_MASK
from .references import PIECE, PIECE_BITS, References

if TYPE_CHECKING:
    from .image import Qcow2

#: Distinct L2 tables of snapshots whose uses are counted in one go.
MAX_SHARED_TABLES = 500_000


class Result:
    """What a check found, in QEMU's words (ImageCheck)."""

    def __init__(self, image: Qcow2) -> None:
        self.corruptions = 0
        self.leaks = 0
        self.check_errors = 0
        self.allocated = 0
        self.compressed = 0
        self.fragmented = 0
        self.end = 0
        self.total = -(-image.size >> image.geometry.cluster_bits)
        #: One sentence each, of the first hundred findings.
        self.messages: list[str] = []

    def corruption(self, text: str, count: int = 1) -> None:
        self.corruptions += count
        self._say(f"ERROR {text}")

    def leak(self, text: str) -> None:
        self.leaks += 1
        self._say(f"Leaked {text}")

    def _say(self, text: str) -> None:
        if len(self.messages) < 100:
            self.messages.append(text)


def check(image: Qcow2, *, repair: str = "", tell: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Check *image* and repair it as asked; the result is in the shape of ImageCheck.

    Nobody else uses the image meanwhile.
    """
    if not image.readonly:
        image.order.write_back()
        image.refcounts.settle()
    first = _Checker(image).run()
    fixed: dict[str, int] = {}
    result = first
    if repair and (first.result.corruptions or first.result.leaks):
        image.store.check_writable()
        first.repair(corruptions=repair == "all")
        result = _Checker(image).run()
        fixed = {
            "corruptions-fixed": max(0, first.result.corruptions - result.result.corruptions),
            "leaks-fixed": max(0, first.result.leaks - result.result.leaks),
        }
    if repair == "all" and not result.result.corruptions:
        header = image.store.header
        clean = header.incompatible_features & ~(features.DIRTY | features.CORRUPT)
        if clean != header.incompatible_features:
            header.incompatible_features = clean
            image.store.write_header("incompatible_features")
            image.store.barrier()
    return _report(result.result, fixed)


def _report(result: Result, fixed: dict[str, int]) -> dict[str, Any]:
    data: dict[str, Any] = {
        "check-errors": result.check_errors,
        "image-end-offset": result.end,
        "total-clusters": result.total,
        "allocated-clusters": result.allocated,
        "fragmented-clusters": result.fragmented,
        "compressed-clusters": result.compressed,
    }
    if result.corruptions:
        data["corruptions"] = result.corruptions
    if result.leaks:
        data["leaks"] = result.leaks
    data.update({key: value for key, value in fixed.items() if value})
    data["messages"] = result.messages
    return data


class _Checker:
    """One pass over an image."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.store = image.store
        self.geometry = image.geometry
        self.references = References(image.store)
        self.result = Result(image)
        #: Refcount table entries of which nothing can be used.
        self._bad_blocks: set[int] = set()

    def run(self) -> _Checker:
        image, header, bits = self.image, self.store.header, self.geometry.cluster_bits
        self._count(0, 1 << bits, "header")
        self._count(header.refcount_table_offset, len(image.refcounts.table) * 8, "refcount table")
        self._count(header.l1_table_offset, header.l1_size * 8, "L1 table")
        self._count(header.snapshots_offset, image.snapshot_table.length, "snapshot table")
        self._count_encryption_header()
        self._count_l2_tables()
        self._count_bitmaps()
        self._count_refcount_blocks()
        self._compare()
        self._check_copied()
        inside = -(-self.store.file.size >> bits)
        self.result.end = min(max(self.references.end(), self._highest), inside) << bits
        return self

    # Counting

    def _count(self, offset: int, length: int, what: str, weight: int = 1) -> None:
        """Count the clusters of a range."""
        if not length:
            return
        bits = self.geometry.cluster_bits
        last = offset + length - 1 >> bits
        if last << bits >= self.store.file.size:
            self.result.corruption(f"{what} at {offset:#x} lies outside the file")
            return
        first = offset >> bits
        self.references.add(first, last - first + 1, weight)

    def _count_encryption_header(self) -> None:
        if self.image.encryption is not None:
            from .encryption import check_extension

            pointer = check_extension(self.store.header, self.image.extensions, self.store.name)
            if pointer is not None:
                self._count(pointer.offset, pointer.length, "encryption header")

    def _count_l2_tables(self) -> None:
        """Count all L2 tables and what they point at, each table once however many L1 tables share it."""
        l1 = self.image.tables.l1
        if not self.image.snapshot_table.entries:
            for index, entry in enumerate(l1):
                if entry:
                    self._count_l2(entry, 1, f"L1 entry {index}", active=True)
            return
        weights: dict[int, int] = {}
        active = {entry for entry in l1 if entry}
        for entry in l1:
            if entry:
                weights[entry & ~COPIED] = weights.get(entry & ~COPIED, 0) + 1
        tables: dict[tuple[int, int], int] = {}
        for snapshot in self.image.snapshot_table.entries:
            key = snapshot.head.l1_table_offset, snapshot.head.l1_size
            tables[key] = tables.get(key, 0) + 1
        for (offset, size), uses in tables.items():
            if size:
                self._count(offset, size * 8, "L1 table of a snapshot", uses)
                for entry in self.store.read_words(offset, size, "L1 table of a snapshot"):
                    if entry:
                        entry &= ~COPIED
                        weights[entry] = weights.get(entry, 0) + uses
                        if len(weights) > MAX_SHARED_TABLES:
                            raise self.store.error("the snapshots have more L2 tables than can be checked")
        live = {entry & ~COPIED for entry in active}
        for entry, weight in weights.items():
            self._count_l2(entry, weight, "L1 entry", active=entry in live)

    def _count_l2(self, entry: int, weight: int, where: str, *, active: bool) -> None:
        offset = entry & OFFSET_MASK
        geometry, result = self.geometry, self.result
        if entry & L1_RESERVED or offset & geometry.cluster_size - 1 or not offset:
            result.corruption(f"{where}: {entry:#018x} is no place for an L2 table")
            return
        if offset + geometry.cluster_size > self.store.file.size:
            result.corruption(f"{where}: L2 table at {offset:#x} lies outside the file")
            return
        cluster = offset >> geometry.cluster_bits
        if self.references.get(cluster):
            result.corruption(f"{where}: L2 table at {offset:#x} overlaps something else")
            self.references.add(cluster, 1, weight)
            return
        self.references.add(cluster, 1, weight)
        expected = 0
        for run in self._runs(self.store.read_words(offset, geometry.cluster_size // 8, "L2 table")):
            if run.state is State.COMPRESSED:
                start, length = geometry.compressed_extent(run.entry)
                if start >= self.store.file.size:
                    result.corruption(f"compressed cluster at {start:#x} lies outside the file")
                else:
                    # The last sector may be cut off by the end of the file, in which case it belongs to no cluster.
                    self._count(start, min(length, self.store.file.size - start), "compressed cluster", weight)
                if active:
                    result.allocated += 1
                    result.compressed += 1
                    result.fragmented += 1
            elif run.host:
                last = run.host + (run.clusters - 1 << geometry.cluster_bits)
                if last >= self.store.file.size:
                    result.corruption(f"data cluster at {last:#x} lies outside the file")
                inside = min(run.clusters, max(0, -(-(self.store.file.size - run.host) >> geometry.cluster_bits)))
                self.references.add(run.host >> geometry.cluster_bits, inside, weight)
                if active:
                    result.allocated += run.clusters
                    if expected and run.host != expected:
                        result.fragmented += 1
                    expected = last + geometry.cluster_size

    def _runs(self, entries: array[int]) -> Iterator[Run]:
        """The runs of a table; entries that mean nothing are reported and passed over."""
        start = 0
        while start < len(entries):
            try:
                yield from runs(entries, start, len(entries), self.geometry)
                return
            except BadEntryError as error:
                self.result.corruption(str(error))
                start = error.index + 1

    def _count_bitmaps(self) -> None:
        """Clusters of persistent bitmaps, if their extension says that they are valid."""
        if not self.store.header.autoclear_features & features.BITMAPS:
            return
        data = extensions.find(self.image.extensions, extensions.BITMAPS)
        if data is None:
            self.result.corruption("the bitmaps feature is set, but there is no bitmaps extension")
            return
        extension = extensions.BitmapsExtension.parse(data)
        if extension.directory_size > 64 << 20:
            self.result.corruption(f"bitmap directory of {extension.directory_size} bytes")
            return
        directory = self.store.read(extension.directory_offset, extension.directory_size, "bitmap directory")
        self._count(extension.directory_offset, extension.directory_size, "bitmap directory")
        position = 0
        for _ in range(extension.nb_bitmaps):
            if position + BitmapEntry.LENGTH > len(directory):
                self.result.corruption("the bitmap directory is shorter than its bitmaps")
                return
            entry = BitmapEntry.parse(directory, position)
            position += BitmapEntry.LENGTH + entry.extra_size + entry.name_size + 7 & ~7
            if entry.table_size > 32 << 17:
                self.result.corruption(f"bitmap table of {entry.table_size} entries")
                continue
            self._count(entry.table_offset, entry.table_size * 8, "bitmap table")
            for word in self.store.read_words(entry.table_offset, entry.table_size, "bitmap table"):
                if word & OFFSET_MASK:
                    self._count(word & OFFSET_MASK, self.geometry.cluster_size, "bitmap data")

    def _count_refcount_blocks(self) -> None:
        """Last, so that a block on top of something else is the one that is found wrong."""
        size, mask = self.store.file.size, self.geometry.cluster_size - 1
        for index, offset in enumerate(self.image.refcounts.table):
            if not offset:
                continue
            cluster = offset >> self.geometry.cluster_bits
            if offset & (mask | 511):
                self.result.corruption(f"refcount block {index} at {offset:#x} is not aligned to clusters")
            elif offset >= size:
                self.result.corruption(f"refcount block {index} at {offset:#x} lies outside the file")
            elif self.references.get(cluster):
                self.result.corruption(f"refcount block {index} at {offset:#x} overlaps something else")
            else:
                self.references.add(cluster, 1)
                continue
            self._bad_blocks.add(index)

    # Comparing

    def _differences(self) -> Iterator[tuple[int, int, int]]:
        """(cluster, refcount, references) where the two differ. :attr:`_highest` follows the refcounts."""
        references, refcounts = self.references, self.image.refcounts
        per_block = self.geometry.refblock_entries
        self._highest = 0
        numbers = set(references.pieces())
        for index, offset in enumerate(refcounts.table):
            if offset and index not in self._bad_blocks:
                start = index * per_block
                numbers.update(range(start >> PIECE_BITS, (start + per_block - 1 >> PIECE_BITS) + 1))
        for number in sorted(numbers):
            start = number << PIECE_BITS
            have = array(references.code)
            if number not in references and self._is_zero(start):
                continue
            while len(have) < PIECE:
                index, low = divmod(start + len(have), per_block)
                step = min(PIECE - len(have), per_block - low)
                block = refcounts.block(index) if index not in self._bad_blocks else None
                if block is None:
                    have.extend(array(have.typecode, bytes(step * have.itemsize)))
                elif block.counts.typecode == have.typecode:
                    have.extend(block.counts[low : low + step])
                else:
                    have.extend(array(have.typecode, block.counts[low : low + step].tolist()))
            want = references.piece(number)
            if have.tobytes().strip(b"\0"):
                last = next(i for i in range(PIECE - 1, -1, -1) if have[i])
                self._highest = start + last + 1
            if have != want:
                for index in range(PIECE):
                    if have[index] != want[index]:
                        yield start + index, have[index], want[index]

    def _is_zero(self, start: int) -> bool:
        """Whether the refcounts of a piece that lies within one block are all zero, without looking at each."""
        index, low = divmod(start, self.geometry.refblock_entries)
        block = self.image.refcounts.block(index) if index not in self._bad_blocks else None
        if block is None or low + PIECE > len(block.counts):
            return False
        piece = block.counts[low : low + PIECE]
        return piece == array(piece.typecode, bytes(PIECE * piece.itemsize))

    def _compare(self) -> None:
        most = self.geometry.refcount_max
        beyond = -(-self.store.file.size >> self.geometry.cluster_bits)
        for cluster, have, want in self._differences():
            text = f"cluster {cluster} refcount={have} reference={want}"
            if cluster >= beyond and not want:
                # Counted, but never written: no space is lost. Writers that died leave such counts.
                continue
            if have < want:
                self.result.corruption(text + (" (too many for the refcount's width)" if want > most else ""))
            else:
                self.result.leak(text)

    def _check_copied(self, *, fix: bool = False) -> None:
        """Compare the COPIED bits of the active tables with the refcounts."""
        image, geometry, result = self.image, self.geometry, self.result
        refcounts, bits = image.refcounts, geometry.cluster_bits
        for index, entry in enumerate(image.tables.l1):
            offset = entry & OFFSET_MASK
            if not entry or entry & L1_RESERVED or offset & geometry.cluster_size - 1:
                continue
            if not offset or offset + geometry.cluster_size > self.store.file.size:
                continue
            one = refcounts.get(offset >> bits) == 1
            if one != bool(entry & COPIED):
                if fix:
                    image.tables.l1[index] = entry ^ COPIED
                    image.tables.changed.add(index)
                else:
                    result.corruption(
                        f"OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} "
                        f"refcount={refcounts.get(offset >> bits)}"
                    )
            try:
                table = image.tables.get(index)
            except ImageError:
                continue
            if table is None:
                continue
            for run in _quiet_runs(self, table.entries):
                if run.state not in (State.DATA, State.ZERO_ALLOCATED):
                    continue
                if run.copied and refcounts.all_one(run.host >> bits, run.clusters):
                    continue
                for position in range(run.clusters):
                    cluster = (run.host >> bits) + position
                    if (refcounts.get(cluster) == 1) == run.copied:
                        continue
                    where = run.at + position
                    if fix:
                        table.entries[where] ^= COPIED
                        table.touch(where, where + 1)
                    else:
                        result.corruption(
                            f"OFLAG_COPIED data cluster: l2_entry={table.entries[where]:x} "
                            f"refcount={refcounts.get(cluster)}"
                        )
            if fix:
                image.order.relieve()

    # Repairing

    def repair(self, *, corruptions: bool) -> None:
        """Set refcounts to the references counted; with *corruptions* also upwards, and mend tables."""
        image, refcounts, allocator = self.image, self.image.refcounts, self.image.allocator
        if corruptions:
            for index in self._bad_blocks:
                refcounts.drop(index)
                refcounts.unlinked.add(index)
            # New blocks go where nothing is, whatever the refcounts say of that place.
            allocator.start_at(max(self.references.end(), self._highest))
        for cluster, have, want in list(self._differences()):
            if want > self.geometry.refcount_max:
                continue
            if have > want or corruptions:
                if have < want:
                    allocator.need_block(cluster)
                refcounts.set_run(cluster, 1, want)
        refcounts.settle()
        if corruptions:
            self._check_copied(fix=True)
        allocator.start_at(0)
        image.order.write_back()


def _quiet_runs(checker: _Checker, entries: array[int]) -> Iterator[Run]:
    """Runs of a table whose bad entries were reported before."""
    start = 0
    while start < len(entries):
        try:
            yield from runs(entries, start, len(entries), checker.geometry)
            return
        except BadEntryError as error:
            start = error.index + 1


class BitmapEntry(Record, order="big"):
    """An entry of the bitmap directory (*Bitmaps*); extra data and name follow."""

    table_offset: int = u64(0, doc="where the bitmap's table is; cluster-aligned")
    table_size: int = u32(8, doc="entries of that table")
    flags: int = u32(12, doc="bit 0 in use, bit 1 auto")
    type: int = u8(16, doc="1: dirty tracking")
    granularity_bits: int = u8(17, doc="log2 of the bytes a bit stands for")
    name_size: int = u16(18, doc="bytes of the name")
    extra_size: int = u32(20, doc="bytes of extra data")
