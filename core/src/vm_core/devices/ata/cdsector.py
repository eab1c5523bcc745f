"""Raw CD sectors: sync, header, error detection and correction codes of mode 1 (ECMA-130 clauses 14 and 20, annex A).

A CD-ROM image holds 2,048 bytes of user data a sector; READ CD may ask for all 2,352 of the disc's.
"""

from __future__ import annotations

from functools import cache

USER = 2048
RAW = 2352
#: Sectors of two seconds that come before LBA 0.
PREGAP = 150
SYNC = b"\x00" + b"\xff" * 10 + b"\x00"


def msf(lba: int) -> tuple[int, int, int]:
    """Minute, second and frame of *lba* on the disc."""
    seconds, frame = divmod(lba + PREGAP, 75)
    minute, second = divmod(seconds, 60)
    return minute, second, frame


def lba_of(minute: int, second: int, frame: int) -> int:
    """The LBA of a position; negative before the first sector."""
    return (minute * 60 + second) * 75 + frame - PREGAP


def bcd(value: int) -> int:
    """0–99 as two decimal digits."""
    return value // 10 << 4 | value % 10


def header(lba: int) -> bytes:
    """The four bytes after the sync pattern: position in BCD, mode 1."""
    return bytes(bcd(part) for part in msf(lba)) + b"\x01"


@cache
def _edc_table() -> tuple[int, ...]:
    """CRC-32 of the polynomial (x^16+x^15+x^2+1)(x^16+x^2+x+1), least significant bit first (14.3)."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0xD8018001 if value & 1 else 0)
        table.append(value)
    return tuple(table)


def edc(data: bytes) -> bytes:
    """The four bytes of error detection code over *data*."""
    table, crc = _edc_table(), 0
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc.to_bytes(4, "little")


@cache
def _double() -> bytes:
    """Multiplication by alpha in GF(256) modulo x^8+x^4+x^3+x^2+1 (annex A)."""
    return bytes((value << 1 ^ (0x11D if value & 0x80 else 0)) & 0xFF for value in range(256))


@cache
def _divide() -> bytes:
    """Division by alpha + 1, the inverse of ``double(x) ^ x``."""
    double, table = _double(), bytearray(256)
    for value in range(256):
        table[double[value] ^ value] = value
    return bytes(table)


def _parity(data: bytes, columns: int, rows: int, column_step: int, row_step: int) -> bytes:
    """Two parity bytes for each of *columns* Reed-Solomon code words of *rows* bytes of *data* (annex A)."""
    double, divide = _double(), _divide()
    size = len(data)
    first, second = bytearray(columns), bytearray(columns)
    for column in range(columns):
        # Even and odd bytes of the 16-bit words are coded apart.
        at = (column >> 1) * column_step + (column & 1)
        a = b = 0
        for _ in range(rows):
            value = data[at]
            at += row_step
            if at >= size:
                at -= size
            a = double[a ^ value]
            b ^= value
        a = divide[double[a] ^ b]
        first[column], second[column] = a, a ^ b
    return bytes(first + second)


def encode(lba: int, user: bytes) -> bytes:
    """The 2,352 bytes of the mode 1 sector at *lba* with 2,048 bytes of *user* data."""
    if len(user) != USER:
        raise ValueError("a mode 1 sector has 2048 bytes of user data")
    body = header(lba) + user
    body += edc(SYNC + body) + bytes(8)
    # P: 86 columns of 24 words' bytes; Q: 52 diagonals of 43, over the P parity too.
    body += _parity(body, 86, 24, 2, 86)
    body += _parity(body, 52, 43, 86, 88)
    return SYNC + body
