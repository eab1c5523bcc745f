"""Just enough of an ACPI Machine Language writer for a board's differentiated description table.

Functions return encoded bytes that are put together by concatenation. Source: ACPI Specification 6.4, chapter 20; the
sections are named beside the functions. Resource descriptors: 6.4.2 and 6.4.3.
"""

from __future__ import annotations

import struct


def name(path: str) -> bytes:
    """NameString (20.2.2): ``\\_SB_.PCI0``, ``_CRS``. Segments are filled up to four characters."""
    root = b"\\" if path.startswith("\\") else b""
    segments = [segment.ljust(4, "_").encode() for segment in path.lstrip("\\").split(".")]
    if len(segments) == 1:
        return root + segments[0]
    if len(segments) == 2:
        return root + b"\x2e" + b"".join(segments)
    return root + b"\x2f" + bytes([len(segments)]) + b"".join(segments)


def integer(value: int) -> bytes:
    """The shortest ComputationalData (20.2.3)."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(value)


def _package_length(body: bytes) -> bytes:
    """PkgLength (20.2.4): the length counts its own bytes."""
    length = len(body) + 1
    if length < 0x40:
        return bytes([length])
    for extra in (1, 2, 3):
        length = len(body) + 1 + extra
        if length < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | length & 0x0F]) + (length >> 4).to_bytes(extra, "little")
    raise ValueError("too long")


def _block(opcode: bytes, body: bytes) -> bytes:
    return opcode + _package_length(body) + body


def scope(path: str, *content: bytes) -> bytes:
    """DefScope (20.2.5.1)."""
    return _block(b"\x10", name(path) + b"".join(content))


def device(path: str, *content: bytes) -> bytes:
    """DefDevice (20.2.5.2)."""
    return _block(b"\x5b\x82", name(path) + b"".join(content))


def define(path: str, value: bytes) -> bytes:
    """DefName (20.2.5.1)."""
    return b"\x08" + name(path) + value


def package(*elements: bytes) -> bytes:
    """DefPackage (20.2.5.4)."""
    return _block(b"\x12", bytes([len(elements)]) + b"".join(elements))


def buffer(data: bytes) -> bytes:
    """DefBuffer (20.2.5.4)."""
    return _block(b"\x11", integer(len(data)) + data)


def eisa_id(text: str) -> bytes:
    """EISAID("PNP0A03") as an integer (19.6.38): three letters of five bits, four hexadecimal digits, big-endian."""
    number = 0
    for letter in text[:3]:
        number = number << 5 | ord(letter) - 0x40
    number = number << 16 | int(text[3:], 16)
    return b"\x0c" + number.to_bytes(4, "big")


# Resources.


def resources(*descriptors: bytes) -> bytes:
    """A resource template: descriptors and the end tag, whose checksum zero means none (6.4.2.9)."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def irq(line: int) -> bytes:
    """IRQ descriptor (6.4.2.1), edge-triggered."""
    return b"\x22" + (1 << line).to_bytes(2, "little")


def ports(start: int, length: int) -> bytes:
    """I/O port descriptor (6.4.2.5), fixed, 16-bit decoding."""
    return struct.pack("<BBHHBB", 0x47, 1, start, start, 1, length)


def bus_numbers(first: int, last: int) -> bytes:
    """Word address space of bus numbers (6.4.3.5.3), fixed and produced."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 2, 0x0C, 0, 0, first, last, 0, last - first + 1)


def port_window(first: int, last: int) -> bytes:
    """Word address space of ports, the entire range."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 1, 0x0C, 3, 0, first, last, 0, last - first + 1)


def memory_window(first: int, last: int) -> bytes:
    """Double-word address space of memory (6.4.3.5.2), read and write, not cacheable."""
    return struct.pack("<BHBBBIIIII", 0x87, 23, 0, 0x0C, 1, 0, first, last, 0, last - first + 1)
