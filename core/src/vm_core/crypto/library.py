"""The package ``cryptography``, imported when it is first needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import PluginError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers import Cipher

_ABSENT = "encryption needs the package 'cryptography': pip install 'vm-core[crypto]'"


def aes(key: bytes, mode: Any) -> Cipher[Any]:
    """AES with *key* (16, 24 or 32 bytes) in a *mode* of ``cryptography``. Raises PluginError where that is absent."""
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher
        from cryptography.hazmat.primitives.ciphers.algorithms import AES
    except ImportError:
        raise PluginError(_ABSENT) from None
    return Cipher(AES(key), mode)


def modes() -> Any:
    """``cryptography``'s module of cipher modes. Raises PluginError where that is absent."""
    try:
        from cryptography.hazmat.primitives.ciphers import modes as found
    except ImportError:
        raise PluginError(_ABSENT) from None
    return found
