"""Looking for damage: blocks that lie outside the file, on metadata or on one another.

A log that had to be replayed when the image was opened is one corruption that has been repaired, as QEMU counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .table import STATES

if TYPE_CHECKING:
    from .image import Vhdx

#: Messages that are given, at most.
_MOST = 1000


def check(image: Vhdx) -> dict[str, Any]:
    """The result in the shape of ImageCheck, the messages in QEMU's words where it has any."""
    reports: list[str] = []
    messages: list[str] = []
    errors = 0
    table = image.table
    for text in table.faults(image.regions, image.file.size):
        errors += 1
        if len(reports) < _MOST:
            reports.append(text)
    for run in table.runs(0, table.blocks):
        if run.state not in STATES:
            errors += run.length
            if len(messages) < _MOST:
                messages.append(f"ERROR: block {run.block} is in state {run.state}, which has no meaning")
    for block, host, other in table.overlaps() if not errors else ():
        errors += 1
        if len(messages) < _MOST:
            messages.append(f"ERROR: block {block} at {host:#x} lies on block {other}")
    for text in table.misplaced(image.regions, image.file.size) if image.metadata.has_parent and not errors else ():
        errors += 1
        if len(messages) < _MOST:
            messages.append(f"ERROR: {text}")
    found: dict[str, Any] = {"check-errors": 0, "reports": reports, "messages": messages}
    if errors:
        found["corruptions"] = errors
    if image.replayed:
        found["corruptions-fixed"] = 1
    return found
