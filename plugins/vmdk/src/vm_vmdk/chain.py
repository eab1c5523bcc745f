"""Chains: which image is the parent, and whether it still is what it was.

An image names its parent by a file name, ``parentFileNameHint``, and keeps the parent's content ID as it was,
``parentCID``. Images move, together; the hint then still has the old directory. So where the hint leads nowhere, the
parent is looked for beside the image: under the name that the hint has, then by the content ID in whatever lies there.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vm_core.block.gate import SCHEME
from vm_core.errors import GateError

from .descriptor import NO_PARENT, Descriptor
from .header import COWD_MAGIC, MAGIC, SECTOR, SparseHeader

if TYPE_CHECKING:
    from vm_core.block.node import Node
    from vm_core.block.open import OpenContext

#: Files whose descriptors are looked at, at most, and bytes of each.
_MOST = 1000
_HEAD = 64 * 1024
#: Bytes of an embedded descriptor whose header does not tell.
_USUAL = 20 * SECTOR


def find_parent(descriptor: Descriptor, name: str, context: OpenContext) -> str:
    """The parent's name for the opener: the hint, or what lies beside the image instead."""
    hint = descriptor.parent_hint
    if not hint or context.backing_given or not context.follow_backing or context.gate.closed:
        return hint
    if hint.startswith("json:") or (SCHEME.match(hint) and not _is_windows(hint)):
        return hint
    directory = os.path.dirname(name)
    if os.path.exists(os.path.join(directory, hint)):
        return hint
    base = hint.replace("\\", "/").rpartition("/")[2]
    wanted = descriptor.parent_cid
    if base and base != hint and _may_open(os.path.join(directory, base), base, name, context):
        return base
    if wanted is None or wanted == NO_PARENT:
        return hint
    try:
        names = sorted(os.listdir(directory or "."))
    except OSError:
        return hint
    own = os.path.basename(name)
    for candidate in [one for one in names if one.lower().endswith(".vmdk") and one != own][:_MOST]:
        path = os.path.join(directory, candidate)
        if _may_open(path, candidate, name, context) and content_id_of(path) == wanted:
            return candidate
    return hint


def _is_windows(hint: str) -> bool:
    return len(hint) > 2 and hint[1] == ":" and hint[2] in "\\/"


def _may_open(path: str, reference: str, name: str, context: OpenContext) -> bool:
    try:
        context.gate.check(name, "backing", reference, path)
    except GateError:
        return False
    return os.path.isfile(path)


def content_id_of(path: str) -> int | None:
    """The content ID of the image in a regular file; None where it has none that can be found."""
    try:
        with open(path, "rb") as file:
            head = file.read(_HEAD)
    except OSError:
        return None
    text = embedded_text(head) if head.startswith(MAGIC) else head
    if not text or text.startswith(COWD_MAGIC):
        return None
    return Descriptor(text, path).cid


def embedded_text(head: bytes) -> bytes:
    """The descriptor embedded in the sparse extent that begins with *head*."""
    start, length = embedded_place(SparseHeader.parse(head), len(head))
    return head[start : start + length]


def embedded_place(header: SparseHeader, size: int) -> tuple[int, int]:
    """Where in a file of *size* bytes the embedded descriptor is, and its length.

    Where the header does not say, or what cannot be, it is where everybody puts it: behind the header.
    """
    start = header.descriptor_offset * SECTOR
    if not 0 < start < size:
        start = SECTOR
    length = header.descriptor_size * SECTOR or _USUAL
    return start, max(0, min(length, size - start, _HEAD))


def check_parent(descriptor: Descriptor, backing: Node) -> str:
    """Why *backing* is not the parent that it was; empty where it is."""
    format = getattr(backing, "format", None)
    found = getattr(format, "content_id", None)
    if found is None:
        return f"{backing.filename} is no VMDK image and has no content ID"
    if found != descriptor.parent_cid:
        return (
            f"the parent {backing.filename} has been changed since: "
            f"its content ID is {found:x}, not {descriptor.parent_cid or 0:x}"
        )
    return ""
