"""The text that describes an image (*Virtual Disk Format 5.0*, "The Descriptor File"): in a file of its own, or
embedded in a sparse extent.

    # Disk DescriptorFile
    version=1
    CID=fb183c20
    parentCID=ffffffff
    createType="twoGbMaxExtentSparse"

    # Extent description
    RW 4192256 SPARSE "test-s001.vmdk"

    # The Disk Data Base
    #DDB

    ddb.adapterType = "ide"

Real ones differ: line ends of DOS, blanks around ``=``, values without quotes, keys in other cases, an ``encoding``.
All of that is read here; keys that mean nothing to us are kept where they are, because the text is never written anew:
the only thing that changes in it is a content ID, digit by digit.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from vm_core.errors import ImageError

#: Bytes of a descriptor, and extents, at most.
MAX_LENGTH = 4 << 20
MAX_EXTENTS = 1 << 16

#: ``parentCID`` of an image without a parent.
NO_PARENT = 0xFFFFFFFF

_ACCESS = ("RW", "RDONLY", "NOACCESS")

_EXTENT = re.compile(
    r"""\s*(?P<access>\S+)\s+(?P<sectors>\S+)\s+(?P<type>\S+)
        (?:\s+"(?P<name>[^"]*)"(?:\s+(?P<offset>\S+))?.*|\s*)$""",
    re.VERBOSE,
)
_ASSIGNMENT = re.compile(r'\s*([\w.:-]+)\s*=\s*("([^"]*)"|[^\s"].*?|)\s*$')

#: Extent types whose data lies in the file as it is.
FLAT_TYPES = ("FLAT", "VMFS", "VMFSRAW", "VMFSRDM")


class ExtentLine(NamedTuple):
    """One line of the extent description."""

    access: str
    sectors: int
    type: str
    #: Relative to the descriptor's directory; empty where the type has no file.
    filename: str
    #: First sector in the file.
    offset: int
    #: The line itself, for messages.
    line: str


class Descriptor:
    """A parsed descriptor."""

    def __init__(self, data: bytes, name: str) -> None:
        """*data* is the text as it is in the file, zeroes and all that follows them included. Raises ImageError."""
        end = data.find(b"\0")
        if end >= 0:
            data = data[:end]
        self.data = data
        self.name = name
        text = decode(data)
        #: Keys in lower case → value without quotes. Of a key given twice the first counts.
        self.values: dict[str, str] = {}
        self._extent_lines: list[str] = []
        for line in text.split("\n"):
            line = line.rstrip("\r\0")
            stripped = line.lstrip(" \t\ufeff")
            if not stripped or stripped.startswith("#"):
                continue
            found = _ASSIGNMENT.match(stripped)
            if found is not None:
                value = found[2] if found[3] is None else found[3]
                self.values.setdefault(found[1].lower(), value)
            elif stripped.split(None, 1)[0].upper() in _ACCESS:
                self._extent_lines.append(stripped)

    @property
    def create_type(self) -> str:
        """``createType``; empty where there is none."""
        return self.values.get("createtype", "")

    @property
    def cid(self) -> int | None:
        """The content ID; None where there is none that can be read."""
        return _hexadecimal(self.values.get("cid"))

    @property
    def parent_cid(self) -> int | None:
        """The parent's content ID as it was when this image was made; NO_PARENT without a parent."""
        return _hexadecimal(self.values.get("parentcid"))

    @property
    def parent_hint(self) -> str:
        """Where the parent was; empty without one."""
        return self.values.get("parentfilenamehint", "")

    def extents(self) -> list[ExtentLine]:
        """The extent description. Raises ImageError with QEMU's words for a line that means nothing."""
        if len(self._extent_lines) > MAX_EXTENTS:
            raise ImageError(
                self.name, f"the descriptor names {len(self._extent_lines)} extents; at most {MAX_EXTENTS} are possible"
            )
        return [self._extent(line) for line in self._extent_lines]

    def _extent(self, line: str) -> ExtentLine:
        invalid = ImageError(self.name, f"Invalid extent line: {line}")
        found = _EXTENT.match(line)
        if found is None:
            raise invalid
        sectors = _decimal(found["sectors"])
        kind = found["type"]
        offset = _decimal(found["offset"]) if found["offset"] else None
        if sectors is None or sectors < 0 or sectors >= 1 << 54 or kind != kind.upper():
            raise invalid
        if kind == "FLAT":
            if found["name"] is None or offset is None or offset < 0:
                raise invalid
        elif kind == "ZERO":
            offset = 0
        elif kind in ("VMFS", "SPARSE", "VMFSSPARSE", "SESPARSE"):
            # Other programs write the offset, which can only be 0, here too. QEMU does not take it.
            if found["name"] is None or (offset or 0) != 0:
                raise invalid
        elif kind in ("VMFSRDM", "VMFSRAW"):
            raise ImageError(self.name, f"extent type {kind} (a raw device of an ESXi host) is not supported: {line}")
        else:
            raise invalid
        if offset is not None and offset >= 1 << 54:
            raise invalid
        return ExtentLine(found["access"].upper(), sectors, kind, found["name"] or "", offset or 0, line)

    def new_cid(self) -> tuple[int, bytes] | None:
        """A new content ID: where in the text it goes, and its digits; None where the text has none.

        It has as many digits as the old one, so that nothing else of the text moves: a power cut in the middle leaves
        a mixture of both, which is as good a content ID as any.
        """
        found = _find_id(self.data, b"CID")
        if found is None:
            return None
        old, digits = found[1], len(found[1])
        while True:
            text = b"%0*x" % (digits, int.from_bytes(os.urandom(4), "little") >> 4 * (8 - digits))
            if (text != old and text[:1] != b"0" and text[:7] != b"fffffff") or digits == 1:
                break
        self._replace(found, text)
        return found.start(1), text

    def new_parent_cid(self, value: int) -> tuple[int, bytes] | None:
        """The parent's content ID has become *value*: where in the text that goes, and its digits.

        None where the text has no place for so many.
        """
        found = _find_id(self.data, b"parentCID")
        if found is None:
            return None
        text = b"%0*x" % (len(found[1]), value)
        if len(text) > len(found[1]):
            return None
        self._replace(found, text)
        return found.start(1), text

    def _replace(self, found: re.Match[bytes], text: bytes) -> None:
        self.data = self.data[: found.start(1)] + text + self.data[found.end(1) :]
        name = b"parentcid" if b"parent" in found[0].lower() else b"cid"
        self.values[name.decode()] = text.decode()


