"""The modern PCI interface (virtio 1.2, section 4.1.4): structures in a memory bar, found through capabilities.

The bar holds four structures, each in a page or more of its own::

    0x0000  common configuration    60 bytes, table COMMON
    0x1000  ISR status              1 byte, cleared by reading
    0x2000  device configuration    as the device defines it
    0x3000  notifications           4 bytes a queue: writing there kicks it

A fifth capability is a window through configuration space for firmware that cannot reach memory bars (4.1.4.9).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from .registers import Register, RegisterTable

if TYPE_CHECKING:
    from .device import Virtqueue
    from .pci import VirtioPci

BAR_SIZE = 0x4000
COMMON_OFFSET = 0x0000
ISR_OFFSET = 0x1000
DEVICE_OFFSET = 0x2000
NOTIFY_OFFSET = 0x3000
NOTIFY_MULTIPLIER = 4

# cfg_type of a vendor capability (4.1.4).
CAP_VENDOR = 0x09
COMMON_CFG = 1
NOTIFY_CFG = 2
ISR_CFG = 3
DEVICE_CFG = 4
PCI_CFG = 5

#: Structure virtio_pci_common_cfg (4.1.4.3).
COMMON = RegisterTable(
    (
        Register("device_feature_select", 0, 4, "rw", 0, "which 32 feature bits device_feature shows"),
        Register("device_feature", 4, 4, "r", 0, "features the device offers"),
        Register("driver_feature_select", 8, 4, "rw", 0, "which 32 feature bits driver_feature holds"),
        Register("driver_feature", 12, 4, "rw", 0, "features the driver accepts"),
        Register("config_vector", 16, 2, "rw", 0xFFFF, "MSI-X vector of configuration changes"),
        Register("num_queues", 18, 2, "r", 0, "queues the device has"),
        Register("device_status", 20, 1, "rw", 0, "device status; writing 0 resets"),
        Register("config_generation", 21, 1, "r", 0, "changes with each change of the device configuration"),
        Register("queue_select", 22, 2, "rw", 0, "which queue the fields below mean"),
        Register("queue_size", 24, 2, "rw", 0, "descriptors; 0: no such queue"),
        Register("queue_vector", 26, 2, "rw", 0xFFFF, "MSI-X vector of the queue"),
        Register("queue_enable", 28, 2, "rw", 0, "1: the queue is in use"),
        Register("queue_notify_off", 30, 2, "r", 0, "its place in the notification structure, in multiples of 4"),
        Register("queue_desc_lo", 32, 4, "rw", 0, "descriptor area"),
        Register("queue_desc_hi", 36, 4, "rw", 0, "descriptor area, high half"),
        Register("queue_driver_lo", 40, 4, "rw", 0, "driver area (available ring)"),
        Register("queue_driver_hi", 44, 4, "rw", 0, "driver area, high half"),
        Register("queue_device_lo", 48, 4, "rw", 0, "device area (used ring)"),
        Register("queue_device_hi", 52, 4, "rw", 0, "device area, high half"),
        Register("queue_notify_data", 56, 2, "r", 0, "what to write with VIRTIO_F_NOTIF_CONFIG_DATA, not offered"),
        Register("queue_reset", 58, 2, "rw", 0, "writing 1 resets the queue, with VIRTIO_F_RING_RESET"),
    )
)


def _low(old: int, value: int) -> int:
    return old & ~0xFFFFFFFF | value


def _high(old: int, value: int) -> int:
    return old & 0xFFFFFFFF | value << 32


class ModernInterface:
    """The registers of the modern interface of one function: the handler of its memory bar."""

    def __init__(self, pci: VirtioPci) -> None:
        self.pci = pci
        self.virtio = pci.virtio
        self.clear()

    def clear(self) -> None:
        """Selectors to 0: part of a device reset."""
        self._device_select = 0
        self._driver_select = 0
        self._queue_select = 0

    def add_to(self, bar: int) -> int:
        """Add the bar and the capabilities; returns the offset of the configuration access capability."""
        pci = self.pci
        pci.add_bar(bar, BAR_SIZE, self, prefetch=True, bits64=True)

        def capability(kind: int, offset: int, length: int, tail: bytes = b"", writable: bytes | None = None) -> int:
            # cap_len, cfg_type, bar, id, padding[2], offset, length (4.1.4)
            body = struct.pack("<BBBBHII", 16 + len(tail), kind, bar, 0, 0, offset, length) + tail
            return pci.add_capability(CAP_VENDOR, body, writable)

        notify_length = NOTIFY_MULTIPLIER * len(self.virtio.queues)
        capability(COMMON_CFG, COMMON_OFFSET, 0x1000)
        capability(ISR_CFG, ISR_OFFSET, 0x1000)
        capability(DEVICE_CFG, DEVICE_OFFSET, 0x1000)
        capability(NOTIFY_CFG, NOTIFY_OFFSET, max(notify_length, 0x1000), NOTIFY_MULTIPLIER.to_bytes(4, "little"))
        # Of this one the driver writes bar, offset, length and the data behind them.
        writable = b"\0\0\xff\0\0\0" + b"\xff" * 12
        at = capability(PCI_CFG, 0, 0, bytes(4), writable)
        pci.config[at + 4] = 0
        return at

    # The bar.

    def read(self, offset: int, size: int) -> int:
        page = offset & ~0xFFF
        if page == COMMON_OFFSET:
            return COMMON.read(self, offset, size)
        if page == ISR_OFFSET:
            return self.pci.read_isr() if offset == ISR_OFFSET else 0
        if page == DEVICE_OFFSET:
            return self.virtio.read_config(offset - DEVICE_OFFSET, size)
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= NOTIFY_OFFSET:
            self.pci.kicked((offset - NOTIFY_OFFSET) // NOTIFY_MULTIPLIER)
        elif offset < ISR_OFFSET:
            COMMON.write(self, offset, size, value)
        elif offset >= DEVICE_OFFSET:
            self.virtio.settle()
            self.virtio.write_config(offset - DEVICE_OFFSET, size, value)

    # Registers about the device.

    def get_device_feature_select(self) -> int:
        return self._device_select

    def set_device_feature_select(self, value: int) -> None:
        self._device_select = value

    def get_device_feature(self) -> int:
        offered = self.virtio.offered(legacy=False)
        return offered >> 32 * self._device_select & 0xFFFFFFFF if self._device_select < 2 else 0

    def get_driver_feature_select(self) -> int:
        return self._driver_select

    def set_driver_feature_select(self, value: int) -> None:
        self._driver_select = value

    def get_driver_feature(self) -> int:
        features = self.virtio.driver_features
        return features >> 32 * self._driver_select & 0xFFFFFFFF if self._driver_select < 2 else 0

    def set_driver_feature(self, value: int) -> None:
        virtio = self.virtio
        virtio.settle()
        # What was agreed stays (2.2.1). Bits that were not offered are kept, to be refused at FEATURES_OK.
        if virtio.features_agreed:
            return
        if self._driver_select < 2:
            change = _high if self._driver_select else _low
            virtio.driver_features = change(virtio.driver_features, value)
        elif value:
            virtio.driver_features |= 1 << 64

    def get_config_vector(self) -> int:
        return self.pci.config_vector

    def set_config_vector(self, value: int) -> None:
        self.virtio.settle()
        self.pci.config_vector = self.pci.checked_vector(value)

    def get_num_queues(self) -> int:
        return len(self.virtio.queues)

    def get_device_status(self) -> int:
        # While a reset waits for requests in flight this is the old value, not 0 (4.1.4.3.1).
        return int(self.virtio.status)

    def set_device_status(self, value: int) -> None:
        self.virtio.write_status(value, legacy=False)

    def get_config_generation(self) -> int:
        return self.virtio.config_generation

    # Registers about the selected queue.

    @property
    def _queue(self) -> Virtqueue | None:
        queues = self.virtio.queues
        return queues[self._queue_select] if self._queue_select < len(queues) else None

    @property
    def _free_queue(self) -> Virtqueue | None:
        """The selected queue, if it may be set up now: a driver does that before it enables it (4.1.4.3.2)."""
        self.virtio.settle()
        queue = self._queue
        return queue if queue is not None and not queue.enabled else None

    def get_queue_select(self) -> int:
        return self._queue_select

    def set_queue_select(self, value: int) -> None:
        self._queue_select = value

    def get_queue_size(self) -> int:
        queue = self._queue
        return queue.size if queue is not None else 0

    def set_queue_size(self, value: int) -> None:
        queue = self._free_queue
        if queue is not None and 0 < value <= queue.max_size:
            queue.size = value

    def get_queue_vector(self) -> int:
        queue = self._queue
        return queue.vector if queue is not None else 0xFFFF

    def set_queue_vector(self, value: int) -> None:
        self.virtio.settle()
        queue = self._queue
        if queue is not None:
            queue.vector = self.pci.checked_vector(value)

    def get_queue_enable(self) -> int:
        queue = self._queue
        return int(queue is not None and queue.enabled)

    def set_queue_enable(self, value: int) -> None:
        queue = self._free_queue
        # Writing 0 is not a way to stop a queue (4.1.4.3.2).
        if queue is not None and value == 1:
            queue.enabled = True

    def get_queue_notify_off(self) -> int:
        return self._queue_select if self._queue is not None else 0

    def _get_address(self, field: str) -> int:
        queue = self._queue
        return int(getattr(queue, field)) if queue is not None else 0

    def _set_low(self, field: str, value: int) -> None:
        queue = self._free_queue
        if queue is not None:
            setattr(queue, field, _low(getattr(queue, field), value))

    def _set_high(self, field: str, value: int) -> None:
        queue = self._free_queue
        if queue is not None:
            setattr(queue, field, _high(getattr(queue, field), value))

    def get_queue_desc_lo(self) -> int:
        return self._get_address("desc") & 0xFFFFFFFF

    def set_queue_desc_lo(self, value: int) -> None:
        self._set_low("desc", value)

    def get_queue_desc_hi(self) -> int:
        return self._get_address("desc") >> 32

    def set_queue_desc_hi(self, value: int) -> None:
        self._set_high("desc", value)

    def get_queue_driver_lo(self) -> int:
        return self._get_address("driver") & 0xFFFFFFFF

    def set_queue_driver_lo(self, value: int) -> None:
        self._set_low("driver", value)

    def get_queue_driver_hi(self) -> int:
        return self._get_address("driver") >> 32

    def set_queue_driver_hi(self, value: int) -> None:
        self._set_high("driver", value)

    def get_queue_device_lo(self) -> int:
        return self._get_address("device") & 0xFFFFFFFF

    def set_queue_device_lo(self, value: int) -> None:
        self._set_low("device", value)

    def get_queue_device_hi(self) -> int:
        return self._get_address("device") >> 32

    def set_queue_device_hi(self, value: int) -> None:
        self._set_high("device", value)

    def get_queue_notify_data(self) -> int:
        return 0

    def get_queue_reset(self) -> int:
        queue = self._queue
        return int(queue is not None and queue.resetting)

    def set_queue_reset(self, value: int) -> None:
        queue = self._queue
        if queue is not None and value == 1 and queue.enabled and self.virtio.can_reset_queues:
            self.virtio.reset_queue(queue)
