"""Changing the options of an image that is there (``qemu-img amend``).

Whatever else is asked for, an upgrade to version 3 comes first, since other changes may need it, and a downgrade last.
Every step leaves an image that opens and has its data: new structures are stable before a header in one sector switches
to them, and only then the old ones are given back. An interrupted step loses space at most.

* *Version 3 → 2*: zero clusters, which version 2 does not have, become clusters of zeroes or, where no backing image
  could show through, are taken away; in the tables of snapshots too. A table that several share is changed once.
* *Refcount width*: the blocks are written anew, elsewhere, which may need more of them to count themselves: the image
  is walked over until nothing more was needed, then once to write.
"""

from __future__ import annotations

from array import array
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vm_core.block.tables import dump
from vm_core.errors import ImageError, UsageError, VmError

from . import extensions, features
from .extensions import Extension
from .geometry import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from .header import MAX_BACKING_NAME, NEW_V3_LENGTH, V2_LENGTH, Header
from .recovery import give_back
from .refcounts import decode, encode
from .snapshots import MIN_EXTRA_BYTES, rewrite_snapshots
from .store import alternate
from .told import told

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vm_core.block.format import Progress

    from .image import Qcow2

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_NEWER = "compatibility level 1.1"
_HEADER_FAILED = "Failed to update the image header"
#: Clusters of zeroes that are taken at a time.
_PORTION = 4096
#: Smaller header clusters have no room to spare for the feature name table.
_FEATURE_TABLE_FROM = 8 << 10


class _Wanted:
    """What the options ask for; None: nothing."""

    def __init__(self, image: Qcow2, options: dict[str, Any]) -> None:
        header = image.header
        compat = options.pop("compat", None)
        if compat is not None and compat not in _VERSIONS:
            raise UsageError(f"Unknown compatibility level {compat}: there is {', '.join(_VERSIONS)}").put(
                f"Unknown compatibility level {compat}"
            )
        self.version = header.version if compat is None else _VERSIONS[compat]
        self.size: int | None = options.pop("size", None)
        self._check_backing(image, options.pop("backing_file", None), options.pop("backing_fmt", None))
        self.encrypt = {
            name.removeprefix("encrypt."): options.pop(name) for name in list(options) if name.startswith("encrypt.")
        }
        if self.encrypt and image.encryption is None:
            raise UsageError("Can't amend encryption options - encryption not present")
        if self.encrypt and image.encryption is not None and image.encryption.luks is None:
            raise UsageError("Only LUKS encryption options can be amended")
        self.lazy: bool | None = options.pop("lazy_refcounts", None)
        bits: int | None = options.pop("refcount_bits", None)
        if bits is not None and bits not in (1, 2, 4, 8, 16, 32, 64):
            raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
        self.bits = image.geometry.refcount_bits if bits is None else bits
        self.data_file: str | None = options.pop("data_file", None)
        if self.data_file is not None and not image.has_data_file:
            raise UsageError("data-file can only be set for images that use an external data file")
        self.raw: bool | None = options.pop("data_file_raw", None)
        if self.raw and not image.raw_data:
            raise UsageError("data-file-raw cannot be set on existing images")
        self.downgrade = self.version < header.version

    def _check_backing(self, image: Qcow2, name: str | None, format: str | None) -> None:
        """Only what the image records anyway may be given."""
        if name is None and format is None:
            return
        now = image.backing_reference
        if (name or "", format or "") != (("", "") if now is None else (now.filename, now.format or "")):
            raise UsageError("Cannot amend the backing file: use rebase instead").put(
                "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead."
            )


def amend(image: Qcow2, options: dict[str, Any], *, force: bool = False, progress: Progress | None = None) -> None:
    """Change what *options* (those of the descriptor's ``amend_options``) say. Raises UsageError, ImageError, OSError.

    *force* allows changes of keys that lose all data. Nobody else uses the image meanwhile.
    """
    image.store.check_writable()
    wanted = _Wanted(image, options)
    try:
        _amend(image, wanted, force, progress)
    except VmError:
        raise  # nothing was begun
    except BaseException:
        give_back(image)
        raise


