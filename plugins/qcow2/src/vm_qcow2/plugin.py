"""What the QCOW2 driver tells about itself."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.hookspecs import hookimpl

_CREATE_OPTIONS = (
    Option("backing_file", "str", "File name of a base image"),
    Option("backing_fmt", "str", "Image format of the base image"),
    Option("cluster_size", "size", "qcow2 cluster size", default=65536),
    Option("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])", default="1.1"),
    Option(
        "compression_type", "enum", "Compression method used for image cluster compression", choices=("zlib", "zstd")
    ),
    Option("lazy_refcounts", "bool", "Postpone refcount updates", default=False),
    Option(
        "preallocation",
        "enum",
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
        choices=("off", "metadata", "falloc", "full"),
    ),
    Option("refcount_bits", "int", "Width of a reference count entry in bits", default=16),
    Option("size", "size", "Virtual disk size"),
)

_OPTIONS = (
    Option("lazy-refcounts", "bool", "Postpone refcount updates (default: as the image says)"),
    Option("l2-cache-size", "size", "Bytes of L2 tables kept in memory", default=32 << 20),
    Option("refcount-cache-size", "size", "Bytes of refcount blocks kept in memory", default=4 << 20),
    Option("snapshot.id", "str", "Show the internal snapshot of this id (read-only)"),
    Option("snapshot.name", "str", "Show the internal snapshot of this name (read-only)"),
    Option("pass-discard-snapshot", "bool", "Give space of deleted snapshots back to the host", default=True),
    Option("pass-discard-request", "bool", "Give space that the guest discards back to the host", default=True),
)


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``qcow2``."""
    return [
        FormatDriver(
            name="qcow2",
            summary="QEMU's copy-on-write image format, versions 2 and 3",
            implementation="vm_qcow2.image:Qcow2",
            capabilities={"write", "create", "backing", "resize", "check", "snapshots"},
            signatures=(
                Signature(0, b"QFI\xfb\0\0\0\x02"),
                Signature(0, b"QFI\xfb\0\0\0\x03"),
                Signature(0, b"QFI\xfb", 50),
            ),
            extensions=(".qcow2", ".qcow", ".img"),
            options=_OPTIONS,
            create_options=_CREATE_OPTIONS,
        )
    ]
