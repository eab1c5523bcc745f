"""Sector ciphers: published vectors, and the library's own modes sector by sector."""

from __future__ import annotations

import os
import random
import sys
import threading
from typing import Any

import pytest

from vm_core.crypto.ciphers import (
    ALGORITHMS,
    FOREIGN,
    GENERATORS,
    MODES,
    SECTOR,
    SectorCipher,
    Suite,
    Vectors,
    Xts,
    sector_cipher,
)
from vm_core.crypto.hashes import digest
from vm_core.errors import PluginError, UsageError

try:
    import numpy
except ImportError:
    numpy = None

BULK = [False, pytest.param(True, marks=pytest.mark.skipif(numpy is None, reason="numpy is missing"))]


def crypt(cipher: SectorCipher, encrypt: bool, sector: int, data: bytes) -> bytes:
    """*data* through *cipher*."""
    target = bytearray(len(data))
    (cipher.encrypt if encrypt else cipher.decrypt)(sector, memoryview(data), memoryview(target))
    return bytes(target)


# IEEE 1619-2007, annex B: key 1, key 2, data unit sequence number, plain text, first 32 bytes of the cipher text.
_COUNT = bytes(range(256)) * 2
_E = bytes.fromhex("2718281828459045235360287471352662497757247093699959574966967627")
_PI = bytes.fromhex("3141592653589793238462643383279502884197169399375105820974944592")
VECTORS = [
    (
        _E[:16],
        _PI[:16],
        0,
        _COUNT,
        "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
    ),
    (
        _E,
        _PI,
        0xFF,
        _COUNT,
        "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
    ),
]


@pytest.mark.parametrize("bulk", BULK)
@pytest.mark.parametrize("vector", VECTORS, ids=["vector 4", "vector 10"])
def test_xts_is_ieee_1619(vector: tuple[bytes, bytes, int, bytes, str], bulk: bool) -> None:
    """Sectors come out as the standard's annex has them, with AES-128 and AES-256."""
    key, tweak, number, clear, start = vector
    cipher = Xts(key, tweak, Vectors())
    cipher._bulk = bulk
    found = crypt(cipher, True, number, clear * 8)[: len(clear)]
    assert found[:32].hex() == start
    assert crypt(cipher, False, number, found) == clear


def test_xts_of_equal_keys_is_vector_1() -> None:
    """The all-zero first vector, whose first block is 917cf69ebd68b2ec9b9fe9a3eadda692."""
    cipher = Xts(bytes(16), bytes(16), Vectors())
    assert crypt(cipher, True, 0, bytes(SECTOR))[:32].hex() == (
        "917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e"
    )


def reference(suite: Suite, key: bytes, encrypt: bool, sector: int, data: bytes) -> bytes:
    """The same with one object of the library a sector."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    result = b""
    for start in range(0, len(data), SECTOR):
        number = sector + start // SECTOR & (0xFFFFFFFF if suite.generator == "plain" else (1 << 64) - 1)
        vector = number.to_bytes(16, "little")
        if suite.generator == "essiv":
            assert suite.generator_hash is not None
            salt = algorithms.AES(digest(suite.generator_hash, key))
            vector = Cipher(salt, modes.ECB()).encryptor().update(vector)
        mode: Any = {"xts": modes.XTS, "cbc": modes.CBC}.get(suite.mode, lambda _: modes.ECB())(vector)
        whole = Cipher(algorithms.AES(key), mode)
        result += (whole.encryptor() if encrypt else whole.decryptor()).update(data[start : start + SECTOR])
    return result


@pytest.mark.parametrize("bulk", BULK)
@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_batches_are_single_sectors(algorithm: str, mode: str, generator: str, bulk: bool) -> None:
    """Any number of sectors at any place gives what the library's own modes give one by one, in place too."""
    suite = Suite(algorithm, mode, generator, "sha256" if generator == "essiv" else None)
    if algorithm == "aes-192" and mode == "xts":
        pytest.skip("the library has no XTS with AES-192 to compare with")
    chance = random.Random(f"{algorithm}{mode}{generator}")
    key = chance.randbytes(suite.key_length)
    cipher = sector_cipher(suite, key)
    cipher._bulk = bulk
    for count, sector in ((1, 0), (3, (1 << 32) - 2), (65, 7), (520, 1 << 40)):
        data = chance.randbytes(count * SECTOR)
        for encrypt in (True, False):
            expected = reference(suite, key, encrypt, sector, data)
            assert crypt(cipher, encrypt, sector, data) == expected
            both = bytearray(data)
            view = memoryview(both)
            (cipher.encrypt if encrypt else cipher.decrypt)(sector, view, view)
            assert both == expected


def test_both_ways_of_xts_agree_where_the_library_has_none() -> None:
    """XTS with AES-192: long integers and numpy give the same, and decryption undoes it."""
    if numpy is None:
        pytest.skip("numpy is missing")
    cipher = sector_cipher(Suite("aes-192"), random.Random(1).randbytes(48))
    data = random.Random(2).randbytes(200 * SECTOR)
    found = []
    for bulk in (False, True):
        cipher._bulk = bulk
        found.append(crypt(cipher, True, 12345, data))
        assert crypt(cipher, False, 12345, found[-1]) == data
    assert found[0] == found[1]


@pytest.mark.parametrize("bulk", BULK)
@pytest.mark.parametrize("mode", MODES)
def test_threads_share_a_cipher(mode: str, bulk: bool) -> None:
    """Four threads at once through one cipher do not meet each other's data."""
    suite = Suite("aes-256", mode, "essiv", "sha256")
    key = os.urandom(suite.key_length)
    cipher = sector_cipher(suite, key)
    cipher._bulk = bulk
    failures: list[int] = []

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(20):
            data = chance.randbytes(chance.randrange(1, 300) * SECTOR)
            sector = chance.randrange(1 << 50)
            if crypt(cipher, False, sector, crypt(cipher, True, sector, data)) != data:
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_ciphers_are_refused_by_name(name: str) -> None:
    """Ciphers that QEMU has and this package does not are named in the refusal."""
    with pytest.raises(UsageError, match=f"Algorithm '{name}' not supported"):
        sector_cipher(Suite(name), bytes(64))


def test_wrong_keys_are_refused() -> None:
    """Keys of a wrong length, and the two equal halves that XTS forbids."""
    with pytest.raises(UsageError, match="Cipher key length 32 should be 64"):
        sector_cipher(Suite(), bytes(32))
    with pytest.raises(UsageError, match="not permitted to be identical"):
        sector_cipher(Suite(), bytes(64))


def test_essiv_wants_a_hash_as_long_as_a_key() -> None:
    """A hash whose digest is no AES key is refused in QEMU's words."""
    with pytest.raises(UsageError, match="No AES cipher with key size 20 available"):
        sector_cipher(Suite("aes-256", "xts", "essiv", "sha1"), os.urandom(64))


def test_without_the_library_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``cryptography`` is absent the error names the command that mends it."""
    for name in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(PluginError, match=r"pip install 'vm-core\[crypto\]'$"):
        sector_cipher(Suite(), os.urandom(64))
