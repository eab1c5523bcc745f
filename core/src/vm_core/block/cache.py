"""Cache modes: what a write's acknowledgement means, and whether the host's page cache takes part."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import UsageError


class CacheMode(NamedTuple):
    """One of QEMU's five modes as the three switches it stands for.

    ========================  ========  ==========  ==============
    ``cache=``                 direct    no_flush    writethrough
    ========================  ========  ==========  ==============
    writeback (the default)
    none                       x
    writethrough                                     x
    directsync                 x                     x
    unsafe                               x
    ========================  ========  ==========  ==============
    """

    #: O_DIRECT: the page cache is bypassed.
    direct: bool = False
    #: Flushes are not passed to the host: fast, and a power cut loses the image.
    no_flush: bool = False
    #: The guest is given no volatile write cache: every write is stable when it is acknowledged.
    writethrough: bool = False

    @classmethod
    def parse(cls, name: str) -> CacheMode:
        """The mode that ``cache=NAME`` names. Raises UsageError."""
        try:
            return MODES[name]
        except KeyError:
            raise UsageError(f"cache mode {name!r} is unknown; there are {', '.join(sorted(MODES))}") from None

    @property
    def name(self) -> str:
        """The name of this mode; of its switches where it has none of its own."""
        for name, mode in MODES.items():
            if mode == self:
                return name
        return ",".join(field for field in self._fields if getattr(self, field)) or "writeback"


MODES: dict[str, CacheMode] = {
    "writeback": CacheMode(),
    "none": CacheMode(direct=True),
    "writethrough": CacheMode(writethrough=True),
    "directsync": CacheMode(direct=True, writethrough=True),
    "unsafe": CacheMode(no_flush=True),
}

WRITEBACK = MODES["writeback"]
