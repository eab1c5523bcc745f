"""PCI: functions with their configuration space, base address registers, MSI-X and INTx, and the bus they sit on.

Theory of operation. A :class:`PciDevice` is one function. Its 256 bytes of configuration space are plain bytes with
two masks beside them: which bits the guest may write, and which it clears by writing ones. A write to a base address
register or to the command register moves the function's :class:`Bar` windows in the port or memory space. A subclass
sets the identity attributes, calls ``super().realize()`` and then adds bars and capabilities::

    class Adder(PciDevice):
        vendor_id, device_id, class_code, interrupt_pin = 0x1B36, 0x0099, 0xFF0000, 1

        def realize(self, machine, bus, address):
            super().realize(machine, bus, address)
            self.add_bar(0, 0x1000, self)          # has read(offset, size) and write(offset, size, value)

Everything here runs with the device lock held. Source: PCI Local Bus Specification 3.0, chapter 6.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..machine.memory import DmaError, MmioHandler, Region, RegionKind
from .bus import Bus
from .device import Device
from .msixroutes import MsixRoutes

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..block.backend import BlockBackend
    from ..machine.machine import Machine
    from ..machine.ports import PortRange

__all__ = ["Bar", "DmaError", "MsixTable", "PciBus", "PciDevice", "parse_address"]

# Registers of the type 0 header (6.1): offset.
VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION = 0x08
CLASS_CODE = 0x09
CACHE_LINE_SIZE = 0x0C
LATENCY_TIMER = 0x0D
HEADER_TYPE = 0x0E
BAR0 = 0x10
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
CAPABILITY_POINTER = 0x34
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D

# Bits of the command register (6.2.2) and of the status register (6.2.3).
COMMAND_IO = 0x0001
COMMAND_MEMORY = 0x0002
COMMAND_MASTER = 0x0004
COMMAND_PARITY = 0x0040
COMMAND_SERR = 0x0100
COMMAND_INTX_DISABLE = 0x0400
STATUS_INTERRUPT = 0x0008
STATUS_CAPABILITIES = 0x0010
#: Error bits of the status register: the guest clears them by writing ones.
STATUS_ERRORS = 0xF900

CAP_MSIX = 0x11
#: Where capabilities go: behind the 64-byte header.
FIRST_CAPABILITY = 0x40

_ADDRESS = re.compile(r"(?:0x)?([0-9a-fA-F]{1,2})(?:\.([0-7]))?\Z")


def parse_address(text: str) -> tuple[int, int]:
    """``slot`` or ``slot.function`` in hexadecimal, as in ``addr=1f.2``: the pair of numbers."""
    found = _ADDRESS.match(text)
    if found is None or int(found[1], 16) > 31:
        raise UsageError(f"addr={text}: a PCI address is SLOT or SLOT.FUNCTION in hexadecimal, 0 to 1f and 0 to 7")
    return int(found[1], 16), int(found[2] or "0")


class Bar:
    """A base address register and the window behind it.

    *size* is a power of two in bytes. :attr:`address` is where the window is mapped now, None while the guest has
    decoding off, has set no address, or has set one that something else holds.
    """

    __slots__ = ("address", "bits64", "device", "handler", "index", "io", "ports", "prefetch", "region", "size")

    def __init__(
        self,
        device: PciDevice,
        index: int,
        size: int,
        handler: MmioHandler,
        *,
        io: bool = False,
        prefetch: bool = False,
        bits64: bool = False,
    ) -> None:
        if size & (size - 1) or size < (4 if io else 16):
            raise ValueError(f"a bar of {size} bytes is impossible")
        if io and (bits64 or prefetch):
            raise ValueError("a port bar is neither 64 bits wide nor prefetchable")
        if not 0 <= index < 6 - bits64:
            raise ValueError(f"there is no bar {index}")
        self.device = device
        self.index = index
        self.size = size
        self.handler = handler
        self.io = io
        self.prefetch = prefetch
        self.bits64 = bits64
        self.address: int | None = None
        self.region: Region | None = None
        self.ports: PortRange | None = None

    def __repr__(self) -> str:
        where = "unmapped" if self.address is None else f"{self.address:#x}"
        return f"<Bar {self.index} of {self.device.id} {'ports' if self.io else 'memory'} {where}+{self.size:#x}>"

    @property
    def offset(self) -> int:
        """Where the register is in configuration space."""
        return BAR0 + 4 * self.index

    def programmed(self) -> int | None:
        """The address that command and base address registers ask for, None for none."""
        config = self.device.config
        command = config[COMMAND]
        at = self.offset
        low = int.from_bytes(config[at : at + 4], "little")
        if self.io:
            address = low & ~3
            # Zero is what a register holds before it is set, and all ones what sizing leaves in it.
            if not command & COMMAND_IO or not address or address + self.size > 0x10000:
                return None
            return address
        address = low & ~15
        top = 1 << 32
        if self.bits64:
            address |= int.from_bytes(config[at + 4 : at + 8], "little") << 32
            top = 1 << 52
        if not command & COMMAND_MEMORY or not address or address + self.size >= top:
            return None
        return address

    def update(self) -> None:
        """Map the window where the registers say."""
        wanted = self.programmed()
        if wanted == self.address:
            return
        machine = self.device.machine
        if self.ports is not None:
            machine.ports.remove(self.ports)
            self.ports = None
        if self.region is not None:
            region, self.region = self.region, None
            machine.memory.remove(region)
        self.address = wanted
        if wanted is not None:
            if self.io:
                try:
                    self.ports = machine.ports.add(wanted, self.size, self.handler)
                except ValueError:
                    # Two claimants of one port: on the real bus both would answer; here the first one keeps it.
                    self.address = None
            else:
                self.region = Region(
                    f"{self.device.id} bar {self.index}",
                    wanted,
                    self.size,
                    RegionKind.MMIO,
                    handler=self.handler,
                    priority=1,
                )
                machine.memory.add(self.region)
        self.device.bar_moved(self)


class MsixTable:
    """The MSI-X table and pending bits of one function, as a window of a memory bar (6.8.2).

    An entry is 16 bytes: message address (64 bits), message data, vector control with the mask in bit 0.
    """

    def __init__(self, device: PciDevice, vectors: int, table_offset: int, pba_offset: int, capability: int) -> None:
        self.device = device
        self.vectors = vectors
        self.table_offset = table_offset
        self.pba_offset = pba_offset
        self.capability = capability
        self.table = bytearray(16 * vectors)
        self.pending = bytearray((vectors + 63) // 64 * 8)
        self.under: MmioHandler | None = None
        #: Made at the first message: the accelerator is chosen after the board has its devices.
        self.routes: MsixRoutes | None = None
        self.reset()

    def reset(self) -> None:
        """All entries masked, nothing pending."""
        self.forget_routes()
        self.table[:] = bytes(len(self.table))
        for vector in range(self.vectors):
            self.table[16 * vector + 12] = 1
        self.pending[:] = bytes(len(self.pending))

    @property
    def enabled(self) -> bool:
        """The guest has turned MSI-X on."""
        return bool(self.device.config[self.capability + 3] & 0x80)

    def masked(self, vector: int) -> bool:
        """By its own entry, or with all the others by the function mask."""
        return bool(self.device.config[self.capability + 3] & 0x40 or self.table[16 * vector + 12] & 1)

    def message(self, vector: int) -> tuple[int, int]:
        """Address and data of *vector*."""
        at = 16 * vector
        return int.from_bytes(self.table[at : at + 8], "little"), int.from_bytes(self.table[at + 8 : at + 12], "little")

    def notify(self, vector: int) -> None:
        """Send the message of *vector*, or remember that it is due while it is masked."""
        if vector >= self.vectors or not self.enabled:
            return
        if self.masked(vector):
            self.pending[vector >> 3] |= 1 << (vector & 7)
            return
        address, data = self.message(vector)
        if self.routes is None:
            self.routes = MsixRoutes(self.device.machine.accel)
        if not self.routes.signal(vector, address, data):
            self.device.machine.irqs.send_msi(address, data)

    def forget_routes(self, vector: int | None = None) -> None:
        """*vector* (None: any) has another message now, or is masked or off."""
        if self.routes is not None:
            self.routes.forget(vector)

    def unmasked(self) -> None:
        """Send what became due under a mask that is gone."""
        if not self.enabled or not any(self.pending):
            return
        for vector in range(self.vectors):
            bit = 1 << (vector & 7)
            if self.pending[vector >> 3] & bit and not self.masked(vector):
                self.pending[vector >> 3] &= ~bit
                self.notify(vector)

    def read(self, offset: int, size: int) -> int:
        at = offset - self.table_offset
        if 0 <= at < len(self.table):
            return int.from_bytes(self.table[at : at + size], "little")
        at = offset - self.pba_offset
        if 0 <= at < len(self.pending):
            return int.from_bytes(self.pending[at : at + size], "little")
        return self.under.read(offset, size) if self.under is not None else 0

    def write(self, offset: int, size: int, value: int) -> None:
        at = offset - self.table_offset
        if 0 <= at < len(self.table):
            # Only aligned words and double words are defined (6.8.2); anything else is dropped.
            if size in (4, 8) and at % size == 0:
                self.table[at : at + size] = value.to_bytes(size, "little")
                self.forget_routes(at // 16)
                self.device.msix_changed(at // 16)
                self.unmasked()
        elif 0 <= offset - self.pba_offset < len(self.pending):
            pass  # read-only
        elif self.under is not None:
            self.under.write(offset, size, value)


class PciDevice(Device):
    """One PCI function. Subclasses set the class attributes below; see the module's text."""

    vendor_id = 0xFFFF
    device_id = 0xFFFF
    #: Base class, subclass and programming interface: 24 bits (``0x010180`` for an IDE controller with bus mastering).
    class_code = 0
    revision = 0
    subsystem_vendor_id = 0
    subsystem_id = 0
    #: 0: no interrupt; 1–4: INTA–INTD.
    interrupt_pin = 0

    machine: Machine
    bus: PciBus
    slot: int
    function: int

    def __init__(self, id: str, options: dict[str, Any], backend: BlockBackend | None = None) -> None:
        super().__init__(id, options, backend)
        self.config = bytearray(256)
        #: Bits of the configuration space that the guest can write, and those it clears by writing a one.
        self.config_writable = bytearray(256)
        self.config_clearable = bytearray(256)
        self.bars: dict[int, Bar] = {}
        self.msix: MsixTable | None = None
        #: What the device drives; the wire also needs that the guest has not disabled INTx.
        self._irq_level = False
        self._wire_level = False
        self._next_capability = FIRST_CAPABILITY
        self._last_capability = CAPABILITY_POINTER

    # Plugging in.

    def realize(self, machine: Machine, bus: Bus, address: str | None) -> None:
        """Take a place on the bus and write the identity into configuration space."""
        if not isinstance(bus, PciBus):
            raise UsageError(f"{self.driver}: bus {bus.name} is no PCI bus")
        self.machine = machine
        self.bus = bus
        self.set16(VENDOR_ID, self.vendor_id)
        self.set16(DEVICE_ID, self.device_id)
        self.config[REVISION] = self.revision
        self.config[CLASS_CODE : CLASS_CODE + 3] = self.class_code.to_bytes(3, "little")
        self.set16(SUBSYSTEM_VENDOR_ID, self.subsystem_vendor_id)
        self.set16(SUBSYSTEM_ID, self.subsystem_id)
        self.config[INTERRUPT_PIN] = self.interrupt_pin
        command = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE
        self.config_writable[COMMAND : COMMAND + 2] = command.to_bytes(2, "little")
        self.config_clearable[STATUS : STATUS + 2] = STATUS_ERRORS.to_bytes(2, "little")
        self.config_writable[CACHE_LINE_SIZE] = 0xFF
        self.config_writable[LATENCY_TIMER] = 0xFF
        self.config_writable[INTERRUPT_LINE] = 0xFF
        bus.plug(self, address)

    def unrealize(self) -> None:
        """Leave the bus: windows closed, interrupt line low."""
        self.set_irq(False)
        self.config[COMMAND : COMMAND + 2] = b"\0\0"
        self._update_bars()
        if self.msix is not None:
            self.msix.forget_routes()
        self.bus.unplug(self)

    def reset(self) -> None:
        """Decoding off, bars and interrupt line register cleared, MSI-X off (RST#, 4.3)."""
        self.set_irq(False)
        self.config[COMMAND : COMMAND + 2] = b"\0\0"
        self.config[CACHE_LINE_SIZE] = self.config[LATENCY_TIMER] = self.config[INTERRUPT_LINE] = 0
        self._update_bars()
        for bar in self.bars.values():
            self._init_bar(bar)
        if self.msix is not None:
            self.config[self.msix.capability + 3] &= 0x3F
            self.msix.reset()

    def boot_path(self) -> str | None:
        """Node names are free (SeaBIOS matches ``*@slot,function``), so a plain one is used."""
        suffix = f",{self.function}" if self.function else ""
        return f"/pci@i0cf8/pci@{self.slot:x}{suffix}"

    # Configuration space.

    def set16(self, offset: int, value: int) -> None:
        """Write a word of configuration space, masks aside."""
        self.config[offset : offset + 2] = value.to_bytes(2, "little")

    def read_config(self, offset: int, size: int) -> int:
        """A configuration read of *size* bytes (1, 2, 4) at *offset*."""
        return int.from_bytes(self.config[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        """A configuration write; bits outside the masks keep their value."""
        config = self.config
        for i in range(offset, offset + size):
            byte = value & 0xFF
            value >>= 8
            mask = self.config_writable[i]
            config[i] = ((config[i] & ~mask) | (byte & mask)) & ~(byte & self.config_clearable[i])
        end = offset + size
        if offset < COMMAND + 2 and end > COMMAND:
            self._update_bars()
            self._update_wire()
        elif offset < BAR0 + 24 and end > BAR0:
            self._update_bars()
        elif self.msix is not None and offset <= self.msix.capability + 3 < end:
            self.msix.forget_routes()
            self.msix_changed(None)
            self.msix.unmasked()

    @property
    def command(self) -> int:
        """The command register."""
        return self.config[COMMAND] | self.config[COMMAND + 1] << 8

    def add_capability(self, cap_id: int, body: bytes | int, writable: bytes | None = None) -> int:
        """Append a capability: *body* is what follows its two header bytes, or how many zero bytes do.

        *writable* masks the bits of the body that the guest can write. Returns the capability's offset.
        """
        data = bytes(body) if isinstance(body, int) else body
        at = self._next_capability
        end = at + 2 + len(data)
        if end > 256:
            raise ValueError("no room left for capabilities")
        self.config[at] = cap_id
        self.config[at + 1] = 0
        self.config[at + 2 : end] = data
        if writable is not None:
            self.config_writable[at + 2 : at + 2 + len(writable)] = writable
        self.config[self._last_capability] = at
        self._last_capability = at + 1
        self._next_capability = (end + 3) & ~3
        self.config[STATUS] |= STATUS_CAPABILITIES
        return at

    # Windows.

    def add_bar(
        self,
        index: int,
        size: int,
        handler: MmioHandler,
        *,
        io: bool = False,
        prefetch: bool = False,
        bits64: bool = False,
    ) -> Bar:
        """Give the function a window of *size* bytes (a power of two) that follows base address register *index*."""
        bar = Bar(self, index, size, handler, io=io, prefetch=prefetch, bits64=bits64)
        taken = {i for b in self.bars.values() for i in range(b.index, b.index + 1 + b.bits64)}
        if taken & set(range(index, index + 1 + bits64)):
            raise ValueError(f"bar {index} is taken")
        self.bars[index] = bar
        mask = ~(size - 1) & (0xFFFFFFFFFFFFFFFF if bits64 else 0xFFFFFFFF)
        width = 8 if bits64 else 4
        self.config_writable[bar.offset : bar.offset + width] = mask.to_bytes(width, "little")
        self._init_bar(bar)
        return bar

    def _init_bar(self, bar: Bar) -> None:
        width = 8 if bar.bits64 else 4
        flags = 1 if bar.io else (4 if bar.bits64 else 0) | (8 if bar.prefetch else 0)
        self.config[bar.offset : bar.offset + width] = flags.to_bytes(width, "little")

    def _update_bars(self) -> None:
        for bar in self.bars.values():
            bar.update()

    def bar_moved(self, bar: Bar) -> None:
        """*bar* was mapped or unmapped (see :attr:`Bar.address`). For subclasses: eventfds follow their window."""

    # Interrupts.

    def set_irq(self, level: bool) -> None:
        """Drive the function's INTx line; the status bit follows, the wire only while INTx is not disabled."""
        if level != self._irq_level:
            self._irq_level = level
            if level:
                self.config[STATUS] |= STATUS_INTERRUPT
            else:
                self.config[STATUS] &= ~STATUS_INTERRUPT
            self._update_wire()

    def _update_wire(self) -> None:
        level = self._irq_level and not self.config[COMMAND + 1] & COMMAND_INTX_DISABLE >> 8
        if level != self._wire_level:
            self._wire_level = level
            if self.interrupt_pin:
                self.bus.set_pin(self.slot, self.interrupt_pin, level)

    def add_msix(self, vectors: int, bar: int, table_offset: int = 0, pba_offset: int = 0x800) -> MsixTable:
        """Give the function MSI-X with *vectors* (1–2048) entries.

        Table and pending bits lie in memory bar *bar*, on top of its own registers; the bar is made where it does not
        exist yet.
        """
        if not 1 <= vectors <= 2048 or table_offset % 8 or pba_offset % 8:
            raise ValueError("1 to 2048 vectors, at offsets that are multiples of 8")
        if table_offset < pba_offset < table_offset + 16 * vectors:
            raise ValueError("the pending bits lie in the table")
        body = (
            (vectors - 1).to_bytes(2, "little")
            + (table_offset | bar).to_bytes(4, "little")
            + (pba_offset | bar).to_bytes(4, "little")
        )
        # Message control: enable (bit 15) and function mask (bit 14) are the guest's.
        at = self.add_capability(CAP_MSIX, body, b"\x00\xc0")
        msix = self.msix = MsixTable(self, vectors, table_offset, pba_offset, at)
        found = self.bars.get(bar)
        if found is None:
            needed = max(table_offset + 16 * vectors, pba_offset + len(msix.pending), 4096)
            self.add_bar(bar, 1 << (needed - 1).bit_length(), msix)
        else:
            msix.under = found.handler
            found.handler = msix
        return msix

    @property
    def msix_enabled(self) -> bool:
        """The guest uses MSI-X instead of INTx."""
        return self.msix is not None and self.msix.enabled

    def msix_notify(self, vector: int) -> None:
        """Signal MSI-X *vector*; a masked one stays pending. Does nothing while MSI-X is off."""
        if self.msix is not None:
            self.msix.notify(vector)

    def msix_changed(self, vector: int | None) -> None:
        """The guest changed the entry of *vector*, or (None) the control word. For subclasses that use irqfds."""

    # Direct memory access.

    def dma_views(self, address: int, length: int) -> list[memoryview]:
        """Guest RAM as writable views. Raises DmaError where it is not RAM or bus mastering is off."""
        if not self.config[COMMAND] & COMMAND_MASTER:
            raise DmaError(f"{self.id} is not a bus master")
        return self.machine.memory.views(address, length)

    def dma_read(self, address: int, length: int) -> bytes:
        """Copy out of guest RAM."""
        views = self.dma_views(address, length)
        return bytes(views[0]) if len(views) == 1 else b"".join(views)

    def dma_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Copy into guest RAM: descriptors and status words. Data that may be code goes through the backend."""
        source = memoryview(data).cast("B")
        at = 0
        for view in self.dma_views(address, len(source)):
            view[:] = source[at : at + len(view)]
            at += len(view)


class PciBus(Bus):
    """A PCI bus: 32 slots of 8 functions.

    :attr:`route` is the board's: called with one of four interrupt lines (PIRQA–PIRQD) and the level of the wired-or of
    all pins that are connected to it.
    """

    def __init__(self, name: str = "pci.0", *, number: int = 0, first_free: int = 2) -> None:
        super().__init__("pci", name)
        self.number = number
        self.first_free = first_free
        #: Functions by ``slot << 3 | function``.
        self.functions: list[PciDevice | None] = [None] * 256
        self.route: Callable[[int, bool], None] = lambda line, level: None
        self._raised = [0, 0, 0, 0]

    def free_address(self, device: Device | None) -> str | None:
        """The first slot without any function."""
        for slot in range(self.first_free, 32):
            if not any(self.functions[slot << 3 : (slot << 3) + 8]):
                return f"{slot:02x}.0"
        return None

    def plug(self, device: PciDevice, address: str | None) -> None:
        """Give *device* the place *address*, or the first free slot."""
        if address is None:
            address = self.free_address(device)
            if address is None:
                raise UsageError(f"{device.driver}: all slots of {self.name} are taken")
        slot, function = parse_address(address)
        devfn = slot << 3 | function
        holder = self.functions[devfn]
        if holder is not None:
            raise UsageError(
                f"{device.driver}: {self.name} addr={address} is taken by {holder.id or holder.driver};"
                " leave addr= out for a free slot"
            )
        self.functions[devfn] = device
        device.slot = slot
        device.function = function
        self.devices[f"{slot:02x}.{function}"] = device
        self._mark_multifunction(slot)

    def unplug(self, device: PciDevice) -> None:
        """Free the place of *device*."""
        self.functions[device.slot << 3 | device.function] = None
        self.devices.pop(f"{device.slot:02x}.{device.function}", None)
        self._mark_multifunction(device.slot)

    def _mark_multifunction(self, slot: int) -> None:
        """Bit 7 of the header type tells a guest to look beyond function 0 (6.2.1)."""
        several = any(self.functions[(slot << 3) + 1 : (slot << 3) + 8])
        first = self.functions[slot << 3]
        if first is not None:
            first.config[HEADER_TYPE] = first.config[HEADER_TYPE] & 0x7F | (0x80 if several else 0)

    def set_pin(self, slot: int, pin: int, level: bool) -> None:
        """A function's INTx pin (1–4) changed: neighbouring slots are wired to different lines."""
        line = (slot - 1 + pin - 1) & 3
        before = self._raised[line]
        self._raised[line] = after = before + (1 if level else -1)
        if (before == 0) != (after == 0):
            self.route(line, after != 0)

    def read(self, devfn: int, offset: int, size: int) -> int:
        """A configuration read; nobody at home reads as ones."""
        device = self.functions[devfn]
        return (1 << 8 * size) - 1 if device is None else device.read_config(offset, size)

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        """A configuration write."""
        device = self.functions[devfn]
        if device is not None:
            device.write_config(offset, size, value)
