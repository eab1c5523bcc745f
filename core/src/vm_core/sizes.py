"""Sizes as people write and read them, in the peer's way to the letter."""

from __future__ import annotations

_UNITS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SUFFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
INT64_MAX = (1 << 63) - 1


class NotANumberError(ValueError):
    """No size at all."""


class OutOfRangeError(ValueError):
    """A size of 2^64 or more."""


def parse(text: str, unit: str = "b") -> int:
    """Bytes from ``512``, ``1.5k``, ``0x200``; *unit* holds for a number without suffix.

    As in QEMU a fraction needs a unit that it is a fraction of, hexadecimal numbers have none, and leading blanks and a
    plus sign do no harm. Raises NotANumberError, OutOfRangeError.
    """
    word = text.lstrip(" \t\n\v\f\r").lower()
    word = word.removeprefix("+")
    if word.startswith("0x"):
        digits, suffix = word[2:], ""
        if digits[-1:] in ("k", "m", "g", "t", "p"):  # "b" and "e" are digits
            digits, suffix = digits[:-1], digits[-1]
        if not digits or digits.strip("0123456789abcdef"):
            raise NotANumberError(text)
        value = int(digits, 16) << _UNITS[suffix or unit]
    else:
        digits, suffix = (word[:-1], word[-1]) if word[-1:] in _UNITS else (word, unit)
        whole, _, fraction = digits.partition(".")
        if not (whole.isascii() and whole.isdigit()) or (fraction and not (fraction.isascii() and fraction.isdigit())):
            raise NotANumberError(text)
        value = int(whole) << _UNITS[suffix]
        part = float(f"0.{fraction}") % 1 if fraction else 0.0
        if part:
            if not _UNITS[suffix]:
                raise NotANumberError(text)
            value += int(part * (1 << _UNITS[suffix]) + 0.5)
    if value >= 1 << 64:
        raise OutOfRangeError(text)
    return value


def human(value: int) -> str:
    """``1.5 GiB``: three digits and a binary unit."""
    scaled, step = value * 128 // 125, 0
    while scaled >= 1024 and step < 6:
        scaled >>= 10
        step += 1
    return f"{value / (1 << 10 * step):0.3g} {_SUFFIXES[step]}B"
