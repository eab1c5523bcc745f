"""Hash algorithms by QEMU's names, and PBKDF2 with them."""

from __future__ import annotations

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


def digest(name: str, data: bytes) -> bytes:
    """The digest of *data*. Raises UsageError where the hash is not to be had."""
    import hashlib

    check_hash(name)
    return hashlib.new(name, data, usedforsecurity=False).digest()


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

    check_hash(name)
    iterations = 1 << 15
    while True:
        start = thread_time()
        pbkdf2(name, b"password", b"0123456789abcdef" * 2, iterations, length)
        spent = thread_time() - start
        if spent >= 0.05 or iterations >= 1 << 31:
            return max(1, int(iterations / max(spent, 1e-9)))
        iterations <<= 1 if spent > 0.02 else 2
