"""Sector ciphers: AES over sectors of 512 bytes, each with an initialisation vector made of its number.

Theory of operation
-------------------
The library's own XTS and CBC objects take one initialisation vector each, so a sector would cost an object, which is
twenty times as long as the encryption itself. Here many sectors go through one call of plain AES (ECB) instead:

* XTS (IEEE 1619): block *j* of a sector is ``AES(data ^ T_j) ^ T_j`` with the tweak ``T_j = T_0 · x^j`` in GF(2^128),
  ``T_0`` being the vector encrypted with the key's second half. All tweaks of a batch are computed together.
* CBC: decrypted as one chain across the sectors, of which the first block of each is then put right; encrypted as one
  chain in which the first block of each sector takes back what the chain would put in.

Long integers serve as vectors of blocks; :mod:`.bulk` does the same with numpy, eight to fifteen times as fast, and
takes over where that is installed and there is enough to do to pay for importing it.

Ciphers are made by :func:`sector_cipher` and may be used from several threads at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ImageError, UsageError
from .library import aes, modes

if TYPE_CHECKING:
    from collections.abc import Callable

    from .bulk import Engine

SECTOR = 512
BLOCK = 16
#: Sectors that are transformed at a time without numpy.
BATCH = 64
#: Sectors from which numpy, once it is there, is faster.
BULK_FROM = 4
#: Bytes after which importing numpy (about 0.1 s) has paid. Large requests, of which more will come, count fourfold.
BULK_AFTER = 16 << 20
LARGE = 128 << 10

#: Ciphers as options and QMP name them, with the bytes of a key (XTS: of each half).
ALGORITHMS = {"aes-128": 16, "aes-192": 24, "aes-256": 32}
#: Ciphers that QEMU knows and this package does not.
FOREIGN = {
    "des": 8,
    "3des": 24,
    "cast5-128": 16,
    "serpent-128": 16,
    "serpent-192": 24,
    "serpent-256": 32,
    "twofish-128": 16,
    "twofish-192": 24,
    "twofish-256": 32,
}
MODES = ("ecb", "cbc", "xts")
FOREIGN_MODES = ("ctr",)
GENERATORS = ("plain", "plain64", "essiv")


class Suite(NamedTuple):
    """How sectors are encrypted: names of the cipher, its mode, the vectors' generator, and the hash that wants."""

    algorithm: str = "aes-256"
    mode: str = "xts"
    generator: str = "plain64"
    generator_hash: str | None = None

    @property
    def key_length(self) -> int:
        """Bytes of a key; two keys' with XTS. Raises UsageError for a cipher that is not supported."""
        check_algorithm(self.algorithm)
        return ALGORITHMS[self.algorithm] * (2 if self.mode == "xts" else 1)


def check_algorithm(name: str) -> None:
    """Refuse ciphers that there are, but not here. Raises UsageError."""
    if name in ("des", "3des"):
        raise UsageError(f"Algorithm '{name}' not supported")
    if name not in ALGORITHMS:
        raise UsageError(f"Algorithm '{name}' not supported: {', '.join(ALGORITHMS)} are")


def check_suite(suite: Suite) -> None:
    """Refuse combinations that cannot be. Raises UsageError."""
    check_algorithm(suite.algorithm)
    if suite.mode not in MODES:
        raise UsageError(f"Cipher mode '{suite.mode}' not supported: {', '.join(MODES)} are")
    if suite.generator == "essiv":
        from .hashes import DIGEST_LENGTHS

        assert suite.generator_hash is not None
        _essiv_check(DIGEST_LENGTHS[suite.generator_hash])


def sector_cipher(suite: Suite, key: bytes) -> SectorCipher:
    """The cipher of *suite* with *key*. Raises UsageError, PluginError."""
    check_suite(suite)
    if len(key) != suite.key_length:
        raise UsageError(f"Cipher key length {len(key)} should be {suite.key_length}")
    vectors = _vectors(suite, key)
    if suite.mode == "xts":
        half = len(key) // 2
        if key[:half] == key[half:]:
            raise UsageError("XTS cipher key parts are not permitted to be identical")
        return Xts(key[:half], key[half:], vectors)
    if suite.mode == "cbc":
        return Cbc(key, vectors)
    return Ecb(key, vectors)


def _essiv_check(length: int) -> None:
    if length not in ALGORITHMS.values():
        raise UsageError(f"No AES cipher with key size {length} available")


