"""The options with which an image is opened: caches, overlap checks, what is discarded. Names and limits are QEMU's."""

from __future__ import annotations

from typing import Any, NamedTuple

from vm_core.errors import UsageError

from . import features, overlap
from .geometry import Geometry
from .header import Header

DEFAULT_L2_CACHE = 32 << 20
#: Tables and blocks that are kept at least.
MIN_L2_TABLES = 2
MIN_REFCOUNT_BLOCKS = 4
#: Tables of more bytes are read in parts by QEMU; clusters in a row are not sought across such parts.
DEFAULT_L2_ENTRY = 65536
MAX_INT = (1 << 31) - 1
#: Seconds after which unused tables are given up.
DEFAULT_CLEAN_INTERVAL = 600


class Runtime(NamedTuple):
    """The options, checked. Sizes are bytes."""

    l2_cache: int
    refcount_cache: int
    #: Bytes of an L2 table in which runs of free clusters are sought at once.
    l2_slice: int
    #: Seconds after which tables that nobody used are dropped from memory; 0: never.
    clean_interval: int
    lazy: bool
    #: Kinds of metadata that writes are checked against.
    checks: frozenset[str]
    discard_request: bool
    discard_snapshot: bool
    discard_other: bool


def take(options: dict[str, Any], header: Header, geometry: Geometry) -> Runtime:
    """Pop what is understood of *options*. Raises UsageError in QEMU's words."""
    l2_cache, refcount_cache, l2_slice = _caches(options, header, geometry)
    interval = options.pop("cache-clean-interval", DEFAULT_CLEAN_INTERVAL)
    if not 0 <= interval <= 0xFFFF_FFFF:
        raise UsageError("Cache clean interval too big")
    lazy = options.pop("lazy-refcounts", None)
    if lazy is None:
        lazy = bool(header.compatible_features & features.LAZY_REFCOUNTS)
    if lazy and header.version < 3:
        raise UsageError("Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level")
    return Runtime(
        l2_cache,
        refcount_cache,
        l2_slice,
        interval,
        lazy,
        _checks(options),
        options.pop("pass-discard-request", True),
        options.pop("pass-discard-snapshot", True),
        options.pop("pass-discard-other", False),
    )


def _caches(options: dict[str, Any], header: Header, geometry: Geometry) -> tuple[int, int, int]:
    """Bytes for L2 tables and for refcount blocks, and of the parts in which L2 tables count."""
    combined = options.pop("cache-size", None)
    given_l2 = options.pop("l2-cache-size", None)
    given_refcount = options.pop("refcount-cache-size", None)
    size = geometry.cluster_size
    entry = options.pop("l2-cache-entry-size", None)
    if entry is None:
        entry = min(DEFAULT_L2_ENTRY, size)
    width = 16 if geometry.extended else 8
    # What the whole image can use.
    most = -(-(-(-header.size // size) * width) // size) * size
    l2 = min(most, DEFAULT_L2_CACHE if given_l2 is None else given_l2)
    refcount = 0 if given_refcount is None else given_refcount
    least = MIN_REFCOUNT_BLOCKS * size
    if combined is not None:
        if given_l2 is not None and given_refcount is not None:
            raise UsageError("cache-size, l2-cache-size and refcount-cache-size may not be set at the same time")
        if given_l2 is not None and given_l2 > combined:
            raise UsageError("l2-cache-size may not exceed cache-size")
        if given_refcount is not None and given_refcount > combined:
            raise UsageError("refcount-cache-size may not exceed cache-size")
        if given_l2 is not None:
            refcount = combined - l2
        elif given_refcount is not None:
            l2 = min(most, combined - refcount)
        else:
            # As much as can be used for L2 tables; the rest for refcounts, which are needed less.
            if combined >= most + least:
                l2 = most
            else:
                l2 = combined - min(combined, least)
            refcount = combined - l2
    if entry < 512 or entry > size or entry & entry - 1:
        raise UsageError(f"L2 cache entry size must be a power of two between 512 and the cluster size ({size})")
    if l2 // entry > MAX_INT:
        raise UsageError("L2 cache size too big")
    if refcount // size > MAX_INT:
        raise UsageError("Refcount cache size too big")
    return max(l2, MIN_L2_TABLES * entry), max(refcount, least), entry


def _checks(options: dict[str, Any]) -> frozenset[str]:
    """What ``overlap-check`` and its members ask for."""
    short = options.pop("overlap-check", None)
    template = options.pop("overlap-check.template", None)
    if short is not None and template is not None and short != template:
        raise UsageError(
            f"Conflicting values for qcow2 options 'overlap-check' ('{short}') and 'overlap-check.template' "
            f"('{template}')"
        )
    word = short or template or "cached"
    found = overlap.TEMPLATES.get(word)
    if found is None:
        raise UsageError(
            f"Unsupported value '{word}' for qcow2 option 'overlap-check'. "
            f"Allowed are any of the following: {', '.join(overlap.TEMPLATES)}"
        )
    kinds = set(found)
    for option, kind in overlap.OPTIONS.items():
        wanted = options.pop(f"overlap-check.{option}", None)
        if wanted is not None:
            (kinds.add if wanted else kinds.discard)(kind)
    return frozenset(kinds)
