"""A virtio driver in Python: the guest's side of rings and of the PCI transport, to test devices with.

Theory of operation. :class:`SplitDriver` and :class:`PackedDriver` are the driver's side of one queue in guest RAM,
written from the specification and independent of the device's side: they allocate descriptors, publish chains, decide
whether a kick is due, and collect what was used. :class:`PciAccess` reaches a function through configuration space,
ports and memory, as a CPU would; :class:`ModernPci` and :class:`LegacyPci` drive the two interfaces of virtio over PCI
with it, and :class:`BlockDriver` sends requests to a block device.
"""

from __future__ import annotations

import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from ..devices.virtio import barrier
from ..devices.virtio.chain import INDIRECT, NEXT, WRITE, RingLayout
from ..machine.memory import GuestMemory, RegionKind


class Part(NamedTuple):
    """A piece of guest memory in a chain; *write*: the device writes it."""

    address: int
    length: int
    write: bool = False


class Heap:
    """Guest memory to allocate from, upwards, without ever giving back."""

    def __init__(self, start: int, end: int) -> None:
        self.next = start
        self.end = end

    def alloc(self, length: int, alignment: int = 16) -> int:
        """The address of *length* free bytes."""
        address = (self.next + alignment - 1) & -alignment
        if address + length > self.end:
            raise MemoryError("the test's guest memory is used up")
        self.next = address + length
        return address


def split_layout(size: int, heap: Heap, **options: bool) -> RingLayout:
    """Place a split queue, its used ring at the page that follows, as the legacy interface wants it (2.7.2)."""
    desc = heap.alloc(16 * size, 4096)
    driver = heap.alloc(6 + 2 * size, 2)
    return RingLayout(size, desc, driver, heap.alloc(6 + 8 * size, 4096), **options)


def packed_layout(size: int, heap: Heap, **options: bool) -> RingLayout:
    """Place a packed queue."""
    return RingLayout(size, heap.alloc(16 * size), heap.alloc(4, 4), heap.alloc(4, 4), **options)


class DriverRing(ABC):
    """The driver's side of a virtqueue."""

    def __init__(self, layout: RingLayout, memory: GuestMemory, heap: Heap) -> None:
        self.layout = layout
        self.size = layout.size
        self.memory = memory
        self.heap = heap
        #: Descriptors that are free.
        self.room = layout.size
        self._tables: dict[int, int] = {}

    @abstractmethod
    def add(self, parts: Sequence[Part], *, indirect: bool = False, direct: int = 0) -> int:
        """Put a chain into the queue, not yet visible; returns its id.

        With *indirect* the parts go into a table, all but the first *direct* of them (split queues only).
        """

    @abstractmethod
    def publish(self) -> bool:
        """Make what was added available. True: the device wants a kick."""

    @abstractmethod
    def collect(self) -> list[tuple[int, int]]:
        """Take what the device has used: (id, bytes written)."""

    @abstractmethod
    def has_used(self) -> bool:
        """There is something to collect."""

    @abstractmethod
    def enable_interrupts(self) -> bool:
        """Ask for an interrupt at the next used buffer. True: there is one already."""

    @abstractmethod
    def disable_interrupts(self) -> None:
        """Ask for no interrupts."""

    def _table(self, parts: Sequence[Part], encode: Callable[[int, Part, bool], bytes]) -> Part:
        data = b"".join(encode(i, part, i + 1 == len(parts)) for i, part in enumerate(parts))
        address = self.heap.alloc(len(data), 16)
        self.memory.write(address, data)
        return Part(address, len(data))


