"""CRC-32C (Castagnoli), the check sum of VHDX, Parallels' extensions, iSCSI and others (RFC 3720, appendix B.4).

A byte costs a table look-up. Runs of zeroes at the end, of which metadata mostly consists, cost next to nothing: the
check sum is linear, so what zeroes do to it is a matrix, and many zeroes are that matrix squared again and again.
"""

from __future__ import annotations

from functools import cache

#: The polynomial, bits reversed.
_POLYNOMIAL = 0x82F63B78


@cache
def _table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


@cache
def _zeroes(order: int) -> tuple[int, ...]:
    """What 2**order zero bytes make of each bit of a check sum."""
    if order == 0:
        table = _table()
        return tuple([table[1 << bit & 0xFF] ^ (1 << bit) >> 8 for bit in range(32)])
    half = _zeroes(order - 1)
    return tuple([_times(half, column) for column in half])


def _times(matrix: tuple[int, ...], vector: int) -> int:
    result = 0
    for column in matrix:
        if vector & 1:
            result ^= column
        vector >>= 1
    return result


def crc32c(data: bytes | bytearray | memoryview, value: int = 0) -> int:
    """The check sum of *data*; *value* is that of what comes before it.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    content = bytes(data).rstrip(b"\0")
    zeroes = len(data) - len(content)
    table = _table()
    crc = value ^ 0xFFFFFFFF
    for byte in content:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    order = 0
    while zeroes:
        if zeroes & 1:
            crc = _times(_zeroes(order), crc)
        zeroes >>= 1
        order += 1
    return crc ^ 0xFFFFFFFF
