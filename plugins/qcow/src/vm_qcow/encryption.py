"""Encrypted images (``crypt_method`` 1): AES with the passphrase as its key, sectors numbered by guest offset."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vm_core.crypto import secrets
from vm_core.crypto.ciphers import SECTOR, NoKey, SectorCipher
from vm_core.crypto.legacy import NO_KEY, chosen_method, cipher
from vm_core.crypto.storage import CryptNode
from vm_core.errors import ImageError, UsageError

if TYPE_CHECKING:
    from vm_core.block.node import Node
    from vm_core.block.open import OpenContext


class Encryption:
    """How the guest data of one open image is encrypted."""

    def __init__(self, file: Node, cipher: SectorCipher) -> None:
        self._node = CryptNode(file, cipher)

    def storage(self, guest: int, host: int) -> CryptNode:
        """What encrypts the sectors of the guest at *guest* that lie at *host*."""
        return self._node.view((guest - host) // SECTOR)


def unlock(file: Node, encrypted: bool, options: dict[str, Any], context: OpenContext) -> Encryption | None:
    """What encrypts an image, None where it is not *encrypted*; takes ``encrypt.format`` and ``encrypt.key-secret``.

    Raises ImageError, UsageError.
    """
    name = context.filename
    method, key_secret = options.pop("encrypt.format", None), options.pop("encrypt.key-secret", None)
    if not encrypted:
        if method is not None:
            raise ImageError(name, f"No encryption in image header, but options specified format '{method}'")
        return None
    if method not in (None, "aes"):
        raise ImageError(name, f"Header reported 'aes' encryption format but options specify '{method}'")
    if not context.io:
        return Encryption(file, NoKey(name))
    if key_secret is None:
        raise UsageError(NO_KEY)
    return Encryption(file, cipher(context.passphrase(key_secret)))


def wanted(options: dict[str, Any]) -> bool:
    """Whether a new image is to be encrypted; takes what says so out of the create *options*. Raises UsageError."""
    method, key_secret = chosen_method(options), options.pop("encrypt.key-secret", None)
    if method is None:
        if key_secret is not None:
            raise UsageError("Parameter 'encrypt.format' is missing: 'aes' is the only one").put(
                "Parameter 'encrypt.format' is missing"
            )
        return False
    if method == "luks":
        raise UsageError("Unsupported encryption format 'luks': qcow images have 'aes' alone, those of qcow2 both").put(
            "Unsupported encryption format"
        )
    if method != "aes":
        raise UsageError(f"Parameter 'format' does not accept value '{method}'")
    if key_secret is None:
        raise UsageError(NO_KEY)
    secrets.passphrase(key_secret)  # the key is in no image: only that there is one
    return True
