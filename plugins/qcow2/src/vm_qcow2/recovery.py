"""After a change that could not be finished: what was taken for it and is not in use is given back.

On a full disk new clusters cannot be written, but what is there can be written over: reference counts of clusters that
no table points at go down again, and the file ends where it did before. So a failed change leaves nothing that somebody
has to repair. The disk is what counts here: the image is read anew from it, and looked at as by a check.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from vm_core.block import notices
from vm_core.errors import VmError

from .features import DIRTY

if TYPE_CHECKING:
    from .image import Qcow2


def give_back(image: Qcow2, size: int | None = None) -> None:
    """A change of *image* has failed: forget what is only in memory, and give back what it took on disk.

    *size*: nothing beyond these guest bytes is wanted; what lies there was only prepared. Where something cannot be
    written once more, clusters stay leaked. Nothing is given back of an image that is damaged.
    """
    store = image.store
    store.failed = True
    if store.corrupt or image.readonly:
        return
    former = notices.sink
    notices.sink = _Ear()
    try:
        with suppress(OSError, VmError):
            recover(image, size)
        with suppress(OSError, VmError):
            image.start_anew()
    finally:
        notices.sink = former


class _Ear:
    """Hears what a check says. Nobody else does: the failure itself is told, not what is done about it."""

    def __init__(self) -> None:
        #: Bits COPIED that do not agree with the reference counts.
        self.marks = 0

    def __call__(self, text: str) -> None:
        self.marks += text.startswith("ERROR OFLAG_COPIED")


def recover(image: Qcow2, size: int | None = None) -> None:
    """Give back, on disk, the clusters of *image* that nothing there points at. Raises OSError, ImageError."""
    from .check import check
    from .emptying import last_used
    from .image import Qcow2 as Image
    from .resize import drop_from
    from .sharing import Tree

    data = image.data
    found = Image.__new__(Image)
    found.encryption = image.encryption
    Image.__init__(
        found,
        image.file,
        image.store.name,
        readonly=False,
        check=True,
        options=dict(image._given),
        open_data=lambda _name: data,
    )
    if found.header.incompatible_features & DIRTY:
        return  # whoever opens it next counts anew
    if size is not None and size == found.size:
        drop_from(found, size)
        found.order.write_back()
    bits = found.geometry.cluster_bits
    end = last_used(found) + 1 << bits
    if end > found.file.size:
        # A check looks no farther than the file reaches.
        found.file.truncate(end)
    notices.sink = ear = _Ear()
    result = check(found, live=True)
    if not result["check-errors"] and result.get("corruptions", 0) == ear.marks:
        if result.get("leaks"):
            check(found, repair="leaks", live=True)
        if result.get("leaks") or ear.marks:
            # What was taken or given up for a snapshot is counted rightly by now.
            Tree(found, found.tables.l1, active=True).mark()
            found.order.write_back()
            found.refcounts.settle()
    _cut(found, image.store.length)
    image.store.failed = False


def shorten(image: Qcow2) -> None:
    """Data could not be written: let the file end where it did, or where the last cluster in use ends."""
    with suppress(OSError, VmError):
        _cut(image, image.store.length)


def _cut(image: Qcow2, length: int) -> None:
    from .emptying import last_used

    end = max(last_used(image) + 1 << image.geometry.cluster_bits, length)
    if end < image.file.size:
        image.file.truncate(end)
