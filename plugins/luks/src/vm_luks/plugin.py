"""What the LUKS driver tells about itself."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.hookspecs import hookimpl

_CREATE_OPTIONS = (
    Option("size", "size", "Virtual disk size"),
    Option("key-secret", "str", "ID of the secret that provides the keyslot passphrase"),
    Option("cipher-alg", "str", "Name of encryption cipher algorithm"),
    Option("cipher-mode", "str", "Name of encryption cipher mode"),
    Option("ivgen-alg", "str", "Name of IV generator algorithm"),
    Option("ivgen-hash-alg", "str", "Name of IV generator hash algorithm"),
    Option("hash-alg", "str", "Name of encryption hash algorithm"),
    Option("iter-time", "int", "Time to spend in PBKDF in milliseconds"),
)

_AMEND_OPTIONS = (
    Option("state", "str", "Select new state of affected keyslots (active/inactive)"),
    Option("keyslot", "int", "Select a single keyslot to modify explicitly"),
    Option("old-secret", "str", "Select all keyslots that match this password"),
    Option("new-secret", "str", "New secret to set in the matching keyslots. Empty string to erase"),
    Option("iter-time", "int", "Time to spend in PBKDF in milliseconds"),
)


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``luks``."""
    return [
        FormatDriver(
            name="luks",
            summary="LUKS version 1 encrypted image",
            implementation="vm_luks.image:LuksImage",
            capabilities={"amend", "create", "measure", "resize", "write"},
            signatures=(Signature(0, b"LUKS\xba\xbe\x00\x01"),),
            extensions=(".luks",),
            options=(
                Option("key-secret", "str", "ID of the secret that provides a passphrase of the image", defining=True),
            ),
            create_options=_CREATE_OPTIONS,
            amend_options=_AMEND_OPTIONS,
        )
    ]
