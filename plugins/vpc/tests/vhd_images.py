"""VHD images built byte by byte, independently of the driver, and other programs that read them."""

from __future__ import annotations

import random
import shutil
import struct
import subprocess
from itertools import pairwise
from pathlib import Path

UNUSED = 0xFFFFFFFF
SECTOR = 512


def reseal(data: bytearray, at: int, length: int, field: int) -> None:
    """Put the check sum right of the structure at *at*."""
    struct.pack_into(">I", data, at + field, 0)
    struct.pack_into(">I", data, at + field, ~sum(data[at : at + length]) & 0xFFFFFFFF)


def footer(size: int, kind: int, *, uuid: bytes = b"\x11" * 16, creator: bytes = b"win ", stamp: int = 1000) -> bytes:
    """A footer."""
    data = bytearray(512)
    struct.pack_into(">8sII", data, 0, b"conectix", 2, 0x10000)
    struct.pack_into(">QI4sI4s", data, 16, 512 if kind != 2 else (1 << 64) - 1, stamp, creator, 0x60003, b"Wi2k")
    struct.pack_into(">QQHBBI", data, 40, size, size, 65535, 16, 255, kind)
    data[68:84] = uuid
    reseal(data, 0, 512, 64)
    return bytes(data)


def locator(code: bytes, text: str) -> tuple[bytes, bytes]:
    """A parent locator's code and data."""
    return code, text.encode("utf-8" if code == b"MacX" else "utf-16-le")


def build(
    data: bytes,
    block: int = 2 << 20,
    chance: random.Random | None = None,
    *,
    uuid: bytes = b"\x11" * 16,
    parent: bytes = bytes(16),
    parent_stamp: int = 0,
    parent_name: str = "",
    locators: tuple[tuple[bytes, bytes], ...] = (),
    absent: frozenset[int] = frozenset(),
) -> bytes:
    """A dynamic image of *data*, its blocks in random order; a differencing one, without the sectors *absent*, if
    *parent* is given."""
    chance = chance or random.Random(1)
    size = len(data)
    count = -(-size // block)
    differencing = any(parent)
    per_block = block // SECTOR
    bitmap_size = -(-per_block // 8 // SECTOR) * SECTOR or SECTOR
    table_offset = 1536
    position = -(-(table_offset + 4 * count) // SECTOR) * SECTOR
    header = bytearray(1024)
    struct.pack_into(">8sQQIII", header, 0, b"cxsparse", (1 << 64) - 1, table_offset, 0x10000, count, block)
    header[40:56] = parent
    struct.pack_into(">I", header, 56, parent_stamp)
    name = parent_name.encode("utf-16-be")
    header[64 : 64 + len(name)] = name
    areas = []
    for number, (code, text) in enumerate(locators):
        space = -(-len(text) // SECTOR) * SECTOR
        struct.pack_into(">4sIIIQ", header, 576 + 24 * number, code, space, len(text), 0, position)
        areas.append(text.ljust(space, b"\0"))
        position += space
    reseal(header, 0, 1024, 36)
    table = [UNUSED] * count
    order = list(range(count))
    chance.shuffle(order)
    blocks = []
    for n in order:
        piece = data[n * block : (n + 1) * block].ljust(block, b"\0")
        present = [s for s in range(per_block) if n * per_block + s not in absent]
        if not present if differencing else not any(piece):
            continue
        bitmap = bytearray(bitmap_size)
        body = bytearray(chance.randbytes(block) if differencing else block)
        for s in present:
            bitmap[s // 8] |= 0x80 >> s % 8
            body[s * SECTOR : (s + 1) * SECTOR] = piece[s * SECTOR : (s + 1) * SECTOR]
        table[n] = position // SECTOR
        position += bitmap_size + block
        blocks.append(bytes(bitmap) + bytes(body))
    foot = footer(size, 4 if differencing else 3, uuid=uuid)
    head = (foot + bytes(header) + struct.pack(f">{count}I", *table)).ljust(
        -(-(table_offset + 4 * count) // SECTOR) * SECTOR, b"\xff"
    )
    return b"".join([head, *areas, *blocks, foot])


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
    done = subprocess.run([program, "x", "-so", "-tvhd", str(path)], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