def _find_id(data: bytes, key: bytes) -> re.Match[bytes] | None:
    """The line of a content ID; its digits are the first group."""
    return re.search(rb"(?im)^[ \t]*" + key + rb"[ \t]*=[ \t]*\"?([0-9a-f]{1,8})", data)


def decode(data: bytes) -> str:
    """The text of a descriptor: in the encoding it names, else UTF-8; bytes that are not survive as surrogates."""
    named = re.search(rb'(?im)^[ \t]*encoding[ \t]*=[ \t]*"?([\w:.-]+)"?', data[:4096])
    encoding = named[1].decode("ascii", "replace") if named is not None else "utf-8"
    if encoding.lower() in ("utf-8", "utf8"):
        return data.decode("utf-8", "surrogateescape")
    import codecs

    try:
        if codecs.lookup(encoding).name in ("idna", "punycode", "utf-7", "utf-16", "utf-32"):
            raise LookupError
        # A name in another encoding still names a file by bytes if it is UTF-8 after all.
        return data.decode(encoding, "strict")
    except (LookupError, UnicodeError):
        return data.decode("utf-8", "surrogateescape")


def _hexadecimal(text: str | None) -> int | None:
    """A content ID; as in QEMU of a longer number the last eight digits count."""
    found = re.match(r"(?:0[xX])?([0-9A-Fa-f]+)", text or "")
    return int(found[1], 16) & 0xFFFFFFFF if found is not None else None


def _decimal(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else None


class NewDescriptor(NamedTuple):
    """What goes into the descriptor of a new image."""

    cid: int
    parent_cid: int
    create_type: str
    parent_hint: str
    extents: str
    hardware_version: str
    cylinders: int
    heads: int
    adapter_type: str
    tools_version: str

    def text(self) -> str:
        """The descriptor, as qemu-img writes it."""
        # The parent's line is in the place of the empty one.
        hint = f'parentFileNameHint="{self.parent_hint}"\n' if self.parent_hint else "\n"
        return (
            "# Disk DescriptorFile\n"
            "version=1\n"
            f"CID={self.cid:x}\n"
            f"parentCID={self.parent_cid:x}\n"
            f'createType="{self.create_type}"\n'
            f"{hint}"
            "# Extent description\n"
            f"{self.extents}"
            "\n"
            "# The Disk Data Base\n"
            "#DDB\n"
            "\n"
            f'ddb.virtualHWVersion = "{self.hardware_version}"\n'
            f'ddb.geometry.cylinders = "{self.cylinders}"\n'
            f'ddb.geometry.heads = "{self.heads}"\n'
            'ddb.geometry.sectors = "63"\n'
            f'ddb.adapterType = "{self.adapter_type}"\n'
            f'ddb.toolsVersion = "{self.tools_version}"\n'
        )