class Vectors:
    """The generator of initialisation vectors.

    ``plain``: the sector's number, 32 bits, little-endian, padded with zeroes; ``plain64``: 64 bits of it;
    ``essiv``: that encrypted (AES, ECB) with a hash of the key.
    """

    def __init__(self, mask: int = (1 << 64) - 1, salt: bytes | None = None) -> None:
        self.mask = mask
        self._encrypt: Callable[[bytes], bytes] | None = None
        if salt is not None:
            # One call at a time passes through an encryptor of whole blocks, which keeps no state: threads may share.
            self._cipher = aes(salt, modes().ECB())
            self._encrypt = lambda data: bytes(self._cipher.encryptor().update(data))

    def make(self, sector: int, count: int) -> bytes:
        """The vectors of *count* sectors, one after the other."""
        mask = self.mask
        return self.finish(b"".join([(n & mask).to_bytes(BLOCK, "little") for n in range(sector, sector + count)]))

    def finish(self, plain: bytes) -> bytes:
        """*plain*, the sectors' numbers as vectors, made into those of this generator."""
        return plain if self._encrypt is None else self._encrypt(plain)


def _vectors(suite: Suite, key: bytes) -> Vectors:
    if suite.generator == "plain":
        return Vectors((1 << 32) - 1)
    if suite.generator == "plain64":
        return Vectors()
    from .hashes import digest

    assert suite.generator_hash is not None
    salt = digest(suite.generator_hash, key)
    _essiv_check(len(salt))
    return Vectors(salt=salt)


