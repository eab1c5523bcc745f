"""VDI images built byte by byte, independently of the driver."""

from __future__ import annotations

import random
import struct

UNALLOCATED, ZERO = 0xFFFFFFFF, 0xFFFFFFFE


def build(
    data: bytes,
    block: int = 1 << 20,
    chance: random.Random | None = None,
    *,
    uuid: bytes = b"\x11" * 16,
    modified: bytes = b"\x22" * 16,
    link: bytes = bytes(16),
    parent: bytes = bytes(16),
    absent: frozenset[int] = frozenset(),
    kind: int = 1,
) -> bytes:
    """An image of *data*, its blocks in random order and zero blocks marked. Blocks *absent* are the parent's."""
    chance = chance or random.Random(1)
    count = -(-len(data) // block)
    blocks = [data[n * block : (n + 1) * block].ljust(block, b"\0") for n in range(count)]
    present = [n for n in range(count) if n not in absent and (any(blocks[n]) or chance.random() < 0.3)]
    chance.shuffle(present)
    table = [
        UNALLOCATED if n in absent or (not link.strip(b"\0") and chance.random() < 0.5) else ZERO for n in range(count)
    ]
    for number, n in enumerate(present):
        table[n] = number
    start = -(-(512 + 4 * count) // 512) * 512
    head = bytearray(512)
    head[:20] = b"<<< built by hand >>"
    struct.pack_into("<IIII", head, 64, 0xBEDA107F, 0x00010001, 0x180, kind)
    struct.pack_into("<II", head, 340, 512, start)
    struct.pack_into("<IIQII II", head, 360, 512, 0, len(data), block, 0, count, len(present))
    head[392:456] = uuid + modified + link + parent
    body = b"".join(blocks[n] for n in present)
    return (bytes(head) + struct.pack(f"<{count}I", *table)).ljust(start, b"\0") + body