def _amend(image: Qcow2, wanted: _Wanted, force: bool, progress: Progress | None) -> None:
    steps = _Steps(progress, (wanted.bits != image.geometry.refcount_bits) + wanted.downgrade)
    if wanted.version > image.header.version:
        upgrade(image)
    if wanted.encrypt:
        from .encryption import amend as amend_keys

        amend_keys(image, wanted.encrypt, force=force)
    if wanted.bits != image.geometry.refcount_bits:
        if image.header.version < 3:
            raise UsageError(
                f"Refcount widths other than 16 bits require {_NEWER} or above (use compat=1.1 or greater)"
            )
        if wanted.downgrade and wanted.bits != 16:
            raise UsageError(
                f"Refcount widths other than 16 bits require {_NEWER} or above (use compat=1.1 or greater)"
            )
        change_refcount_width(image, wanted.bits, steps.next())
    if wanted.raw is False and image.raw_data:
        flags = image.header.autoclear_features & ~features.RAW_DATA_FILE
        with told(_HEADER_FAILED):
            image.store.update_header("autoclear_features", autoclear_features=flags)
        image.raw_data = False
    if wanted.data_file is not None:
        _change_data_file(image, wanted.data_file)
    if wanted.lazy is not None and wanted.lazy != bool(image.header.compatible_features & features.LAZY_REFCOUNTS):
        _change_lazy(image, wanted)
    if wanted.size is not None:
        image.truncate(wanted.size)
    if wanted.downgrade:
        downgrade(image, steps.next())
    if progress is not None:
        progress(1, 1)


class _Steps:
    """Reports several long steps as one."""

    def __init__(self, progress: Progress | None, count: int) -> None:
        self._progress = progress
        self._count = max(count, 1)
        self._done = -1

    def next(self) -> Callable[[int, int], None]:
        """What reports the next step."""
        self._done += 1
        number = self._done

        def report(done: int, total: int) -> None:
            if self._progress is not None:
                self._progress(number * total + done, self._count * total)

        return report


# Small changes


def _change_data_file(image: Qcow2, name: str) -> None:
    data = name.encode("utf-8", "surrogateescape")
    if len(data) > MAX_BACKING_NAME:
        raise UsageError(f"data_file: the name has {len(data)} bytes, {MAX_BACKING_NAME} is the longest")
    others = [one for one in image.extensions if one.type != extensions.DATA_FILE_NAME]
    new = [Extension(extensions.DATA_FILE_NAME, data)] if data else []
    _write_header(image, _ordered([*others, *new]), image.header)


def _change_lazy(image: Qcow2, wanted: _Wanted) -> None:
    header = image.header
    # Before the image says that refcounts are never late they must not be.
    image.settle()
    flags = header.compatible_features & ~features.LAZY_REFCOUNTS
    if wanted.lazy:
        if header.version < 3 or wanted.version < 3:
            raise UsageError(f"Lazy refcounts only supported with {_NEWER} and above (use compat=1.1 or greater)")
        flags |= features.LAZY_REFCOUNTS
    with told(_HEADER_FAILED):
        image.store.update_header("compatible_features", compatible_features=flags)
    image.reload()


# Versions


def upgrade(image: Qcow2) -> None:
    """From version 2 to 3: a longer header, and what version 3 demands of snapshots."""
    image.settle()
    if any(one.head.extra_size < MIN_EXTRA_BYTES for one in image.snapshot_table.entries):
        rewrite_snapshots(image)
    header = Header.parse(image.header.pack()[:V2_LENGTH])
    header.version = 3
    header.header_length = NEW_V3_LENGTH
    found = [one for one in image.extensions if one.type != extensions.FEATURE_NAME_TABLE]
    if image.cluster_size >= _FEATURE_TABLE_FROM:
        found.append(Extension(extensions.FEATURE_NAME_TABLE, extensions.pack_feature_names(features.FEATURE_NAMES)))
    _write_header(image, _ordered(found), header)
    image.reload()