class SectorCipher:
    """Encrypts and decrypts whole sectors; *source* and *target* are byte views of one length, perhaps the same."""

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self._engines: list[Engine] = []
        self._bulk: bool | None = None
        self._done = 0

    def encrypt(self, sector: int, source: memoryview, target: memoryview) -> None:
        """Encrypt *source*, whose first sector has the number *sector*, into *target*."""
        self._run(True, sector, source, target)

    def decrypt(self, sector: int, source: memoryview, target: memoryview) -> None:
        """Decrypt *source*, whose first sector has the number *sector*, into *target*."""
        self._run(False, sector, source, target)

    def _run(self, encrypt: bool, sector: int, source: memoryview, target: memoryview) -> None:
        length = source.nbytes
        assert length == target.nbytes
        assert not length % SECTOR
        if length >= BULK_FROM * SECTOR and self._use_bulk(length):
            try:
                engine = self._engines.pop()
            except IndexError:
                engine = self._engine()
            try:
                engine.run(encrypt, sector, source, target)
            finally:
                self._engines.append(engine)
            return
        step = BATCH * SECTOR
        for start in range(0, length, step):
            piece = source[start : start + step]
            data = self._small(encrypt, sector + start // SECTOR, piece)
            target[start : start + piece.nbytes] = data

    def _use_bulk(self, length: int) -> bool:
        if self._bulk is None:
            self._done += length if length < LARGE else length * 4
            if "numpy" not in sys.modules and self._done < BULK_AFTER:
                return False
            from importlib.util import find_spec

            self._bulk = find_spec("numpy") is not None
        return self._bulk

    def _engine(self) -> Engine:
        """Something that transforms many sectors fast, for one thread at a time."""
        raise NotImplementedError

    def _small(self, encrypt: bool, sector: int, source: memoryview) -> bytes | memoryview:
        """At most :data:`BATCH` sectors, transformed without numpy."""
        raise NotImplementedError


class NoKey(SectorCipher):
    """Stands for a cipher where an image was opened without its key, only to be described."""

    def __init__(self, name: str) -> None:
        super().__init__(Vectors())
        self._name = name

    def _run(self, encrypt: bool, sector: int, source: memoryview, target: memoryview) -> None:
        raise ImageError(self._name, "encrypted, and opened without its key")


class Ecb(SectorCipher):
    """AES by itself, without any vector."""

    def __init__(self, key: bytes, vectors: Vectors) -> None:
        super().__init__(vectors)
        self._cipher = aes(key, modes().ECB())

    def _engine(self) -> Engine:
        from .bulk import EcbEngine

        return EcbEngine(self._cipher, self.vectors)

    def _small(self, encrypt: bool, sector: int, source: memoryview) -> bytes:
        context: Any = self._cipher.encryptor() if encrypt else self._cipher.decryptor()
        return bytes(context.update(source))


class Cbc(SectorCipher):
    """Cipher block chaining within each sector."""

    def __init__(self, key: bytes, vectors: Vectors) -> None:
        super().__init__(vectors)
        self._ecb = aes(key, modes().ECB())
        self._chain = aes(key, modes().CBC(bytes(BLOCK)))

    def _engine(self) -> Engine:
        from .bulk import CbcEngine

        return CbcEngine(self._ecb, self.vectors)

    def _small(self, encrypt: bool, sector: int, source: memoryview) -> bytes | memoryview:
        count = source.nbytes // SECTOR
        vectors = self.vectors.make(sector, count)
        return (self._encrypt if encrypt else self._decrypt)(source, vectors)

    def _decrypt(self, source: memoryview, vectors: bytes) -> memoryview:
        # A block in clear is AES⁻¹(itself) ^ the block before. At the start of a sector that should be the vector.
        data = memoryview(bytearray(self._chain.decryptor().update(source)))
        before = 0
        for start in range(0, source.nbytes, SECTOR):
            place = start // SECTOR * BLOCK
            wrong = before ^ int.from_bytes(vectors[place : place + BLOCK], "little")
            first = data[start : start + BLOCK]
            first[:] = (int.from_bytes(first, "little") ^ wrong).to_bytes(BLOCK, "little")
            before = int.from_bytes(source[start + SECTOR - BLOCK : start + SECTOR], "little")
        return data

    def _encrypt(self, source: memoryview, vectors: bytes) -> bytes:
        context = self._chain.encryptor()
        result: list[bytes] = []
        before = 0
        for start in range(0, source.nbytes, SECTOR):
            place = start // SECTOR * BLOCK
            first = int.from_bytes(source[start : start + BLOCK], "little") ^ before
            first ^= int.from_bytes(vectors[place : place + BLOCK], "little")
            head = first.to_bytes(BLOCK, "little")
            sector = context.update(head + bytes(source[start + BLOCK : start + SECTOR]))
            before = int.from_bytes(sector[-BLOCK:], "little")
            result.append(sector)
        return b"".join(result)


class Xts(SectorCipher):
    """IEEE 1619's mode for sectors."""

    def __init__(self, key: bytes, tweak_key: bytes, vectors: Vectors) -> None:
        super().__init__(vectors)
        self._data = aes(key, modes().ECB())
        self._tweak = aes(tweak_key, modes().ECB())

    def _engine(self) -> Engine:
        from .bulk import XtsEngine

        return XtsEngine(self._data, self._tweak, self.vectors)

    def _small(self, encrypt: bool, sector: int, source: memoryview) -> bytes:
        length = source.nbytes
        count = length // SECTOR
        tweaks = spread_tweaks(self._tweak.encryptor().update(self.vectors.make(sector, count)))
        context: Any = self._data.encryptor() if encrypt else self._data.decryptor()
        data = context.update((int.from_bytes(source, "little") ^ tweaks).to_bytes(length, "little"))
        return (int.from_bytes(data, "little") ^ tweaks).to_bytes(length, "little")


#: By count of sectors: a number with the lower half of each 256-bit lane set.
_halves: dict[int, int] = {}


def spread_tweaks(first: bytes) -> int:
    """The tweaks of all 32 blocks of sectors whose *first* ones are given, as one little-endian number.

    First every other one, ``first · x^2k`` for k below 16, each in a lane of 256 bits and not yet reduced by the
    field's polynomial ``x^128 + x^7 + x^2 + x + 1``; shifting those once more gives the ones between them.
    """
    count = len(first) // BLOCK
    half = _halves.get(count)
    if half is None:
        half = int.from_bytes((b"\xff" * 16 + bytes(16)) * (16 * count), "little")
        _halves[count] = half
    gap = bytes(SECTOR - BLOCK)
    wide = int.from_bytes(gap.join([first[at : at + BLOCK] for at in range(0, len(first), BLOCK)]), "little")
    wide |= wide << 256 + 2
    wide |= wide << 512 + 4
    wide |= wide << 1024 + 8
    wide |= wide << 2048 + 16
    return _reduce(wide, half) | _reduce(wide << 1, half) << 128


def _reduce(wide: int, half: int) -> int:
    high = wide >> 128 & half
    return wide & half ^ high ^ high << 1 ^ high << 2 ^ high << 7
