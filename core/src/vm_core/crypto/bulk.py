"""Sector ciphers over hundreds of sectors at a time, with numpy: see :mod:`.ciphers` for what is computed.

An engine owns buffers for one batch and serves one thread at a time. 512 sectors a batch keep everything that is
touched within a processor's second-level cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from .ciphers import Vectors

SECTOR = 512
BLOCK = 16
#: Sectors in a batch.
BATCH = 512
#: Words of 64 bits in a sector, blocks in a sector.
WORDS = SECTOR // 8
BLOCKS = SECTOR // BLOCK

# Typed loosely, so that the package type-checks whether or not numpy is there.
np: Any = numpy
_word = np.dtype("<u8")


class Engine:
    """Transforms whole sectors in batches."""

    def __init__(self, vectors: Vectors) -> None:
        self._vectors = vectors

    def run(self, encrypt: bool, sector: int, source: memoryview, target: memoryview) -> None:
        """As :meth:`.ciphers.SectorCipher.encrypt` and ``decrypt``."""
        step = BATCH * SECTOR
        for start in range(0, source.nbytes, step):
            self._batch(encrypt, sector + start // SECTOR, source[start : start + step], target[start : start + step])

    def _batch(self, encrypt: bool, sector: int, source: memoryview, target: memoryview) -> None:
        raise NotImplementedError

    def _make_vectors(self, sector: int, count: int) -> bytes:
        numbers = np.zeros((count, 2), _word)
        numbers[:, 0] = np.arange(sector, sector + count, dtype=_word) & np.uint64(self._vectors.mask)
        return self._vectors.finish(numbers.tobytes())


class EcbEngine(Engine):
    """Nothing to prepare: the buffers are all it takes."""

    def __init__(self, cipher: Any, vectors: Vectors) -> None:
        super().__init__(vectors)
        self._encryptor = cipher.encryptor()
        self._decryptor = cipher.decryptor()
        self._out = bytearray(BATCH * SECTOR + BLOCK)
        self._view = memoryview(self._out)

    def _batch(self, encrypt: bool, sector: int, source: memoryview, target: memoryview) -> None:
        (self._encryptor if encrypt else self._decryptor).update_into(source, self._out)
        target[:] = self._view[: source.nbytes]


class XtsEngine(Engine):
    """Tweaks by vectorised shifts, two exclusive ors, one call of the cipher."""

    def __init__(self, cipher: Any, tweak: Any, vectors: Vectors) -> None:
        super().__init__(vectors)
        self._encryptor = cipher.encryptor()
        self._decryptor = cipher.decryptor()
        self._tweak = tweak.encryptor()
        shape = (BATCH, BLOCKS)
        self._low, self._high, self._a, self._b = (np.empty(shape, _word) for _ in range(4))
        self._tweaks = np.empty((*shape, 2), _word)
        # Shifting by arrays of equal shape is three times as fast as by one that numpy has to stretch.
        self._left = np.tile(np.arange(BLOCKS, dtype=_word), (BATCH, 1))
        self._right = np.uint64(64) - self._left  # numpy shifts by 64 bits to zero
        self._in = bytearray(BATCH * SECTOR)
        self._out = bytearray(BATCH * SECTOR + BLOCK)
        self._in_view = memoryview(self._in)
        self._in_words = np.frombuffer(self._in, _word)
        self._out_words = np.frombuffer(self._out, _word)

    def _batch(self, encrypt: bool, sector: int, source: memoryview, target: memoryview) -> None:
        length = source.nbytes
        words = length // 8
        tweaks = self._spread(self._tweak.update(self._make_vectors(sector, length // SECTOR)))
        np.bitwise_xor(np.frombuffer(source, _word), tweaks, out=self._in_words[:words])
        (self._encryptor if encrypt else self._decryptor).update_into(self._in_view[:length], self._out)
        np.bitwise_xor(self._out_words[:words], tweaks, out=np.frombuffer(target, _word))

    def _spread(self, first: bytes) -> Any:
        """The tweaks of all blocks of the sectors whose first ones are given: ``first · x^j``, for j = 0 … 31.

        With the two words of a first tweak: shift both, carry from the low into the high one, and reduce the j bits
        that leave the high one by ``x^128 = x^7 + x^2 + x + 1``.
        """
        count = len(first) // BLOCK
        pair = np.frombuffer(first, _word).reshape(count, 2)
        low, high, a, b = self._low[:count], self._high[:count], self._a[:count], self._b[:count]
        left, right = self._left[:count], self._right[:count]
        tweaks = self._tweaks[:count]
        one, two, five = np.uint64(1), np.uint64(2), np.uint64(5)
        low[:] = pair[:, :1]
        high[:] = pair[:, 1:]
        np.right_shift(high, right, out=a)
        np.left_shift(a, one, out=b)
        np.bitwise_xor(b, a, out=b)
        np.left_shift(a, two, out=a)
        np.bitwise_xor(b, a, out=b)
        np.left_shift(a, five, out=a)
        np.bitwise_xor(b, a, out=b)
        np.left_shift(low, left, out=a)
        np.bitwise_xor(a, b, out=tweaks[:, :, 0])
        np.left_shift(high, left, out=a)
        np.right_shift(low, right, out=b)
        np.bitwise_xor(a, b, out=tweaks[:, :, 1])
        return tweaks.reshape(-1)


class CbcEngine(Engine):
    """Decryption in one call; encryption in step: block after block, of all sectors at once."""

    def __init__(self, cipher: Any, vectors: Vectors) -> None:
        super().__init__(vectors)
        self._encryptor = cipher.encryptor()
        self._decryptor = cipher.decryptor()
        self._out = bytearray(BATCH * SECTOR + BLOCK)
        self._out_words = np.frombuffer(self._out, _word)
        self._column = bytearray(BATCH * BLOCK)
        self._column_view = memoryview(self._column)
        self._column_words = np.frombuffer(self._column, _word).reshape(BATCH, 2)
        self._made = bytearray(BATCH * BLOCK + BLOCK)
        self._made_words = np.frombuffer(self._made, _word)

    def _batch(self, encrypt: bool, sector: int, source: memoryview, target: memoryview) -> None:
        count = source.nbytes // SECTOR
        given = np.frombuffer(source, _word).reshape(count, WORDS)
        vectors = np.frombuffer(self._make_vectors(sector, count), _word).reshape(count, 2)
        result = self._out_words[: count * WORDS].reshape(count, WORDS)
        if encrypt:
            column, view = self._column_words[:count], self._column_view[: count * BLOCK]
            made = self._made_words[: count * 2].reshape(count, 2)
            before = vectors
            for start in range(0, WORDS, 2):
                np.bitwise_xor(given[:, start : start + 2], before, out=column)
                self._encryptor.update_into(view, self._made)
                result[:, start : start + 2] = made
                before = made
        else:
            self._decryptor.update_into(source, self._out)
            result[:, 2:] ^= given[:, :-2]
            result[:, :2] ^= vectors
        np.frombuffer(target, _word)[:] = self._out_words[: count * WORDS]
