"""The contract of a format driver: it maps and allocates, and never moves guest data.

The core wraps a :class:`Format` into a node that does the rest once for all formats: reads across runs, backing chains,
copy-on-write, unaligned heads and tails, zero detection. It also holds a lock for the image around every call here, so
a driver needs none of its own. A read-only driver implements ``open``, ``size`` and ``map``, plus ``read_special`` if
it has compressed runs, and is about a page.

Every write to a fresh allocation goes: ``allocate`` → the core writes the data → ``commit`` (or ``abort`` if that
failed). Metadata may reach the disk only so that at every instant the image on disk is one that can be opened with
everything in it that was flushed; ``flush`` owns that order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ImageError, UsageError
from .mapping import Allocation, Mapping

if TYPE_CHECKING:
    from .inplace import Source, Target
    from .node import Node
    from .open import OpenContext
    from .relocation import Relocation


#: Told how far a long operation is: bytes (or other units) done, and all there are.
Progress = Callable[[int, int], None]


class BackingReference(NamedTuple):
    """What an image records of its backing image."""

    filename: str
    #: The recorded format's name, None where the image has none (it is then probed).
    format: str | None = None


class Format(ABC):
    """One open image of a format."""

    #: The storage that holds the metadata.
    file: Node
    readonly: bool = False
    #: Bytes a unit of allocation has; 1 where there is none (raw).
    cluster_size: int = 1
    #: Bytes in which :meth:`zero` can be told about parts of a unit of allocation; None: there are no such parts.
    #: A range within one unit that starts or ends in the middle of it comes alone.
    zero_unit: int | None = None
    #: Whether zeroing a part of a unit of allocation may become zeroing it whole where the rest reads as zeroes, and
    #: whether zeroes that :meth:`zero` cannot express are left out where the image reads as zeroes. Where not, both are
    #: written like any other data, as QEMU does for all formats but QCOW2, and each unit gets its place.
    zero_parts: bool = True
    #: Whether who is about to overwrite the whole image has :meth:`blank` empty it first. Where not, what is there
    #: stays in its place and is overwritten.
    emptied_first: bool = True
    #: Much space was set aside and never written: where the storage has holes, DATA reads as zeroes, and walks say so.
    sparse: bool = False
    #: Damage was found and told while requests were served; nothing more is written, and closing says no more.
    failed: bool = False
    #: Bytes in which SPECIAL runs are turned into data: a partial read asks for whole units (and keeps the last ones).
    #: None: clusters.
    special_unit: int | None = None
    #: Bytes that who copies all of the image reads at once; None: as many as serve the target. QEMU's drivers of some
    #: formats tell of one unit of allocation at a time, and a copy by QEMU needs little memory then.
    copy_step: int | None = None
    #: Whether QEMU's driver has the host copy (``convert -C``). With others data is copied as without, and zeroes in it
    #: are found.
    copies_ranges: bool = False
    #: Whether the driver wants to hear of every change of guest data: see :meth:`written`.
    tracking: bool = False
    #: Guest data can be written only compressed: whole clusters, each once.
    compressed_only: bool = False
    #: Whether ``info`` tells the cluster size and whether the image was closed cleanly: QEMU's drivers of a few formats
    #: keep that to themselves.
    tells_clusters: bool = True
    #: Whether QEMU's driver says where data is; where not, a program that stands in for QEMU's tells data of the whole
    #: image in ``map``.
    peer_maps: bool = True
    #: What the peer says where a new image cannot be written; ``{}`` is the system's reason.
    create_failure: str = "Could not create image: {}"
    #: And where the format named for the backing image of a new one, ``{}``, does not exist.
    backing_format_failure: str = "Parameter 'backing-fmt' does not accept value '{}'"
    #: The recorded backing image, None for a standalone one.
    backing_reference: BackingReference | None = None

    #: Guest data is encrypted.
    encrypted: bool = False

    @classmethod
    @abstractmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Format:
        """Read and check the metadata in *file*, popping the *options* that are understood.

        Raises ImageError with one sentence for anything wrong with the image; never loops or allocates by a number
        from the image that was not checked first. ``context.readonly`` tells whether changes are wanted; further files
        (data files, extents) are opened with ``context.open_child``, which passes the gate.
        """

    @property
    @abstractmethod
    def size(self) -> int:
        """The virtual size in bytes."""

    @property
    def dirty(self) -> bool:
        """Whether the image says that it was not closed cleanly (``dirty-flag``)."""
        return False

    @abstractmethod
    def map(self, offset: int, length: int) -> Iterable[Mapping]:
        """Maximal runs that cover the range, in order. The range lies inside the image."""

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping] | None:
        """What :meth:`map` would say, if that is known without any I/O; else None. Serves reads that must not block."""
        return None

    def read_special(self, mapping: Mapping) -> bytes:
        """The bytes of one SPECIAL run that :meth:`map` returned, exactly ``mapping.length`` of them.

        Called without the image's lock, so that threads decompress side by side: only read from storage here.
        """
        raise NotImplementedError

    def read_specials(self, mappings: Sequence[Mapping]) -> Iterator[bytes]:
        """:meth:`read_special` of each, in order; drivers that can read what adjoins at once override it."""
        return map(self.read_special, mappings)

    # Writing. A driver that overrides none of these is read-only.

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        """Allocations that cover the range, in order, adjoining; fresh ones may reach beyond it to whole clusters."""
        raise NotImplementedError

    def commit(self, allocations: Sequence[Allocation]) -> None:
        """The data of these fresh allocations has been written: make them what the guest sees."""
        raise NotImplementedError

    def abort(self, allocations: Sequence[Allocation]) -> None:
        """The data of these fresh allocations could not be written: give the space back."""

    def zero(self, offset: int, length: int, *, unmap: bool) -> bool:
        """Make a range of whole clusters (or one that ends at the image's end) read as zeroes by metadata alone.

        Returns False where the format cannot say so; the core then writes zeroes.
        """
        return False

    def blank(self, offset: int, length: int) -> bool:
        """Make such a range read as zeroes with as little host space as can be: for who wants the image small.

        Differs from :meth:`zero` where that has zeroes written since QEMU's driver writes them.
        """
        return self.zero(offset, length, unmap=True)

    def discard(self, offset: int, length: int) -> None:
        """Give back whole clusters. What the guest reads there afterwards must not be older data of a backing image."""

    def written(self, offset: int, length: int) -> None:
        """The guest changed these bytes: written, zeroed or discarded. Called where :attr:`tracking` is set."""

    # Compressed writing (capability ``compress``)

    def encode(self, offset: int, data: bytes | memoryview) -> bytes | None:
        """The stored form of one whole cluster of guest *data*; None where it does not get smaller.

        Called without any lock, from several threads at once: it touches nothing of the image. The core pads the
        image's last cluster with zeroes.
        """
        raise NotImplementedError

    def allocate_encoded(self, offset: int, length: int) -> Allocation:
        """Host space of *length* bytes for the stored form of the cluster at guest *offset*.

        The core writes the bytes at ``host`` and calls :meth:`commit` (or :meth:`abort`). The allocation's ``length``
        is
        that of the guest bytes. Raises BlockError(EIO) where the format cannot replace what the cluster holds already.
        """
        raise NotImplementedError

    def end_encoded(self) -> None:
        """A job has stored its last cluster in encoded form; called under the metadata mutex."""

    # Internal snapshots (capability ``snapshots``)

    def snapshots(self) -> Sequence[dict[str, Any]]:
        """The snapshots, shaped as QEMU's SnapshotInfo (``id``, ``name``, ``vm-state-size``, ``date-sec``, …)."""
        return ()

    def snapshot_create(self, name: str) -> None:
        """Keep the present contents as a snapshot called *name*."""
        raise UsageError("this format has no snapshots")

    def snapshot_apply(self, name: str) -> None:
        """Go back to the snapshot of this id or name (an id is tried first). Raises ImageError where there is none.

        A note on the exception (``__notes__``) is something to tell before it.
        """
        raise UsageError("this format has no snapshots")

    def snapshot_delete(self, name: str | None, *, id: str | None = None) -> None:
        """Delete the first snapshot of this name (as qemu-img does, which looks at no ids), of this id where given."""
        raise UsageError("this format has no snapshots")

    def snapshot_load(self, *, id: str | None = None, name: str | None = None) -> None:
        """Show the contents of a snapshot from now on; the image must be open read-only."""
        raise UsageError("this format has no snapshots")

    # Saved machine state, behind the virtual disk

    def vmstate_offset(self) -> int | None:
        """Where machine state is kept: a guest offset at or past :attr:`size` from which on :meth:`map` and
        :meth:`allocate` work too. None: this format keeps none."""
        return None

    def vmstate_reserve(self, end: int) -> None:
        """Machine state will be written up to the guest offset *end*: see to it that the tables reach there."""

    # Dirty bitmaps kept in the image (capability ``bitmaps``)

    @property
    def keeps_bitmaps(self) -> bool:
        """Whether this very image can keep bitmaps, too: not where its version is of before there were any."""
        return True

    def bitmaps(self) -> Sequence[dict[str, Any]]:
        """The bitmaps: ``name``, ``granularity`` (bytes), ``flags`` (of ``auto``, ``in-use``)."""
        return ()

    def bitmap_add(self, name: str, granularity: int | None = None, *, enabled: bool = True) -> None:
        """Add an empty bitmap; *granularity* in bytes, a power of two from 512 to 2 GiB."""
        raise UsageError("this format has no bitmaps")

    def bitmap_remove(self, name: str) -> None:
        """Take a bitmap away."""
        raise UsageError("this format has no bitmaps")

    def bitmap_clear(self, name: str) -> None:
        """Make a bitmap empty."""
        raise UsageError("this format has no bitmaps")

    def bitmap_enable(self, name: str, *, enabled: bool = True) -> None:
        """Let writes set bits of it (or no longer)."""
        raise UsageError("this format has no bitmaps")

    def bitmap_load(self, name: str) -> tuple[int, bytearray]:
        """A bitmap's granularity (bytes) and its bits, least significant first, one a granule."""
        raise UsageError("this format has no bitmaps")

    def bitmap_merge(self, name: str, granularity: int, bits: bytes | bytearray) -> None:
        """Set in bitmap *name* what another one, of whatever granularity, has set."""
        raise UsageError("this format has no bitmaps")

    # Becoming an image of another format (capability ``inplace``): see ``inplace.py``

    def inplace_source(self) -> Source:
        """This image as the source of an in-place conversion."""
        raise UsageError("this format cannot be converted in place")

    @classmethod
    def inplace_target(cls) -> type[Target]:
        """What writes this format's metadata over another's data."""
        raise UsageError("this format cannot be converted to in place")

    # Changes of the image as a whole

    def amend(self, options: dict[str, Any], *, force: bool = False, progress: Progress | None = None) -> None:
        """Change what ``qemu-img amend -o`` changes: the descriptor's ``amend_options``."""
        raise UsageError("this format cannot be amended")

    def empty(self) -> None:
        """Forget all guest data: every byte comes from the backing image again, or is zero (``commit``)."""
        raise UsageError("an image of this format cannot be emptied")

    def backing_changed(self, node: Node | None) -> None:
        """*node* answers for UNALLOCATED runs now (None: nobody does). For drivers that check whether it may."""

    def reclaim(self) -> int:
        """Give host space that the metadata calls free back: punch holes, cut off the file's end. Returns the bytes.

        Called when everything is stable.
        """
        return 0

    def relocation(self) -> Relocation | None:
        """What moves the file's last units into free places, see ``relocation.py``; None: they stay where they are.

        Everything is stable, and the metadata was found to be sound. Changes nothing by itself.
        """
        return None

    def change_backing(self, filename: str | None, format: str | None) -> None:
        """Record another backing image (None: none) without looking at any data (``rebase -u``)."""
        raise UsageError("this format has no backing images")

    def backing_commits(self, node: Node) -> None:
        """The backing image *node*, writable by now, will be changed into what this image shows (``commit``).

        For formats that remember which state of it they were made on: the one that it will be in is as good.
        """

    def backing_committed(self, node: Node) -> None:
        """It was changed so, as far as it went: the state in which it is now is the one to remember."""

    @classmethod
    def measure(cls, size: int, data: Iterable[tuple[int, int]], options: dict[str, Any]) -> dict[str, int]:
        """Bytes that a new image of *size* takes: ``required`` with the *data* ranges (offset, length; ascending) in
        it, ``fully-allocated`` with everything. *options* as for :meth:`create`. QEMU's BlockMeasureInfo."""
        raise UsageError("this format cannot be measured")

    def flush(self) -> None:
        """Bring data and metadata to stable storage, in a safe order. Includes ``self.file.flush()``."""
        self.file.flush()

    def truncate(self, size: int) -> None:
        """Change the virtual size. Bytes gained in whole clusters are UNALLOCATED or read as zeroes.

        The core zeroes the rest of the former last cluster, and what a longer backing image would show.
        """
        raise UsageError("this format cannot change an image's size")

    def truncate_preallocated(self, size: int, mode: str, *, hide: bool, read: Callable[[int, int], bytes]) -> bool:
        """Grow, and set host space aside for what is gained: *mode* ``metadata``, ``falloc`` or ``full``.

        *hide*: a backing image would show through. *read* is what the guest reads (offset, length), for the cluster in
        which the image ended. Returns whether whole clusters that were gained read as zeroes then.
        """
        raise UsageError(f"Unsupported preallocation mode '{mode}'")

    def reopen(self, *, readonly: bool) -> None:
        """Change between read-only and read-write; the storage is writable when this is called, either way.

        A driver that keeps nothing which depends on it sets :attr:`readonly`; one that marks open images does so here.
        """
        raise ImageError(self.file.filename, "an image of this format cannot change between read-only and read-write")

    def close(self) -> None:
        """Write back what is cached (unless read-only). The core closes the children."""

    def children(self) -> dict[str, Node]:
        """Nodes opened with ``context.open_child`` besides ``file`` and ``backing``, by role."""
        return {}

    def info(self) -> dict[str, Any]:
        """Format-specific facts, in the shape of QEMU's ImageInfoSpecific ``data``."""
        return {}

    def check(self, *, repair: str = "") -> dict[str, Any]:
        """Check the metadata; *repair* is ``""``, ``"leaks"`` or ``"all"``. Result shaped as QEMU's ImageCheck."""
        raise UsageError("this format cannot be checked")

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        """Write an empty image of *size* bytes into *file* (an empty node), popping the create *options* known.

        ``backing_file`` and ``backing_fmt`` are among *options* where the driver has the capability ``backing``.
        """
        raise UsageError("images of this format cannot be created")