def downgrade(image: Qcow2, report: Callable[[int, int], None]) -> None:
    """From version 3 to 2. Raises UsageError where version 2 cannot hold the image."""
    header = image.header
    if image.has_data_file:
        raise UsageError("Cannot downgrade an image with a data file")
    if header.refcount_order != 4:
        raise UsageError("compat=0.10 requires refcount_bits=16")
    if any(one.vm_state_size >= 1 << 32 or one.disk_size != header.size for one in image.snapshot_table.entries):
        raise UsageError("Internal snapshots prevent downgrade of image")
    if header.incompatible_features & features.COMPRESSION_TYPE and _has_compressed(image):
        raise UsageError("Cannot downgrade an image with zstd compression type and existing compressed clusters")
    left = header.incompatible_features & ~(features.DIRTY | features.COMPRESSION_TYPE)
    if left:
        raise UsageError(f"Cannot downgrade an image with incompatible features {left:#x} set")
    for one in list(image.bitmaps()):
        image.bitmap_remove(one["name"])
    expand_zero_clusters(image, report)
    image.settle()
    older = Header.parse(header.pack()[:V2_LENGTH])
    older.version = 2
    found = [one for one in image.extensions if one.type not in (extensions.FEATURE_NAME_TABLE, extensions.BITMAPS)]
    _write_header(image, found, older)
    image.reload()


def _write_header(image: Qcow2, found: list[Extension], header: Header) -> None:
    from .headerarea import NoRoomError, write_area

    with told(_HEADER_FAILED):
        try:
            write_area(image, found, header=header)
        except NoRoomError as error:
            peer = f"{_HEADER_FAILED}: {error.strerror}"
            raise ImageError(
                image.store.name, "the header does not fit into its cluster any more", peer=peer
            ) from error


def _ordered(found: list[Extension]) -> list[Extension]:
    """Extensions in QEMU's order, unknown ones last."""
    known = (
        extensions.BACKING_FORMAT,
        extensions.DATA_FILE_NAME,
        extensions.ENCRYPTION_HEADER,
        extensions.FEATURE_NAME_TABLE,
        extensions.BITMAPS,
    )
    return sorted(found, key=lambda one: known.index(one.type) if one.type in known else len(known))


# Zero clusters


def _l1_tables(image: Qcow2) -> Iterator[array[int]]:
    """The active L1 table, then those of the snapshots."""
    yield image.tables.l1
    for one in image.snapshot_table.entries:
        problem = one.l1_problem(image.cluster_size)
        if problem is not None:
            problem.add_note(str(problem.strerror))
            raise problem
        yield image.store.read_words(one.head.l1_table_offset, one.head.l1_size, f"L1 table of snapshot '{one.name}'")


def _has_compressed(image: Qcow2) -> bool:
    image.order.write_back()
    seen: set[int] = set()
    for l1 in _l1_tables(image):
        for entry in l1:
            offset = entry & OFFSET_MASK
            if offset and offset not in seen:
                seen.add(offset)
                if any(word & COMPRESSED for word in image.tables.read(offset, "L2 table").entries):
                    return True
    return False


def expand_zero_clusters(image: Qcow2, report: Callable[[int, int], None]) -> None:
    """Do away with zero clusters in all L2 tables, of snapshots too. Raises BlockError."""
    with told("Failed to turn zero into data clusters"):
        _expand(image, report)


def _expand(image: Qcow2, report: Callable[[int, int], None]) -> None:
    image.order.write_back()
    image.refcounts.settle()
    image.tables.drop_clean()
    backed = image.backing_reference is not None
    tables = list(_l1_tables(image))
    total = sum([len(one) for one in tables])
    done = 0
    seen: set[int] = set()
    for l1 in tables:
        for index, entry in enumerate(l1):
            offset = entry & OFFSET_MASK
            if offset & image.cluster_size - 1:
                raise image.tables.unaligned(index, offset)
            if offset and offset not in seen:
                seen.add(offset)
                _expand_table(image, offset, index, backed)
            done += 1
            report(done, total)
    image.tables.drop_clean()


