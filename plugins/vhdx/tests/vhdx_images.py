"""VHDX images built byte by byte, independently of the driver, and other programs that read them."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
import uuid
from itertools import pairwise
from pathlib import Path

MIB = 1 << 20
NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED, FULL, PARTIAL = 0, 1, 2, 3, 6, 7


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc_table()


def crc32c(data: bytes | bytearray) -> int:
    """The check sum, the slow way."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def guid(text: str) -> bytes:
    return uuid.UUID(text).bytes_le


def seal(data: bytearray, at: int, length: int) -> None:
    """Put the check sum right of the structure at *at*."""
    struct.pack_into("<I", data, at + 4, 0)
    struct.pack_into("<I", data, at + 4, crc32c(data[at : at + length]))


def header(
    sequence: int, *, data_write: bytes, log_guid: bytes = bytes(16), log_length: int = MIB, log_offset: int = MIB
) -> bytes:
    data = bytearray(4096)
    struct.pack_into(
        "<4sIQ16s16s16sHHIQ",
        data,
        0,
        b"head",
        0,
        sequence,
        b"f" * 16,
        data_write,
        log_guid,
        0,
        1,
        log_length,
        log_offset,
    )
    seal(data, 0, 4096)
    return bytes(data)


def log_entry(
    sectors: list[tuple[int, bytes | int]], *, guid: bytes, sequence: int, tail: int, size: int, last: int = 0
) -> bytes:
    """An entry of the log: sectors of 4 KiB, or a number of zeroes, with their places."""
    descriptors, bodies = [], []
    for offset, what in sectors:
        if isinstance(what, int):
            descriptors.append(struct.pack("<4sIQQQ", b"zero", 0, what, offset, sequence))
        else:
            descriptors.append(b"desc" + what[-4:] + what[:8] + struct.pack("<QQ", offset, sequence))
            bodies.append(
                struct.pack("<4sI", b"data", sequence >> 32) + what[8:-4] + struct.pack("<I", sequence & 0xFFFFFFFF)
            )
    length = -(-(64 + 32 * len(sectors)) // 4096) * 4096
    head = struct.pack(
        "<4sIIIQII16sQQ",
        b"loge",
        0,
        length + 4096 * len(bodies),
        tail,
        sequence,
        len(sectors),
        0,
        guid,
        size,
        last or size,
    )
    data = bytearray((head + b"".join(descriptors)).ljust(length, b"\0") + b"".join(bodies))
    seal(data, 0, len(data))
    return bytes(data)


def locator(pairs: dict[str, str]) -> bytes:
    """A parent locator."""
    head = guid("B04AEFB7-D19E-4A81-B789-25B8E9445913") + struct.pack("<HH", 0, len(pairs))
    position = 20 + 12 * len(pairs)
    entries, texts = b"", b""
    for key, value in pairs.items():
        k, v = key.encode("utf-16-le"), value.encode("utf-16-le")
        entries += struct.pack("<IIHH", position, position + len(k), len(k), len(v))
        texts += k + v
        position += len(k) + len(v)
    return head + entries + texts


def build(
    data: bytes,
    block: int = MIB,
    chance: random.Random | None = None,
    *,
    sector: int = 512,
    data_write: bytes = b"\x11" * 16,
    parent: dict[str, str] | None = None,
    absent: frozenset[int] = frozenset(),
    log: bytes = b"",
    log_guid: bytes = bytes(16),
) -> bytes:
    """An image of *data*, its blocks in random order; a differencing one, without the sectors *absent*, with *parent*.

    Regions lie elsewhere than in images of QEMU.
    """
    chance = chance or random.Random(1)
    ratio = (1 << 23) * sector // block
    count = -(-len(data) // block)
    per_block = block // sector
    chunks = -(-count // ratio)
    entries = chunks * (ratio + 1) if parent is not None else count + max(count - 1, 0) // ratio
    bat_length = max(-(-8 * entries // MIB), 1) * MIB
    metadata_at, bat_at = 2 * MIB, 3 * MIB
    position = bat_at + bat_length
    table = [0] * entries
    body: dict[int, bytes] = {}
    bitmaps = [bytearray(MIB) for _ in range(chunks)]
    order = list(range(count))
    chance.shuffle(order)
    for n in order:
        piece = data[n * block : (n + 1) * block].ljust(block, b"\0")
        index = n + n // ratio
        missing = [s for s in range(per_block) if n * per_block + s in absent]
        if parent is not None and len(missing) == per_block:
            table[index] = NOT_PRESENT
        elif not any(piece) and not missing:
            table[index] = ZERO if parent is not None else chance.choice([NOT_PRESENT, UNDEFINED, ZERO, UNMAPPED])
        else:
            if missing:
                content = bytearray(piece)
                for s in missing:
                    content[s * sector : (s + 1) * sector] = chance.randbytes(sector)
                piece = bytes(content)
                for s in range(per_block):
                    if n * per_block + s not in absent:
                        bit = n % ratio * per_block + s
                        bitmaps[n // ratio][bit // 8] |= 1 << bit % 8
            table[index] = position | (PARTIAL if missing else FULL)
            body[position] = piece
            position += block
    if parent is not None:
        for chunk in range(chunks):
            if any(bitmaps[chunk]):
                table[(chunk + 1) * (ratio + 1) - 1] = position | 6
                body[position] = bytes(bitmaps[chunk])
                position += MIB
    image = bytearray(position)
    image[:8] = b"vhdxfile"
    image[8 : 8 + 24] = "built by hand".encode("utf-16-le")[:24]
    for number, at in enumerate((64 << 10, 128 << 10)):
        image[at : at + 4096] = header(7 + number, data_write=data_write, log_guid=log_guid)
    image[MIB : MIB + len(log)] = log
    regions = bytearray(64 << 10)
    struct.pack_into("<4sIII", regions, 0, b"regi", 0, 2, 0)
    regions[16:32] = guid("8B7CA206-4790-4B9A-B8FE-575F050F886E")
    struct.pack_into("<QII", regions, 32, metadata_at, MIB, 1)
    regions[48:64] = guid("2DC27766-F623-4200-9D64-115E9BFD4A08")
    struct.pack_into("<QII", regions, 64, bat_at, bat_length, 1)
    seal(regions, 0, len(regions))
    for at in (192 << 10, 256 << 10):
        image[at : at + len(regions)] = regions
    items = [
        ("CAA16737-FA36-4D43-B3B6-33F0AA44E76B", struct.pack("<II", block, 2 if parent is not None else 0), 4),
        ("2FA54224-CD1B-4876-B211-5DBED83BF4B8", struct.pack("<Q", len(data)), 6),
        ("BECA12AB-B2E6-4523-93EF-C309E000C746", b"d" * 16, 6),
        ("8141BF1D-A96F-4709-BA47-F233A8FAAB5F", struct.pack("<I", sector), 6),
        ("CDA348C7-445D-4471-9CC9-E9885251C556", struct.pack("<I", 4096), 6),
    ]
    if parent is not None:
        items.append(("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C", locator(parent), 4))
    struct.pack_into("<8sHH", image, metadata_at, b"metadata", 0, len(items))
    at = 64 << 10
    for number, (name, value, flags) in enumerate(items):
        start = metadata_at + 32 + 32 * number
        image[start : start + 16] = guid(name)
        struct.pack_into("<IIII", image, start + 16, at, len(value), flags, 0)
        image[metadata_at + at : metadata_at + at + len(value)] = value
        at += len(value)
    struct.pack_into(f"<{entries}Q", image, bat_at, *table)
    for place, content in body.items():
        image[place : place + len(content)] = content
    return bytes(image)


def read_by_libvhdi(path: Path, *parents: Path) -> bytes | None:
    """What libvhdi finds in an image, whose chain of parents is given; None where it is not installed."""
    try:
        import pyvhdi
    except ImportError:
        return None
    files = []
    for one in (path, *parents):
        file = pyvhdi.file()
        file.open(str(one))
        files.append(file)
    for child, parent in pairwise(files):
        child.set_parent(parent)
    size = files[0].get_media_size()
    pieces, position = [], 0
    while position < size:
        piece = files[0].read_buffer_at_offset(min(1 << 20, size - position), position)
        assert piece
        pieces.append(piece)
        position += len(piece)
    for file in files:
        file.close()
    return b"".join(pieces)


def read_by_7zip(path: Path) -> bytes | None:
    """What 7-Zip, which looks for parents by itself, finds in an image; None where it is not installed."""
    program = shutil.which("7zz")
    if program is None:
        return None
    done = subprocess.run([program, "x", "-so", "-tvhdx", str(path)], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
