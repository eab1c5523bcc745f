"""Numbers, sizes, times and bytes as this program reads and prints them."""

from __future__ import annotations

import sys

from ... import sizes

#: Bytes that one request may have: the most sectors of 512 bytes that a signed 32-bit number of bytes counts.
MAX_REQUEST = (1 << 31) - 512

_SUFFIXES = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


class BadNumberError(ValueError):
    """A word that should be a size is none; ``str()`` is the sentence to print."""


def parse_size(text: str, program: str) -> int:
    """Bytes from ``512``, ``64k``, ``0x200``. Raises BadNumberError."""
    try:
        value = sizes.parse(text)
    except sizes.OutOfRangeError:
        value = 1 << 64
    except sizes.NotANumberError:
        value = -1
    if value < 0:
        raise BadNumberError(
            f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"
        ) from None
    if value > sizes.INT64_MAX:
        raise BadNumberError(f"Parsing error: argument too large -- {text}")
    if text[:2].lower() == "0x" and text[-1].lower() in "kmgtp":
        sys.stderr.write(f"{program}: warning: Using a multiplier suffix on hex numbers is deprecated: {text}\n")
    return value


def parse_c_number(text: str) -> int | None:
    """A whole number as C reads it when the base is left open: 10, 012, 0xa, with a sign; None for no number."""
    word = text.lstrip(" \t\n\v\f\r").lower()
    sign = -1 if word[:1] == "-" else 1
    word = word[1:] if word[:1] in ("+", "-") else word
    base = 16 if word.startswith("0x") else 8 if word.startswith("0") else 10
    if not word.isascii() or not word.isalnum():
        return None
    try:
        return sign * int(word, base)
    except ValueError:
        return 0 if word == "0" else None


def human(value: float) -> str:
    """A number of bytes: ``512 bytes``, ``1.500 KiB``, ``64 KiB``."""
    if value < 1024:
        text = f"{value:f}".removesuffix(".000000")
        return f"{text} bytes"
    step = 0
    while value >= 1 << 10 * (step + 2) and step + 1 < len(_SUFFIXES):
        step += 1
    return f"{value / (1 << 10 * (step + 1)):.3f}".removesuffix(".000") + f" {_SUFFIXES[step]}"


def clock(nanoseconds: int, *, full: bool) -> str:
    """A duration: ``00.01 sec``, from a second on (or if *full*) ``0:00:01.50``."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    hundredths = rest // 10_000_000
    if full or seconds:
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}.{hundredths:02d}"
    return f"00.{hundredths:02d} sec"


def report(verb: str, offset: int, count: int, total: int, operations: int, nanoseconds: int, *, bare: bool) -> str:
    """The lines about a finished request: *total* of *count* bytes in *nanoseconds*; *bare* for programs."""
    elapsed = max(nanoseconds, 1) / 1e9
    rate, pace = total / elapsed, operations / elapsed
    if bare:
        return f"{total},{operations},{clock(nanoseconds, full=True)},{rate:.3f},{pace:.3f}\n"
    return (
        f"{verb} {total}/{count} bytes at offset {offset}\n"
        f"{human(total)}, {operations} ops; {clock(nanoseconds, full=False)} "
        f"({human(rate)}/sec and {pace:.4f} ops/sec)\n"
    )


def dump(data: memoryview, offset: int) -> str:
    """*data* in lines of sixteen bytes, hexadecimal and as letters; the first is at *offset*."""
    lines = []
    for start in range(0, len(data), 16):
        piece = bytes(data[start : start + 16])
        letters = "".join([chr(byte) if byte < 128 and chr(byte).isalnum() else "." for byte in piece])
        lines.append(f"{offset + start:08x}:  {piece.hex(' ')}  {letters}\n")
    return "".join(lines)
