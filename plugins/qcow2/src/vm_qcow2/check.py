"""Checking an image, and repairing it.

Every reference to a host cluster is counted anew – header, refcount structures, L1 and L2 tables of the image and of
its snapshots, data, bitmaps – and compared with the refcounts. A refcount too high is a *leak*: space lost, nothing
else. One too low is a *corruption*: the cluster could be given to something else. So is a COPIED bit that contradicts
the refcount (only in the active tables; elsewhere it means nothing), and an entry that points to where nothing can be.

Repair sets refcounts to what was counted (``leaks``: only downwards) and sets the COPIED bits. Where the refcount
structures themselves cannot be used – a block is missing, lies outside the file or on something else –, all of them are
made anew (``rebuild.py``). It never touches what a guest sees.

What is told, its order and its words are QEMU's.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vm_core.block import notices
from vm_core.block.structs import Record, u8, u16, u32, u64
from vm_core.block.tables import load
from vm_core.errors import BlockError

from . import extensions, features, scattered
from .entries import ALL_ALLOCATED, Run, State, all_runs
from .geometry import COMPRESSED, COPIED, L1_RESERVED, L2_RESERVED, MAX_L1_BYTES, OFFSET_MASK, ZERO
from .references import PIECE, PIECE_BITS, References
from .tables import L2Table

if TYPE_CHECKING:
    from .image import Qcow2
    from .refcounts import RefcountBlock

#: Sound L2 tables whose runs are kept, in case a snapshot shares them.
KEPT_TABLES = 1024
#: Runs of an active L2 table that are kept until its COPIED bits are looked at.
FEW_RUNS = 16
#: Bits of refcounts that no image's references reach, so that the order of counting cannot be seen.
MANY = 16
#: Entries of all snapshots' L1 tables together that are looked at.
MAX_SNAPSHOT_ENTRIES = 1 << 28

#: No file has anything past this; a read there fails, where one past a shorter file's end gives zeroes.
_FARTHEST = (1 << 63) - (1 << 30)
#: Findings that are kept to be returned; with more, those before are told at once.
MAX_MESSAGES = 10_000


class Result:
    """What a check found, in QEMU's words (ImageCheck)."""

    def __init__(self, image: Qcow2) -> None:
        self.corruptions = 0
        self.leaks = 0
        self.check_errors = 0
        self.corruptions_fixed = 0
        self.leaks_fixed = 0
        self.allocated = 0
        self.compressed = 0
        self.fragmented = 0
        self.end = 0
        self.total = -(-image.size >> image.geometry.cluster_bits)

    def report(self) -> dict[str, Any]:
        """The shape of ImageCheck."""
        data: dict[str, Any] = {
            "check-errors": self.check_errors,
            "image-end-offset": self.end,
            "total-clusters": self.total,
            "allocated-clusters": self.allocated,
            "fragmented-clusters": self.fragmented,
            "compressed-clusters": self.compressed,
        }
        for name, value in (
            ("corruptions", self.corruptions),
            ("leaks", self.leaks),
            ("corruptions-fixed", self.corruptions_fixed),
            ("leaks-fixed", self.leaks_fixed),
        ):
            if value:
                data[name] = value
        return data


def check(image: Qcow2, *, repair: str = "", live: bool = False) -> dict[str, Any]:
    """Check *image* and repair it as asked; the result is in the shape of ImageCheck.

    With ``messages``, one sentence for each finding, in order; or, if *live*, each is told at once.
    Nobody else uses the image meanwhile. Raises BlockError where it cannot be checked.
    """
    image.store.check_writable()
    if live:
        return _check(image, repair).report()
    messages: list[str] = []
    former = notices.sink

    def keep(text: str) -> None:
        if len(messages) >= MAX_MESSAGES:
            notices.sink = former
            for line in messages:
                notices.notice(line)
            notices.sink = keep
            messages.clear()
        messages.append(text)

    notices.sink = keep
    try:
        result = _check(image, repair)
    except BaseException:
        notices.sink = former
        for line in messages:
            notices.notice(line)
        raise
    finally:
        notices.sink = former
    data = result.report()
    data["messages"] = messages
    return data


