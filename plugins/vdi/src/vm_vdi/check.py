"""Looking for damage: block numbers that cannot be, or that are there twice, and a wrong count of blocks."""

from __future__ import annotations

from array import array
from typing import Any

from .header import ZERO, Header

#: Messages that are given, at most: a damaged map of many blocks would fill the screen for hours.
_MOST = 1000


def check(header: Header, entries: array[int]) -> dict[str, Any]:
    """The result in the shape of ImageCheck, the messages in QEMU's words. There is nothing that could be repaired."""
    messages: list[str] = []
    errors = allocated = 0
    seen: set[int] = set()
    for index, number in enumerate(entries):
        if number >= ZERO:
            continue
        if number < header.blocks_in_image:
            allocated += 1
            if number not in seen:
                seen.add(number)
                continue
            text = f"ERROR: block index {number} also used by {number}"
        else:
            text = f"ERROR: block index {index} too large, is {number}"
        errors += 1
        if len(messages) < _MOST:
            messages.append(text)
    if len(entries) < header.blocks_in_image:
        errors += 1
        messages.append(f"ERROR: block map ends at index {len(entries)}, should have {header.blocks_in_image}")
    if allocated != header.blocks_allocated:
        errors += 1
        messages.append(f"ERROR: allocated blocks mismatch, is {allocated}, should be {header.blocks_allocated}")
    found: dict[str, Any] = {"check-errors": 0, "messages": messages}
    if errors:
        found["corruptions"] = errors
    return found
