"""Hash algorithms by QEMU's names, and PBKDF2 with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import UsageError

#: Hashes as options and QMP name them, with the bytes of a digest.
DIGEST_LENGTHS = {
    "md5": 16,
    "sha1": 20,
    "sha224": 28,
    "sha256": 32,
    "sha384": 48,
    "sha512": 64,
    "ripemd160": 20,
}


#: Seconds of processor time that tell how fast this computer is.
MEASURED = 0.025
_rates: dict[tuple[str, int], int] = {}


def digest(name: str, data: bytes) -> bytes:
    """The digest of *data*. Raises UsageError where the hash is not to be had."""
    return bytes(hasher(name)(data).digest())


def hasher(name: str) -> Callable[[bytes], Any]:
    """What makes hash objects of data. Raises UsageError where the hash is not to be had."""
    import hashlib

    check_hash(name)
    found: Callable[[bytes], Any] | None = getattr(hashlib, name, None)
    return found if found is not None else lambda data: hashlib.new(name, data)


def pbkdf2(name: str, password: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """*length* bytes derived from *password* (RFC 2898, section 5.2, with HMAC)."""
    import hashlib

    check_hash(name)
    return hashlib.pbkdf2_hmac(name, password, salt, iterations, length)


def check_hash(name: str) -> None:
    """Refuse hashes that are unknown, or that this Python's OpenSSL leaves out. Raises UsageError."""
    import hashlib

    if name not in DIGEST_LENGTHS:
        raise UsageError(f"Hash algorithm '{name}' is not supported: {', '.join(DIGEST_LENGTHS)} are")
    try:
        hashlib.new(name, usedforsecurity=False)
    except ValueError:
        raise UsageError(f"Hash algorithm '{name}' is not offered by this system's OpenSSL") from None


def iterations_per_second(name: str, length: int) -> int:
    """PBKDF2 iterations that this computer does in a second of processor time for *length* bytes; at least 1."""
    from time import thread_time

    found = _rates.get((name, length))
    if found is not None:
        return found
    iterations = 1 << 12
    while True:
        start = thread_time()
        pbkdf2(name, b"password", b"0123456789abcdef" * 2, iterations, length)
        spent = thread_time() - start
        if spent >= MEASURED or iterations >= 1 << 30:
            rate = _rates[name, length] = max(1, int(iterations / max(spent, 1e-9)))
            return rate
        iterations = iterations * 4 if spent < MEASURED / 4 else int(iterations * MEASURED * 1.2 / spent) + 1
