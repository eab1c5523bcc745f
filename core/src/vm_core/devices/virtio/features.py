"""Feature bits that belong to every virtio device (virtio 1.2, chapter 6), and the device status (2.1)."""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple


class Feature(NamedTuple):
    """A feature bit. *legacy*: it also exists on the legacy interface, where there are bits 0 to 31 only."""

    bit: int
    name: str
    legacy: bool
    text: str

    @property
    def mask(self) -> int:
        return 1 << self.bit


NOTIFY_ON_EMPTY = Feature(24, "NOTIFY_ON_EMPTY", True, "legacy: interrupt when the last buffer is used")
ANY_LAYOUT = Feature(27, "ANY_LAYOUT", True, "legacy: headers and data may be cut into descriptors anywhere")
INDIRECT_DESC = Feature(28, "INDIRECT_DESC", True, "chains in a table of their own")
EVENT_IDX = Feature(29, "EVENT_IDX", True, "suppression of kicks and interrupts by index")
VERSION_1 = Feature(32, "VERSION_1", False, "virtio 1.0 or later, not legacy")
RING_PACKED = Feature(34, "RING_PACKED", False, "packed virtqueue layout")
RING_RESET = Feature(40, "RING_RESET", False, "queues can be reset one by one")

#: Every transport and ring feature that the toolkit implements.
RING_FEATURES = (NOTIFY_ON_EMPTY, ANY_LAYOUT, INDIRECT_DESC, EVENT_IDX, VERSION_1, RING_PACKED, RING_RESET)

#: What a driver of the legacy interface can see: its registers have 32 bits.
LEGACY_MASK = 0xFFFFFFFF
#: Bits that exist on the legacy interface only (6.3): a driver of the modern one is not shown them.
LEGACY_ONLY = NOTIFY_ON_EMPTY.mask


class Status(IntFlag):
    """The device status field (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128
