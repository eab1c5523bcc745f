"""Recognising descriptors, which have no magic number (sparse extents do)."""

from __future__ import annotations

#: Bytes of a file's start that are looked at.
_HEAD = 4096


def probe(head: bytes, size: int, filename: str) -> int:
    """100 for the text of a descriptor.

    Its first line that is no comment is ``version=`` and 1, 2 or 3: VMware itself goes by that. Blank lines and other
    spellings of it are taken too where a comment says what the file is.
    """
    if not head[:1] or head[0] not in b"#v\n\r \t\xefV":
        return 0
    text = head[:_HEAD].removeprefix(b"\xef\xbb\xbf")
    titled = b"disk descriptorfile" in text[:1024].lower()
    for line in text.split(b"\n"):
        line = line.rstrip(b"\r")
        if line.startswith(b"#"):
            continue
        if line in (b"version=1", b"version=2", b"version=3"):
            return 100
        if not titled:
            return 0
        word = line.strip().lower()
        if not word:
            continue
        key, _, value = word.partition(b"=")
        return 100 if key.strip() in (b"version", b"encoding") and value.strip() else 0
    return 0


def probe_appliance(head: bytes, size: int, filename: str) -> int:
    """100 for a tar archive whose first member is an OVF descriptor."""
    if head[257:262] != b"ustar":
        return 0
    return 100 if head[:100].rstrip(b"\0").lower().endswith(b".ovf") else 0
