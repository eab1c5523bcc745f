"""Persistent dirty bitmaps (*Bitmaps*): which parts of the virtual disk were written since some moment.

Theory of operation. The directory and the bitmap tables are read and judged when the image is opened; the bits
themselves when they are needed. Opening for writing marks every bitmap on disk as *in use*: from then on only memory
knows what it holds. Writes set bits in those that are enabled (*auto*). Closing writes all of them anew – bits, tables,
directory, each to free clusters – lets the header point at the new directory, and frees the old clusters. A power cut
before that leaves the old directory, whose bitmaps are in use and so of no value; never a bitmap that lacks a write.
Where closing fails, on a full disk perhaps, the old directory counts on (:meth:`Bitmaps.restore`): those of its bitmaps
that no write of the guest has changed are as good as before.

Bits are kept by clusters of bitmap data, in pieces that exist where a bit is set.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vm_core.block.structs import Record, u8, u16, u32, u64
from vm_core.errors import ImageError

from . import extensions, features, overlap
from .bitmaparea import write_extension
from .extensions import BitmapsExtension
from .told import told

if TYPE_CHECKING:
    from .image import Qcow2

#: QEMU's limits, so that each of us opens what the other makes.
MAX_BITMAPS = 65535
MAX_NAME = 1023
MAX_TABLE = 0x8000000
MAX_BYTES = 0x20000000
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
MAX_DIRECTORY = MAX_BITMAPS * 1024

_EXTENSION_FAILED = "Failed to update bitmap extension"
IN_USE = 1
#: The byte of a directory entry with the lowest bits of its flags.
_FLAGS_END = 15
AUTO = 2
DIRTY_TRACKING = 1
#: Bits of a table entry.
ALL_ONES = 1
ENTRY_RESERVED = 0xFF00_0000_0000_01FE
ENTRY_OFFSET = 0x00FF_FFFF_FFFF_FE00

_SET = re.compile(rb"[^\0]+")
_MODIFIED = (
    "a program lacking bitmap support modified this file, so all bitmaps are now considered inconsistent\n"
    "Some clusters may be leaked, run 'qemu-img check -r' on the image file to fix."
)


class DirectoryEntry(Record, order="big"):
    """An entry of the bitmap directory; extra data and name follow."""

    table_offset: int = u64(0, doc="where the bitmap's table is; cluster-aligned")
    table_size: int = u32(8, doc="entries of that table")
    flags: int = u32(12, doc="bit 0 in use, bit 1 auto")
    type: int = u8(16, default=DIRTY_TRACKING, doc="1: dirty tracking")
    granularity_bits: int = u8(17, doc="log2 of the bytes a bit stands for")
    name_size: int = u16(18, doc="bytes of the name")
    extra_size: int = u32(20, doc="bytes of extra data")


class Bitmap:
    """One bitmap."""

    def __init__(self, image: Qcow2, name: str, granularity_bits: int) -> None:
        self.image = image
        self.name = name
        self.granularity_bits = granularity_bits
        self.enabled = True
        #: Somebody had it in use and did not store it: nothing but its removal makes sense.
        self.inconsistent = False
        #: Where it is on disk: the table's place, its entries, and those of them that lie within the file.
        self.table_offset = 0
        self.table_size = 0
        self.table: array[int] = array("Q")
        #: Its bits on disk lack writes of the guest, or are of another size.
        self.stale = False
        #: Bits by number of cluster of bitmap data; None while they are only on disk.
        self._pieces: dict[int, bytearray] | None = {}

    @property
    def granularity(self) -> int:
        """Bytes that a bit stands for."""
        return 1 << self.granularity_bits

    @property
    def bits(self) -> int:
        """Bits that the virtual disk needs."""
        return -(-self.image.size >> self.granularity_bits)

    @property
    def clusters(self) -> int:
        """Clusters of bitmap data, and so entries of the table."""
        return -(-self.bits // (8 * self.image.cluster_size))

    def info(self) -> dict[str, Any]:
        """QEMU's Qcow2BitmapInfo."""
        in_use = ["in-use"] if self.inconsistent else []
        return {
            "flags": in_use + (["auto"] if self.enabled else []),
            "name": self.name,
            "granularity": self.granularity,
        }

    def entry(self, *, in_use: bool) -> bytes:
        """The directory entry, padded."""
        name = self.name.encode("utf-8", "surrogateescape")
        record = DirectoryEntry(
            table_offset=self.table_offset,
            table_size=self.table_size,
            flags=(IN_USE if in_use else 0) | (AUTO if self.enabled else 0),
            granularity_bits=self.granularity_bits,
            name_size=len(name),
        )
        data = record.pack() + name
        return data + bytes(-len(data) % 8)

    # Bits

    def on_disk(self, offset: int, size: int, table: array[int]) -> None:
        """It is stored, with its table of *size* entries at *offset*."""
        self.table_offset, self.table_size, self.table = offset, size, table

    def forget(self) -> None:
        """The bits are only on disk; they are read when they are needed."""
        self._pieces = None

    def pieces(self) -> dict[int, bytearray]:
        """The bits by number of cluster."""
        if self._pieces is None:
            found: dict[int, bytearray] = {}
            size, last = self.image.cluster_size, self.clusters - 1
            for index, entry in enumerate(self.table):
                if entry == ALL_ONES:
                    found[index] = bytearray(b"\xff" * size)
                elif entry & ENTRY_OFFSET:
                    found[index] = bytearray(self.image.file.pread(entry & ENTRY_OFFSET, size))
            if last in found:
                self._cut(found[last])
            self._pieces = found
        return self._pieces

    def _cut(self, piece: bytearray) -> None:
        """Clear the bits of the last piece that stand for nothing."""
        rest = self.bits - (self.clusters - 1) * self.image.cluster_size * 8
        whole, part = divmod(rest, 8)
        piece[whole + (part > 0) :] = bytes(len(piece) - whole - (part > 0))
        if part:
            piece[whole] &= (1 << part) - 1

    def clear(self) -> None:
        """Clear every bit."""
        self._pieces = {}

    def mark(self, offset: int, length: int) -> None:
        """Set the bits of the guest bytes at *offset*."""
        if length > 0:
            first = offset >> self.granularity_bits
            self.set(first, min((offset + length - 1 >> self.granularity_bits) + 1, self.bits))

    def set(self, first: int, after: int) -> None:
        """Set the bits from *first* to below *after*."""
        size = self.image.cluster_size
        pieces = self.pieces()
        per_piece = size * 8
        while first < after:
            index, low = divmod(first, per_piece)
            high = min(after - index * per_piece, per_piece)
            piece = pieces.get(index)
            if piece is None:
                piece = pieces[index] = bytearray(size)
            start, stop = low >> 3, high >> 3
            if start == stop:
                piece[start] |= (1 << high - low) - 1 << (low & 7)
            else:
                if low & 7:
                    piece[start] |= 0xFF << (low & 7) & 0xFF
                    start += 1
                piece[start:stop] = b"\xff" * (stop - start)
                if high & 7:
                    piece[stop] |= (1 << (high & 7)) - 1
            first = index * per_piece + high

    def load(self) -> bytearray:
        """All bits, least significant first."""
        size = self.image.cluster_size
        data = bytearray(-(-self.bits // 8))
        for index, piece in self.pieces().items():
            start = index * size
            data[start : start + size] = piece[: len(data) - start]
        return data

    def merge(self, granularity_bits: int, bits: bytes | bytearray) -> None:
        """Set what *bits* of another granularity have set."""
        if granularity_bits == self.granularity_bits:
            size, pieces = self.image.cluster_size, self.pieces()
            for match in _SET.finditer(bits):
                for index in range(match.start() // size, (match.end() - 1) // size + 1):
                    low, high = max(match.start(), index * size), min(match.end(), (index + 1) * size)
                    piece = pieces.setdefault(index, bytearray(size))
                    at = low - index * size
                    number = int.from_bytes(piece[at : at + high - low], "little")
                    number |= int.from_bytes(bits[low:high], "little")
                    piece[at : at + high - low] = number.to_bytes(high - low, "little")
            if self.clusters - 1 in pieces:
                self._cut(pieces[self.clusters - 1])
            return
        for first, after in set_runs(bits):
            start = first << granularity_bits
            end = min(after << granularity_bits, self.image.size)
            self.mark(start, end - start)

    def resize(self) -> None:
        """The virtual disk has another size now: bits beyond it go."""
        pieces = self.pieces()
        for index in [index for index in pieces if index >= self.clusters]:
            del pieces[index]
        if self.clusters - 1 in pieces:
            self._cut(pieces[self.clusters - 1])


def set_runs(bits: bytes | bytearray) -> Iterator[tuple[int, int]]:
    """Runs (first, after) of set bits."""
    begin = end = -1
    for match in _SET.finditer(bits):
        if begin >= 0 and match.start() * 8 > end:
            yield begin, end
            begin = -1
        for index in range(match.start(), match.end()):
            byte = bits[index]
            if byte == 0xFF:
                if begin >= 0 and end == index * 8:
                    end += 8
                    continue
                if begin >= 0:
                    yield begin, end
                begin, end = index * 8, index * 8 + 8
                continue
            for bit in range(8):
                if byte >> bit & 1:
                    at = index * 8 + bit
                    if begin >= 0 and end == at:
                        end += 1
                    else:
                        if begin >= 0:
                            yield begin, end
                        begin, end = at, at + 1
    if begin >= 0:
        yield begin, end


class Bitmaps:
    """The bitmaps of one image."""

    def __init__(self, image: Qcow2) -> None:
        self.image = image
        self.entries: list[Bitmap] = []
        #: The directory on disk: place and bytes.
        self.directory_offset = 0
        self.directory_size = 0
        #: They are on disk as they are here, and not in use, although the image is open for writing.
        self.settled = False
        #: What the directory on disk names: bitmap, and its entry as of one that is not in use.
        self._stored: list[tuple[Bitmap, bytes]] = []

    # Reading

    def read(self) -> str:
        """Read directory and tables; returns what should be said to the user. Raises ImageError."""
        image, store = self.image, self.image.store
        data = extensions.find(image.extensions, extensions.BITMAPS)
        if data is None:
            return ""
        if len(data) != BitmapsExtension.LENGTH:
            raise store.error("bitmaps_ext: Invalid extension length")
        if not store.header.autoclear_features & features.BITMAPS:
            return _MODIFIED if image.geometry.version >= 3 else ""
        head = BitmapsExtension.parse(data)
        if head.reserved:
            raise store.error("bitmaps_ext: Reserved field is not zero")
        if head.nb_bitmaps > MAX_BITMAPS:
            raise store.error(
                f"bitmaps_ext: Image has {head.nb_bitmaps} bitmaps, exceeding the QEMU supported maximum of "
                f"{MAX_BITMAPS}"
            )
        if not head.nb_bitmaps:
            raise store.error("found bitmaps extension with zero bitmaps")
        if head.directory_offset & image.cluster_size - 1:
            raise store.error("bitmaps_ext: invalid bitmap directory offset")
        if head.directory_size > MAX_DIRECTORY:
            raise store.error(
                f"bitmaps_ext: bitmap directory size ({head.directory_size}) exceeds the maximum supported size "
                f"({MAX_DIRECTORY})"
            )
        if not head.directory_size:
            raise store.error("Requested bitmap directory size is zero")
        self.directory_offset, self.directory_size = head.directory_offset, head.directory_size
        self._read_directory(head)
        return ""

    def _read_directory(self, head: BitmapsExtension) -> None:
        image, store = self.image, self.image.store
        # Past the end of the file there are zeroes, and an entry of zeroes satisfies nothing: no need to hold them.
        inside = max(0, min(head.directory_size, image.file.size - head.directory_offset))
        data = image.file.pread(head.directory_offset, inside)
        position = count = 0
        names: set[str] = set()
        while position < head.directory_size:
            if position + DirectoryEntry.LENGTH > head.directory_size:
                raise store.error("Broken bitmap directory")
            record = DirectoryEntry.parse(data[position : position + DirectoryEntry.LENGTH].ljust(24, b"\0"))
            name_at = position + DirectoryEntry.LENGTH + record.extra_size
            end = name_at + record.name_size + 7 & ~7
            if end > head.directory_size:
                raise store.error("Broken bitmap directory")
            count += 1
            if count > head.nb_bitmaps:
                raise store.error("More bitmaps found than specified in header extension")
            if record.extra_size:
                raise store.error("Bitmap extra data is not supported")
            name = data[name_at : name_at + record.name_size].partition(b"\0")[0].decode("utf-8", "surrogateescape")
            bitmap = Bitmap(image, name, record.granularity_bits)
            if not _possible(image, record, bitmap):
                shown = data[name_at : name_at + (record.name_size or 2)].partition(b"\0")[0]
                shown_name = shown.decode("utf-8", "surrogateescape")
                raise store.error(f"Bitmap '{shown_name}' doesn't satisfy the constraints")
            if name in names:
                raise store.error(f"Bitmap already exists: {name}")
            names.add(name)
            bitmap.enabled = bool(record.flags & AUTO)
            bitmap.inconsistent = bool(record.flags & IN_USE)
            self._read_table(bitmap, record)
            self.entries.append(bitmap)
            position = end
        if count < head.nb_bitmaps:
            raise store.error("Less bitmaps found than specified in header extension")

    def _read_table(self, bitmap: Bitmap, record: DirectoryEntry) -> None:
        image = self.image
        mask = image.cluster_size - 1
        size = record.table_size
        if not bitmap.inconsistent and size != bitmap.clusters:
            raise image.store.error(f"Could not read bitmap '{bitmap.name}' from image: Invalid argument")
        inside = max(0, min(size, (image.file.size - record.table_offset) // 8))
        table = image.store.read_words(record.table_offset, inside, "bitmap table") if inside else array("Q")
        for entry in table:
            offset = entry & ENTRY_OFFSET
            if entry & ENTRY_RESERVED or offset & mask or (offset and entry & ALL_ONES):
                if bitmap.inconsistent:
                    continue
                raise image.store.error(
                    f"Could not read bitmap_table table from image for bitmap '{bitmap.name}': Invalid argument"
                )
        bitmap.on_disk(record.table_offset, size, table)
        bitmap.forget()

    # What a tool asks for

    def find(self, name: str, *, inconsistent: bool = False) -> Bitmap:
        """The bitmap called *name*, usable unless *inconsistent* ones are wanted too. Raises ImageError."""
        found = next((one for one in self.entries if one.name == name), None)
        if found is None:
            raise self.image.store.error(f"Dirty bitmap '{name}' not found")
        if found.inconsistent and not inconsistent:
            text = f"Bitmap '{name}' is inconsistent and cannot be used"
            raise ImageError(
                self.image.store.name,
                f"{text}; remove it from the image",
                peer=f"{text}\nTry block-dirty-bitmap-remove to delete this bitmap from disk",
            )
        return found

    def add(self, name: str, granularity: int | None, *, enabled: bool) -> None:
        """Add an empty bitmap. Raises ImageError."""
        image = self.image
        if granularity is None:
            granularity = min(65536, max(4096, image.cluster_size))
        bits = granularity.bit_length() - 1
        error = image.store.error
        encoded = name.encode("utf-8", "surrogateescape")
        if not encoded:
            raise error("Bitmap name cannot be empty")
        if granularity != 1 << bits or not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
            raise error("Granularity must be power of 2 and at least 512")
        if any(one.name == name for one in self.entries):
            raise error(f"Bitmap already exists: {name}")
        if image.geometry.version < 3:
            raise error("Cannot store dirty bitmaps in qcow2 v2 files")
        if len(encoded) > MAX_NAME:
            raise error(f"Name length exceeds maximum ({MAX_NAME} characters)")
        bitmap = Bitmap(image, name, bits)
        bitmap.enabled = enabled
        if bitmap.clusters << image.geometry.cluster_bits > MAX_BYTES or bitmap.clusters > MAX_TABLE:
            raise error("Too much space will be occupied by the bitmap. Use larger granularity")
        if len(self.entries) >= MAX_BITMAPS:
            raise error("Maximum number of persistent bitmaps is already reached")
        if sum(len(one.entry(in_use=False)) for one in (*self.entries, bitmap)) > MAX_DIRECTORY:
            raise error("Not enough space in the bitmap directory")
        self.entries.append(bitmap)

    def remove(self, name: str) -> None:
        """Take a bitmap away, from the disk at once. Raises ImageError."""
        bitmap = self.find(name, inconsistent=True)
        position = self.entries.index(bitmap)
        del self.entries[position]
        if bitmap.table_offset:
            try:
                self._settle()
                with told(_EXTENSION_FAILED):
                    self._switch(in_use=True)
            except BaseException:
                self.entries.insert(position, bitmap)
                raise
            self._free_bits([(bitmap.table_offset, bitmap.table_size, bitmap.table)])

    def mark(self, offset: int, length: int) -> None:
        """Guest bytes were written."""
        for bitmap in self.entries:
            if bitmap.enabled and not bitmap.inconsistent:
                bitmap.mark(offset, length)
                bitmap.stale = True

    @contextmanager
    def resizing(self) -> Iterator[None]:
        """The virtual size changes meanwhile. Raises ImageError where a bitmap is in the way."""
        for bitmap in self.entries:
            self.find(bitmap.name)
        for bitmap in self.entries:
            bitmap.pieces()
        former = self.image.size
        try:
            yield
        finally:
            if self.image.size != former:
                for bitmap in self.entries:
                    bitmap.resize()
                    bitmap.stale = True

    # To disk

    def unsettle(self) -> None:
        """Something is about to change."""
        if self.settled:
            self.settled = False
            self.begin()

    def begin(self) -> None:
        """The image is open for writing: what is on disk is in use from now on."""
        if any(not one.inconsistent for one in self.entries):
            store = self.image.store
            self._stored = self._entries()
            try:
                store.write(self.directory_offset, self._directory(in_use=True))
                store.barrier()
            except OSError as error:
                raise store.error(f"Can't update bitmap directory: {error.strerror}") from error

    def store(self) -> None:
        """Write every bitmap anew and let the header point at them. Raises BlockError; then all stay in use."""
        fresh = [one for one in self.entries if not one.inconsistent]
        if not fresh or self.settled:
            return
        self._settle()
        # QEMU keeps its list newest first, so those added since are stored in that order.
        new = [one for one in self.entries if not one.table_offset]
        self.entries = [one for one in self.entries if one.table_offset] + new[::-1]
        fresh = [one for one in self.entries if not one.inconsistent]
        before = [(one.table_offset, one.table_size, one.table) for one in fresh]
        try:
            for bitmap in fresh:
                with told(f"Failed to write bitmap '{bitmap.name}' to file"):
                    self._write(bitmap)
            with told(_EXTENSION_FAILED):
                self._switch(in_use=False)
        except BaseException:
            for bitmap, place in zip(fresh, before, strict=True):
                bitmap.on_disk(*place)
            raise
        for bitmap in fresh:
            bitmap.stale = False
        self._free_bits([place for place in before if place[0]])

    def restore(self) -> bool:
        """They could not be stored: have the directory on disk say which bitmaps are of use; returns whether all are.

        Nothing changes any more until the image is opened again.
        """
        lost = len(self._stored) < len(self.entries) or any(one.stale for one, _ in self._stored)
        data = bytearray()
        for bitmap, entry in self._stored:
            piece = bytearray(entry)
            if bitmap.stale:
                piece[_FLAGS_END] |= IN_USE
            data += piece
        try:
            if data:
                self.image.store.write(self.directory_offset, data)
                self.image.store.barrier()
        except OSError:
            return False
        return not lost

    def move_directory(self) -> None:
        """Write the directory anew, to the first free clusters. The bitmaps are on disk as they are here."""
        if self.directory_offset:
            self._settle()
            self._switch(in_use=False)

    def _settle(self) -> None:
        self.image.order.write_back()
        self.image.refcounts.settle()

    def _directory(self, *, in_use: bool) -> bytes:
        """*in_use* goes for those that are not anyway."""
        return b"".join(one.entry(in_use=in_use or one.inconsistent) for one in self.entries if one.table_offset)

    def _entries(self) -> list[tuple[Bitmap, bytes]]:
        return [(one, one.entry(in_use=one.inconsistent)) for one in self.entries if one.table_offset]

    def _write(self, bitmap: Bitmap) -> None:
        """Bits and table to free clusters."""
        image, store = self.image, self.image.store
        bits = image.geometry.cluster_bits
        table = array("Q", bytes(8 * bitmap.clusters))
        for index, piece in sorted(bitmap.pieces().items()):
            if any(piece):
                cluster = image.allocator.allocate(1)
                store.write(cluster << bits, piece)
                table[index] = cluster << bits
        first = image.allocator.allocate(max(1, -(-len(table) * 8 >> bits)))
        store.write_words(first << bits, table)
        bitmap.on_disk(first << bits, len(table), table)

    def _switch(self, *, in_use: bool) -> None:
        """A directory of what is on disk now, stable before the header points at it; the former one is freed."""
        image, store = self.image, self.image.store
        bits = image.geometry.cluster_bits
        data = self._directory(in_use=in_use)
        count = -(-len(data) >> bits)
        first = image.allocator.allocate_metadata(count, overlap.BITMAPS) if count else 0
        if count:
            store.write(first << bits, data)
        image.refcounts.settle()
        store.barrier()
        number = sum(bool(one.table_offset) for one in self.entries)
        extension = (
            BitmapsExtension(nb_bitmaps=number, directory_size=len(data), directory_offset=first << bits)
            if number
            else None
        )
        write_extension(image, extension.pack() if extension is not None else None)
        self._stored = self._entries()
        if self.directory_offset:
            clusters = -(-self.directory_size >> bits)
            image.allocator.free_now(self.directory_offset >> bits, clusters)
        self.directory_offset, self.directory_size = first << bits, len(data)
        image.refcounts.settle()

    def _free_bits(self, former: list[tuple[int, int, array[int]]]) -> None:
        """Free the clusters of tables (place, size, entries) that nothing points at; bits go back to the host."""
        image = self.image
        bits = image.geometry.cluster_bits
        discards: list[int] = []
        for offset, size, table in former:
            for entry in table:
                if entry & ENTRY_OFFSET and image.refcounts.get((entry & ENTRY_OFFSET) >> bits):
                    discards += image.allocator.free_now((entry & ENTRY_OFFSET) >> bits, 1)
            count = max(1, -(-size * 8 >> bits))
            # What a damaged directory points at may be nobody's; that is for the check to tell.
            if all(image.refcounts.get((offset >> bits) + number) for number in range(count)):
                image.allocator.free_now(offset >> bits, count)
        image.refcounts.settle()
        for cluster in discards:
            image.store.discard(cluster << bits, image.cluster_size)


def _possible(image: Qcow2, record: DirectoryEntry, bitmap: Bitmap) -> bool:
    """Whether an entry says nothing that cannot be."""
    size = record.table_size
    if not (
        0 < record.name_size <= MAX_NAME
        and MIN_GRANULARITY_BITS <= record.granularity_bits <= MAX_GRANULARITY_BITS
        and 0 < size <= MAX_TABLE
        and record.table_offset
        and not record.table_offset & image.cluster_size - 1
        and size << image.geometry.cluster_bits <= MAX_BYTES
        and not record.flags & ~(IN_USE | AUTO)
        and record.type == DIRTY_TRACKING
    ):
        return False
    return bool(record.flags & IN_USE) or size >= bitmap.clusters
