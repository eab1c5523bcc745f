"""Disk images for programs: a file-like object with a few methods more.

    with vm_core.open("disk.qcow2", "r+") as image:
        image.size, image.format                  # 10737418240, 'qcow2'
        image.seek(512); image.read(4096)         # like any binary file
        image.pread(512, 4096)                    # the same without a position, safe from many threads
        image.pwrite(512, b"...")
        image.zero(1 << 20, 1 << 30)              # a gigabyte of zeroes, by metadata where possible
        image.discard(0, 1 << 20)                 # these bytes are no longer needed
        image.flush()                             # on stable storage when this returns
        sum(run.length for run in image.map() if run.data)

An image is opened by path or by any of QEMU's other spellings (``json:{…}``, ``driver=…,file.filename=…``, a dict). Its
backing files are opened if they lie beside or below it; see :class:`vm_core.Gate` for what else may be followed.
Errors are :class:`vm_core.VmError` (one line to show to a user) when opening, ``OSError`` with an errno in I/O.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .block.cache import CacheMode
from .block.extents import walk
from .block.mapping import Kind
from .block.node import Node
from .block.open import create_image, open_node
from .errors import UsageError, VmError

if TYPE_CHECKING:
    from typing_extensions import Buffer as _Buffer

    from .block.gate import Gate

_MODES = {"r": (False, False), "r+": (True, False), "w": (True, True), "w+": (True, True), "x": (True, True)}


class MapEntry(NamedTuple):
    """One run of an image, as in ``qemu-img map``."""

    #: First guest byte and number of bytes.
    start: int
    length: int
    #: The bytes are stored somewhere.
    data: bool
    #: They read as zeroes.
    zero: bool
    #: Some image of the chain says what they are; False: nobody ever wrote them.
    allocated: bool
    #: Which image of the chain: 0 this one, 1 its backing image, …
    depth: int
    #: Where in *filename* they are stored verbatim; None for zeroes and compressed or encrypted data.
    offset: int | None
    filename: str | None


class Image(io.RawIOBase):
    """An open disk image. Made by :func:`open`.

    It is a binary file of fixed length: reads end at :attr:`size`, writes past it fail, :meth:`truncate` changes it.
    """

    def __init__(self, node: Node, *, writethrough: bool = False, owned: bool = True) -> None:
        """Wrap *node*, closing it too if *owned*."""
        super().__init__()
        self._node = node
        self._writethrough = writethrough
        self._owned = owned
        self._position = 0

    @property
    def node(self) -> Node:
        """The node of the block layer."""
        return self._node

    @property
    def name(self) -> str:
        """The path or URI of the image."""
        return self._node.filename

    @property
    def size(self) -> int:
        """The virtual size in bytes."""
        return self._node.size

    @property
    def format(self) -> str:
        """The format's name."""
        return self._node.driver

    @property
    def backing(self) -> Image | None:
        """The backing image, open as long as this one is."""
        below = self._node.backing
        return None if below is None else Image(below, owned=False)

    @property
    def chain(self) -> list[Image]:
        """This image, its backing image, that one's, …"""
        images = [self]
        while (below := images[-1].backing) is not None:
            images.append(below)
        return images

    @property
    def info(self) -> dict[str, Any]:
        """What there is to say: name, format, sizes in bytes, backing file, and the format's own facts."""
        node = self._node
        found: dict[str, Any] = {
            "filename": node.filename,
            "format": node.driver,
            "virtual-size": node.size,
            **node.known_allocated(),
        }
        if node.cluster_size > 1:
            found["cluster-size"] = node.cluster_size
        if node.backing is not None:
            found["full-backing-filename"] = node.backing.filename
        specific = node.info()
        if specific:
            found["format-specific"] = {"type": node.driver, "data": specific}
        return found

    def map(self, start: int = 0, length: int | None = None) -> Iterator[MapEntry]:
        """Maximal runs that cover the image (or *length* bytes from *start* on), in order.

        Follows the backing chain and asks the file system about holes in raw images.
        """
        for extent in walk(self._node, start, length):
            stored = extent.kind in (Kind.DATA, Kind.SPECIAL)
            placed = extent.kind is Kind.DATA or (extent.kind is Kind.ZERO and extent.host >= 0)
            yield MapEntry(
                extent.offset,
                extent.length,
                stored,
                extent.kind is Kind.ZERO,
                extent.allocated,
                extent.depth,
                extent.host if placed else None,
                extent.storage.filename if placed and extent.storage is not None else None,
            )

    # Without a position

    def pread(self, offset: int, length: int) -> bytes:
        """*length* bytes from *offset* on; fewer at the end of the image."""
        self._check_open()
        return self._node.pread(offset, max(0, min(length, self.size - offset)))

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> int:
        """Write all of *data* at *offset*."""
        self._check_open()
        view = memoryview(data).cast("B")
        if view.nbytes:
            self._node.write(offset, (view,), fua=self._writethrough)
        return view.nbytes

    def zero(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make the bytes zero, by metadata where possible; *unmap* lets host space go."""
        self._check_open()
        self._node.zero(offset, length, unmap=unmap, fua=self._writethrough)

    def discard(self, offset: int, length: int) -> None:
        """The bytes are no longer needed; whole clusters of host space go. Reads there give anything."""
        self._check_open()
        self._node.discard(offset, length)

    # io.RawIOBase

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return not self._node.readonly

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: _Buffer) -> int:
        self._check_open()
        view = memoryview(buffer).cast("B")
        length = max(0, min(view.nbytes, self.size - self._position))
        if length:
            self._node.read(self._position, (view[:length],))
            self._position += length
        return length

    def readall(self) -> bytes:
        data = self.pread(self._position, max(0, self.size - self._position))
        self._position += len(data)
        return data

    def write(self, data: _Buffer) -> int:
        written = self.pwrite(self._position, memoryview(data).cast("B"))
        self._position += written
        return written

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._check_open()
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}.get(whence)
        if base is None:
            raise ValueError(f"whence {whence} is none of SEEK_SET, SEEK_CUR, SEEK_END")
        if base + offset < 0:
            raise ValueError("the position would be before the image")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        self._check_open()
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Change the virtual size to *size*, the position if None. Bytes gained are zero."""
        self._check_open()
        size = self._position if size is None else size
        self._node.truncate(size)
        return size

    def flush(self) -> None:
        """Return when everything written is on stable storage."""
        if not self.closed and not self._node.readonly:
            self._node.flush()

    def fileno(self) -> int:
        """Not supported: a descriptor would show the file, not the image."""
        raise io.UnsupportedOperation("an image has no file descriptor; its bytes are not the file's")

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close; where the body failed already, its error is the one that is told."""
        try:
            self.close()
        except (OSError, VmError):
            if error is None:
                raise

    def close(self) -> None:
        """Flush and close, with all images below."""
        if self.closed:
            return
        try:
            super().close()
        finally:
            if self._owned:
                self._node.close()

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the image is closed")

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.size} bytes"
        return f"<vm_core.Image {self.name!r} {self.format}, {state}>"


def open(
    spec: str | os.PathLike[str] | dict[str, Any],
    mode: str = "r",
    *,
    format: str | None = None,
    size: int | str | None = None,
    cache: str = "writeback",
    gate: Gate | None = None,
    share: bool = False,
    backing: bool = True,
    **options: Any,
) -> Image:
    """Open a disk image.

    *mode*: ``r`` reads; ``r+`` reads and writes; ``w`` creates the image (emptying what is there) and ``x`` creates it
    only if there is nothing yet, both with *size* bytes (``"10G"`` will do) in *format* (raw if None) with the create
    *options*. A ``b`` may be added.

    *format* names the format; None: it is recognised. *cache* is one of QEMU's modes (writeback, writethrough, none,
    directsync, unsafe). *gate* decides about backing files that lie elsewhere. *share* reads although another process
    writes. Without *backing* the backing images are left closed and their bytes read as zeroes.

    Raises ImageError (LockError where the image is in use, GateError where a backing file may not be opened),
    PluginError where a plugin is missing, UsageError.
    """
    writable, creating = _mode(mode)
    if creating:
        if not isinstance(spec, (str, os.PathLike)):
            raise UsageError("modes w and x take a path")
        if "x" in mode and os.path.lexists(spec):
            raise FileExistsError(17, "File exists", os.fspath(spec))
        format = format or "raw"
        create(spec, size, format=format, gate=gate, **options)
    elif options or size is not None:
        raise UsageError(f"{min(options, default='size')}=… belongs to creating an image: mode w or x")
    how = CacheMode.parse(cache)
    node = open_node(spec, readonly=not writable, cache=how, format=format, gate=gate, share=share, backing=backing)
    return Image(node, writethrough=how.writethrough)


def _mode(mode: str) -> tuple[bool, bool]:
    plain = mode.replace("b", "", 1)
    if plain == "+r" or plain not in (*_MODES, "x+"):
        raise ValueError(f"mode {mode!r} is none of r, r+, w, x (and b)")
    return _MODES[plain.removesuffix("+") if plain in ("x+", "w+") else plain]


def create(
    path: str | os.PathLike[str],
    size: int | str | None = None,
    *,
    format: str = "raw",
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    gate: Gate | None = None,
    **options: Any,
) -> None:
    """Create an image of *size* bytes (``"10G"`` will do), emptying what is at *path*.

    With *backing* it is an overlay that holds only what differs from that image, whose *backing_format* has to be
    named; *size* is then that image's, if not given. The other *options* are the format's create options, as after
    ``-o`` of ``qemu-img create`` (with ``_`` for ``-``): ``cluster_size="2M"``. Raises ImageError, PluginError,
    UsageError.
    """
    if isinstance(size, str):
        from .options import parse_size

        size = parse_size(size)
    if backing is not None:
        options["backing_file"] = os.fspath(backing)
    if backing_format is not None:
        options["backing_fmt"] = backing_format
    create_image(os.fspath(path), format, size, options, gate=gate)
