"""The device configuration of a virtio block device (virtio 1.2, 5.2.4) and its feature bits (5.2.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from vm_core.devices.virtio.features import Feature

SEG_MAX = Feature(2, "SEG_MAX", True, "seg_max is valid")
GEOMETRY = Feature(4, "GEOMETRY", True, "geometry is valid")
RO = Feature(5, "RO", True, "the device is read-only")
BLK_SIZE = Feature(6, "BLK_SIZE", True, "blk_size is valid")
FLUSH = Feature(9, "FLUSH", True, "there is a flush command")
TOPOLOGY = Feature(10, "TOPOLOGY", True, "topology is valid")
CONFIG_WCE = Feature(11, "CONFIG_WCE", True, "writeback can be read and written")
MQ = Feature(12, "MQ", True, "there are num_queues queues")
DISCARD = Feature(13, "DISCARD", True, "there is a discard command")
WRITE_ZEROES = Feature(14, "WRITE_ZEROES", True, "there is a write-zeroes command")

FEATURES = (SEG_MAX, GEOMETRY, RO, BLK_SIZE, FLUSH, TOPOLOGY, CONFIG_WCE, MQ, DISCARD, WRITE_ZEROES)

#: The unit of capacity and of request positions, whatever the block size (5.2.6).
SECTOR = 512


class Field(NamedTuple):
    """A little-endian field of struct virtio_blk_config. Offsets and sizes are bytes."""

    name: str
    offset: int
    size: int
    text: str


CONFIG = (
    Field("capacity", 0, 8, "512-byte sectors"),
    Field("size_max", 8, 4, "bytes of a segment; not limited"),
    Field("seg_max", 12, 4, "segments of a request"),
    Field("cylinders", 16, 2, "geometry"),
    Field("heads", 18, 1, "geometry"),
    Field("sectors", 19, 1, "geometry"),
    Field("blk_size", 20, 4, "bytes of a logical block"),
    Field("physical_block_exp", 24, 1, "logical blocks of a physical one, as a power of two"),
    Field("alignment_offset", 25, 1, "first aligned logical block"),
    Field("min_io_size", 26, 2, "logical blocks"),
    Field("opt_io_size", 28, 4, "logical blocks"),
    Field("writeback", 32, 1, "1: write cache; the driver may switch it"),
    Field("num_queues", 34, 2, "request queues"),
    Field("max_discard_sectors", 36, 4, "512-byte sectors"),
    Field("max_discard_seg", 40, 4, "ranges of a discard"),
    Field("discard_sector_alignment", 44, 4, "512-byte sectors"),
    Field("max_write_zeroes_sectors", 48, 4, "512-byte sectors"),
    Field("max_write_zeroes_seg", 52, 4, "ranges of a write-zeroes"),
    Field("write_zeroes_may_unmap", 56, 1, "1: its unmap flag may deallocate"),
)
CONFIG_SIZE = 60
#: Where the fields of DISCARD and WRITE_ZEROES begin.
DISCARD_FIELDS = 36
WRITEBACK = 32


def pack(values: Mapping[str, int]) -> bytes:
    """The bytes of the configuration; fields that *values* leaves out are zero."""
    data = bytearray(CONFIG_SIZE)
    for field in CONFIG:
        value = values.get(field.name, 0)
        data[field.offset : field.offset + field.size] = value.to_bytes(field.size, "little")
    return bytes(data)
