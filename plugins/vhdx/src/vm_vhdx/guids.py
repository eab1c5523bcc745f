"""The GUIDs of the format. On disk their first three fields are little-endian."""

from __future__ import annotations

import os

NONE = bytes(16)


def guid(text: str) -> bytes:
    """The stored form of a GUID that is written as people do."""
    plain = bytes.fromhex(text.replace("-", ""))
    return plain[3::-1] + plain[5:3:-1] + plain[7:5:-1] + plain[8:]


def show(stored: bytes) -> str:
    """A stored GUID as people write it."""
    parts = stored[3::-1], stored[5:3:-1], stored[7:5:-1], stored[8:10], stored[10:]
    return "-".join(part.hex() for part in parts)


def new() -> bytes:
    """A random GUID (RFC 4122, version 4)."""
    data = bytearray(os.urandom(16))
    data[6] = data[6] & 0x0F | 0x40
    data[8] = data[8] & 0x3F | 0x80
    return bytes(data)


#: Regions (2.2.3.2)
BAT = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
METADATA = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")

#: Metadata items (2.6.2)
FILE_PARAMETERS = guid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
DISK_SIZE = guid("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
DISK_ID = guid("BECA12AB-B2E6-4523-93EF-C309E000C746")
LOGICAL_SECTOR = guid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F")
PHYSICAL_SECTOR = guid("CDA348C7-445D-4471-9CC9-E9885251C556")
PARENT_LOCATOR = guid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")

#: The only type of parent locator that is defined (2.6.2.6.3)
VHDX_LOCATOR = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913")
