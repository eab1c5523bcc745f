"""What a power cut would have left of recorded changes.

Until a flush completes, a disk may keep any of the changes made since the last one, in any combination, and may tear a
write between sectors. :func:`power_cuts` makes such states from the log of a
:class:`~vm_core.testing.nodes.RecordingNode`:

    recorder = RecordingNode(MemoryNode(image))
    node = FormatNode(Format.open(recorder, …))
    … node.write(…); node.flush(); recorder.mark(bytes(model)) …
    for cut in power_cuts(recorder, seed=1):
        check(cut.image)                       # opens, is free of corruption
        assert read_all(cut.image) contains every byte that cut.mark says was flushed

Marks made after the moment of the cut are not promised, though what they describe may be there in part.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from .nodes import Change, RecordingNode

SECTOR = 512


class PowerCut(NamedTuple):
    """One state that the storage can be in after a power cut."""

    #: The moment of the recorder's clock at which it happened.
    moment: int
    #: The whole storage.
    image: bytes
    #: The last :meth:`RecordingNode.mark` made before, None if none was.
    mark: Any
    #: For messages: which changes got lost or torn.
    story: str


def power_cuts(
    recorder: RecordingNode, *, seed: int = 0, variants: int = 3, limit: int | None = None
) -> Iterator[PowerCut]:
    """Cuts after every recorded change, each in *variants* versions.

    The first version keeps everything that had begun, the second nothing that was not flushed, the others a random
    choice with torn writes. With *limit* only so many moments are tried, picked evenly.
    """
    chance = random.Random(seed)
    changes = sorted(recorder.changes, key=lambda change: change.begin)
    moments = sorted({0, *(change.end for change in changes), *(change.begin for change in changes)})
    if limit is not None and len(moments) > limit:
        moments = [moments[index * (len(moments) - 1) // (limit - 1)] for index in range(limit)]
    for moment in moments:
        begun = [change for change in changes if change.begin <= moment]
        flushes = [change for change in begun if change.operation == "flush" and change.end <= moment]
        flushed = max((flush.begin for flush in flushes), default=0)
        mark = None
        for when, what in recorder.marks:
            if when <= moment:
                mark = what
        for variant in range(variants):
            kept: list[Change] = []
            lost: list[str] = []
            for change in begun:
                if change.operation == "flush":
                    continue
                stable = change.end <= flushed or (change.fua and change.end <= moment)
                if stable or variant == 0 or (variant > 1 and chance.random() < 0.5):
                    if not stable and variant > 1 and change.operation == "write" and chance.random() < 0.3:
                        torn = _tear(change, chance)
                        lost.append(f"torn {_describe(change)}")
                        kept.extend(torn)
                    else:
                        kept.append(change)
                else:
                    lost.append(_describe(change))
            yield PowerCut(moment, apply(recorder.base, kept), mark, "; ".join(lost) or "nothing lost")


def apply(base: bytes, changes: Sequence[Change]) -> bytes:
    """*base* after *changes*, in order."""
    image = bytearray(base)
    for change in changes:
        if change.operation == "truncate":
            size = change.offset
            if size < len(image):
                del image[size:]
            else:
                image.extend(bytes(size - len(image)))
            continue
        end = change.offset + change.length
        if change.operation == "discard":
            end = min(end, len(image))
            image[change.offset : end] = bytes(max(0, end - change.offset))
            continue
        if end > len(image):
            image.extend(bytes(end - len(image)))
        image[change.offset : end] = change.data if change.operation == "write" else bytes(change.length)
    return bytes(image)


def _tear(change: Change, chance: random.Random) -> list[Change]:
    """Some of the sectors of a write."""
    pieces: list[Change] = []
    position, end = change.offset, change.offset + change.length
    while position < end:
        stop = min(end, (position // SECTOR + 1) * SECTOR)
        if chance.random() < 0.5:
            data = change.data[position - change.offset : stop - change.offset]
            pieces.append(change._replace(offset=position, length=stop - position, data=data))
        position = stop
    return pieces


def _describe(change: Change) -> str:
    return f"{change.operation} {change.offset:#x}+{change.length:#x}"