def _expand_table(image: Qcow2, offset: int, l1_index: int, backed: bool) -> None:
    """Do away with the zero clusters of the L2 table at *offset*, which several L1 tables may share."""
    geometry, store, allocator, refcounts = image.geometry, image.store, image.allocator, image.refcounts
    bits, size = geometry.cluster_bits, geometry.cluster_size
    entries = image.tables.read(offset, "L2 table").entries
    numbers = [number for number, word in enumerate(entries) if word & ZERO and not word & COMPRESSED]
    users = refcounts.get(offset >> bits)
    guest = l1_index << geometry.guest_bits
    for start in range(0, len(numbers), _PORTION):
        replaced: list[int] = []
        for number in numbers[start : start + _PORTION]:
            word = entries[number]
            host = word & OFFSET_MASK
            if host & size - 1:
                raise store.mark_corrupt(
                    f"Cluster allocation offset {host:#x} unaligned "
                    f"(L2 offset: {offset:#x}, L2 index: {alternate(number)})"
                )
            if not host and not backed:
                entries[number] = 0
                continue
            if host and refcounts.get(host >> bits) > users:
                # Another table has data there: it must not be overwritten.
                replaced.append(host >> bits)
                host = 0
            if not host:
                cluster = allocator.allocate(1)
                if users > 1:
                    refcounts.set_run(cluster, 1, users)
                host = cluster << bits
            image.storage(guest + (number << bits), host).zero(host, size)
            entries[number] = host | (COPIED if users == 1 else 0)
        refcounts.settle()
        store.barrier()
        store.write_words(offset, entries)
        store.barrier()
        for cluster in replaced:
            for _ in range(users):
                for freed in refcounts.decrement(cluster, 1):
                    allocator.lower(freed)
        refcounts.settle()


# The width of refcounts


def change_refcount_width(image: Qcow2, bits: int, report: Callable[[int, int], None]) -> None:
    """Let refcounts have *bits* bits. Raises ImageError where one of them is too large for that."""
    image.settle()
    change = _WidthChange(image, bits, report)
    try:
        change.plan()
        change.write()
    except BaseException:
        change.undo()
        raise
    former = change.former_clusters()
    with told("Failed to update the qcow2 header"):
        # All three are in the first sector.
        image.store.update_header(
            "refcount_table_offset",
            "refcount_order",
            refcount_table_offset=change.table_first << image.geometry.cluster_bits,
            refcount_table_clusters=change.table_clusters,
            refcount_order=bits.bit_length() - 1,
        )
    image.reload()
    with told("Failed to flush the refcount block cache"):
        for first, count in former:
            for freed in image.refcounts.decrement(first, count):
                image.allocator.lower(freed)
        image.refcounts.settle()


