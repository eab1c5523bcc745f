"""Changing an image's size: whether that can be, and growing with host space for what is gained."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import BlockError, UsageError

if TYPE_CHECKING:
    from .node import Node


#: QEMU's words for a format of which :func:`resizable` is not true.
NOT_RESIZABLE = "Image format driver does not support resize"


def resizable(node: Node) -> bool:
    """Whether the format's driver says so; filters and protocols are asked by trying."""
    from ..plugins import find
    from .formatnode import FormatNode

    return not isinstance(node, FormatNode) or "resize" in find("format", node.driver).capabilities


def on_device(node: Node) -> bool:
    """Whether a raw image's bytes are those of a device, whose size nobody changes."""
    from .host_device import HostDeviceProtocol

    while node.transparent and "file" in node.children():
        node = node.children()["file"]
    return isinstance(node, HostDeviceProtocol)


def grow_allocated(node: Node, size: int, mode: str) -> None:
    """Make *node* *size* bytes long and set host space aside; *mode* is ``metadata``, ``falloc`` or ``full``.

    Raises UsageError where the format cannot.
    """
    from .formatnode import FormatNode

    if isinstance(node, FormatNode):
        node.truncate_preallocated(size, mode)
        return
    if on_device(node):
        raise UsageError(f"Preallocation mode '{mode}' unsupported for this non-regular file")
    former = node.size
    if size < former:
        raise UsageError("Cannot use preallocation for shrinking files")
    if mode == "metadata":
        raise UsageError(f"Unsupported preallocation mode: {mode}")
    node.truncate(size)
    if size > former:
        try:
            set_aside(node, former, size - former, full=mode == "full")
        except BaseException:
            with suppress(OSError):
                node.truncate(former)
            raise


def set_aside(node: Node, offset: int, length: int, *, full: bool) -> None:
    """:meth:`.Node.reserve` with QEMU's words where that fails. Raises BlockError."""
    try:
        node.reserve(offset, length, full=full)
    except OSError as error:
        told = "Could not write zeros for preallocation" if full else "Could not preallocate new data"
        raise BlockError.of(error.errno or errno.EIO, f"{told}: {error.strerror or error}") from error