class SplitDriver(DriverRing):
    """The driver's side of a split virtqueue (2.7)."""

    def __init__(self, layout: RingLayout, memory: GuestMemory, heap: Heap) -> None:
        super().__init__(layout, memory, heap)
        size = layout.size
        self._desc = memory.view(layout.desc, 16 * size)
        self._avail = memory.view(layout.driver, 6 + 2 * size).cast("H")
        self._used = memory.view(layout.device, 6 + 8 * size)
        for view in (self._desc, self._avail.cast("B"), self._used):
            view[:] = bytes(len(view))
        self._used16 = self._used.cast("H")
        self._free = list(range(size))
        self._chains: dict[int, list[int]] = {}
        self._idx = 0
        self._published = 0
        self._last_used = 0

    def add(self, parts: Sequence[Part], *, indirect: bool = False, direct: int = 0) -> int:
        entries = [(p, WRITE if p.write else 0) for p in parts]
        if indirect:
            table = self._table(
                parts[direct:],
                lambda i, p, last: struct.pack(
                    "<QIHH",
                    p.address,
                    p.length,
                    (WRITE if p.write else 0) | (0 if last else NEXT),
                    0 if last else i + 1,
                ),
            )
            entries[direct:] = [(table, INDIRECT)]
        indices = [self._free.pop() for _ in entries]
        self.room -= len(indices)
        for n, (part, flags) in enumerate(entries):
            last = n + 1 == len(entries)
            struct.pack_into(
                "<QIHH",
                self._desc,
                16 * indices[n],
                part.address,
                part.length,
                flags | (0 if last else NEXT),
                0 if last else indices[n + 1],
            )
        head = indices[0]
        self._chains[head] = indices
        self._avail[2 + self._idx % self.size] = head
        self._idx += 1
        return head

    def publish(self) -> bool:
        old, new = self._published, self._idx
        self._published = new
        self._avail[1] = new & 0xFFFF
        barrier.full()
        if self.layout.event_idx:
            event = self._used16[2 + 4 * self.size]
            return (new - event - 1) & 0xFFFF < new - old
        return not self._used16[0] & 1

    def collect(self) -> list[tuple[int, int]]:
        used = []
        while self._used16[1] != self._last_used & 0xFFFF:
            head, length = struct.unpack_from("<II", self._used, 4 + 8 * (self._last_used % self.size))
            self._last_used += 1
            indices = self._chains.pop(head)
            self._free += indices
            self.room += len(indices)
            used.append((head, length))
        return used

    def enable_interrupts(self) -> bool:
        if self.layout.event_idx:
            self._avail[2 + self.size] = self._last_used & 0xFFFF
        else:
            self._avail[0] = 0
        barrier.full()
        return self.has_used()

    def has_used(self) -> bool:
        return bool(self._used16[1] != self._last_used & 0xFFFF)

    def disable_interrupts(self) -> None:
        if not self.layout.event_idx:
            self._avail[0] = 1


