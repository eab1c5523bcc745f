"""The file type identifier and the two headers (2.2.1, 2.2.2).

Of the two headers the one with the higher sequence number counts, if it is sound. An update is written over the other,
so that a torn write leaves the former state.
"""

from __future__ import annotations

from vm_core.block.crc32c import crc32c
from vm_core.block.node import Node
from vm_core.block.structs import Record, raw, u16, u32, u64
from vm_core.errors import ImageError

from . import guids

SIGNATURE = b"vhdxfile"
KIB, MIB = 1 << 10, 1 << 20
#: Where the headers are.
PLACES = (64 * KIB, 128 * KIB)
LENGTH = 4 * KIB
MAX_SEQUENCE = (1 << 64) - 1


class Header(Record, order="little"):
    """One header (2.2.2)."""

    signature: bytes = raw(0, 4, default=b"head")
    checksum: int = u32(4, doc="CRC-32C over the 4 KiB with this field zero")
    sequence: int = u64(8, doc="the higher one counts")
    file_write_guid: bytes = raw(16, 16, doc="new with each opening that changes the file")
    data_write_guid: bytes = raw(32, 16, doc="new with each opening that changes what a guest sees")
    log_guid: bytes = raw(48, 16, doc="of the log's entries that count; zero: the log is empty")
    log_version: int = u16(64)
    version: int = u16(66, default=1)
    log_length: int = u32(68, doc="multiple of 1 MiB")
    log_offset: int = u64(72, doc="multiple of 1 MiB")

    def seal(self) -> bytes:
        """The bytes with their check sum."""
        self.checksum = 0
        self.checksum = crc32c(self.pack().ljust(LENGTH, b"\0"))
        return self.pack().ljust(LENGTH, b"\0")


def sealed(data: bytes) -> bool:
    """Whether the check sum at offset 4 of a structure is right."""
    return int.from_bytes(data[4:8], "little") == crc32c(data[:4] + bytes(4) + data[8:])


def invalid(name: str, reason: str) -> ImageError:
    """An error for which QEMU has only "Invalid argument"."""
    return ImageError(name, reason, peer=f"Could not open '{name}': Invalid argument")


def unsupported(name: str, reason: str) -> ImageError:
    """An error for which QEMU has only "Operation not supported"."""
    return ImageError(name, reason, peer=f"Could not open '{name}': Operation not supported")


class Headers:
    """The header that counts, and updating it."""

    def __init__(self, file: Node, name: str) -> None:
        """Read both. Raises ImageError where the file is no VHDX image or neither can be used."""
        self.file = file
        self._name = name
        self._planned = b""
        if file.pread(0, len(SIGNATURE)) != SIGNATURE:
            raise invalid(name, "not a VHDX image: the file type identifier is missing")
        found: list[tuple[Header, int, bytes]] = []
        for place in PLACES:
            data = file.pread(place, LENGTH)
            header = Header.parse(data)
            if header.signature == b"head" and header.version == 1 and sealed(data):
                found.append((header, place, data))
        if not found:
            raise ImageError(name, "No valid VHDX header found")
        if len(found) == 2 and found[0][0].sequence == found[1][0].sequence and found[0][2] != found[1][2]:
            raise ImageError(name, "No valid VHDX header found")
        self.current, self._place, _ = max(found, key=lambda one: one[0].sequence)
        if self.current.log_version:
            raise invalid(name, f"log version {self.current.log_version} is not supported; 0 is")
        if self.current.log_offset % MIB or self.current.log_offset < MIB:
            raise invalid(name, f"the log at {self.current.log_offset:#x} is not where a log can be")

    def update(self, *, both: bool = False) -> None:
        """Write the current header, changed by the caller, to stable storage; over both headers if *both*.

        Whatever of it fails, one sound header is left.
        """
        for _ in range(2 if both else 1):
            place = PLACES[0] if self._place == PLACES[1] else PLACES[1]
            if self.current.sequence >= MAX_SEQUENCE:
                raise invalid(self._name, "the headers' sequence number cannot grow any more")
            self.current.sequence += 1
            self.file.pwrite(place, self.current.seal())
            self.file.flush()
            self._place = place

    def begin(self, *, visible: bool = True) -> None:
        """The image is about to be changed for the first time since it was opened (2.2.2, on both GUIDs).

        Not *visible*: nothing will change that a guest can see, so what was made on the image stays valid.
        """
        self.current.file_write_guid = guids.new()
        if visible:
            self.current.data_write_guid, self._planned = self.planned(), b""
        self.update(both=True)

    def planned(self) -> bytes:
        """The data write GUID that the next change which a guest can see will bring."""
        self._planned = self._planned or guids.new()
        return self._planned
