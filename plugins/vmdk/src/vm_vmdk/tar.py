"""The container of an OVA: a tar archive (POSIX.1-1988 ``ustar``, with the extensions of POSIX.1-2001 and GNU for long
names and large files). Only what an appliance needs: finding members, and writing the header of one.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from vm_core.block.structs import Record, raw
from vm_core.errors import ImageError

if TYPE_CHECKING:
    from vm_core.block.node import Node

BLOCK = 512
#: Members that are looked at, and bytes of a header's extension, at most.
MAX_MEMBERS = 1000
MAX_EXTENSION = 64 * 1024


class TarHeader(Record, order="little"):
    """The header block before each member: text fields, numbers in octal digits."""

    name: bytes = raw(0, 100)
    mode: bytes = raw(100, 8, default=b"0000644\0")
    uid: bytes = raw(108, 8, default=b"0000000\0")
    gid: bytes = raw(116, 8, default=b"0000000\0")
    size: bytes = raw(124, 12)
    mtime: bytes = raw(136, 12)
    checksum: bytes = raw(148, 8, default=b" " * 8)
    type: bytes = raw(156, 1, default=b"0")
    link: bytes = raw(157, 100)
    magic: bytes = raw(257, 6, default=b"ustar\0")
    version: bytes = raw(263, 2, default=b"00")
    owner: bytes = raw(265, 32)
    group: bytes = raw(297, 32)
    major: bytes = raw(329, 8, default=b"0000000\0")
    minor: bytes = raw(337, 8, default=b"0000000\0")
    prefix: bytes = raw(345, 155)


class Member(NamedTuple):
    """A file in the archive: *size* bytes from *offset* on."""

    name: str
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where the next header is."""
        return self.offset + -(-self.size // BLOCK) * BLOCK


def is_tar(head: bytes) -> bool:
    """Whether *head* begins with the header of a member."""
    return len(head) >= BLOCK and head[257:262] == b"ustar"


def members(file: Node) -> tuple[list[Member], str]:
    """The regular files of an archive up to its end, or to where it is damaged, which the second result tells."""
    found: list[Member] = []
    offset, size = 0, file.size
    long_name: str | None = None
    long_size: int | None = None
    for _ in range(MAX_MEMBERS):
        block = file.pread(offset, BLOCK) if offset + BLOCK <= size else b""
        if not any(block):
            return found, ""
        header = TarHeader.parse(block)
        length = _number(header.size)
        kind, data = header.type, offset + BLOCK
        extension = kind in (b"x", b"L", b"g")
        if not is_tar(block) or _checksum(block) != _number(header.checksum) or length is None:
            return found, f" (the header of a member, at {offset:#x}, is damaged)"
        if long_size is not None and not extension:
            length, long_size = long_size, None
        if data + length > size or (extension and length > MAX_EXTENSION):
            return found, f" (a member, at {offset:#x}, has {length} bytes, which cannot be)"
        if kind == b"L":
            long_name = file.pread(data, length).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == b"x":
            records = _records(file.pread(data, length))
            long_name = records.get("path", long_name)
            if records.get("size", "").isdecimal():
                long_size = int(records["size"][:20])
        elif not extension:
            if kind in (b"0", b"\0"):
                parts = (header.prefix.rstrip(b"\0"), header.name.rstrip(b"\0"))
                short = b"/".join(part for part in parts if part).decode("utf-8", "surrogateescape")
                found.append(Member(long_name or short, data, length))
            long_name = None
        offset = data + -(-length // BLOCK) * BLOCK
    return found, f" (of the archive's members only the first {MAX_MEMBERS} are looked at)"


def pack_header(name: str, size: int) -> bytes:
    """The header block of a file."""
    text = name.encode("utf-8", "surrogateescape")
    if len(text) > 100:
        raise ImageError("", f"{name!r} is too long for the name of a file in an archive: 100 bytes are possible")
    octal = b"%011o\0" % size if size < 1 << 33 else b"\x80" + size.to_bytes(11, "big")
    header = TarHeader(name=text, size=octal, mtime=b"%011o\0" % int(time.time()))
    block = header.pack().ljust(BLOCK, b"\0")
    header.checksum = b"%06o\0 " % _checksum(block)
    return header.pack().ljust(BLOCK, b"\0")


def _checksum(block: bytes) -> int:
    """The sum of a header's bytes, with blanks where the checksum is."""
    return sum(block) - sum(block[148:156]) + 8 * 32


def _number(field: bytes) -> int | None:
    """Octal digits, or a binary number after a byte with the top bit (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    digits = field.strip(b" \0") or b"0"
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _records(data: bytes) -> dict[str, str]:
    """``LENGTH KEY=VALUE\\n`` records of a POSIX.1-2001 header."""
    found: dict[str, str] = {}
    while data:
        digits, blank, _ = data.partition(b" ")
        if not blank or not digits.isdigit() or not len(digits) < int(digits) <= len(data):
            break
        record, data = data[len(digits) + 1 : int(digits)], data[int(digits) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        found[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
    return found
