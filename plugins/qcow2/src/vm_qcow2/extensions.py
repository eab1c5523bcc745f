"""Header extensions (*Header extensions*): a chain of type, length and data, padded to 8 bytes, ended by type 0."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from vm_core.block.node import Node
from vm_core.block.structs import Record, raw, u8, u32, u64
from vm_core.errors import ImageError

from .features import FeatureName
from .header import Header

END = 0
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAME_TABLE = 0x6803F857
BITMAPS = 0x23852875
ENCRYPTION_HEADER = 0x0537BE77
#: ``crypt_method`` of images with an encryption header, and the bytes of the extension that points at that.
CRYPT_LUKS, POINTER_LENGTH = 2, 16
#: Bytes of a format's name that QEMU does not take any more.
MAX_FORMAT_NAME = 16
DATA_FILE_NAME = 0x44415441


class ExtensionHead(Record, order="big"):
    """What stands before the data of each extension."""

    type: int = u32(0, doc="which extension; 0 ends the area")
    length: int = u32(4, doc="bytes of data that follow, without padding")


class FeatureNameEntry(Record, order="big"):
    """One entry of the feature name table."""

    kind: int = u8(0, doc="0 incompatible, 1 compatible, 2 auto-clear")
    bit: int = u8(1, doc="bit in that mask")
    name: bytes = raw(2, 46, doc="padded with zeroes")


class BitmapsExtension(Record, order="big"):
    """Where the directory of persistent bitmaps is."""

    nb_bitmaps: int = u32(0, doc="bitmaps in the image, at least 1")
    reserved: int = u32(4, doc="zero")
    directory_size: int = u64(8, doc="bytes of the directory")
    directory_offset: int = u64(16, doc="where it is; cluster-aligned")


class Extension(NamedTuple):
    """One extension as it is in the image, known or not."""

    type: int
    data: bytes


def read_extensions(file: Node, header: Header, name: str) -> list[Extension]:
    """All extensions, in the image's order. Raises ImageError where they do not fit into the first cluster.

    The area ends at its end mark, at the name of the backing file, or with the first cluster.
    """
    end = header.backing_file_offset or 1 << header.cluster_bits
    area = file.pread(0, end)
    position = header.header_length
    found: list[Extension] = []
    while position < end:
        if position > end - ExtensionHead.LENGTH:
            raise ImageError(name, "Header extension too large")
        head = ExtensionHead.parse(area, position)
        start = position + ExtensionHead.LENGTH
        if head.length > end - start:
            raise ImageError(name, "Header extension too large")
        if head.type == END:
            break
        if head.type == ENCRYPTION_HEADER:
            # Told before what follows is looked at, as by QEMU.
            if header.crypt_method != CRYPT_LUKS:
                raise ImageError(name, "CRYPTO header extension only expected with LUKS encryption method")
            if head.length != POINTER_LENGTH:
                raise ImageError(
                    name, f"CRYPTO header extension size {head.length}, but expected size {POINTER_LENGTH}"
                )
        if head.type == BACKING_FORMAT and head.length >= MAX_FORMAT_NAME:
            raise ImageError(name, f"ERROR: ext_backing_format: len={head.length} too large (>={MAX_FORMAT_NAME})")
        found.append(Extension(head.type, area[start : start + head.length]))
        position = start + (head.length + 7 & ~7)
    return found


def pack_extensions(extensions: Iterable[Extension]) -> bytes:
    """The extension area with its end mark."""
    parts: list[bytes] = []
    for one in extensions:
        parts.append(ExtensionHead(type=one.type, length=len(one.data)).pack())
        parts.append(one.data + bytes(-len(one.data) % 8))
    parts.append(ExtensionHead(type=END, length=0).pack())
    return b"".join(parts)


def find(extensions: Iterable[Extension], type: int) -> bytes | None:
    """The data of the extension of *type*; of several the last counts, as for a reader that takes each in turn."""
    return next((one.data for one in reversed(list(extensions)) if one.type == type), None)


def string(data: bytes) -> str:
    """The text of a string extension."""
    return data.split(b"\0")[0].decode("utf-8", "surrogateescape")


def parse_feature_names(data: bytes | None) -> list[FeatureName]:
    """The feature name table of an image."""
    names = []
    # The last entry may be cut off.
    for position in range(0, len(data or b""), FeatureNameEntry.LENGTH):
        piece = (data or b"")[position : position + FeatureNameEntry.LENGTH].ljust(FeatureNameEntry.LENGTH, b"\0")
        entry = FeatureNameEntry.parse(piece)
        text = entry.name.split(b"\0")[0].decode("utf-8", "replace")
        names.append(FeatureName(entry.kind, entry.bit, "".join(c if c.isprintable() else "?" for c in text)))
    return names


def pack_feature_names(names: Iterable[FeatureName]) -> bytes:
    """A feature name table."""
    return b"".join(FeatureNameEntry(kind=one.kind, bit=one.bit, name=one.name.encode()).pack() for one in names)
