"""What this distribution brings: one format."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.hookspecs import hookimpl


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``qcow``."""
    return [
        FormatDriver(
            name="qcow",
            summary="QEMU's first copy-on-write image format",
            implementation="vm_qcow.format:Qcow",
            capabilities={"write", "create", "backing", "compress"},
            signatures=(Signature(0, b"QFI\xfb\0\0\0\x01"),),
            extensions=(".qcow",),
            create_options=(
                Option("size", "size", "Virtual disk size"),
                Option("backing_file", "str", "File name of a base image"),
                Option("backing_fmt", "str", "Format of the backing image"),
                Option(
                    "encryption",
                    "bool",
                    "Encrypt the image with format 'aes'. (Deprecated in favor of encrypt.format=aes)",
                ),
                Option("encrypt.format", "str", "Encrypt the image, format choices: 'aes'"),
                Option("encrypt.key-secret", "str", "ID of the secret that provides the AES encryption key"),
            ),
            options=(
                Option("encrypt.format", "str", "How the image is encrypted: aes"),
                Option("encrypt.key-secret", "str", "ID of the secret that provides the AES key", defining=True),
            ),
        )
    ]
