"""What this distribution brings: one format."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Signature
from vm_core.hookspecs import hookimpl


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``dmg``."""
    return [
        FormatDriver(
            name="dmg",
            summary="Apple disk image, UDIF (read-only)",
            implementation="vm_dmg.format:Dmg",
            signatures=(Signature(-512, b"koly\0\0\0\x04", 90),),
            extensions=(".dmg",),
        )
    ]
