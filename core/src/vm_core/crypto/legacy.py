"""The encryption of old qcow and qcow2 images: AES-128 in CBC mode, the passphrase itself being the key.

Sectors are numbered by guest offset. Only clusters with guest data as it is are encrypted: neither tables, nor
compressed clusters.
"""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from .ciphers import SectorCipher, Suite, sector_cipher

NO_KEY = "Parameter 'encrypt.key-secret' is required for cipher"

_KEY = 16


def cipher(passphrase: bytes) -> SectorCipher:
    """What encrypts with *passphrase*: as much of it as there is room for is the key."""
    return sector_cipher(Suite("aes-128", "cbc", "plain64"), passphrase[:_KEY].ljust(_KEY, b"\0"))


def chosen_method(options: dict[str, Any]) -> str | None:
    """Take ``encrypt.format`` and its old spelling ``encryption`` out of the create *options*. Raises UsageError."""
    old, method = options.pop("encryption", None), options.pop("encrypt.format", None)
    if old and method is not None:
        raise UsageError("'encrypt.format' and its alias 'encryption' can't be used at the same time")
    return "aes" if old else method
