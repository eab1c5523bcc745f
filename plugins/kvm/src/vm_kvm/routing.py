"""Where the interrupts of a VM go: the GSI routing table (4.52).

GSIs 0–15 are the ISA lines: each reaches its input of the PICs, and the same input of the I/O APIC, but for the timer,
which a PC wires to input 2 of the I/O APIC (ACPI 6.5, 5.2.12.5 and MultiProcessor Specification 1.4, B.3 both tell
firmware of it as an override). 16–23 reach only the I/O APIC. From 24 on, GSIs are made for eventfds that stand for an
MSI.
"""

from __future__ import annotations

import ctypes
import errno

from vm_core.errors import VmError

from . import abi
from .syscall import ioctl

#: Inputs of the I/O APIC.
PINS = 24


def _line_entries() -> list[abi.IrqRoutingEntry]:
    entries = []
    for gsi in range(PINS):
        if gsi < 16 and gsi != 2:  # input 2 of the first PIC is the second one
            chip = abi.CHIP_PIC_MASTER if gsi < 8 else abi.CHIP_PIC_SLAVE
            entries.append(_entry(gsi, abi.ROUTING_IRQCHIP, chip, gsi % 8))
        if gsi != 2:
            entries.append(_entry(gsi, abi.ROUTING_IRQCHIP, abi.CHIP_IOAPIC, gsi or 2))
    return entries


def _entry(gsi: int, kind: int, *words: int) -> abi.IrqRoutingEntry:
    return abi.IrqRoutingEntry(gsi=gsi, type=kind, u=(ctypes.c_uint32 * 8)(*words))


class Routing:
    """The routing table of VM *vm*, with MSIs added and removed."""

    def __init__(self, vm: int) -> None:
        self._vm = vm
        self._lines = _line_entries()
        self._messages: dict[int, tuple[int, int]] = {}
        self._load()

    def add(self, address: int, data: int) -> int:
        """A new GSI that is the MSI of *data* written to *address*."""
        gsi = PINS
        while gsi in self._messages:
            gsi += 1
        self.change(gsi, address, data)
        return gsi

    def change(self, gsi: int, address: int, data: int) -> None:
        """Let *gsi* be another MSI."""
        before = self._messages.get(gsi)
        self._messages[gsi] = (address, data)
        try:
            self._load()
        except OSError as e:
            if before is None:
                del self._messages[gsi]
            else:
                self._messages[gsi] = before
            if e.errno == errno.EINVAL:
                raise VmError(f"KVM takes no more than {len(self._messages)} interrupt routes") from None
            raise

    def remove(self, gsi: int) -> None:
        """Forget *gsi*."""
        del self._messages[gsi]
        self._load()

    def _load(self) -> None:
        entries = self._lines + [
            _entry(gsi, abi.ROUTING_MSI, address & 0xFFFFFFFF, address >> 32, data)
            for gsi, (address, data) in self._messages.items()
        ]
        table = bytes(abi.IrqRoutingHeader(nr=len(entries))) + b"".join(map(bytes, entries))
        ioctl(self._vm, abi.SET_GSI_ROUTING, ctypes.create_string_buffer(table, len(table)))
