"""What this distribution brings: one format."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.hookspecs import hookimpl


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``qed``."""
    return [
        FormatDriver(
            name="qed",
            summary="QEMU enhanced disk image format",
            implementation="vm_qed.image:Qed",
            capabilities={"write", "create", "backing", "resize", "check", "inplace"},
            signatures=(Signature(0, b"QED\0"),),
            extensions=(".qed",),
            create_options=(
                Option("size", "size", "Virtual disk size"),
                Option("backing_file", "str", "File name of a base image"),
                Option("backing_fmt", "str", "Image format of the base image"),
                Option("cluster_size", "size", "Cluster size (in bytes)", default=65536),
                Option("table_size", "size", "L1/L2 table size (in clusters)"),
            ),
        )
    ]
