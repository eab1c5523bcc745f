"""Moving clusters from the end of the file into free ones before them (``compact``).

Theory of operation. With L clusters in use, everything can lie below cluster L: what is in use there or behind is moved
to clusters below it that are free. References are found by reading all tables, in windows from the end of the file
downwards, so that memory stays bounded; one reading does for as many clusters as fit into a window.

What is moved, one window after the other, and what points at it:

* data clusters (and those set aside for zeroes): entries of L2 tables, several where snapshots share a cluster;
* compressed clusters, which take parts of host clusters: each on its own, packed anew;
* L2 tables: entries of the active L1 table and of snapshots' L1 tables;
* at the end: refcount blocks (those that count nothing are given up instead); the active L1 table, the refcount table,
  the snapshots' L1 tables and their list, if there is a row of free clusters before them; bitmaps, which are written
  anew anyway.

Before that, L2 tables in which nothing is are given up. The header's cluster, a LUKS header and bitmaps that are of no
use any more stay where they are, and so does each cluster whose references do not add up to its refcount. With an
external data file only the metadata moves.

The order on disk, a portion at a time:

1. The copies are written, and the new clusters' refcounts: those of the old ones. A **barrier**.
2. The entries that point at them are changed, each within a sector. A **barrier**.
3. The refcounts of the old clusters become zero.

A power cut before step 3 is over leaves both clusters counted: a leak, the image is whole. If several entries point at
a cluster, some may point at the copy then and some at the old one; both are counted as all references together, so they
are never written in place (no entry has the bit COPIED), and they hold the same.

Nothing in memory differs from the disk when this begins. Tables are changed on disk, and dropped from the cache.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vm_core.block.relocation import Move, Relocation
from vm_core.block.tables import load

from .emptying import free_runs, last_used
from .entries import State, all_runs
from .geometry import COMPRESSED, COPIED, MAX_L1_BYTES, OFFSET_MASK, ZERO
from .overlap import ACTIVE_L1, ACTIVE_L2, INACTIVE_L1, INACTIVE_L2, REFCOUNT_BLOCK
from .snapshots import Snapshot, SnapshotHead, prepare_snapshots, switch_snapshots
from .tables import L2Table

if TYPE_CHECKING:
    from .image import Qcow2

#: References that are kept at a time.
MAX_REFERENCES = 1 << 18
#: How often it is tried to get anything shorter.
ROUNDS = 3


class Reference(NamedTuple):
    """*clusters* entries from number *entry* on of the L2 table at *table* point at clusters from *first* on."""

    first: int
    clusters: int
    table: int
    entry: int


class Extent(NamedTuple):
    """A compressed cluster: where, the bytes it can have, and the entries (table, index) that point at it."""

    offset: int
    length: int
    #: The last host cluster that is counted for it.
    last: int
    entries: list[tuple[int, int]]


class Window(NamedTuple):
    """What points at clusters from *low* on."""

    low: int
    data: list[Reference]
    #: By host offset.
    compressed: dict[int, Extent]


class Segment(NamedTuple):
    """Clusters that are moved together: all have the same *references*, given for the first one, and refcount."""

    first: int
    clusters: int
    weight: int
    references: list[Reference]


class Portion(NamedTuple):
    """What is copied at a time, and what is to be done then."""

    moves: list[Move]
    finish: Callable[[], None]


class Qcow2Relocation(Relocation):
    """The relocation of one image."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.store = image.store
        self.geometry = image.geometry
        self.refcounts = image.refcounts
        self._bits = image.geometry.cluster_bits
        self._size = image.cluster_size
        self._limit = 0
        self._portion = 0
        self._work: Iterator[Portion] | None = None
        self._finish: Callable[[], None] | None = None
        #: Free runs that were not looked at yet, and what is left of the present one.
        self._places: Iterator[tuple[int, int]] = iter(())
        self._place = (0, 0)
        #: Clusters that were taken and not used.
        self._spare: list[int] = []
        #: The last cluster with compressed data, and how many of its bytes are used.
        self._tail = (0, 0)

    # What the core calls

    def plan(self) -> tuple[int, int]:
        live = self._live(0)
        return self._live(live) << self._bits, max(0, self.store.file.size - (live << self._bits))

    def prepare(self, limit: int) -> Sequence[Move]:
        self._portion = max(1, limit >> self._bits)
        if self._work is None:
            self._work = self._all()
        portion = next(self._work, None)
        if portion is None:
            return ()
        self._finish = portion.finish
        return portion.moves

    def complete(self) -> None:
        assert self._finish is not None
        self._finish()

    def abandon(self) -> None:
        """Nothing knows of the copies."""

    # All of it

    def _all(self) -> Iterator[Portion]:
        image = self.image
        # Nothing of what was taken before goes on.
        image.allocator.start_at(0)
        self._drop_empty_tables()
        self._settle()
        self._drop_empty_blocks()
        end = last_used(image) + 1
        for number in range(ROUNDS):
            yield from self._round()
            former, end = end, last_used(image) + 1
            # Tables of several clusters and bitmaps moved last; what they left can hold something again.
            if (number and end >= former) or end - self._live(0) <= end >> 10:
                return

    def _round(self) -> Iterator[Portion]:
        image = self.image
        self._limit = self._live(0)
        self._places = free_runs(image, self._limit)
        self._place, self._spare, self._tail = (0, 0), [], (0, 0)
        top = last_used(image) + 1
        while top > self._limit:
            tables = self._table_weights()
            window = self._scan(tables, top)
            yield from self._move_data(window, tables)
            yield from self._move_compressed(window, tables)
            yield from self._move_l2(window.low, top, tables)
            top = window.low
        self._settle()
        self._move_blocks()
        self._drop_empty_blocks()
        self._move_refcount_table()
        self._move_l1()
        self._move_snapshots()
        self._settle()
        # Bitmaps are written beside the former ones, whose places are free only then: so once more, where it helps.
        for _ in range(2 if image.tracking else 0):
            image.settle_bitmaps()
            self._settle()
            if last_used(image) + 1 == self._live(0):
                break
        else:
            image.move_bitmap_directory()
            self._settle()

    def _settle(self) -> None:
        self.image.order.write_back()
        self.refcounts.settle()
        self.refcounts.trim()
        self.image.tables.drop_clean()

    def _live(self, low: int) -> int:
        """How many clusters from *low* on are in use."""
        per_block, found = self.geometry.refblock_entries, 0
        for index in range(low // per_block, len(self.refcounts.table)):
            block = self.refcounts.block(index)
            if block is not None:
                counts = block.counts[max(low - index * per_block, 0) :]
                found += len(counts) - counts.count(0)
        return found

    # Free clusters

    def _take(self, count: int) -> list[tuple[int, int]]:
        """Up to *count* free clusters below the limit, as runs (first, count), lowest first; each is given once."""
        found: list[tuple[int, int]] = []
        while count and self._spare:
            first = self._spare.pop(0)
            count -= 1
            if found and sum(found[-1]) == first:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((first, 1))
        while count:
            first, length = self._place
            if not length:
                place = next(self._places, None)
                if place is None:
                    return found
                self._place = place
                continue
            # A place without refcount block would need one.
            per_block = self.geometry.refblock_entries
            step = min(count, length, per_block - first % per_block)
            self._place = (first + step, length - step)
            if self.refcounts.block(first // per_block) is None:
                continue
            self.image.metadata.check(first, step)
            if found and sum(found[-1]) == first:
                found[-1] = (found[-1][0], found[-1][1] + step)
            else:
                found.append((first, step))
            count -= step
        return found

    def _row(self, count: int, below: int) -> int | None:
        """The first of *count* free clusters in a row, below cluster *below* as a whole; None: there are none."""
        per_block = self.geometry.refblock_entries
        for first, length in free_runs(self.image, below):
            end = first + length
            while first + count <= end:
                missing = [
                    number
                    for number in range(first // per_block, (first + count - 1) // per_block + 1)
                    if self.refcounts.block(number) is None
                ]
                if not missing:
                    self.image.metadata.check(first, count)
                    return first
                first = (missing[-1] + 1) * per_block
        return None

    # Finding references

    def _l1_tables(self) -> Iterator[tuple[array[int], int, bool]]:
        """Each L1 table, where it is, and whether it is the active one."""
        yield self.image.tables.l1, self.store.header.l1_table_offset, True
        for one in self.image.snapshot_table.entries:
            if one.l1_problem(self._size) is None and one.head.l1_size:
                data = self.store.file.pread(one.head.l1_table_offset, one.head.l1_size * 8)
                yield load("Q", data, "big"), one.head.l1_table_offset, False

    def _table_weights(self) -> dict[int, int]:
        """How many L1 entries point at each L2 table."""
        found: dict[int, int] = {}
        for l1, _, _ in self._l1_tables():
            for entry in l1:
                offset = entry & OFFSET_MASK
                if offset:
                    found[offset] = found.get(offset, 0) + 1
        return found

    def _read_table(self, offset: int) -> L2Table:
        return self.image.tables.read(offset, "L2 table")

    def _scan(self, tables: dict[int, int], top: int) -> Window:
        """What points at clusters below *top*, as far down as there is room to keep it, at most to the limit."""
        low, bits, external = self._limit, self._bits, self.geometry.external
        data: list[Reference] = []
        compressed: dict[int, Extent] = {}
        kept = 0
        for offset in tables:
            table = self._read_table(offset)
            for run in all_runs(table.entries, None, 0, len(table.entries), self.geometry):
                if run.state is State.COMPRESSED:
                    start, length = self.geometry.compressed_extent(run.entry)
                    if low <= start + length - 1 >> bits < top:
                        one = compressed.get(start)
                        if one is None:
                            one = compressed[start] = Extent(start, length, start + length - 1 >> bits, [])
                        one.entries.append((offset, run.at))
                        kept += 1
                elif run.placed and not external:
                    first, stop = run.host >> bits, (run.host >> bits) + run.clusters
                    begin, end = max(first, low), min(stop, top)
                    if begin < end:
                        data.append(Reference(begin, end - begin, offset, run.at + begin - first))
                        kept += 1
            if kept > MAX_REFERENCES:
                low = self._middle(data, compressed, low)
                data = [_above(one, low) for one in data if one.first + one.clusters > low]
                compressed = {at: one for at, one in compressed.items() if one.last >= low}
                kept = len(data) + sum(len(one.entries) for one in compressed.values())
        data.sort()
        return Window(low, data, compressed)

    def _middle(self, data: list[Reference], compressed: dict[int, Extent], low: int) -> int:
        """A cluster above *low* behind which about half of the references point."""
        ends = [one.first + one.clusters - 1 for one in data]
        ends += [one.last for one in compressed.values()]
        ends.sort()
        return max(low + 1, ends[len(ends) // 2])

    # Data

    def _move_data(self, window: Window, tables: dict[int, int]) -> Iterator[Portion]:
        """The highest clusters first, in portions; within one they keep their order."""
        portion: list[Segment] = []
        count = 0
        for segment in self._segments(window, tables):
            rest = segment
            while rest.clusters:
                some = min(rest.clusters, self._portion - count)
                portion.append(_part(rest, rest.clusters - some, some))
                rest = _part(rest, 0, rest.clusters - some)
                count += some
                if count >= self._portion:
                    yield from self._data_portion(portion, count)
                    portion, count = [], 0
        if portion:
            yield from self._data_portion(portion, count)

    def _segments(self, window: Window, tables: dict[int, int]) -> Iterator[Segment]:
        """Clusters that can be moved, from the last one down: all their references are known."""
        for first, count, references in _overlaid(window.data):
            weight = sum(tables[one.table] for one in references)
            for start, some in self._equal(first, count, weight):
                yield Segment(start, some, weight, [_above(one, start) for one in references])

    def _equal(self, first: int, count: int, weight: int) -> Iterator[tuple[int, int]]:
        """The runs, from the last one down, of clusters with the refcount *weight*; others have more references."""
        stop = first + count
        end = stop
        while stop > first:
            if self.refcounts.get(stop - 1) != weight:
                if stop < end:
                    yield stop, end - stop
                end = stop - 1
            stop -= 1
        if first < end:
            yield first, end - first

    def _data_portion(self, segments: list[Segment], count: int) -> Iterator[Portion]:
        places = self._take(count)
        if not places:
            return
        segments.sort(key=lambda one: one.first)
        # Without enough places the lowest ones stay.
        missing = count - sum(length for _, length in places)
        pairs: list[tuple[Segment, int]] = []
        at = 0
        for segment in segments:
            if missing:
                skip = min(missing, segment.clusters)
                missing -= skip
                segment = _part(segment, skip, segment.clusters - skip)
            while segment.clusters:
                first, length = places[at]
                some = min(length, segment.clusters)
                pairs.append((_part(segment, 0, some), first))
                segment = _part(segment, some, segment.clusters - some)
                places[at] = (first + some, length - some)
                if length == some:
                    at += 1
        encryption = self.image.encryption
        bits = self._bits
        # LUKS counts sectors by their place in the file: such data is decrypted and encrypted anew.
        storage = self.image.file if encryption is None or encryption.method != "luks" else encryption.storage(0, 0)
        moves = [Move(storage, one.first << bits, target << bits, one.clusters << bits) for one, target in pairs]
        yield Portion(_joined(moves), lambda: self._finish_data(pairs))

    def _finish_data(self, pairs: list[tuple[Segment, int]]) -> None:
        bits = self._bits
        for segment, target in pairs:
            self.refcounts.set_run(target, segment.clusters, segment.weight)
        self.refcounts.settle()
        changes: dict[int, list[tuple[int, int, int, int]]] = {}
        for segment, target in pairs:
            for one in segment.references:
                changes.setdefault(one.table, []).append((one.entry, segment.clusters, segment.first, target))
        for offset, found in changes.items():
            table = self._read_table(offset)
            for index, count, source, target in found:
                entries = table.entries
                old = range(source << bits, source + count << bits, self._size)
                if [entry & OFFSET_MASK for entry in entries[index : index + count]] != list(old):
                    raise self.store.error(f"L2 table at {offset:#x} changed while its clusters were moved")
                shift = target - source << bits
                entries[index : index + count] = array("Q", [e + shift for e in entries[index : index + count]])
                table.touch(index, index + count)
            self._write_table(table)
        self.store.barrier()
        self.image.tables.drop_clean()
        for segment, _ in pairs:
            self._forget(segment.first, segment.clusters)

    def _write_table(self, table: L2Table) -> None:
        grain = min(512, self.geometry.l2_entries)
        width = self._size // self.geometry.l2_entries
        low = table.low - table.low % grain
        self.store.write_words(table.offset + low * width, table.words(low, -(-table.high // grain) * grain))

    def _forget(self, first: int, count: int) -> None:
        """Nothing on disk points at these clusters any more."""
        self.refcounts.set_run(first, count, 0)
        self.image.allocator.lower(first)
        if self.refcounts.pressure:
            self.refcounts.settle()
            self.refcounts.trim()

    # Compressed clusters

    def _move_compressed(self, window: Window, tables: dict[int, int]) -> Iterator[Portion]:
        """Each on its own, one behind the other in the new clusters, across borders of those where they adjoin."""
        found = sorted(window.compressed.values(), reverse=True)
        following = 0
        portion: list[Extent] = []
        length = 0
        for one in found:
            # What the entry speaks of reaches to the end of a sector; where the next one begins it has surely ended.
            exact = min(one.length, following - one.offset) if following > one.offset else one.length
            following = one.offset
            portion.append(one._replace(length=exact))
            length += exact
            if length >= self._portion << self._bits:
                yield from self._compressed_portion(portion, length, tables)
                portion, length = [], 0
        if portion:
            yield from self._compressed_portion(portion, length, tables)

    def _compressed_portion(self, extents: list[Extent], length: int, tables: dict[int, int]) -> Iterator[Portion]:
        extents.reverse()
        # Small refcounts let few of them share a cluster.
        weights = sum(tables[table] for one in extents for table, _ in one.entries)
        places = self._take(max((length >> self._bits) + 2, -(-weights // self.geometry.refcount_max)))
        clusters = [first + number for first, count in places for number in range(count)]
        tail, used = self._tail
        if tail:
            clusters.insert(0, tail)
        pairs: list[tuple[Extent, int, int]] = []
        added: dict[int, int] = {}
        most, size, at = self.geometry.refcount_max, self._size, 0
        for one in extents:
            weight = sum(tables[table] for table, _ in one.entries)
            found = self._fit(clusters, at, used, one.length, most - weight, added)
            if found is None:
                continue
            at, used = found
            offset = (clusters[at] << self._bits) + used
            if offset >= one.offset:
                break  # only forwards: what is packed less densely than before is no gain
            pairs.append((one, offset, weight))
            for number in range(clusters[at], (offset + one.length - 1 >> self._bits) + 1):
                added[number] = added.get(number, 0) + weight
            used += one.length
            if used >= size:
                at, used = at + 1, used - size
        if used and at < len(clusters) and clusters[at] in added:
            self._tail = (clusters[at], used)
        elif pairs:
            self._tail = (0, 0)
        self._spare = sorted([*self._spare, *(one for one in clusters if one not in added and one != tail)])
        if pairs:
            moves = [Move(self.image.file, one.offset, target, one.length) for one, target, _ in pairs]
            yield Portion(_joined(moves), lambda: self._finish_compressed(pairs, added))

    def _fit(
        self, clusters: list[int], at: int, used: int, length: int, most: int, added: dict[int, int]
    ) -> tuple[int, int] | None:
        """Where *length* bytes fit: the number of one of *clusters*, from *at* on, and the offset in it.

        The first has *used* bytes; none of them may be counted more than *most* times so far.
        """
        mask = self.geometry.compressed_offset_mask
        while at < len(clusters):
            cluster = clusters[at]
            over = used + length > self._size
            adjoins = at + 1 < len(clusters) and clusters[at + 1] == cluster + 1
            counted = self.refcounts.get(cluster) + added.get(cluster, 0)
            if counted <= most and (not over or (adjoins and used + length <= 2 * self._size)):
                return (at, used) if (cluster << self._bits) + used + length - 1 <= mask else None
            at, used = at + 1, 0
        return None

    def _finish_compressed(self, pairs: list[tuple[Extent, int, int]], added: dict[int, int]) -> None:
        bits, geometry = self._bits, self.geometry
        for cluster, weight in added.items():
            # The first may have been used by the portion before.
            self.refcounts.set_run(cluster, 1, self.refcounts.get(cluster) + weight)
        self.refcounts.settle()
        changes: dict[int, list[tuple[int, int, int]]] = {}
        for one, target, _ in pairs:
            sectors = (target + one.length - 1 >> 9) - (target >> 9)
            entry = COMPRESSED | sectors << geometry.compressed_sectors_shift | target
            for where, index in one.entries:
                changes.setdefault(where, []).append((index, one.offset, entry))
        taken: dict[int, int] = {}
        for offset, found in changes.items():
            table = self._read_table(offset)
            for index, source, entry in found:
                former = table.entries[index]
                if geometry.compressed_extent(former)[0] != source:
                    raise self.store.error(f"L2 table at {offset:#x} changed while its clusters were moved")
                table.entries[index] = entry
                table.touch(index, index + 1)
            self._write_table(table)
        self.store.barrier()
        self.image.tables.drop_clean()
        for one, _, weight in pairs:
            for number in range(one.offset >> bits, one.last + 1):
                taken[number] = taken.get(number, 0) + weight
        for cluster, weight in sorted(taken.items()):
            left = self.refcounts.get(cluster) - weight
            if left < 0:
                raise self.store.error(f"cluster {cluster} has fewer references than point at it")
            self.refcounts.set_run(cluster, 1, left)
            self.image.allocator.lower(cluster)

    # L2 tables

    def _move_l2(self, low: int, top: int, tables: dict[int, int]) -> Iterator[Portion]:
        bits = self._bits
        wanted = sorted(
            offset
            for offset, weight in tables.items()
            if low <= offset >> bits < top and self.refcounts.get(offset >> bits) == weight
        )
        while wanted:
            some = wanted[-self._portion :]
            del wanted[-self._portion :]
            places = [first + number for first, count in self._take(len(some)) for number in range(count)]
            if not places:
                return
            pairs = dict(zip(some[-len(places) :], places, strict=True))
            moves = [Move(self.image.file, offset, place << bits, self._size) for offset, place in pairs.items()]
            yield Portion(_joined(moves), lambda pairs=pairs: self._finish_l2(pairs, tables))  # type: ignore[misc]

    def _finish_l2(self, pairs: dict[int, int], tables: dict[int, int]) -> None:
        image, bits = self.image, self._bits
        for offset, place in pairs.items():
            self.refcounts.set_run(place, 1, tables[offset])
        self.refcounts.settle()
        image.tables.drop_clean()
        active: set[int] = set()
        for l1, where, own in self._l1_tables():
            for index, entry in enumerate(l1):
                place = pairs.get(entry & OFFSET_MASK, -1)
                if place >= 0:
                    if own:
                        active.add(entry & OFFSET_MASK)
                    l1[index] = entry & ~OFFSET_MASK | place << bits
                    self.store.write_words(where, l1, index, index + 1)
        self.store.barrier()
        for offset, place in pairs.items():
            self._forget(offset >> bits, 1)
            image.metadata.remove(offset >> bits, 1)
            image.metadata.add(place, 1, ACTIVE_L2 if offset in active else INACTIVE_L2)

    def _drop_empty_tables(self) -> None:
        """L2 tables of the active L1 table, shared with no snapshot, in which nothing is."""
        image = self.image
        if self.geometry.external:
            return
        # Without a backing image, what is not there reads as zeroes too.
        word = ZERO if image.backing_reference is None and not self.geometry.extended else 0
        size = self.geometry.l2_entries
        for index, entry in enumerate(image.tables.l1):
            if not entry & COPIED or not entry & OFFSET_MASK:
                continue
            table = image.tables.get(index)
            assert table is not None
            entries = table.entries
            if entries.count(0) + (entries.count(word) if word else 0) != size:
                continue
            if table.bitmaps is not None and any(table.bitmaps) and image.backing_reference is not None:
                continue
            image.tables.remove(index)
            image.order.relieve()

    # Refcount structures

    def _drop_empty_blocks(self) -> None:
        """Refcount blocks behind all that is in use that count nothing, or nothing but themselves."""
        image, refcounts, bits = self.image, self.refcounts, self._bits
        for index in range(len(refcounts.table) - 1, 0, -1):
            block = refcounts.block(index)
            if block is None:
                continue
            own = block.offset >> bits
            within = own >> self.geometry.refblock_bits == index
            used = len(block.counts) - block.counts.count(0)
            if used > within:
                return
            refcounts.settle()
            refcounts.drop(index)
            self.store.write_words(self.store.header.refcount_table_offset, refcounts.table, index, index + 1)
            self.store.barrier()
            image.metadata.remove(own, 1)
            if not within:
                self._forget(own, 1)
            refcounts.settle()

    def _move_blocks(self) -> None:
        refcounts, bits = self.refcounts, self._bits
        for index in range(len(refcounts.table) - 1, -1, -1):
            block = refcounts.block(index)
            if block is None or block.offset >> bits < self._limit:
                continue
            old = block.offset >> bits
            place = next(iter(self._take(1)), None)
            if place is None:
                return
            first = place[0]
            # Counted before anything points there, the block's own counts included.
            refcounts.set_run(first, 1, 1)
            refcounts.settle()
            self.store.write(first << bits, self.store.file.pread(old << bits, self._size))
            self.store.barrier()
            refcounts.table[index] = first << bits
            self.store.write_words(self.store.header.refcount_table_offset, refcounts.table, index, index + 1)
            self.store.barrier()
            block.offset = first << bits
            self.image.metadata.remove(old, 1)
            self.image.metadata.add(first, 1, REFCOUNT_BLOCK)
            self._forget(old, 1)
            refcounts.settle()

    def _move_refcount_table(self) -> None:
        header = self.store.header
        count = header.refcount_table_clusters
        old = header.refcount_table_offset >> self._bits
        if old + count <= self._limit:
            return
        place = self._row(count, old)
        if place is not None:
            self.image.allocator.move_table(place)
            self.refcounts.settle()

    # Tables of several clusters

    def _move_l1(self) -> None:
        image, store, header = self.image, self.store, self.store.header
        l1, bits = image.tables.l1, self._bits
        count = -(-len(l1) * 8 >> bits)
        old = header.l1_table_offset >> bits
        if not count or old + count <= self._limit:
            return
        place = self._row(count, old)
        if place is None:
            return
        self.refcounts.set_run(place, count, 1)
        store.write(place << bits, bytes(count << bits))
        store.write_words(place << bits, l1)
        self.refcounts.settle()
        store.barrier()
        header.l1_table_offset = place << bits
        store.write_header("l1_table_offset")
        store.barrier()
        image.metadata.remove(old, count)
        image.metadata.add(place, count, ACTIVE_L1)
        self._forget(old, count)
        self.refcounts.settle()

    def _move_snapshots(self) -> None:
        """The snapshots' L1 tables that lie behind the limit, and with them, or by itself, the list that names them."""
        image, store, bits = self.image, self.store, self._bits
        table = image.snapshot_table
        if not table.entries:
            return
        places: list[tuple[int, int, int]] = []
        entries: list[Snapshot] = []
        for one in table.entries:
            count, old = -(-one.head.l1_size * 8 >> bits), one.head.l1_table_offset >> bits
            place = None
            if count and old + count > self._limit and one.head.l1_size * 8 <= MAX_L1_BYTES:
                place = self._row(count, old)
            if place is None:
                entries.append(one)
                continue
            self.refcounts.set_run(place, count, 1)
            store.write(place << bits, store.file.pread(old << bits, count << bits))
            head = SnapshotHead.parse(one.head.pack())
            head.l1_table_offset = place << bits
            entries.append(one._replace(head=head))
            places.append((place, old, count))
        start = store.header.snapshots_offset >> bits
        if not places and start + (-(-table.length >> bits)) <= self._limit:
            return
        self.refcounts.settle()
        store.barrier()
        image.allocator.start_at(0)
        first, count = switch_snapshots(image, prepare_snapshots(image, entries))
        for place, old, length in [*places, (-1, first, count)]:
            image.metadata.remove(old, length)
            if place >= 0:
                image.metadata.add(place, length, INACTIVE_L1)
            self._forget(old, length)
        self.refcounts.settle()


def _above(one: Reference, low: int) -> Reference:
    """The part of a reference that is about clusters from *low* on."""
    skip = max(0, low - one.first)
    return Reference(one.first + skip, one.clusters - skip, one.table, one.entry + skip)


def _part(segment: Segment, skip: int, count: int) -> Segment:
    """*count* clusters of *segment* behind its first *skip*."""
    first = segment.first + skip
    return Segment(first, count, segment.weight, [_above(one, first) for one in segment.references])


def _overlaid(references: list[Reference]) -> Iterator[tuple[int, int, list[Reference]]]:
    """(first, count, references) of clusters at which the same *references* (sorted) point, the last ones first."""
    borders = sorted({one.first for one in references} | {one.first + one.clusters for one in references})
    found = sorted(references, key=lambda one: one.first + one.clusters)
    active: list[Reference] = []
    for number in range(len(borders) - 1, 0, -1):
        low, high = borders[number - 1], borders[number]
        while found and found[-1].first + found[-1].clusters >= high:
            active.append(found.pop())
        active = [one for one in active if one.first < high]
        if active:
            yield low, high - low, active[:]


def _joined(moves: list[Move]) -> list[Move]:
    """Moves made one where they adjoin at both ends."""
    joined: list[Move] = []
    for move in moves:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.storage is move.storage
            and last.source + last.length == move.source
            and last.target + last.length == move.target
        ):
            joined[-1] = last._replace(length=last.length + move.length)
        else:
            joined.append(move)
    return joined