class PackedDriver(DriverRing):
    """The driver's side of a packed virtqueue (2.8)."""

    def __init__(self, layout: RingLayout, memory: GuestMemory, heap: Heap) -> None:
        super().__init__(layout, memory, heap)
        self._desc = memory.view(layout.desc, 16 * layout.size)
        self._driver_event = memory.view(layout.driver, 4).cast("H")
        self._device_event = memory.view(layout.device, 4).cast("H")
        for view in (self._desc, self._driver_event.cast("B"), self._device_event.cast("B")):
            view[:] = bytes(len(view))
        self._next = 0
        self._wrap = 1
        self._used_slot = 0
        self._used_wrap = 1
        self._ids = list(range(layout.size))
        self._slots: dict[int, int] = {}
        self._added = 0
        self._pending: list[tuple[int, int]] = []

    def _flags(self, wrap: int) -> int:
        return 1 << 7 if wrap else 1 << 15

    def add(self, parts: Sequence[Part], *, indirect: bool = False, direct: int = 0) -> int:
        id = self._ids.pop(0)
        entries = [(p, WRITE if p.write else 0) for p in parts]
        if indirect:
            table = self._table(
                parts, lambda i, p, last: struct.pack("<QIHH", p.address, p.length, 0, WRITE if p.write else 0)
            )
            entries = [(table, INDIRECT)]
        first = None
        for n, (part, flags) in enumerate(entries):
            word = flags | self._flags(self._wrap) | (NEXT if n + 1 < len(entries) else 0)
            at = 16 * self._next
            if first is None:
                # The first descriptor of a chain becomes available last, with publish().
                first = (at, word)
                struct.pack_into("<QIH", self._desc, at, part.address, part.length, id)
            else:
                struct.pack_into("<QIHH", self._desc, at, part.address, part.length, id, word)
            self._next += 1
            if self._next == self.size:
                self._next, self._wrap = 0, self._wrap ^ 1
        assert first is not None
        self._pending.append(first)
        self._slots[id] = len(entries)
        self.room -= len(entries)
        self._added += len(entries)
        return id

    def publish(self) -> bool:
        for at, flags in reversed(self._pending):
            struct.pack_into("<H", self._desc, at + 14, flags)
        self._pending.clear()
        barrier.full()
        added, self._added = self._added, 0
        flags = self._device_event[1] & 3
        if flags == 2:
            event = self._device_event[0]
            offset, wrap = event & 0x7FFF, event >> 15
            # Is the named slot one of the last `added`? Positions before the wrap count down from the slot reached.
            if wrap != self._wrap:
                offset -= self.size
            return (self._next - offset - 1) & 0xFFFF < added
        return flags == 0

    def collect(self) -> list[tuple[int, int]]:
        used = []
        while self.has_used():
            _, length, id, _ = struct.unpack_from("<QIHH", self._desc, 16 * self._used_slot)
            slots = self._slots.pop(id)
            self._ids.append(id)
            self.room += slots
            self._used_slot += slots
            if self._used_slot >= self.size:
                self._used_slot -= self.size
                self._used_wrap ^= 1
            used.append((id, length))
        return used

    def has_used(self) -> bool:
        (flags,) = struct.unpack_from("<H", self._desc, 16 * self._used_slot + 14)
        return bool(flags >> 7 & 1 == flags >> 15 & 1 == self._used_wrap)

    def enable_interrupts(self) -> bool:
        if self.layout.event_idx:
            self._driver_event[0] = self._used_slot | self._used_wrap << 15
            self._driver_event[1] = 2
        else:
            self._driver_event[1] = 0
        barrier.full()
        return self.has_used()

    def disable_interrupts(self) -> None:
        self._driver_event[1] = 1


# The PCI transport.


class PciAccess:
    """One PCI function as software on the CPU reaches it.

    *machine* is a :class:`vm_core.testing.machine.FakeMachine` or a real one whose vCPUs do not run.
    """

    def __init__(self, machine: Any, slot: int, function: int = 0, bus: str = "pci.0") -> None:
        self.machine = machine
        self.devfn = slot << 3 | function
        self.bus = machine.buses[bus]

    def read(self, offset: int, size: int = 4) -> int:
        """Read configuration space."""
        with self.machine.lock:
            return int(self.bus.read(self.devfn, offset, size))

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """Write configuration space."""
        with self.machine.lock:
            self.bus.write(self.devfn, offset, size, value)

    def capabilities(self) -> list[tuple[int, int]]:
        """(id, offset) of each capability in the order of the list."""
        found = []
        at = self.read(0x34, 1)
        while at:
            found.append((self.read(at, 1), at))
            at = self.read(at + 1, 1)
        return found

    def bar_size(self, index: int) -> tuple[int, int]:
        """(size, flags) of a base address register, by writing ones; size 0: there is none."""
        at = 0x10 + 4 * index
        old = self.read(at)
        self.write(at, 0xFFFFFFFF)
        value = self.read(at)
        self.write(at, old)
        mask = ~3 if value & 1 else ~15
        return (-(value & mask) & 0xFFFFFFFF if value & mask else 0), value & ~mask

    def set_bar(self, index: int, address: int) -> None:
        """Program a base address register."""
        self.write(0x10 + 4 * index, address & 0xFFFFFFFF)
        if self.read(0x10 + 4 * index, 1) & 7 == 4:
            self.write(0x14 + 4 * index, address >> 32)

    def enable(self, *, master: bool = True, intx: bool = True) -> None:
        """Turn decoding (and bus mastering) on."""
        self.write(4, 3 | (4 if master else 0) | (0 if intx else 0x400), 2)

    def load(self, address: int, size: int) -> int:
        """A memory read of the CPU."""
        with self.machine.lock:
            found = self.machine.memory.find(address)
            assert found is not None, f"nothing at {address:#x}"
            assert found.region.kind is RegionKind.MMIO
            return int(found.region.handler.read(address - found.start + found.offset, size))

    def store(self, address: int, size: int, value: int) -> None:
        """A memory write of the CPU."""
        with self.machine.lock:
            found = self.machine.memory.find(address)
            assert found is not None, f"nothing at {address:#x}"
            assert found.region.kind is RegionKind.MMIO
            found.region.handler.write(address - found.start + found.offset, size, value)

    def port_in(self, port: int, size: int) -> int:
        """IN."""
        with self.machine.lock:
            return int(self.machine.ports.read(port, size))

    def port_out(self, port: int, size: int, value: int) -> None:
        """OUT."""
        with self.machine.lock:
            self.machine.ports.write(port, size, value)

    def msix(self, bar_address: int) -> tuple[int, int]:
        """Turn MSI-X on, every vector *n* sending data ``0x4000 + n``; (capability's offset, vectors)."""
        at = next(offset for id, offset in self.capabilities() if id == 0x11)
        vectors = (self.read(at + 2, 2) & 0x7FF) + 1
        for n in range(vectors):
            for word, value in enumerate((0xFEE00000, 0, 0x4000 + n, 0)):
                self.store(bar_address + 16 * n + 4 * word, 4, value)
        self.write(at + 2, 0x8000, 2)
        return at, vectors


