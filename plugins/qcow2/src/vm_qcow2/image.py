"""The driver: one open QCOW2 image.

Reading: guest offset → L1 entry → L2 entry → host offset, in runs (``entries.py``). Writing: clusters are taken, the
core fills them, and only then they are entered into L2 tables (:meth:`Qcow2.commit`). All of it happens in memory; when
what reaches the disk is the business of ``order.py``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from vm_core.block.format import BackingReference, Format, Progress
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.node import SECTOR, Node, sectors_up
from vm_core.block.tables import load
from vm_core.errors import BlockError, ImageError

from . import extensions, features, overlap
from .allocator import Allocator
from .compression import TYPES, DecompressError, decoder, encoder
from .entries import INVALID, Run, State, all_runs, run_length
from .entries import damage as describe_damage
from .geometry import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from .header import MAX_BACKING_NAME, Header, read_header
from .order import Order
from .overlap import MetadataMap
from .refcounts import Refcounts
from .runtime import take
from .snapshots import SnapshotTable, check_place, read_snapshots
from .store import Store, alternate
from .tables import L2Table, Tables

if TYPE_CHECKING:
    from vm_core.block.inplace import Source, Target
    from vm_core.block.open import OpenContext
    from vm_core.block.relocation import Relocation

    from .bitmaps import Bitmaps
    from .encryption import Encryption
    from .writing import Writer

#: Incompatible features that are understood.
SUPPORTED = features.DIRTY | features.CORRUPT | features.DATA_FILE | features.COMPRESSION_TYPE | features.EXTENDED_L2

#: What each state is to the core.
_KINDS = {
    State.UNALLOCATED: Kind.UNALLOCATED,
    State.ZERO: Kind.ZERO,
    State.ZERO_ALLOCATED: Kind.ZERO,
    State.DATA: Kind.DATA,
    State.COMPRESSED: Kind.SPECIAL,
    State.UNALLOCATED_ALLOCATED: Kind.UNALLOCATED,
    State.BAD: Kind.SPECIAL,
}


#: Bytes of adjoining compressed clusters that are read at once.
READ_AT_ONCE = 256 * 1024
#: Runs of an L2 table from which on they are taken for short ones.
SHORT = 64


class Damage(NamedTuple):
    """What the map says of an L2 entry that means nothing: the table, and which entry."""

    table: L2Table
    number: int


class Qcow2(Format):
    """One open image."""

    copies_ranges = True

    #: What could not be done is told by who did it.
    create_failure = "{}"
    #: How guest data is encrypted, where it is.
    encryption: Encryption | None = None

    def __init__(
        self,
        file: Node,
        name: str,
        *,
        readonly: bool,
        check: bool = False,
        options: dict[str, Any] | None = None,
        open_data: Callable[[str | None], Node] | None = None,
        context: OpenContext | None = None,
    ) -> None:
        """Read and check the metadata; for writing also repair what a crash left. Raises ImageError, UsageError.

        With *check* the image is opened to be checked or repaired, whatever marks it has. *options* are those of
        ``runtime.py`` and ``encryption.py``, and are popped. *context* has the secrets of an encrypted image; without
        one it can only be described. *open_data* opens the data file: the user's, or the one of this name.
        """
        header = read_header(file, name)
        # As in QEMU a disk has whole sectors. What lies behind the last one stays where it is, unseen.
        self.unseen = header.size % SECTOR
        header.size -= self.unseen
        self.file = file
        self.readonly = readonly
        self.header = header
        self.extensions = _check_features(file, header, name, refuse_corrupt=not readonly and not check)
        self.store = store = Store(file, header, name)
        store.readonly = readonly
        self.geometry = store.geometry
        self.cluster_size = store.geometry.cluster_size
        self._cluster_bits = store.geometry.cluster_bits
        self._unit_bits = store.geometry.unit_bits
        #: log2 of the units under one L2 table.
        self._table_bits = store.geometry.guest_bits - store.geometry.unit_bits
        self._external = store.geometry.external
        self.zero_unit = 1 << self._unit_bits
        # As in QEMU, whose driver knows no way to tell zeroes in version 2.
        self.emptied_first = self.geometry.version >= 3
        self._decode = decoder(header.compression_type)
        self._encode = encoder(header.compression_type)
        #: For :meth:`read_specials`, which several threads call.
        self._read_buffers: list[bytearray] = []
        self._writer: Writer | None = None
        self._sparse: bool | None = None
        self._registered = False
        self.metadata = MetadataMap(store)
        self.refcounts = Refcounts(store, check=check)
        if not check:
            check_place(store, header.nb_snapshots)
        self.allocator = Allocator(store, self.refcounts, self.metadata)
        self.tables = Tables(store, self.allocator)
        options = {} if options is None else options
        #: The options as they were given, to read the image again with.
        self._given = dict(options)
        self.runtime = runtime = take(options, header, self.geometry)
        #: How guest data is encrypted, where it is.
        self.encryption = self._unlock(options, context)
        self.refcounts.limit(runtime.refcount_cache)
        self.tables.limit(runtime.l2_cache)
        self.tables.clean_after(runtime.clean_interval)
        self.metadata.checks = runtime.checks
        #: Where guest data is: the image itself, or the external data file.
        self.data: Node = self._open_data(open_data)
        if self.encryption is not None:
            self.encryption.put_over(self.data)
        #: The data file must stay readable as a raw image.
        self.raw_data = bool(header.autoclear_features & features.RAW_DATA_FILE)
        if self.raw_data and not self._external:
            raise store.error("data-file-raw requires a data file")
        self.backing_reference = _backing_reference(file, header, self.extensions, name)
        # A check reads the table of snapshots itself, and mends it.
        self.snapshot_table: SnapshotTable = SnapshotTable() if check else _read_snapshots(store)
        self._register_tables()
        self.order = Order(store, self.tables, self.refcounts, self.allocator, lazy=runtime.lazy)
        self.tables.settle_new = runtime.lazy
        self.order.pass_discard = runtime.discard_request
        self.order.pass_discard_snapshot = runtime.discard_snapshot
        self.order.pass_discard_other = runtime.discard_other
        self._bitmaps: Bitmaps | None = None
        #: What is to be told to the user about them.
        self.bitmap_warning = ""
        if extensions.find(self.extensions, extensions.BITMAPS) is not None:
            from .bitmaps import Bitmaps

            self._bitmaps = Bitmaps(self)
            self.bitmap_warning = self._bitmaps.read()
        self.tracking = self._bitmaps is not None and not readonly and not check
        if not readonly:
            self._prepare_writing(check)

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Qcow2:
        snapshot = {word: options.pop(f"snapshot.{word}", None) for word in ("id", "name")}
        explicit = context.explicit("data-file")

        def open_data(name: str | None) -> Node:
            if not context.io:
                # No guest data will be wanted, so what the image names stays closed.
                context._explicit.pop("data-file", None)
                return file
            if name is None and not explicit:
                raise ImageError(context.filename or file.filename, "'data-file' is required for this image")
            return context.open_child("data-file", name, storage=True)

        image = cls(
            file,
            context.filename or file.filename,
            readonly=context.readonly,
            check=context.check,
            options=options,
            open_data=open_data,
            context=context,
        )
        if explicit and not image.has_data_file:
            context.open_child("data-file", None, storage=True)
            raise ImageError(image.store.name, "'data-file' can only be set for images with an external data file")
        if image.bitmap_warning:
            context.warn(image.bitmap_warning)
        if any(snapshot.values()):
            image.snapshot_load(**snapshot)
        return image

    def _open_data(self, open_data: Callable[[str | None], Node] | None) -> Node:
        if not self._external:
            return self.file
        if open_data is None:
            raise self.store.error("'data-file' is required for this image")
        name = extensions.find(self.extensions, extensions.DATA_FILE_NAME)
        return open_data(extensions.string(name) if name is not None else None)

    def _unlock(self, options: dict[str, Any], context: OpenContext | None) -> Encryption | None:
        header = self.header
        if self.encryption is not None:  # the image is read again
            options.pop("encrypt.format", None)
            options.pop("encrypt.key-secret", None)
            return self.encryption
        if not header.crypt_method and extensions.find(self.extensions, extensions.ENCRYPTION_HEADER) is None:
            wanted = options.pop("encrypt.format", None)
            options.pop("encrypt.key-secret", None)
            if wanted is not None:
                raise self.store.error(f"No encryption in image header, but options specified format '{wanted}'")
            return None
        from .encryption import unlock

        return unlock(self.file, header, self.extensions, options, self.store.name, context)

    @property
    def encrypted(self) -> bool:  # type: ignore[override]
        """Whether guest data is encrypted."""
        return self.encryption is not None

    def storage(self, guest: int, host: int) -> Node:
        """The node in which the bytes of the guest at *guest* lie at *host*."""
        return self.data if self.encryption is None else self.encryption.storage(guest, host)

    def children(self) -> dict[str, Node]:
        return {"data-file": self.data} if self._external and self.data is not self.file else {}

    def _register_tables(self) -> None:
        """Tell the overlap check where tables are."""
        if self.readonly or self._registered:
            return
        self._registered = True
        header, metadata = self.header, self.metadata
        metadata.register(header.refcount_table_offset, len(self.refcounts.table) * 8, overlap.REFCOUNT_TABLE)
        metadata.register(header.l1_table_offset, header.l1_size * 8, overlap.ACTIVE_L1)
        metadata.register(header.snapshots_offset, self.snapshot_table.length, overlap.SNAPSHOT_TABLE)
        metadata.register_tables(self.refcounts.table, overlap.REFCOUNT_BLOCK)
        metadata.register_tables(self.tables.l1, overlap.ACTIVE_L2)
        for one in self.snapshot_table.entries:
            problem = one.l1_problem(self.cluster_size)
            if problem is not None:
                if overlap.INACTIVE_L2 in metadata.checks:
                    metadata.broken = problem
            else:
                metadata.register(one.head.l1_table_offset, one.head.l1_size * 8, overlap.INACTIVE_L1)
                if overlap.INACTIVE_L2 in metadata.checks:
                    tables = load("Q", self.file.pread(one.head.l1_table_offset, one.head.l1_size * 8), "big")
                    metadata.register_tables(tables, overlap.INACTIVE_L2)

    def _prepare_writing(self, check: bool) -> None:
        header, store = self.header, self.store
        unknown = header.autoclear_features & ~features.KNOWN_AUTOCLEAR
        if unknown:
            # Nobody here keeps these features up to date, so their data is not valid from now on.
            header.autoclear_features &= features.KNOWN_AUTOCLEAR
            store.write_header("autoclear_features")
            store.barrier()
        if self.bitmap_warning:
            from .headerarea import write_area

            # They are told once: whoever opens the image next finds none.
            write_area(self, [one for one in self.extensions if one.type != extensions.BITMAPS])
        if header.incompatible_features & features.DIRTY and not check:
            self._repair_dirty()
        if self._bitmaps is not None and not check:
            self._bitmaps.begin()

    def _repair_dirty(self) -> None:
        """A program died with lazy refcounts: count them anew."""
        from .check import check

        try:
            found = check(self, repair="all", live=True)
            failed = self.store.corrupt or bool(found.get("corruptions"))
        except OSError:
            failed = True
        if failed:
            raise self.store.error("Could not repair dirty image: Input/output error")

    # What it is

    @property
    def size(self) -> int:
        return self.header.size

    @property
    def dirty(self) -> bool:
        return bool(self.header.incompatible_features & features.DIRTY)

    def info(self) -> dict[str, Any]:
        header = self.header
        data: dict[str, Any] = {
            "compat": "1.1" if header.version == 3 else "0.10",
            "compression-type": TYPES[header.compression_type],
            "refcount-bits": self.geometry.refcount_bits,
        }
        if header.version == 3:
            data["lazy-refcounts"] = bool(header.compatible_features & features.LAZY_REFCOUNTS)
            data["corrupt"] = bool(header.incompatible_features & features.CORRUPT)
            data["extended-l2"] = self.geometry.extended
        if self.encryption is not None:
            data["encrypt"] = self.encryption.info()
        if self.has_data_file and "data-file-raw" not in data:
            name = extensions.find(self.extensions, extensions.DATA_FILE_NAME)
            if name is not None:
                data["data-file"] = extensions.string(name)
            data["data-file-raw"] = self.raw_data
        if self._bitmaps is not None and self._bitmaps.entries:
            data["bitmaps"] = list(self.bitmaps())
        return data

    @property
    def has_data_file(self) -> bool:
        """Whether guest data is in another file."""
        return bool(self.header.incompatible_features & features.DATA_FILE)

    # Dirty bitmaps

    @property
    def keeps_bitmaps(self) -> bool:
        return self.geometry.version >= 3

    def bitmaps(self) -> Sequence[dict[str, Any]]:
        return [] if self._bitmaps is None else [one.info() for one in self._bitmaps.entries]

    @property
    def bitmap_set(self) -> Bitmaps:
        """The bitmaps; their code is loaded when there are any or one is asked for."""
        if self._bitmaps is None:
            from .bitmaps import Bitmaps

            self._bitmaps = Bitmaps(self)
        elif not self.readonly:
            self._bitmaps.unsettle()
        return self._bitmaps

    def bitmap_add(self, name: str, granularity: int | None = None, *, enabled: bool = True) -> None:
        self.store.check_writable()
        self.bitmap_set.add(name, granularity, enabled=enabled)
        self.tracking = True

    def bitmap_remove(self, name: str) -> None:
        self.store.check_writable()
        self.bitmap_set.remove(name)

    def bitmap_clear(self, name: str) -> None:
        self.bitmap_set.find(name).clear()

    def bitmap_enable(self, name: str, *, enabled: bool = True) -> None:
        self.bitmap_set.find(name).enabled = enabled

    def bitmap_load(self, name: str) -> tuple[int, bytearray]:
        found = self.bitmap_set.find(name)
        return found.granularity, found.load()

    def bitmap_merge(self, name: str, granularity: int, bits: bytes | bytearray) -> None:
        self.bitmap_set.find(name).merge(granularity.bit_length() - 1, bits)

    def written(self, offset: int, length: int) -> None:
        assert self._bitmaps is not None
        self._bitmaps.unsettle()
        self._bitmaps.mark(offset, length)

    # Internal snapshots

    def snapshots(self) -> Sequence[dict[str, Any]]:
        return [one.info() for one in self.snapshot_table.entries]

    def snapshot_create(self, name: str) -> None:
        from .snapshotting import create

        create(self, name)

    def snapshot_apply(self, name: str) -> None:
        from .snapshotting import apply

        apply(self, name)

    def snapshot_delete(self, name: str | None, *, id: str | None = None) -> None:
        from .snapshotting import delete

        delete(self, name, id)

    def snapshot_load(self, *, id: str | None = None, name: str | None = None) -> None:
        from .snapshotting import load

        load(self, id, name)

    def vmstate_offset(self) -> int:
        return self.geometry.l1_entries_for(self.size + self.unseen) << self.geometry.guest_bits

    def vmstate_reserve(self, end: int) -> None:
        from .resize import grow_l1_for_state

        grow_l1_for_state(self, end)

    # Reading

    def map(self, offset: int, length: int) -> Sequence[Mapping]:
        self.store.check_writable()
        bits, table_bits = self._unit_bits, self._table_bits
        end = offset + length
        found: list[Mapping] = []
        unit = offset >> bits
        stop = (end - 1 >> bits) + 1
        if unit + 1 == stop and (one := self._map_within(offset, length)) is not None:
            return one
        while unit < stop:
            l1_index = unit >> table_bits
            table = self.tables.get(l1_index)
            if table is None:
                if l1_index >= len(self.tables.l1):  # machine state that was never written
                    self._append(found, Kind.UNALLOCATED, unit, stop, -1, False, None, offset, end)
                    break
                empty = run_length(self.tables.l1, l1_index, (stop - 1 >> table_bits) + 1, 0)
                after = min(l1_index + empty << table_bits, stop)
                self._append(found, Kind.UNALLOCATED, unit, after, -1, False, None, offset, end)
                unit = after
                continue
            base = l1_index << table_bits
            last = min(stop - base, 1 << table_bits)
            runs = all_runs(table.entries, table.bitmaps, unit - base, last, self.geometry)
            if len(runs) > SHORT and self.encryption is None and not self._external:
                self._append_plain(found, table, runs, base, offset, end)
            else:
                for run in runs:
                    self._append_run(found, table, run, base + run.at, offset, end)
            unit = base + last
        return found

    def _map_within(self, offset: int, length: int) -> tuple[Mapping] | None:
        """Shortcut for most small requests, which are about a part of one plain data cluster; None: not such a one."""
        unit, bits = offset >> self._unit_bits, self._table_bits
        table = self.tables.get(unit >> bits)
        if table is None or table.bitmaps is not None or self._external:
            return None
        entry = table.entries[unit & (1 << bits) - 1]
        host = entry & OFFSET_MASK
        inside = self.cluster_size - 1
        if not host or host & inside or entry & (COMPRESSED | ZERO):
            return None
        writable = bool(entry & COPIED) and not self.readonly and not self.store.corrupt
        if writable:
            writable = self.metadata.find(host >> self._cluster_bits, 1) is None
        host += offset & inside
        return (Mapping(Kind.DATA, offset, length, self.storage(offset, host), host, writable),)

    def _append_plain(
        self, found: list[Mapping], table: L2Table, runs: Sequence[Run], base: int, offset: int, end: int
    ) -> None:
        """Like :meth:`_append_run` for many short runs: those that neither begin nor go on anything go straight in."""
        bits, data, low = self._unit_bits, self.data, offset
        locked = self.readonly or self.store.corrupt
        plain, empty = State.DATA, State.UNALLOCATED
        former = runs[0].state  # the first may go on what the table before ended with
        for run in runs:
            state, at, clusters, host, copied, _ = run
            start = base + at << bits
            length = clusters << bits
            if state is not former and start >= low and start + length <= end:
                if state is empty:
                    former = state
                    found.append(Mapping(Kind.UNALLOCATED, start, length))
                    continue
                if state is plain and (locked or not copied):
                    former = state
                    found.append(Mapping(Kind.DATA, start, length, data, host))
                    continue
            former = state
            self._append_run(found, table, run, base + at, offset, end)

    def _append_run(self, found: list[Mapping], table: L2Table, run: Run, first: int, offset: int, end: int) -> None:
        state = run.state
        host, writable = -1, False
        token: Any = None
        if run.placed:
            host = run.host
            if self._external:
                guest = first << self._unit_bits
                if host != guest:
                    raise self.store.mark_corrupt(
                        f"External data file host cluster offset {host & -self.cluster_size:#x} does not match guest "
                        f"cluster offset: {guest & -self.cluster_size:#x}, L2 index: {run.at // self.geometry.units:#x}"
                    )
                writable = state is State.DATA and run.copied and not self.readonly
            elif state is State.DATA:
                # What lies past the end of the file reads as zeroes; checks tell of it.
                writable = run.copied and not self.readonly and not self.store.corrupt
                if writable:
                    bits = self._cluster_bits
                    cluster = host >> bits
                    count = (host + (run.clusters << self._unit_bits) - 1 >> bits) - cluster + 1
                    writable = self.metadata.find(cluster, count) is None
        elif state is State.COMPRESSED:
            if self._external:
                raise self.store.mark_corrupt(
                    "Compressed cluster entry found in image with external data file "
                    f"(L2 offset: {table.offset:#x}, L2 index: {run.at // self.geometry.units:#x})"
                )
            token = run.entry
        elif state is State.BAD:
            # Whoever reads or writes it is told.
            token = Damage(table, run.at // self.geometry.units)
        self._append(found, _KINDS[state], first, first + run.clusters, host, writable, token, offset, end)

    def _append(
        self,
        found: list[Mapping],
        kind: Kind,
        first: int,
        after: int,
        host: int,
        writable: bool,
        token: Any,
        offset: int,
        end: int,
    ) -> None:
        """Add the units from *first* to below *after*, cut to the request, to the run before where they go on."""
        start = first << self._unit_bits
        stop = min(after << self._unit_bits, end)
        if start < offset:
            if host >= 0:
                host += offset - start
            start = offset
        if found and token is None:
            last = found[-1]
            if (
                last.kind is kind
                and last.writable == writable
                and (last.host + last.length == host if host >= 0 else last.host < 0)
            ):
                found[-1] = last._replace(length=last.length + stop - start)
                return
        storage = self.storage(start, host) if host >= 0 else None
        found.append(Mapping(kind, start, stop - start, storage, host, writable, token))

    def _damaged(self, damage: Damage) -> OSError:
        """An L2 entry means nothing: mark the image as corrupt; returns the error to raise."""
        table, index = damage
        text = describe_damage(table.entries[index], table.bitmaps[index] if table.bitmaps else 0, self.geometry)
        if text == INVALID:
            text += " "  # so QEMU puts it where it reads
        return self.store.mark_corrupt(f"{text} (L2 offset: {alternate(table.offset)}, L2 index: {alternate(index)})")

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping] | None:
        shift = self.geometry.guest_bits
        tables = self.tables
        index, last = offset >> shift, offset + length - 1 >> shift
        while index <= last:
            if tables.cached(index) is None and tables.l1[index]:
                return None
            index += 1
        return self.map(offset, length)

    def read_special(self, mapping: Mapping) -> bytes:
        if isinstance(mapping.token, Damage):
            raise self._damaged(mapping.token)
        offset, length = self.geometry.compressed_extent(mapping.token)
        size = self.file.size
        if offset >= size:
            from vm_core.sizes import human

            raise self.store.error(f"compressed cluster at {offset:#x} lies outside the file ({human(size)})")
        return self._decoded(mapping, offset, self.file.pread(offset, min(length, size - offset)))

    def _decoded(self, mapping: Mapping, offset: int, stored: bytes | memoryview) -> bytes:
        try:
            data = self._decode(stored, self.cluster_size)
        except DecompressError as error:
            raise self.store.error(f"compressed cluster at {offset:#x} cannot be decompressed: {error}") from None
        start = mapping.offset & self.cluster_size - 1
        if start or mapping.length != len(data):
            return data[start : start + mapping.length]
        return data

    def read_specials(self, mappings: Sequence[Mapping]) -> Iterator[bytes]:
        """Compressed clusters that lie behind each other, as they were written, are read at once."""
        try:
            buffer = self._read_buffers.pop()
        except IndexError:
            buffer = bytearray(READ_AT_ONCE)
        try:
            number = 0
            while number < len(mappings):
                group = self._adjoining(mappings, number)
                if len(group) < 2:
                    yield self.read_special(mappings[number])
                    number += 1
                    continue
                start, stop = group[0][0], max(end for _, end in group)
                with memoryview(buffer) as whole, whole[: stop - start] as stored:
                    self.file.read(start, (stored,))
                    for mapping, (offset, end) in zip(islice(mappings, number, None), group, strict=False):
                        yield self._decoded(mapping, offset, stored[offset - start : end - start])
                number += len(group)
        finally:
            self._read_buffers.append(buffer)

    def _adjoining(self, mappings: Sequence[Mapping], number: int) -> list[tuple[int, int]]:
        """Where the data of *mappings* from *number* on starts and ends, as long as it can be read at once."""
        group: list[tuple[int, int]] = []
        start = stop = 0
        for mapping in islice(mappings, number, None):
            if isinstance(mapping.token, Damage):
                break
            offset, length = self.geometry.compressed_extent(mapping.token)
            end = offset + length
            if not group:
                start = stop = offset
            if not start <= offset <= stop or end - start > READ_AT_ONCE or end > self.file.size:
                break
            stop = max(stop, end)
            group.append((offset, end))
        return group

    # Writing

    @property
    def writer(self) -> Writer:
        """What changes the image; its code is loaded when something is."""
        found = self._writer
        if found is None:
            from .writing import Writer

            found = self._writer = Writer(self)
        return found

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        return self.writer.allocate(offset, length)

    def commit(self, allocations: Sequence[Allocation]) -> None:
        self.writer.commit(allocations)

    def abort(self, allocations: Sequence[Allocation]) -> None:
        self.writer.abort(allocations)

    def encode(self, offset: int, data: bytes | memoryview) -> bytes | None:
        return self._encode(data)

    def allocate_encoded(self, offset: int, length: int) -> Allocation:
        return self.writer.allocate_encoded(offset, length)

    def end_encoded(self) -> None:
        """Let the file end with a sector: entries of compressed clusters count whole ones, and readers want them."""
        end = sectors_up(self.file.size)
        if end != self.file.size:
            self.file.truncate(end)

    def zero(self, offset: int, length: int, *, unmap: bool) -> bool:
        return self.writer.zero(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self.writer.discard(offset, length)

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        """Whether many more clusters are counted than the host has space for: preallocated metadata."""
        if self._sparse is None:
            self._sparse = self._counts_holes()
        return self._sparse

    def _counts_holes(self) -> bool:
        bits, per_block = self._cluster_bits, self.geometry.refblock_entries
        real = self.file.known_allocated().get("actual-size", 0) >> bits
        limit = max(real * 10 // 9, real + 2)
        clusters = -(-self.file.size >> bits)
        if not real or clusters < limit:
            return False
        counted = 0
        for index in range(-(-clusters // per_block)):
            block = self.refcounts.block(index)
            if block is not None:
                counts = block.counts[: clusters - index * per_block]
                counted += len(counts) - counts.count(0)
                if counted >= limit:
                    return True
        return False

    @property
    def failed(self) -> bool:  # type: ignore[override]
        """Damage was found and told: nothing more is written."""
        return self.store.corrupt

    def flush(self) -> None:
        if self.readonly:
            return
        self.order.write_back()

    def truncate(self, size: int) -> None:
        from .resize import resize

        resize(self, size)

    def truncate_preallocated(self, size: int, mode: str, *, hide: bool, read: Callable[[int, int], bytes]) -> bool:
        from .resize import resize

        resize(self, size, preallocation=mode, hide=hide, read=read)
        return mode != "metadata"

    def reopen(self, *, readonly: bool) -> None:
        if readonly == self.readonly:
            return
        if readonly:
            if not self.store.corrupt:
                self._store_last_bitmaps()
                self.order.close()
        elif self.header.incompatible_features & features.CORRUPT:
            raise self.store.error("the image is marked as corrupt: it can only be opened read-only, or repaired")
        if self._external:
            self.data.reopen(readonly=readonly)
        self.readonly = self.store.readonly = readonly
        self.tracking = self._bitmaps is not None and not readonly
        if not readonly:
            # Whoever had the image open for writing meanwhile may have changed the tables.
            self.tables.drop_clean()
            self.refcounts.forget()
            self._register_tables()
            self._prepare_writing(False)

    def close(self) -> None:
        if self.readonly or self.store.corrupt:
            return
        try:
            try:
                self._store_last_bitmaps()
            finally:
                self.order.finish()
        finally:
            if self.store.failed or self.store.aborted:
                from .recovery import give_back, shorten

                give_back(self) if self.store.failed else shorten(self)

    def _store_bitmaps(self) -> None:
        if self._bitmaps is not None and self.tracking:
            self._bitmaps.store()

    def _store_last_bitmaps(self) -> None:
        """The same for the last time: what cannot be stored is told, and what was there before counts on."""
        try:
            self._store_bitmaps()
        except OSError as error:
            assert self._bitmaps is not None
            if self._bitmaps.restore():
                raise
            text = f"Lost persistent bitmaps during inactivation of node '{self.store.name}': {error.strerror}"
            raise BlockError.of(error.errno or errno.EIO, text) from error

    def inplace_source(self) -> Source:
        from .inplace import Qcow2Source

        return Qcow2Source(self)

    @classmethod
    def inplace_target(cls) -> type[Target]:
        from .inplace import Qcow2Target

        return Qcow2Target

    def check(self, *, repair: str = "") -> dict[str, Any]:
        from .check import check

        return check(self, repair=repair)

    def amend(self, options: dict[str, Any], *, force: bool = False, progress: Progress | None = None) -> None:
        from .amend import amend

        amend(self, options, force=force, progress=progress)

    def settle(self) -> None:
        """Bring all that is only in memory to the disk."""
        self._store_bitmaps()
        self.order.close()

    def reload(self) -> None:
        """Read the metadata again after the structures that it is in have been changed on disk.

        Before those were, :meth:`settle` was called.
        """
        data = self.data
        Qcow2.__init__(
            self,
            self.file,
            self.store.name,
            readonly=self.readonly,
            options=dict(self._given),
            open_data=lambda _name: data,
        )

    def empty(self) -> None:
        from .emptying import empty

        empty(self)

    def start_anew(self) -> None:
        """Everything that is kept of the tables is outdated: read them again."""
        store, runtime, old = self.store, self.runtime, self.order
        self.metadata = MetadataMap(store)
        self.metadata.checks = runtime.checks
        self.refcounts = Refcounts(store)
        self.refcounts.limit(runtime.refcount_cache)
        self.allocator = Allocator(store, self.refcounts, self.metadata)
        self.tables = Tables(store, self.allocator)
        self.tables.limit(runtime.l2_cache)
        self.tables.clean_after(runtime.clean_interval)
        self.tables.settle_new = old.lazy
        self.order = Order(store, self.tables, self.refcounts, self.allocator, lazy=old.lazy)
        self.order.pass_discard = old.pass_discard
        self.order.pass_discard_snapshot = old.pass_discard_snapshot
        self.order.pass_discard_other = old.pass_discard_other
        self._writer = None
        self._registered = False
        self._register_tables()

    def relocation(self) -> Relocation:
        from .relocation import Qcow2Relocation

        return Qcow2Relocation(self)

    def settle_bitmaps(self) -> None:
        """Have the bitmaps on disk as they are, in the first free clusters; closing has nothing to do about them then.

        What changes them, or anything else, takes that back.
        """
        if self._bitmaps is not None and self.tracking:
            self._bitmaps.settled = False
            self._bitmaps.store()
            self._bitmaps.settled = True

    def move_bitmap_directory(self) -> None:
        """Have the directory of the bitmaps in the first free clusters, apart from the bitmaps, which are settled."""
        if self._bitmaps is not None and self._bitmaps.settled:
            self._bitmaps.move_directory()

    def reclaim(self) -> int:
        from .emptying import reclaim

        return reclaim(self)

    def change_backing(self, filename: str | None, format: str | None) -> None:
        from .headerarea import change_backing

        change_backing(self, filename, format)

    @classmethod
    def measure(cls, size: int, data: Iterable[tuple[int, int]], options: dict[str, Any]) -> dict[str, int]:
        from .measuring import measure

        return measure(size, data, options)

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        from .create import create

        create(file, size, options)


def _check_features(file: Node, header: Header, name: str, *, refuse_corrupt: bool) -> list[extensions.Extension]:
    """Refuse what is not understood, by name, in QEMU's order; returns the header's extensions."""
    mask = header.incompatible_features
    unknown = mask & ~SUPPORTED
    if unknown:
        try:
            found = extensions.read_extensions(file, header, name)
        except ImageError:
            found = []
        table = extensions.find(found, extensions.FEATURE_NAME_TABLE)
        told = features.unsupported(unknown, extensions.parse_feature_names(table))
        raise ImageError(name, f"Unsupported qcow2 feature(s): {told}")
    if mask & features.CORRUPT and refuse_corrupt:
        raise ImageError(name, "qcow2: Image is corrupt; cannot be opened read/write")
    if header.compression_type not in TYPES:
        raise ImageError(name, f"qcow2: unknown compression type: {header.compression_type}")
    if mask & features.COMPRESSION_TYPE and not header.compression_type:
        raise ImageError(name, "qcow2: Compression type incompatible feature bit must not be set")
    if not mask & features.COMPRESSION_TYPE and header.compression_type:
        raise ImageError(name, "qcow2: Compression type incompatible feature bit must be set")
    if header.refcount_order > 6:
        raise ImageError(name, "Reference count entry width too large; may not exceed 64 bits")
    if header.crypt_method > 2:
        raise ImageError(name, f"Unsupported encryption method {header.crypt_method}")
    return extensions.read_extensions(file, header, name)


def _read_snapshots(store: Store) -> SnapshotTable:
    try:
        return read_snapshots(store)
    except OSError as error:
        raise store.error("Failed to read snapshot table: Input/output error") from error


def _backing_reference(
    file: Node, header: Header, found: Sequence[extensions.Extension], name: str
) -> BackingReference | None:
    if not header.backing_file_offset:
        return None
    room = (1 << header.cluster_bits) - header.backing_file_offset
    if header.backing_file_size > min(MAX_BACKING_NAME, room):
        raise ImageError(name, "Backing file name too long")
    if not header.backing_file_size:
        return None
    filename = file.pread(header.backing_file_offset, header.backing_file_size)
    format = extensions.find(found, extensions.BACKING_FORMAT)
    if not extensions.string(filename):
        return None
    return BackingReference(extensions.string(filename), extensions.string(format) if format is not None else None)
