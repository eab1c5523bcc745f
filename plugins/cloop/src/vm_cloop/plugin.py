"""What this distribution brings: one format."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Signature
from vm_core.hookspecs import hookimpl

#: What every image of version 2 begins with.
MAGIC = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``cloop``."""
    return [
        FormatDriver(
            name="cloop",
            summary="Compressed loop image (read-only)",
            implementation="vm_cloop.format:Cloop",
            signatures=(Signature(0, MAGIC, 2),),
            extensions=(".cloop",),
        )
    ]