class VirtioPciDriver(ABC):
    """A driver of virtio over PCI: initialisation as section 3.1.1 has it."""

    ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64

    def __init__(self, access: PciAccess, heap: Heap) -> None:
        self.access = access
        self.memory: GuestMemory = access.machine.memory
        self.heap = heap
        self.features = 0
        self.rings: list[DriverRing] = []

    @property
    @abstractmethod
    def status(self) -> int:
        """The device status."""

    @status.setter
    @abstractmethod
    def status(self, value: int) -> None: ...

    @abstractmethod
    def offered(self) -> int:
        """Features the device offers."""

    @abstractmethod
    def accept(self, features: int) -> None:
        """Write the driver's features."""

    @abstractmethod
    def queue_count(self) -> int:
        """Queues that exist."""

    @abstractmethod
    def set_up_queue(self, index: int, size: int | None = None) -> DriverRing:
        """Place a queue in memory and enable it."""

    @abstractmethod
    def kick(self, index: int) -> None:
        """Notify the device."""

    @abstractmethod
    def isr(self) -> int:
        """Read and clear the ISR status."""

    @abstractmethod
    def config(self, offset: int, size: int) -> int:
        """Read the device configuration."""

    @abstractmethod
    def set_config(self, offset: int, size: int, value: int) -> None:
        """Write the device configuration."""

    def start(self, wanted: int = -1, *, queues: int | None = None, size: int | None = None) -> None:
        """Reset, negotiate what is offered and *wanted*, set up queues, DRIVER_OK."""
        self.status = 0
        self.status = self.ACKNOWLEDGE
        self.status = self.ACKNOWLEDGE | self.DRIVER
        self.features = self.offered() & wanted
        self.accept(self.features)
        self._agree()
        count = self.queue_count()
        self.rings = [self.set_up_queue(i, size) for i in range(count if queues is None else queues)]
        self.status = self.status | self.DRIVER_OK

    def _agree(self) -> None:
        """FEATURES_OK, where the interface has it."""

    def _make_ring(self, size: int, packed: bool) -> DriverRing:
        options = {"event_idx": bool(self.features >> 29 & 1), "indirect": bool(self.features >> 28 & 1)}
        if packed:
            return PackedDriver(packed_layout(size, self.heap, **options), self.memory, self.heap)
        return SplitDriver(split_layout(size, self.heap, **options), self.memory, self.heap)


