"""Stream: copy into an image what it takes from its backing images, so that it needs them no more."""

from __future__ import annotations

from ..formatnode import FormatNode
from ..node import Node
from .job import Job
from .rebase import rebase


def stream(image: FormatNode, base: Node | None = None, *, job: Job | None = None, workers: int = 8) -> None:
    """Copy what only the backing images above *base* (None: all of them) hold into *image*, and record the new chain.

    Its node keeps the former chain open until it is closed. Raises CopyError, Cancelled, BlockError, ImageError.
    """
    rebase(image, base, job=job, workers=workers)
    reference = None
    node: Node | None = image
    while base is not None and node is not None:
        if node.backing is base and isinstance(node, FormatNode):
            reference = node.format.backing_reference
        node = node.backing
    with image.quiesce() as driver:
        if reference is None:
            driver.change_backing(None, None)
        else:
            driver.change_backing(reference.filename, reference.format)
        driver.flush()
