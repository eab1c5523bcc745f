"""What the QCOW2 driver tells about itself."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.hookspecs import hookimpl

#: In the order in which qemu-img tells them.
_CREATE_OPTIONS = (
    Option("encryption", "bool", "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)"),
    Option("encrypt.format", "str", "Encrypt the image, format choices: 'aes', 'luks'"),
    Option("encrypt.key-secret", "str", "ID of secret providing qcow AES key or LUKS passphrase"),
    Option("encrypt.cipher-alg", "str", "Name of encryption cipher algorithm"),
    Option("encrypt.cipher-mode", "str", "Name of encryption cipher mode"),
    Option("encrypt.ivgen-alg", "str", "Name of IV generator algorithm"),
    Option("encrypt.ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
    Option("encrypt.hash-alg", "str", "Name of encryption hash algorithm"),
    Option("encrypt.iter-time", "int", "Time to spend in PBKDF in milliseconds"),
    Option("cluster_size", "size", "qcow2 cluster size", default=65536),
    Option("extended_l2", "bool", "Extended L2 tables", default=False),
    Option(
        "preallocation",
        "enum",
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
        choices=("off", "metadata", "falloc", "full"),
    ),
    Option(
        "compression_type",
        "enum",
        "Compression method used for image cluster compression",
        default="zlib",
        choices=("zlib", "zstd"),
    ),
    Option("size", "size", "Virtual disk size"),
    Option("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Option("backing_file", "str", "File name of a base image"),
    Option("backing_fmt", "str", "Image format of the base image"),
    Option("data_file", "str", "File name of an external data file"),
    Option("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
    Option("lazy_refcounts", "bool", "Postpone refcount updates", default=False),
    Option("refcount_bits", "int", "Width of a reference count entry in bits", default=16),
)

_AMEND_OPTIONS = (
    Option("encrypt.state", "str", "Select new state of affected keyslots (active/inactive)"),
    Option("encrypt.keyslot", "int", "Select a single keyslot to modify explicitly"),
    Option("encrypt.old-secret", "str", "Select all keyslots that match this password"),
    Option("encrypt.new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase"),
    Option("encrypt.iter-time", "int", "Time to spend in PBKDF in milliseconds"),
    Option("size", "size", "Virtual disk size"),
    Option("compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Option("backing_file", "str", "File name of a base image"),
    Option("backing_fmt", "str", "Image format of the base image"),
    Option("data_file", "str", "File name of an external data file"),
    Option("data_file_raw", "bool", "The external data file must stay valid as a raw image"),
    Option("lazy_refcounts", "bool", "Postpone refcount updates"),
    Option("refcount_bits", "int", "Width of a reference count entry in bits"),
)

_OPTIONS = (
    Option("data-file", "node", "Where guest data is, of images with an external data file"),
    Option("encrypt.format", "str", "How the image is encrypted: aes or luks"),
    Option(
        "encrypt.key-secret", "str", "ID of the secret that provides the AES key or a LUKS passphrase", defining=True
    ),
    Option("lazy-refcounts", "bool", "Postpone refcount updates (default: as the image says)"),
    Option("cache-size", "size", "Bytes of L2 tables and refcount blocks kept in memory"),
    Option("l2-cache-size", "size", "Bytes of L2 tables kept in memory", default=32 << 20),
    Option("l2-cache-entry-size", "size", "Bytes of an L2 table that count as one", default=65536),
    Option("refcount-cache-size", "size", "Bytes of refcount blocks kept in memory (default: four clusters)"),
    Option("cache-clean-interval", "int", "Seconds after which unused tables leave memory (0: never)", default=600),
    Option("snapshot.id", "str", "Show the internal snapshot of this id (read-only)"),
    Option("snapshot.name", "str", "Show the internal snapshot of this name (read-only)"),
    Option("pass-discard-snapshot", "bool", "Give space of deleted snapshots back to the host", default=True),
    Option("pass-discard-request", "bool", "Give space that the guest discards back to the host", default=True),
    Option("pass-discard-other", "bool", "Give space of data that has moved back to the host", default=False),
    Option("overlap-check", "str", "Metadata that writes are checked against: none, constant, cached, all"),
    Option("overlap-check.template", "str", "The same, where more options of it are given"),
    Option("overlap-check.main-header", "bool", "Check writes against the header"),
    Option("overlap-check.active-l1", "bool", "Check writes against the active L1 table"),
    Option("overlap-check.active-l2", "bool", "Check writes against active L2 tables"),
    Option("overlap-check.refcount-table", "bool", "Check writes against the refcount table"),
    Option("overlap-check.refcount-block", "bool", "Check writes against refcount blocks"),
    Option("overlap-check.snapshot-table", "bool", "Check writes against the snapshot table"),
    Option("overlap-check.inactive-l1", "bool", "Check writes against L1 tables of snapshots"),
    Option("overlap-check.inactive-l2", "bool", "Check writes against L2 tables of snapshots"),
    Option("overlap-check.bitmap-directory", "bool", "Check writes against the directory of bitmaps"),
)


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``qcow2``."""
    return [
        FormatDriver(
            name="qcow2",
            summary="QEMU's copy-on-write image format, versions 2 and 3",
            implementation="vm_qcow2.image:Qcow2",
            capabilities={
                "amend",
                "backing",
                "check",
                "compress",
                "create",
                "measure",
                "resize",
                "snapshots",
                "bitmaps",
                "inplace",
                "write",
            },
            signatures=(
                Signature(0, b"QFI\xfb\0\0\0\x02"),
                Signature(0, b"QFI\xfb\0\0\0\x03"),
                Signature(0, b"QFI\xfb", 50),
            ),
            extensions=(".qcow2", ".qcow", ".img"),
            options=_OPTIONS,
            create_options=_CREATE_OPTIONS,
            amend_options=_AMEND_OPTIONS,
        )
    ]
