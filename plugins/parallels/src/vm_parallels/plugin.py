"""What this distribution brings: one format."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.hookspecs import hookimpl


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``parallels``."""
    return [
        FormatDriver(
            name="parallels",
            summary="Parallels expandable disk image",
            implementation="vm_parallels.format:Parallels",
            capabilities={"write", "create", "backing", "check"},
            signatures=(
                Signature(0, b"WithoutFreeSpace\x02\0\0\0"),
                Signature(0, b"WithouFreSpacExt\x02\0\0\0"),
            ),
            extensions=(".hds", ".hdd"),
            create_options=(
                Option("size", "size", "Virtual disk size"),
                Option("cluster_size", "size", "Parallels image cluster size", default=1 << 20),
            ),
        )
    ]
