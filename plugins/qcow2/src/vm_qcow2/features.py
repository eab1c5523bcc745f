"""Feature bits (*Header*: incompatible, compatible and auto-clear features) and their names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

#: Refcounts may be wrong: they must be counted anew before the image is written.
DIRTY = 1 << 0
#: Any metadata may be wrong: the image must not be written.
CORRUPT = 1 << 1
#: Guest data is in another file.
DATA_FILE = 1 << 2
#: Compressed clusters are not zlib's: see ``compression_type``.
COMPRESSION_TYPE = 1 << 3
#: L2 entries have 128 bits and describe subclusters.
EXTENDED_L2 = 1 << 4

#: Refcounts may be updated lazily while DIRTY is set (compatible feature).
LAZY_REFCOUNTS = 1 << 0

#: The bitmaps extension is consistent (auto-clear feature).
BITMAPS = 1 << 0
#: The external data file can be used as a raw image (auto-clear feature).
RAW_DATA_FILE = 1 << 1

KNOWN_COMPATIBLE = LAZY_REFCOUNTS
KNOWN_AUTOCLEAR = BITMAPS | RAW_DATA_FILE


class FeatureName(NamedTuple):
    """One entry of the feature name table. *kind*: 0 incompatible, 1 compatible, 2 auto-clear."""

    kind: int
    bit: int
    name: str


#: The table that new images get, in the order in which qemu-img writes it.
FEATURE_NAMES = (
    FeatureName(0, 0, "dirty bit"),
    FeatureName(0, 1, "corrupt bit"),
    FeatureName(0, 2, "external data file"),
    FeatureName(0, 3, "compression type"),
    FeatureName(0, 4, "extended L2 entries"),
    FeatureName(1, 0, "lazy refcounts"),
    FeatureName(2, 0, "bitmaps"),
    FeatureName(2, 1, "raw external data"),
)


def unsupported(mask: int, names: Iterable[FeatureName]) -> str:
    """The unknown incompatible features in *mask*, by the image's own names, those without a name as a number."""
    parts = []
    rest = mask
    for one in names:
        if one.kind == 0 and mask >> one.bit & 1 and one.name:
            parts.append(one.name)
            rest &= ~(1 << one.bit)
    if rest:
        parts.append(f"Unknown incompatible feature: {rest:x}")
    return ", ".join(parts)


def bits(mask: int) -> list[int]:
    """The numbers of the bits set in *mask*."""
    return [bit for bit in range(64) if mask >> bit & 1]


def describe(kind: int, mask: int, names: Iterable[FeatureName]) -> str:
    """What the bits in *mask* are called, by the image's own table, then ours, then by number."""
    known = {(one.kind, one.bit): one.name for one in (*FEATURE_NAMES, *names)}
    return ", ".join(known.get((kind, bit)) or f"bit {bit}" for bit in bits(mask))
