"""A machine without a processor, for tests of devices.

:class:`FakeMachine` is a :class:`~vm_core.machine.machine.Machine` with RAM, ports, one PCI bus ``pci.0`` and nothing
else: its I/O thread runs when told (``machine.io.run_until_idle()``), its clock is moved by hand
(``machine.clock.advance(ns)``), and what devices do to interrupt lines is written down (``machine.irqs``)::

    machine = FakeMachine()
    device = Adder("adder", {})
    device.realize(machine, machine.pci, "4.0")
    machine.map_bars(device)                        # as firmware would
    machine.mmio_write(device.bars[0].address, 4, 1)
"""

from __future__ import annotations

from ..devices.bus import Bus
from ..devices.pci import COMMAND, PciBus, PciDevice
from ..machine.clock import ManualClock
from ..machine.iothread import InlineIo
from ..machine.machine import Machine
from ..machine.memory import GuestMemory, Region, RegionKind
from ..machine.runstate import RunState

__all__ = ["FakeMachine", "IrqRecorder"]


class IrqRecorder:
    """Interrupt inputs that remember: levels now, every change of a line, every message."""

    def __init__(self) -> None:
        self.level: dict[int, bool] = {}
        #: ``(irq, level)`` for each change of an ISA line or I/O APIC input.
        self.changes: list[tuple[int, bool]] = []
        #: ``(address, data)`` of each message.
        self.messages: list[tuple[int, int]] = []

    def set_irq(self, irq: int, level: bool) -> None:
        if self.level.get(irq, False) != level:
            self.level[irq] = level
            self.changes.append((irq, level))

    def send_msi(self, address: int, data: int) -> None:
        self.messages.append((address, data))

    def edges(self, irq: int) -> int:
        """How often *irq* went up."""
        return self.changes.count((irq, True))


class FakeMachine(Machine):
    """See the module's text. PCI lines PIRQA–PIRQD appear as interrupts 10, 10, 11, 11, as SeaBIOS routes them."""

    def __init__(self, ram: int = 16 << 20) -> None:
        self.io = InlineIo()
        clock = ManualClock()
        super().__init__(GuestMemory(ram), iothread=self.io, clock=clock)
        self.manual_clock = clock
        self.recorder = IrqRecorder()
        self.irqs = self.recorder
        self.memory.add(Region("ram", 0, ram, RegionKind.RAM))
        self.pci = PciBus("pci.0")
        self._lines = [False] * 4
        self.pci.route = self._route
        self.add_bus(self.pci)
        #: Resets and power-offs that devices asked for.
        self.reset_requests: list[str] = []
        #: What :meth:`must_return` answers: the machine is stopping or stopped.
        self.halted = False
        self._next_memory = 0xE0000000
        self._next_port = 0xC000

    def _route(self, line: int, level: bool) -> None:
        self._lines[line] = level
        pair = line & 2
        self.irqs.set_irq(10 + (pair >> 1), self._lines[pair] or self._lines[pair + 1])

    def must_return(self) -> bool:
        """Only while a test says that the machine is halted."""
        return self.halted

    def request_reset(self, reason: str) -> None:
        self.reset_requests.append(reason)

    def advance(self, nanoseconds: int) -> None:
        """Let time pass: timers that become due run with the lock held, then what they queued."""
        with self.lock:
            self.manual_clock.advance(nanoseconds)
        self.settle()

    def settle(self) -> None:
        """Wait for every request in flight and handle every completion, until nothing is left to do."""
        self._drain()
        self.io.run_until_idle()

    def isa_bus(self) -> Bus:
        """A bus of type ``isa``, made on first use."""
        return self.buses.get("isa.0") or self.add_bus(Bus("isa", "isa.0"))

    def plug(self, device: PciDevice, address: str | None = None) -> PciDevice:
        """Realize *device* on the PCI bus and do for it what firmware does."""
        device.realize(self, self.pci, address)
        self.devices[device.id] = device
        if device.backend is not None:
            self.attach_backend(device.backend)
        self.map_bars(device)
        return device

    def map_bars(self, device: PciDevice) -> None:
        """Give every bar of *device* an address, and turn decoding and bus mastering on."""
        for bar in device.bars.values():
            if bar.io:
                address = self._next_port = (self._next_port + bar.size - 1) & ~(bar.size - 1)
                self._next_port += bar.size
            else:
                address = self._next_memory = (self._next_memory + bar.size - 1) & ~(bar.size - 1)
                self._next_memory += bar.size
            device.write_config(bar.offset, 4, address)
        device.write_config(COMMAND, 2, 7)

    # The guest's accesses.

    def inb(self, port: int) -> int:
        with self.lock:
            return self.ports.read(port, 1)

    def inw(self, port: int) -> int:
        with self.lock:
            return self.ports.read(port, 2)

    def inl(self, port: int) -> int:
        with self.lock:
            return self.ports.read(port, 4)

    def outb(self, port: int, value: int) -> None:
        with self.lock:
            self.ports.write(port, 1, value)

    def outw(self, port: int, value: int) -> None:
        with self.lock:
            self.ports.write(port, 2, value)

    def outl(self, port: int, value: int) -> None:
        with self.lock:
            self.ports.write(port, 4, value)

    def insw(self, port: int, count: int) -> bytes:
        """REP INSW."""
        with self.lock:
            return self.ports.read_block(port, 2, count)

    def outsw(self, port: int, data: bytes) -> None:
        """REP OUTSW."""
        with self.lock:
            self.ports.write_block(port, 2, data)

    def mmio_read(self, address: int, size: int) -> int:
        """A load of *size* bytes from RAM or registers; ones from a hole."""
        found = self.memory.find(address)
        if found is None:
            return (1 << 8 * size) - 1
        with self.lock:
            if found.region.kind is RegionKind.MMIO:
                assert found.region.handler is not None
                return found.region.handler.read(found.offset + address - found.start, size)
            return int.from_bytes(self.memory.read(address, size), "little")

    def mmio_write(self, address: int, size: int, value: int) -> None:
        """A store of *size* bytes."""
        found = self.memory.find(address)
        if found is None:
            return
        with self.lock:
            if found.region.kind is RegionKind.MMIO:
                assert found.region.handler is not None
                found.region.handler.write(found.offset + address - found.start, size, value)
            else:
                self.memory.write(address, value.to_bytes(size, "little"))

    def resume(self) -> None:
        """Show the machine as running, for devices that ask."""
        self.status = RunState.RUNNING