class ModernPci(VirtioPciDriver):
    """The modern interface, found through the vendor capabilities (4.1.4)."""

    def __init__(self, access: PciAccess, heap: Heap, *, bar_address: int = 0xE0000000) -> None:
        super().__init__(access, heap)
        self.places: dict[int, int] = {}
        self.config_window = 0
        self.multiplier = 0
        bars: dict[int, int] = {}
        next_bar = bar_address
        for id, at in access.capabilities():
            if id != 0x09:
                continue
            kind, bar, offset = access.read(at + 3, 1), access.read(at + 4, 1), access.read(at + 8)
            if kind == 5:
                self.config_window = at
                continue
            if bar not in bars:
                size, _ = access.bar_size(bar)
                next_bar = (next_bar + size - 1) & -size
                access.set_bar(bar, next_bar)
                bars[bar] = next_bar
                next_bar += size
            if kind == 2:
                self.multiplier = access.read(at + 16)
            self.places.setdefault(kind, bars[bar] + offset)
        access.enable()

    def common(self, offset: int, size: int) -> int:
        """Read the common configuration."""
        return self.access.load(self.places[1] + offset, size)

    def set_common(self, offset: int, size: int, value: int) -> None:
        """Write the common configuration."""
        self.access.store(self.places[1] + offset, size, value)

    @property
    def status(self) -> int:
        return self.common(20, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.set_common(20, 1, value)

    def offered(self) -> int:
        value = 0
        for word in (0, 1):
            self.set_common(0, 4, word)
            value |= self.common(4, 4) << 32 * word
        return value

    def accept(self, features: int) -> None:
        for word in (0, 1):
            self.set_common(8, 4, word)
            self.set_common(12, 4, features >> 32 * word & 0xFFFFFFFF)

    def _agree(self) -> None:
        self.status = self.status | self.FEATURES_OK
        assert self.status & self.FEATURES_OK, "the device refused the features"

    def queue_count(self) -> int:
        return self.common(18, 2)

    def set_up_queue(self, index: int, size: int | None = None) -> DriverRing:
        self.set_common(22, 2, index)
        if size is not None:
            self.set_common(24, 2, size)
        ring = self._make_ring(self.common(24, 2), bool(self.features >> 34 & 1))
        for offset, address in ((32, ring.layout.desc), (40, ring.layout.driver), (48, ring.layout.device)):
            self.set_common(offset, 4, address & 0xFFFFFFFF)
            self.set_common(offset + 4, 4, address >> 32)
        self.set_common(28, 2, 1)
        return ring

    def kick(self, index: int) -> None:
        self.set_common(22, 2, index)
        self.access.store(self.places[2] + self.common(30, 2) * self.multiplier, 2, index)

    def isr(self) -> int:
        return self.access.load(self.places[3], 1)

    def config(self, offset: int, size: int) -> int:
        return self.access.load(self.places[4] + offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.access.store(self.places[4] + offset, size, value)


class LegacyPci(VirtioPciDriver):
    """The legacy interface in port bar 0 (4.1.4.10)."""

    def __init__(self, access: PciAccess, heap: Heap, *, base: int = 0xC000) -> None:
        super().__init__(access, heap)
        access.set_bar(0, base)
        access.enable()
        self.base = base
        self.msix = False

    def get(self, offset: int, size: int) -> int:
        """Read a register."""
        return self.access.port_in(self.base + offset, size)

    def set(self, offset: int, size: int, value: int) -> None:
        """Write a register."""
        self.access.port_out(self.base + offset, size, value)

    @property
    def status(self) -> int:
        return self.get(18, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.set(18, 1, value)

    def offered(self) -> int:
        return self.get(0, 4)

    def accept(self, features: int) -> None:
        self.set(4, 4, features & 0xFFFFFFFF)

    def queue_count(self) -> int:
        for index in range(1025):
            self.set(14, 2, index)
            if not self.get(12, 2):
                return index
        raise AssertionError("more than 1024 queues")

    def set_up_queue(self, index: int, size: int | None = None) -> DriverRing:
        self.set(14, 2, index)
        ring = self._make_ring(self.get(12, 2), False)
        self.set(8, 4, ring.layout.desc >> 12)
        return ring

    def kick(self, index: int) -> None:
        self.set(16, 2, index)

    def isr(self) -> int:
        return self.get(19, 1)

    def config(self, offset: int, size: int) -> int:
        return self.get((24 if self.msix else 20) + offset, size)

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.set((24 if self.msix else 20) + offset, size, value)


class Pending(NamedTuple):
    """A request under way: where its data and its status byte are."""

    queue: int
    id: int
    data: tuple[Part, ...]
    status: int


class BlockDriver:
    """Requests to a virtio block device (5.2.6). *poll* lets the device work while the driver waits."""

    IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
    #: What an unanswered request's status byte holds.
    UNANSWERED = 0xEE

    def __init__(self, pci: VirtioPciDriver, poll: Callable[[], object]) -> None:
        self.pci = pci
        self.poll = poll
        #: Ask for an interrupt at the next used buffer, as a driver does that has looked at all.
        self.interrupts = True
        self._used: dict[tuple[int, int], int] = {}

    def send(
        self,
        type: int,
        sector: int = 0,
        *,
        data: bytes = b"",
        length: int = 0,
        cuts: Sequence[int] = (),
        queue: int = 0,
        indirect: bool = False,
        header: bytes | None = None,
        kick: bool = True,
    ) -> Pending:
        """Put a request into the ring: *data* for the device to read, *length* bytes of room for it to write.

        *cuts* are positions in header and data, or in room and status, at which descriptors end besides the ones that
        legacy drivers use (behind the header and ahead of the status byte); an empty tuple cuts there.
        """
        heap, memory, ring = self.pci.heap, self.pci.memory, self.pci.rings[queue]
        head = struct.pack("<IIQ", type, 0, sector) if header is None else header
        out = head + data
        out_at = heap.alloc(len(out))
        memory.write(out_at, out)
        in_at = heap.alloc(length + 1)
        memory.write(in_at + length, bytes([self.UNANSWERED]))
        parts = []
        for start, size, write, border in ((out_at, len(out), False, len(head)), (in_at, length + 1, True, length)):
            places = sorted({0, size, *(c for c in (cuts or (border,)) if 0 < c < size)})
            parts += [Part(start + a, b - a, write) for a, b in pairwise(places)]
        id = ring.add(parts, indirect=indirect)
        if kick and ring.publish():
            self.pci.kick(queue)
        return Pending(queue, id, (Part(in_at, length, True),), in_at + length)

    def collect(self) -> None:
        """Look for used buffers in all queues."""
        for number, ring in enumerate(self.pci.rings):
            again = True
            while again:
                for id, written in ring.collect():
                    self._used[number, id] = written
                again = self.interrupts and ring.enable_interrupts()

    def wait(self, pending: Pending, timeout: float = 2.0) -> tuple[int, bytes]:
        """(status byte, data) of a request. Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        while (pending.queue, pending.id) not in self._used:
            self.poll()
            self.collect()
            if time.monotonic() > deadline:
                raise TimeoutError("the request was not answered")
        self.written = self._used.pop((pending.queue, pending.id))
        (room,) = pending.data
        memory = self.pci.memory
        return memory.read(pending.status, 1)[0], memory.read(room.address, room.length)

    def request(self, type: int, sector: int = 0, **options: Any) -> tuple[int, bytes]:
        """Send a request and wait for it."""
        return self.wait(self.send(type, sector, **options))

    def read(self, sector: int, count: int, **options: Any) -> bytes:
        """Read sectors; raises OSError for any status but OK."""
        status, data = self.request(self.IN, sector, length=512 * count, **options)
        if status:
            raise OSError(f"status {status}")
        return data

    def write(self, sector: int, data: bytes, **options: Any) -> None:
        """Write sectors; raises OSError for any status but OK."""
        status, _ = self.request(self.OUT, sector, data=data, **options)
        if status:
            raise OSError(f"status {status}")
