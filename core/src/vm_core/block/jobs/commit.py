"""Commit: write what an overlay holds into one of its backing images, and empty the overlay."""

from __future__ import annotations

from ...errors import ImageError, UsageError
from ..format import Format
from ..formatnode import FormatNode
from ..node import Node
from .convert import ConvertOptions, convert
from .job import Job

#: Beyond every image: a backing image that answers for everything.
_ENDLESS = 1 << 63


def chain(top: Node) -> list[Node]:
    """*top* and its backing images, filters on the way left out."""
    found: list[Node] = []
    node: Node | None = top
    while node is not None:
        while node.backing is None and node.transparent and "file" in node.children():
            inner = node.children()["file"]
            if not isinstance(inner, FormatNode):
                break
            node = inner
        found.append(node)
        node = node.backing
    return found


def commit(
    top: Node, base: Node | None = None, *, keep: bool = False, job: Job | None = None, workers: int = 8
) -> None:
    """Write into *base* (None: the backing image of *top*) what *top* and the images between hold; then empty *top*.

    *base* is made writable where it is not, and grows where *top* is longer; the image above it, which may remember the
    state in which *base* was, is told. With *keep* the overlay is left as it is; an overlay whose *base* is not its own
    backing image always is: emptied, it would show what lies between.
    Raises ImageError, CopyError, Cancelled, BlockError.
    """
    images = chain(top)
    overlay = images[0]
    if len(images) < 2:
        raise ImageError("", "Image does not have a backing file")
    if base is None:
        base = images[1]
    job = job or Job()
    was_readonly = base.readonly
    if was_readonly:
        base.reopen(readonly=False)
    above = images[_place(base, images) - 1]
    try:
        _tell(above, base, done=False)
        if base.size < top.size:
            base.truncate(top.size)
        convert(
            [overlay],
            base,
            ConvertOptions(workers=workers, backing=_ENDLESS, zero_init=False, detect=False),
            base=base,
            job=job,
        )
        base.flush()
        if not keep and base is images[1]:
            empty(overlay)
    finally:
        if was_readonly:
            base.reopen(readonly=True)
        _tell(above, base, done=True)


def _place(base: Node, images: list[Node]) -> int:
    """The place of *base* among *images*, the first below the top where it is not there."""
    return next((number for number, one in enumerate(images) if number and one is base), 1)


def _tell(overlay: Node, base: Node, *, done: bool) -> None:
    """Tell the image above *base*, where its format wants to know, that *base* was changed into what it shows, or will
    be."""
    if not isinstance(overlay, FormatNode):
        return
    kind = type(overlay.format)
    if (
        (kind.backing_committed is Format.backing_committed)
        if done
        else (kind.backing_commits is Format.backing_commits)
    ):
        return
    was_readonly = overlay.readonly
    if was_readonly:
        overlay.reopen(readonly=False)
    try:
        with overlay.quiesce() as driver:
            (driver.backing_committed if done else driver.backing_commits)(base)
            driver.flush()
    finally:
        if was_readonly:
            overlay.reopen(readonly=True)


def empty(node: Node) -> None:
    """Forget all data of an image whose format can; another keeps what it has: the same bytes. Raises ImageError."""
    if not isinstance(node, FormatNode):
        return
    try:
        with node.quiesce() as driver:
            driver.empty()
            driver.flush()
    except UsageError:
        return
    except OSError as error:
        raise ImageError("", f"Failed to empty {node.filename}: {error.strerror or error}") from error