def _check(image: Qcow2, repair: str) -> Result:
    from .snapshots import check_snapshots, repair_snapshots

    store = image.store
    if not image.readonly:
        image.order.write_back()
        image.refcounts.settle()
    said, broken = check_snapshots(image, repair=repair == "all")
    for text in said:
        notices.notice(text)
    checker = _Checker(image, repair)
    result = checker.run()
    if broken and repair == "all" and not store.corrupt:
        repair_snapshots(image)
        result.corruptions_fixed += broken
    else:
        result.corruptions += broken
    if repair and not result.check_errors and not result.corruptions:
        store.check_writable()
        header = store.header
        clean = header.incompatible_features & ~(features.DIRTY | features.CORRUPT)
        if clean != header.incompatible_features:
            header.incompatible_features = clean
            store.write_header("incompatible_features")
            store.barrier()
    return result


class _Checker:
    """One check of an image."""

    def __init__(self, image: Qcow2, repair: str) -> None:
        self.image = image
        self.store = image.store
        self.geometry = image.geometry
        #: Whether corruptions, and leaks, are to be mended.
        self.fix_errors = repair == "all"
        self.fix_leaks = repair in ("all", "leaks")
        self.result = Result(image)
        self.references = References(image.store)
        #: The refcount structures have to be made anew.
        self.rebuild = False
        #: What points at clusters and cannot be read: they look like leaks.
        self._unread = ""
        self._highest = 0
        #: Sound L2 tables by offset: what each of their runs takes.
        self._sound: OrderedDict[int, list[tuple[int, int]]] = OrderedDict()
        #: Active L2 tables by offset, if they have few runs.
        self._active: dict[int, list[Run]] = {}

    def run(self) -> Result:
        result = self.result
        self._count_all()
        before = result.corruptions, result.leaks
        self._compare(fix_errors=False, fix_leaks=False)
        if self.rebuild and self.fix_errors:
            self._rebuild()
        elif self.fix_leaks:
            if self.rebuild:
                notices.notice("ERROR need to rebuild refcount structures")
                raise BlockError.of(errno.EIO, "the refcount structures have to be made anew, which -r all does")
            if self._unread and result.leaks:
                self.fix_leaks = False
                notices.notice(f"Leaked clusters are left alone: they may be those of {self._unread}")
            if result.leaks or result.corruptions:
                result.corruptions, result.leaks = before
                self._compare(fix_errors=self.fix_errors, fix_leaks=self.fix_leaks)
                self._settle()
        self._check_copied()
        result.end = self._highest + 1 << self.geometry.cluster_bits
        return result

    def _settle(self) -> None:
        if not self.store.corrupt:
            self.image.refcounts.settle()

    def _rebuild(self) -> None:
        from .rebuild import rebuild

        result = self.result
        notices.notice("Rebuilding refcount structure")
        rebuild(self.image, self.references)
        former = result.corruptions, result.leaks
        # Counted anew with the new structures; what they replace is leaked now.
        self.result = fresh = Result(self.image)
        fresh.check_errors = result.check_errors
        fresh.corruptions_fixed, fresh.leaks_fixed = result.corruptions_fixed, result.leaks_fixed
        self.references = References(self.store)
        self.rebuild = False
        self.fix_errors = False
        self._sound.clear()
        self._active.clear()
        self._count_all()
        self.fix_errors = True
        kept = fresh.corruptions, fresh.leaks, fresh.corruptions_fixed, fresh.leaks_fixed
        self._compare(fix_errors=False, fix_leaks=True)
        if self.rebuild:
            notices.notice("ERROR rebuilt refcount structure is still broken")
        fresh.corruptions, fresh.leaks, fresh.corruptions_fixed, fresh.leaks_fixed = kept
        self._settle()
        fresh.corruptions_fixed += max(0, former[0] - fresh.corruptions)
        fresh.leaks_fixed += max(0, former[1] - fresh.leaks)
        result.__dict__.update(fresh.__dict__)
        self.result = result

    def _corruption(self, text: str) -> None:
        self.result.corruptions += 1
        notices.notice(text)

    # Counting

    def _count_all(self) -> None:
        image, header = self.image, self.store.header
        entries = image.snapshot_table.entries
        self._count(0, self.geometry.cluster_size)
        self._count_l1(header.l1_table_offset, image.tables.l1, active=True)
        if self.geometry.external and entries:
            self._corruption("ERROR snapshots in image with data file")
        total = 0
        for one in entries:
            name = f"snapshot {one.id} ({one.name})"
            where = f"ERROR {name}"
            offset, size = one.head.l1_table_offset, one.head.l1_size
            if offset & self.geometry.cluster_size - 1 or offset + size * 8 > self.store.file.size:
                self._unread = name
            if offset & self.geometry.cluster_size - 1:
                self._corruption(
                    f"{where} l1_offset={offset:#x}: L1 table is not cluster aligned; snapshot table entry corrupted"
                )
            elif size * 8 > MAX_L1_BYTES:
                self._corruption(f"{where} l1_size={size:#x}: L1 table is too large; snapshot table entry corrupted")
            else:
                if offset + size * 8 > _FARTHEST:
                    # Taken for an empty table, all the snapshot's data would be leaked, and so free.
                    self._count(offset, size * 8)
                    notices.notice("ERROR: I/O error in check_refcounts_l1")
                    raise BlockError.of(errno.EIO, f"the L1 table of {name} is in no file")
                total += size
                if total > MAX_SNAPSHOT_ENTRIES:
                    raise self.store.error("the snapshots have more L2 tables than can be checked")
                inside = max(0, min(size, (self.store.file.size - offset) // 8))
                l1 = load("Q", self.store.file.pread(offset, inside * 8), "big")
                self._count_l1(offset, l1, active=False, size=size)
        self._count(header.snapshots_offset, image.snapshot_table.length)
        self._count(header.refcount_table_offset, header.refcount_table_clusters << self.geometry.cluster_bits)
        self._count_encryption_header()
        self._count_bitmaps()
        self._count_refcount_blocks()

    def _count(self, offset: int, length: int) -> None:
        """Count the clusters of a range."""
        if not length:
            return
        bits = self.geometry.cluster_bits
        if offset + length - self.store.file.size >= 1 << bits:
            self._corruption(
                "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
                f"offset {offset:#x} size {length:#x}"
            )
            return
        first = offset >> bits
        self._add(first, (offset + length - 1 >> bits) - first + 1)

    def _add(self, first: int, count: int) -> None:
        for cluster in self.references.add(first, count):
            self._corruption(f"ERROR: overflow cluster offset={cluster << self.geometry.cluster_bits:#x}")
            notices.notice(
                "Use qemu-img amend to increase the refcount entry width or qemu-img convert to create a clean copy if "
                "the image cannot be opened for writing"
            )

    def _count_l1(self, offset: int, l1: array[int], *, active: bool, size: int | None = None) -> None:
        size = len(l1) if size is None else size
        if not size:
            return
        self._count(offset, size * 8)
        for entry in l1:
            if not entry:
                continue
            if entry & L1_RESERVED:
                self._corruption(f"ERROR found L1 entry with reserved bits set: {entry:x}")
            table = entry & OFFSET_MASK
            self._count(table, self.geometry.cluster_size)
            if table & self.geometry.cluster_size - 1 or table >= self.store.file.size:
                self._unread = f"the L2 table at {table:#x}"
            if table & self.geometry.cluster_size - 1:
                self._corruption(f"ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted")
            self._count_l2(table, active=active)

    def _count_l2(self, offset: int, *, active: bool) -> None:
        """Count what an L2 table points at. Past the end of the file there are zeroes."""
        geometry = self.geometry
        size = geometry.cluster_size
        if not active:
            known = self._sound.get(offset)
            if known is not None:
                for first, count in known:
                    self._add(first, count)
                return
        if offset >= self.store.file.size:
            return
        words = load("Q", self.store.file.pread(offset, size), "big")
        table = L2Table.of_words(offset, words, linked=True, extended=geometry.extended)
        found = self.result.corruptions
        taken: list[tuple[int, int]] = []
        for first, count in self._taken(table, active):
            taken.append((first, count))
            self._add(first, count)
        if found == self.result.corruptions and self.image.snapshot_table.entries:
            self._sound[offset] = taken
            if len(self._sound) > KEPT_TABLES:
                self._sound.popitem(last=False)

    def _taken(self, table: L2Table, active: bool) -> Iterator[tuple[int, int]]:
        """(first, count) of the clusters at which a table points."""
        geometry, result = self.geometry, self.result
        bits, mask = geometry.cluster_bits, geometry.cluster_size - 1
        size = self.store.file.size
        entries, bitmaps = table.entries, table.bitmaps
        expected = 0
        changed: list[int] = []
        plain = scattered.plain_entries(entries, geometry) if geometry.refcount_bits >= MANY else None
        if plain is not None:
            hosts = [entry & OFFSET_MASK for entry in plain]
            if max(hosts) < size:
                if active:
                    result.allocated += len(hosts)
                    result.fragmented += scattered.jumps(hosts, geometry)
                yield from scattered.clusters(hosts, geometry)
                return
        found = all_runs(entries, None, 0, len(entries), geometry)
        if active and len(found) <= FEW_RUNS:
            self._active[table.offset] = found
        for run in found:
            state = run.state
            if run.entry & L2_RESERVED and state is not State.COMPRESSED:
                for entry in entries[run.at : run.at + run.clusters]:
                    self._corruption(f"ERROR found l2 entry with reserved bits set: {entry:x}")
            if bitmaps is not None:
                self._check_bitmaps(run, entries, bitmaps)
            if state is State.COMPRESSED:
                entry = run.entry
                start, length = geometry.compressed_extent(entry)
                if entry & COPIED:
                    self._corruption(
                        f"ERROR: coffset={start:#x}: copied flag must never be set for compressed clusters"
                    )
                    entry &= ~COPIED
                if geometry.external:
                    self._corruption(f"ERROR compressed cluster {run.at} with data file, entry={entry:#x}")
                    continue
                if bitmaps is not None and bitmaps[run.at]:
                    self._corruption(
                        f"ERROR compressed cluster {run.at} with non-zero subcluster allocation bitmap, "
                        f"entry={entry:#x}"
                    )
                    continue
                if start + length - size > mask:
                    self._count(start, length)
                else:
                    yield start >> bits, (start + length - 1 >> bits) - (start >> bits) + 1
                if active:
                    result.allocated += 1
                    result.compressed += 1
                    result.fragmented += 1
            elif run.placed:
                if active:
                    result.allocated += run.clusters
                    if expected and run.host != expected:
                        result.fragmented += 1
                    expected = run.host + (run.clusters << bits)
                if geometry.external:
                    continue
                inside = max(0, min(run.clusters, size - run.host + mask >> bits))
                if inside:
                    yield run.host >> bits, inside
                for position in range(inside, run.clusters):
                    self._count(run.host + (position << bits), mask + 1)
            elif state is State.BAD:
                host = run.entry & OFFSET_MASK
                if geometry.version < 3 and run.entry & ZERO and not host & mask:
                    # Version 2 knows no zero clusters; what is set aside is counted.
                    if host:
                        self._count(host, mask + 1)
                    continue
                data = bitmaps[run.at] & ALL_ALLOCATED if bitmaps is not None else not run.entry & ZERO
                if not data:
                    word = "Repairing" if self.fix_errors else "ERROR"
                    self._corruption(
                        f"{word} offset={host:x}: Preallocated cluster is not properly aligned; L2 entry corrupted."
                    )
                    if self.fix_errors:
                        entries[run.at] = 0 if bitmaps is not None else ZERO
                        changed.append(run.at)
                        result.corruptions -= 1
                        result.corruptions_fixed += 1
                        continue
                else:
                    self._corruption(
                        f"ERROR offset={host:x}: Data cluster is not properly aligned; L2 entry corrupted."
                    )
                if active:
                    result.allocated += 1
                    if expected and host != expected:
                        result.fragmented += 1
                    expected = host + mask + 1
                if not geometry.external:
                    self._count(host, mask + 1)
        for index in changed:
            self._active.pop(table.offset, None)
            self._write_entry(table, index)

    def _write_entry(self, table: L2Table, index: int) -> None:
        """Put a mended entry on disk, and into the cached table if there is one."""
        width = 16 if table.bitmaps is not None else 8
        self.store.write_words(table.offset + index * width, table.words(index, index + 1))
        self.image.tables.drop_clean()

    def _check_bitmaps(self, run: Run, entries: array[int], bitmaps: array[int]) -> None:
        """The allocation bitmaps of a run of extended entries."""
        if run.state is State.COMPRESSED:
            return
        part = bitmaps[run.at : run.at + run.clusters]
        uniform = part == array("Q", part[:1]) * run.clusters
        for position, bitmap in enumerate(part[:1] if uniform else part):
            if run.state is State.UNALLOCATED:
                if bitmap & ALL_ALLOCATED:
                    for _ in range(run.clusters if uniform else 1):
                        self._corruption("ERROR: Unallocated cluster has non-zero subcluster allocation map")
            elif bitmap >> 32 & bitmap:
                for index in range(run.at, run.at + run.clusters) if uniform else (run.at + position,):
                    self._corruption(
                        f"ERROR offset={entries[index] & OFFSET_MASK:x}: Allocated cluster has corrupted subcluster "
                        "allocation bitmap"
                    )

    def _count_encryption_header(self) -> None:
        if self.store.header.crypt_method:
            from .encryption import check_extension

            pointer = check_extension(self.store.header, self.image.extensions, self.store.name)
            if pointer is not None:
                self._count(pointer.offset, pointer.length)

    def _count_bitmaps(self) -> None:
        """Clusters of persistent bitmaps, if their extension says that they are valid."""
        if not self.store.header.autoclear_features & features.BITMAPS:
            return
        data = extensions.find(self.image.extensions, extensions.BITMAPS)
        if data is None:
            return
        extension = extensions.BitmapsExtension.parse(data)
        if extension.directory_size > 64 << 20:
            self._corruption(f"ERROR bitmap directory of {extension.directory_size} bytes")
            return
        self._count(extension.directory_offset, extension.directory_size)
        inside = max(0, min(extension.directory_size, self.store.file.size - extension.directory_offset))
        directory = self.store.file.pread(extension.directory_offset, inside)
        position = 0
        for _ in range(extension.nb_bitmaps):
            if position + BitmapEntry.LENGTH > len(directory):
                self._corruption("ERROR the bitmap directory is shorter than its bitmaps")
                return
            entry = BitmapEntry.parse(directory, position)
            position += BitmapEntry.LENGTH + entry.extra_size + entry.name_size + 7 & ~7
            if entry.table_size > 32 << 17:
                self._corruption(f"ERROR bitmap table of {entry.table_size} entries")
                continue
            self._count(entry.table_offset, entry.table_size * 8)
            if entry.table_offset + entry.table_size * 8 > self.store.file.size:
                continue
            for word in load("Q", self.store.file.pread(entry.table_offset, entry.table_size * 8), "big"):
                if word & OFFSET_MASK:
                    self._count(word & OFFSET_MASK, self.geometry.cluster_size)

    def _count_refcount_blocks(self) -> None:
        """Last, so that a block on top of something else is the one that is found wrong."""
        size = self.geometry.cluster_size
        table = self.image.refcounts.table
        references = self.references
        for index, entry in enumerate(table):
            if not entry:
                continue
            offset = entry & ~511
            cluster = offset >> self.geometry.cluster_bits
            if entry & 511:
                self._corruption(f"ERROR refcount table entry {index} has reserved bits set")
                self.rebuild = True
            elif offset & size - 1:
                self._corruption(f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted")
                self.rebuild = True
            elif cluster >= references.clusters:
                word = "Repairing" if self.fix_errors else "ERROR"
                self._corruption(f"{word} refcount block {index} is outside image")
                if self.fix_errors:
                    self._bring_inside(offset)
            else:
                self._add(cluster, 1)
                count = references.get(cluster)
                if count != 1:
                    self._corruption(f"ERROR refcount block {index} refcount={count}")
                    self.rebuild = True

    def _bring_inside(self, offset: int) -> None:
        """Let the file reach over a refcount block, which is empty then."""
        end = offset + self.geometry.cluster_size
        try:
            if end >= 1 << 63:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            self.store.file.truncate(end)
        except OSError as error:
            self.rebuild = True
            notices.notice(f"ERROR could not resize image: {os.strerror(error.errno or errno.EIO)}")
            return
        self.result.corruptions -= 1
        self.result.corruptions_fixed += 1
        self._add(offset >> self.geometry.cluster_bits, 1)

    # Comparing

    def _compare(self, *, fix_errors: bool, fix_leaks: bool) -> None:
        """Tell where refcounts and references differ, and mend the refcounts as far as that is wanted."""
        result, refcounts = self.result, self.image.refcounts
        discarded: list[int] = []
        self._highest = 0
        for cluster, have, want in self._differences():
            if have < 0:
                notices.notice(f"Can't get refcount for cluster {cluster}: {os.strerror(-have)}")
                result.check_errors += 1
                continue
            fix = False
            if not have:
                self.rebuild = True
            elif have > want:
                fix = fix_leaks
            else:
                fix = fix_errors
            word = "Repairing" if fix else "ERROR" if have < want else "Leaked"
            notices.notice(f"{word} cluster {cluster} refcount={have} reference={want}")
            if fix:
                refcounts.set_run(cluster, 1, want)
                if have > want:
                    result.leaks_fixed += 1
                    if not want:
                        discarded.append(cluster)
                else:
                    result.corruptions_fixed += 1
            elif have < want:
                result.corruptions += 1
            else:
                result.leaks += 1
        if discarded:
            self._settle()
            self._discard(discarded)

    def _discard(self, clusters: list[int]) -> None:
        """Give the space of leaked clusters back to the host."""
        bits = self.geometry.cluster_bits
        first = last = -1
        for cluster in [*clusters, -1]:
            if cluster == last + 1 and first >= 0:
                last = cluster
                continue
            if first >= 0:
                self.store.discard(first << bits, last - first + 1 << bits)
            first = last = cluster
        self.image.allocator.lower(clusters[0])

    def _differences(self) -> Iterator[tuple[int, int, int]]:
        """(cluster, refcount, references) where the two differ, in order; :attr:`_highest` follows what is in use.

        A refcount that cannot be read is told as a negative errno.
        """
        references, refcounts = self.references, self.image.refcounts
        per_block = self.geometry.refblock_entries
        numbers = set(references.pieces())
        end = references.clusters
        pieces = -(-end // PIECE)
        for index, offset in enumerate(refcounts.table):
            if offset:
                start = index * per_block
                if start >= end:
                    break
                numbers.update(range(start >> PIECE_BITS, min(start + per_block - 1 >> PIECE_BITS, pieces - 1) + 1))
        for number in sorted(numbers):
            start = number << PIECE_BITS
            if start >= end:
                break
            length = min(PIECE, end - start)
            have: array[int] | list[int] = self._counts(start, length)
            want = references.piece(number)[:length]
            if type(have) is array:
                used = have if have == want else array(want.typecode, [a | b for a, b in zip(have, want, strict=True)])
                data = used.tobytes().rstrip(b"\0")
                if data:
                    self._highest = start + (len(data) - 1) // used.itemsize
                if used is have:
                    continue
            for position in range(length):
                one, two = have[position], want[position]
                if one > 0 or two > 0:
                    self._highest = max(self._highest, start + position)
                if one != two:
                    yield start + position, one, two

    def _counts(self, start: int, length: int) -> array[int] | list[int]:
        """The refcounts of *length* clusters: an array, or numbers with negative errnos where they cannot be read."""
        refcounts = self.image.refcounts
        per_block = self.geometry.refblock_entries
        found: array[int] = array(self.references.code)
        failed: list[tuple[int, int, int]] = []
        position = start
        while position < start + length:
            index, low = divmod(position, per_block)
            step = min(start + length - position, per_block - low)
            block: RefcountBlock | None
            try:
                block = refcounts.block(index)
            except OSError as error:
                block = None
                failed.append((position - start, step, -(error.errno or errno.EIO)))
            if block is None:
                found.extend(array(found.typecode, bytes(step * found.itemsize)))
            else:
                found.extend(block.counts[low : low + step])
            position += step
        if not failed:
            return found
        numbers = found.tolist()
        for at, step, code in failed:
            numbers[at : at + step] = [code] * step
        return numbers

    # The bit that goes with refcounts

    def _check_copied(self) -> None:
        """Compare the COPIED bits of the active tables with the refcounts."""
        image, geometry, result = self.image, self.geometry, self.result
        refcounts, bits = image.refcounts, geometry.cluster_bits
        # Where leaks were all there was, mending them is what makes these bits wrong.
        clean = not (result.check_errors or result.corruptions or result.leaks)
        fix = self.fix_errors or (self.fix_leaks and clean)
        word = "Repairing" if fix else "ERROR"
        size = self.store.file.size
        header = self.store.header
        start = header.l1_table_offset >> bits
        own = range(start, start + -(-header.l1_size * 8 >> bits))
        for index, entry in enumerate(image.tables.l1):
            offset = entry & OFFSET_MASK
            if not offset:
                continue
            try:
                count = refcounts.get(offset >> bits)
            except OSError:
                continue
            if fix and offset >> bits in own:
                raise self.store.mark_corrupt("Preventing invalid write on metadata (overlaps with active L2 table)")
            if (count == 1) != bool(entry & COPIED):
                self._corruption(
                    f"{word} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} refcount={count}"
                )
                if fix:
                    image.tables.l1[index] = entry ^ COPIED
                    image.tables.changed.add(index)
                    result.corruptions -= 1
                    result.corruptions_fixed += 1
            if offset & geometry.cluster_size - 1 or offset + geometry.cluster_size > size:
                continue
            known = self._active.get(offset)
            if known is not None and self._all_right(known):
                continue
            table = image.tables.cached(index) or image.tables.read(offset, f"L2 table {index}")
            wrong = self._check_table(table, word)
            if fix and wrong:
                cached = image.tables.get(index)
                assert cached is not None
                for where in wrong:
                    cached.entries[where] ^= COPIED
                    cached.touch(where, where + 1)
                result.corruptions -= len(wrong)
                result.corruptions_fixed += len(wrong)
                image.order.relieve()
        if fix and not self.store.corrupt:
            image.order.write_back()

    def _all_right(self, known: list[Run]) -> bool:
        """Whether no COPIED bit of these runs is missing, and none is wrong."""
        bits, refcounts = self.geometry.cluster_bits, self.image.refcounts
        for run in known:
            if run.state is State.BAD:
                return False
            if run.placed:
                if not run.entry & COPIED:
                    return False
                if not self.geometry.external:
                    try:
                        if not refcounts.all_one(run.host >> bits, run.clusters):
                            return False
                    except OSError:
                        return False
        return True

    def _scattered_right(self, entries: array[int]) -> bool:
        """Whether this is a table of many short runs whose COPIED bits are all right."""
        geometry, refcounts = self.geometry, self.image.refcounts
        plain = scattered.plain_entries(entries, geometry)
        if plain is None:
            return False
        copied = [entry ^ COPIED for entry in plain if entry & COPIED]
        shared = [entry for entry in plain if not entry & COPIED]
        try:
            return all(refcounts.all_one(*run) for run in scattered.clusters(copied, geometry)) and not any(
                refcounts.any_one(*run) for run in scattered.clusters(shared, geometry)
            )
        except OSError:
            return False

    def _check_table(self, table: L2Table, word: str) -> list[int]:
        """Tell where the COPIED bits of an L2 table contradict the refcounts; returns the entries."""
        geometry, refcounts = self.geometry, self.image.refcounts
        bits = geometry.cluster_bits
        entries = table.entries
        if self._scattered_right(entries):
            return []
        wrong: list[int] = []
        for run in all_runs(entries, None, 0, len(entries), geometry):
            host = run.host
            if run.state is State.BAD and not run.entry & COMPRESSED:
                host = run.entry & OFFSET_MASK
                if not host:
                    continue
            elif not run.placed:
                continue
            copied = bool(run.entry & COPIED)
            try:
                if copied and (geometry.external or refcounts.all_one(host >> bits, run.clusters)):
                    continue
            except OSError:
                pass
            for position in range(run.clusters):
                try:
                    count = 1 if geometry.external else refcounts.get((host >> bits) + position)
                except OSError:
                    continue
                if (count == 1) != copied:
                    where = run.at + position
                    self._corruption(f"{word} OFLAG_COPIED data cluster: l2_entry={entries[where]:x} refcount={count}")
                    wrong.append(where)
        return wrong


class BitmapEntry(Record, order="big"):
    """An entry of the bitmap directory (*Bitmaps*); extra data and name follow."""

    table_offset: int = u64(0, doc="where the bitmap's table is; cluster-aligned")
    table_size: int = u32(8, doc="entries of that table")
    flags: int = u32(12, doc="bit 0 in use, bit 1 auto")
    type: int = u8(16, doc="1: dirty tracking")
    granularity_bits: int = u8(17, doc="log2 of the bytes a bit stands for")
    name_size: int = u16(18, doc="bytes of the name")
    extra_size: int = u32(20, doc="bytes of extra data")
