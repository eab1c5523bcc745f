"""Raw CD sectors against the definitions of their codes."""

from __future__ import annotations

import os

from vm_core.devices.ata import cdsector


def gf_multiply(a: int, b: int) -> int:
    """Multiplication in GF(256) modulo x^8+x^4+x^3+x^2+1."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a = a << 1 ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return product


def syndromes(word: bytes) -> tuple[int, int]:
    """The two sums that are zero for a code word (ECMA-130 annex A): over v(i), and over alpha^(n-1-i) v(i)."""
    zero = one = 0
    for value in word:
        zero ^= value
        one = gf_multiply(one, 2) ^ value
    return zero, one


def test_layout() -> None:
    """Sync, BCD position, mode 1, user data."""
    user = os.urandom(2048)
    raw = cdsector.encode(4350, user)
    assert len(raw) == 2352
    assert raw[:16] == b"\x00" + b"\xff" * 10 + b"\x00" + b"\x01\x00\x00\x01"
    assert raw[16:2064] == user
    assert raw[2068:2076] == bytes(8)


def test_edc_divides() -> None:
    """The polynomial divides header, data and EDC, as clause 14.3 defines it, lowest bit first."""
    raw = cdsector.encode(0, os.urandom(2048))
    polynomial = 0
    for a in (16, 15, 2, 0):
        for b in (16, 2, 1, 0):
            polynomial ^= 1 << a + b
    remainder = 0
    for byte in raw[:2068]:
        for bit in range(8):
            remainder = remainder << 1 | byte >> bit & 1
            if remainder >> 32:
                remainder ^= polynomial
    assert remainder == 0


def test_p_and_q_words_are_code_words() -> None:
    """Every P column and Q diagonal of both byte planes has zero syndromes (annex A)."""
    raw = cdsector.encode(12345, os.urandom(2048))
    body = raw[12:]
    for plane in (0, 1):
        rsw = body[plane::2]  # 1170 words' bytes
        for column in range(43):
            assert syndromes(bytes(rsw[43 * m + column] for m in range(26))) == (0, 0)
        for diagonal in range(26):
            word = [rsw[(44 * m + 43 * diagonal) % 1118] for m in range(43)]
            word += [rsw[43 * 26 + diagonal], rsw[44 * 26 + diagonal]]
            assert syndromes(bytes(word)) == (0, 0)


def test_positions() -> None:
    """LBA 0 is at 00:02:00, and positions translate both ways."""
    assert cdsector.msf(0) == (0, 2, 0)
    for lba in (0, 74, 75, 4349, 4350, 359999):
        assert cdsector.lba_of(*cdsector.msf(lba)) == lba
    assert cdsector.lba_of(0, 0, 0) == -150
