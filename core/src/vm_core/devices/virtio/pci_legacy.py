"""The legacy PCI interface of a transitional device (virtio 1.2, section 4.1.4.10): registers in a port bar.

The device configuration follows the registers: at 20, or at 24 while MSI-X is enabled, when two vector registers come
in between. Queues are one contiguous piece of memory that starts at a page (2.7.2): the descriptor table, the available
ring, and at the next multiple of 4096 bytes the used ring.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .registers import Register, RegisterTable

if TYPE_CHECKING:
    from .device import Virtqueue
    from .pci import VirtioPci

PAGE_SHIFT = 12
ALIGN = 4096
NOTIFY_OFFSET = 16

HEADER = (
    Register("device_features", 0, 4, "r", 0, "features 0 to 31 the device offers"),
    Register("driver_features", 4, 4, "rw", 0, "features 0 to 31 the driver accepts"),
    Register("queue_pfn", 8, 4, "rw", 0, "page of the selected queue; 0 stops it"),
    Register("queue_size", 12, 2, "r", 0, "descriptors of the selected queue; 0: no such queue"),
    Register("queue_select", 14, 2, "rw", 0, "which queue the fields above mean"),
    Register("queue_notify", 16, 2, "rw", 0, "writing a queue's number kicks it"),
    Register("device_status", 18, 1, "rw", 0, "device status; writing 0 resets"),
    Register("isr", 19, 1, "r", 0, "ISR status, cleared by reading"),
)
VECTORS = (
    Register("config_vector", 20, 2, "rw", 0xFFFF, "MSI-X vector of configuration changes"),
    Register("queue_vector", 22, 2, "rw", 0xFFFF, "MSI-X vector of the selected queue"),
)
WITHOUT_MSIX = RegisterTable(HEADER)
WITH_MSIX = RegisterTable(HEADER + VECTORS)


def bar_size(config_size: int) -> int:
    """Ports needed for the registers and *config_size* bytes of device configuration, a power of two."""
    return int(1 << (24 + config_size - 1).bit_length())


class LegacyInterface:
    """The registers of the legacy interface of one function: the handler of its port bar."""

    def __init__(self, pci: VirtioPci) -> None:
        self.pci = pci
        self.virtio = pci.virtio
        self.clear()

    def clear(self) -> None:
        """The selector to 0: part of a device reset."""
        self._queue_select = 0

    def add_to(self, bar: int, config_size: int) -> None:
        """Add the bar."""
        self.pci.add_bar(bar, bar_size(config_size), self, io=True)

    # The bar.

    def read(self, offset: int, size: int) -> int:
        # Legacy drivers do not wait for a reset: it is over by the next access.
        self.virtio.settle()
        table, config = (WITH_MSIX, 24) if self.pci.msix_enabled else (WITHOUT_MSIX, 20)
        if offset >= config:
            return self.virtio.read_config(offset - config, size)
        return table.read(self, offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == NOTIFY_OFFSET:
            self.set_queue_notify(value & 0xFFFF)
            return
        self.virtio.settle()
        table, config = (WITH_MSIX, 24) if self.pci.msix_enabled else (WITHOUT_MSIX, 20)
        if offset >= config:
            self.virtio.write_config(offset - config, size, value)
        else:
            table.write(self, offset, size, value)

    # Registers.

    @property
    def _queue(self) -> Virtqueue | None:
        queues = self.virtio.queues
        return queues[self._queue_select] if self._queue_select < len(queues) else None

    def get_device_features(self) -> int:
        return self.virtio.offered(legacy=True)

    def get_driver_features(self) -> int:
        return self.virtio.driver_features & 0xFFFFFFFF

    def set_driver_features(self, value: int) -> None:
        # There is no FEATURES_OK to refuse with: what was not offered is dropped.
        if not self.virtio.features_agreed:
            self.virtio.driver_features = value & self.virtio.offered(legacy=True)

    def get_queue_pfn(self) -> int:
        queue = self._queue
        return queue.desc >> PAGE_SHIFT if queue is not None else 0

    def set_queue_pfn(self, value: int) -> None:
        queue = self._queue
        if queue is None:
            return
        if value == 0:
            self.virtio.reset_queue(queue)
            self.virtio.settle()
            return
        if queue.enabled:
            return
        queue.desc = value << PAGE_SHIFT
        queue.driver = queue.desc + 16 * queue.size
        end_of_available = queue.driver + 6 + 2 * queue.size
        queue.device = (end_of_available + ALIGN - 1) & ~(ALIGN - 1)
        queue.enabled = True
        self.virtio.legacy = True

    def get_queue_size(self) -> int:
        queue = self._queue
        return queue.max_size if queue is not None else 0

    def get_queue_select(self) -> int:
        return self._queue_select

    def set_queue_select(self, value: int) -> None:
        self._queue_select = value

    def get_queue_notify(self) -> int:
        return 0

    def set_queue_notify(self, value: int) -> None:
        self.pci.kicked(value)

    def get_device_status(self) -> int:
        return int(self.virtio.status)

    def set_device_status(self, value: int) -> None:
        self.virtio.write_status(value, legacy=True)
        self.virtio.settle()

    def get_isr(self) -> int:
        return self.pci.read_isr()

    def get_config_vector(self) -> int:
        return self.pci.config_vector

    def set_config_vector(self, value: int) -> None:
        self.pci.config_vector = self.pci.checked_vector(value)

    def get_queue_vector(self) -> int:
        queue = self._queue
        return queue.vector if queue is not None else 0xFFFF

    def set_queue_vector(self, value: int) -> None:
        queue = self._queue
        if queue is not None:
            queue.vector = self.pci.checked_vector(value)