class _WidthChange:
    """New refcount structures beside the old ones, which count both until the header is switched."""

    def __init__(self, image: Qcow2, bits: int, report: Callable[[int, int], None]) -> None:
        self._image = image
        self._bits = bits
        self._report = report
        geometry = image.geometry
        self._cluster_size = geometry.cluster_size
        self._shift = geometry.cluster_bits + 3 - (bits.bit_length() - 1)
        self._old_shift = geometry.refblock_bits
        #: Number of a new block → the cluster that it is in.
        self._blocks: dict[int, int] = {}
        self.table_first = 0
        self.table_clusters = 0
        self._walks = 0

    def plan(self) -> None:
        """Take clusters for blocks and table until no more are needed to count those."""
        changed = True
        while changed:
            changed = self._walk()
            self._walks += 1
        with told("Failed to flush the refblock cache"):
            self._image.refcounts.settle()

    def _walk(self) -> bool:
        refcounts, allocator = self._image.refcounts, self._image.allocator
        changed = False
        index = 0
        walks = length = 1
        while index < len(refcounts.table):
            walks, length = max(self._walks + 2, 3), len(refcounts.table)
            self._report(self._walks * length + index, walks * length)
            for number in self._needed(index):
                if number not in self._blocks:
                    self._blocks[number] = allocator.allocate(1)
                    changed = True
            index += 1
        self._report((self._walks + 1) * length, walks * length)
        clusters = -(-(max(self._blocks) + 1) * 8 // self._cluster_size)
        if clusters > self.table_clusters:
            if self.table_clusters:
                allocator.cancel(self.table_first, self.table_clusters)
                self.table_clusters = 0
            self.table_first = allocator.allocate(clusters)
            self.table_clusters = clusters
            changed = True
        return changed

    def _needed(self, index: int) -> Iterator[int]:
        """Numbers of the new blocks that the counts of old block *index* go to. Raises ImageError."""
        block = self._image.refcounts.block(index)
        if block is None:
            return
        first = index << self._old_shift
        if self._bits < self._image.geometry.refcount_bits:
            self._check(block.counts, first)
        step = min(1 << self._shift, len(block.counts))
        empty = bytes(step * block.counts.itemsize)
        for start in range(0, len(block.counts), step):
            if block.counts[start : start + step].tobytes() != empty:
                yield first + start >> self._shift

    def _check(self, counts: array[int], first: int) -> None:
        limit = (1 << self._bits) - 1
        if max(counts) > limit:
            at = next(number for number, count in enumerate(counts) if count > limit)
            raise ImageError(
                self._image.store.name,
                f"Cannot decrease refcount entry width to {self._bits} bits: Cluster at offset "
                f"{(first + at) * self._cluster_size:#x} has a refcount of {counts[at]}",
            )

    def write(self) -> None:
        """Write the new blocks and their table."""
        image = self._image
        store, bits = image.store, image.geometry.cluster_bits
        length = len(image.refcounts.table)
        reported = -1
        for number, cluster in sorted(self._blocks.items()):
            old = min((number << self._shift) >> self._old_shift, length - 1)
            while reported < old:
                reported += 1
                self._report(self._walks * length + reported, (self._walks + 1) * length)
            with told("Failed to write refblock"):
                store.write(cluster << bits, encode(self._counts(number), self._bits))
        for old in range(reported + 1, length + 1):
            self._report(self._walks * length + old, (self._walks + 1) * length)
        table = array("Q", bytes(self.table_clusters * self._cluster_size))
        for number, cluster in self._blocks.items():
            table[number] = cluster << bits
        with told("Failed to write the new reftable"):
            store.write(self.table_first << bits, dump(table, "big"))
            store.barrier()

    def _counts(self, number: int) -> array[int]:
        """The counts of new block *number*."""
        counts = decode(bytes(self._cluster_size), self._bits)
        first = number << self._shift
        position = 0
        while position < len(counts):
            cluster = first + position
            block = self._image.refcounts.block(cluster >> self._old_shift)
            low = cluster & (1 << self._old_shift) - 1
            step = min(len(counts) - position, (1 << self._old_shift) - low)
            if block is not None:
                counts[position : position + step] = array(counts.typecode, block.counts[low : low + step])
            position += step
        return counts

    def undo(self) -> None:
        """Give everything back that was taken."""
        allocator = self._image.allocator
        for cluster in self._blocks.values():
            allocator.cancel(cluster, 1)
        if self.table_clusters:
            allocator.cancel(self.table_first, self.table_clusters)
        with suppress(OSError):
            self._image.refcounts.settle()

    def former_clusters(self) -> list[tuple[int, int]]:
        """First and count of the clusters that the old structures are in."""
        image = self._image
        bits = image.geometry.cluster_bits
        blocks = [(offset >> bits, 1) for offset in image.refcounts.table if offset]
        return [(image.header.refcount_table_offset >> bits, image.header.refcount_table_clusters), *blocks]
