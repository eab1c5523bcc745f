"""CRC-32C: the values of the standard, in pieces too, and with zeroes at the end."""

from __future__ import annotations

import random

import pytest

from vm_core.block.crc32c import crc32c


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_values_of_the_standard(data: bytes, value: int) -> None:
    """The examples of RFC 3720, appendix B.4."""
    assert crc32c(data) == value
    assert crc32c(memoryview(data)) == value


def test_pieces_and_zeroes() -> None:
    """However the data is cut, and however many zeroes it ends with."""
    chance = random.Random(1)
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    for zeroes in (0, 1, 2, 63, 64, 1000, 4017, 65_456):
        data = chance.randbytes(chance.randrange(50)) + bytes(zeroes)
        plain = 0xFFFFFFFF
        for byte in data:
            plain = table[(plain ^ byte) & 0xFF] ^ plain >> 8
        plain ^= 0xFFFFFFFF
        assert crc32c(data) == plain
        cut = chance.randrange(len(data) + 1)
        assert crc32c(data[cut:], crc32c(data[:cut])) == plain
