"""A node of the block graph: a protocol driver at the bottom, formats and filters above it.

Nodes are synchronous and safe to call from several threads at once. Positions and lengths are bytes and need no
alignment; a node whose storage wants aligned requests (O_DIRECT) sees to it itself. Failures raise
:class:`vm_core.errors.BlockError` (an ``OSError`` with an errno).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from ..errors import VmError
from .mapping import Mapping

if TYPE_CHECKING:
    from .breakpoints import Breakpoints
    from .formatnode import FormatNode
    from .open import OpenContext
    from .passage import Hold, Span

#: Bytes of a sector. Sizes are told in whole ones.
SECTOR = 512
#: A piece of memory that a request reads into or writes from. Only flat, contiguous byte views (format "B") are passed.
Buffer = memoryview


def sectors_up(size: int) -> int:
    """*size* rounded up to whole sectors."""
    return -(-size // SECTOR) * SECTOR


class Node(ABC):
    """Something with bytes that can be read, and usually written."""

    #: The name by which ``-blockdev``/QMP know the node (``#block123`` where none was given).
    node_name: str = ""
    #: The driver's name: ``qcow2``, ``file``.
    driver: str = ""
    #: What a person calls the image: a path or URI, shortest form that names it.
    filename: str = ""
    readonly: bool = False
    #: The driver, the options and the children's options that define the node: what its ``json:`` name holds.
    full_options: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed
    #: Offsets and lengths that are multiples of this (bytes) are served without a bounce buffer.
    request_alignment: int = 1
    #: Allocation granularity in bytes (cluster, grain, block); 1 where the image has none.
    cluster_size: int = 1
    #: Filters and raw images: every run of :meth:`map` is DATA of one child at a constant distance, so that walks go
    #: on in that child.
    transparent: bool = False
    #: Images much of whose DATA is holes in the storage: walks look there.
    sparse: bool = False
    #: What is stored are not the bytes that are read (they are encrypted): nobody may take them from the storage below.
    opaque: bool = False
    #: Somebody below looks at events, so they must be told.
    watched: bool = False
    #: Named like a protocol, so that an image above needs no other name than this node's.
    is_protocol: bool = False
    #: A drive of the host whose medium comes and goes, and whether it is in. See :mod:`vm_core.block.medium`.
    removable: bool = False
    present: bool = True
    #: Where requests may be stopped, on nodes that offer it.
    breakpoints: Breakpoints | None = None

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes that a guest sees."""

    @abstractmethod
    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill *buffers* in order from *offset* on. Bytes past :attr:`size` read as zeroes."""

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        """Write *buffers* from *offset* on; with *fua* the bytes are stable when this returns.

        On a protocol node a write past the end grows the storage; on a format node it raises EIO.
        """
        raise self.read_only_error()

    def flush(self) -> None:
        """Return once everything acknowledged before is on stable storage."""

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        """Make the range read as zeroes, the cheapest way there is; *unmap* allows host space to be given back."""
        raise self.read_only_error()

    def discard(self, offset: int, length: int) -> None:
        """The guest no longer needs these bytes. Advisory: may do nothing; parts of clusters are left alone."""
        raise self.read_only_error()

    def read_nowait(self, offset: int, buffers: Sequence[Buffer]) -> bool:
        """Like :meth:`read`, but only if that cannot block. False: nothing is promised, call :meth:`read`."""
        return False

    def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
        """Like :meth:`zero`, but only if no zeroes have to be written. False, with nothing done, where they had to."""
        return False

    def host_spans(
        self, offset: int, length: int, spans: list[Span], holds: list[Hold], *, write: bool, stable: bool
    ) -> bool:
        """Resolve a read or a write in place into *spans* of plain files, if no I/O and no waiting is needed for that.

        Appends to *spans*, and to *holds* the locks that keep them valid: see :mod:`vm_core.block.passage`. False: the
        request is to be carried out by this node, as one that passes an image's end is; what was put on *holds* is
        given back by the caller either way. Never raises for that.
        """
        return False

    @abstractmethod
    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        """Runs that cover ``[offset, offset + length)`` of this node alone, in order, adjoining, cut to the range."""

    def truncate(self, size: int) -> None:
        """Change :attr:`size`. Bytes gained read as zeroes."""
        raise self.read_only_error()

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        """Set host space aside for a range that reads as zeroes; by writing it if *full* or there is no other way."""
        from .vectors import zero_views

        while length > 0:
            step = min(length, 4 * 1024 * 1024)
            self.write(offset, zero_views(step))
            offset += step
            length -= step

    def allocated(self) -> int:
        """Host bytes that the node and its storage take (``disk size`` / ``actual-size``).

        Raises BlockError (ENOTSUP) where nobody can say.
        """
        return 0

    def known_allocated(self) -> dict[str, int]:
        """The member ``actual-size`` of what is told of an image; nothing where nobody can say."""
        try:
            return {"actual-size": self.allocated()}
        except OSError:
            return {}

    @property
    def backing(self) -> Node | None:
        """The node that answers for UNALLOCATED runs."""
        return None

    def lease_runs(self, ranges: Sequence[tuple[int, int]]) -> tuple[FormatNode, int, list[Mapping]] | None:
        """For :func:`vm_core.block.extents.plan`: lock the hull of the (offset, length) *ranges*, map them.

        Returns the node, its lock's ticket and the runs; None from a node that is simply read.
        """
        return None

    def read_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Read saved machine state (an image's bytes behind the virtual disk); *offset* counts from its start."""
        import errno

        from ..errors import BlockError

        raise BlockError.of(errno.ENOTSUP)

    def write_vmstate(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write saved machine state."""
        import errno

        from ..errors import BlockError

        raise BlockError.of(errno.ENOTSUP)

    def children(self) -> Dict[str, Node]:
        """Child nodes by role: ``file``, ``backing``, ``data-file``, …"""
        return {}

    def info(self) -> dict[str, Any]:
        """Format-specific facts, in the shape of QEMU's ImageInfoSpecific ``data``."""
        return {}

    def event(self, name: str) -> None:
        """A format driver tells its storage what it is about to do (``l2_load``, ``refblock_update``, …).

        Test filters such as blkdebug act on it; everybody else ignores it.
        """

    def claim(self) -> None:
        """From now on nobody else may write or resize this storage. Raises LockError where somebody does already."""

    def alone(self) -> AbstractContextManager[None]:
        """While the context lasts nobody else may even read the storage. Raises LockError where somebody does.

        For changes after which others would go on with what no longer holds, such as those of keys.
        """
        return nullcontext()

    def reopen(self, *, readonly: bool) -> None:
        """Change between read-only and read-write where the node is. Raises ImageError where it cannot."""
        from ..errors import ImageError

        if readonly != self.readonly:
            raise ImageError(
                self.filename, f"{self.driver}: cannot be reopened {'read-only' if readonly else 'for writing'}"
            )

    def identity(self) -> tuple[Any, ...] | None:
        """What all openings of one piece of storage have in common (device and inode), None where unknown."""
        return None

    def invalidate(self) -> None:
        """Forget cached contents of the storage: somebody else may have changed it."""

    @abstractmethod
    def close(self) -> None:
        """Flush and release. Children that this node opened are closed too. A second call does nothing."""

    def read_only_error(self) -> OSError:
        """The error of a change to a node that allows none."""
        import errno

        from ..errors import BlockError

        return BlockError.of(errno.EACCES if self.readonly else errno.ENOTSUP)

    # Conveniences for programs and drivers, on top of the above.

    def pread(self, offset: int, length: int) -> bytes:
        """Return *length* bytes from *offset* on."""
        data = bytearray(length)
        if length:
            self.read(offset, (memoryview(data),))
        return bytes(data)

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write *data* at *offset*."""
        if len(data):
            self.write(offset, (memoryview(data).cast("B"),))

    def __enter__(self) -> Node:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            self.close()
        except (OSError, VmError):
            if error is None:  # else what went wrong first is what is told
                raise


class Protocol(Node):
    """A node without children: it talks to the host or to a server."""

    is_protocol = True

    @classmethod
    def claims(cls, filename: str) -> int:
        """Score for a plain path without scheme (0: not mine), for drivers with the capability ``local``."""
        return 0

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """Options that a file name stands for, prefix included: ``nbd://h/x`` → host, port, export."""
        return {"filename": filename}

    @classmethod
    @abstractmethod
    def open(cls, options: dict[str, Any], context: OpenContext) -> Protocol:
        """Open from *options*, popping each that is understood; the opener refuses what is left over by name."""

    @classmethod
    def create(cls, options: dict[str, Any], size: int) -> None:
        """Make (or truncate) the storage that *options* name with *size* bytes that read as zeroes."""
        from ..errors import UsageError

        raise UsageError(f"{cls.driver}: images cannot be created through this protocol")
