"""What two images have in common if host clusters were taken and given back alike."""

from __future__ import annotations

import struct
from pathlib import Path

from vm_qcow2.refcounts import decode


class Layout:
    """What two images must have in common: everything but times, COPIED bits of unused tables, and free clusters."""

    def __init__(self, path: Path) -> None:
        data = bytearray(path.read_bytes())
        fields = struct.unpack(">IIQIIQIIQQIIQ", data[:72])
        self.cluster = size = 1 << fields[4]
        order = int.from_bytes(data[96:100], "big") if fields[1] > 2 else 4
        position = fields[12]
        for _ in range(fields[11]):
            position = position + 7 & ~7
            id_size, name_size = struct.unpack(">HH", data[position + 12 : position + 16])
            extra = int.from_bytes(data[position + 36 : position + 40], "big")
            data[position + 16 : position + 24] = bytes(8)
            position += 40 + extra + id_size + name_size
        self.used: set[int] = set()
        table = fields[9]
        for index in range(fields[10] * size // 8):
            at = int.from_bytes(data[table + 8 * index : table + 8 * index + 8], "big")
            if at:
                counts = decode(bytes(data[at : at + size]).ljust(size, b"\0"), 1 << order)
                self.used |= {index * len(counts) + one for one, value in enumerate(counts) if value}
        self.data = bytes(data)

    def clusters(self) -> dict[int, bytes]:
        """The contents of the clusters in use."""
        size = self.cluster
        return {one: self.data[one * size : (one + 1) * size].ljust(size, b"\0") for one in self.used}

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, Layout)
        if self.used != other.used:
            return False
        mine, theirs = self.clusters(), other.clusters()
        return all(mine[one] == theirs[one] or _but_copied(mine[one], theirs[one]) for one in mine)

    __hash__ = None  # type: ignore[assignment]


def _but_copied(one: bytes, two: bytes) -> bool:
    """Whether two clusters differ in bit 63 of big-endian 64-bit words alone."""
    return all(
        one[at] & 0x7F == two[at] & 0x7F and one[at + 1 : at + 8] == two[at + 1 : at + 8]
        for at in range(0, len(one), 8)
    )


def guest_data(path: Path) -> tuple[set[int], set[int]]:
    """The host clusters that hold plain data of the guest, and those in which compressed data begins or goes on."""
    data = path.read_bytes()
    fields = struct.unpack(">IIQIIQIIQQIIQ", data[:72])
    bits, step = fields[4], 8
    if fields[1] > 2 and int.from_bytes(data[72:80], "big") >> 4 & 1:
        step = 16
    plain: set[int] = set()
    compressed: set[int] = set()
    for number in range(fields[7]):
        at = fields[8] + 8 * number
        table = int.from_bytes(data[at : at + 8], "big") & (1 << 56) - 512
        if not table:
            continue
        for place in range(table, min(table + (1 << bits), len(data)), step):
            entry = int.from_bytes(data[place : place + 8], "big")
            if entry >> 62 & 1:
                host = entry & (1 << 70 - bits) - 1
                sectors = (entry & (1 << 62) - 1) >> 70 - bits
                last = (host | 511) + 512 * sectors
                compressed |= set(range(host >> bits, (last >> bits) + 1))
            elif entry & (1 << 56) - 512:
                plain.add((entry & (1 << 56) - 512) >> bits)
    return plain, compressed
