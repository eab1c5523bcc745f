"""The interrupt controllers and the PIT inside the kernel, as the board's devices use them."""

from __future__ import annotations

import ctypes

from . import abi
from .routing import Routing
from .syscall import ioctl


class KvmIrqchip:
    """PICs, I/O APIC, local APICs and PIT of VM *vm* (an ``InterruptController``).

    Ports 0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1, 0x40–0x43, 0x61 and the APICs' pages never reach the machine's handlers.
    """

    def __init__(self, vm: int) -> None:
        self._vm = vm
        ioctl(vm, abi.CREATE_IRQCHIP)
        ioctl(vm, abi.CREATE_PIT2, abi.PitConfig(flags=abi.PIT_SPEAKER_DUMMY))
        self._routing = Routing(vm)
        self._irqfds: dict[int, int] = {}
        #: The state after RESET is that of a new one.
        self._fresh = self._save()

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive line *irq* (0–23)."""
        ioctl(self._vm, abi.IRQ_LINE, abi.IrqLevel(irq, level))

    def send_msi(self, address: int, data: int) -> None:
        """Deliver the interrupt that a write of *data* to *address* means."""
        ioctl(self._vm, abi.SIGNAL_MSI, abi.Msi(address & 0xFFFFFFFF, address >> 32, data))

    # irqfd.

    def bind_msi(self, fd: int, address: int, data: int) -> None:
        """Make every signal of eventfd *fd* the MSI of *data* written to *address*; again: change it."""
        gsi = self._irqfds.get(fd)
        if gsi is not None:
            self._routing.change(gsi, address, data)
            return
        gsi = self._routing.add(address, data)
        try:
            ioctl(self._vm, abi.IRQFD, abi.Irqfd(fd=fd, gsi=gsi))
        except OSError:
            self._routing.remove(gsi)
            raise
        self._irqfds[fd] = gsi

    def unbind_msi(self, fd: int) -> None:
        """Undo :meth:`bind_msi`; signals stay in the eventfd from now on."""
        gsi = self._irqfds.pop(fd)
        ioctl(self._vm, abi.IRQFD, abi.Irqfd(fd=fd, gsi=gsi, flags=abi.IRQFD_DEASSIGN))
        self._routing.remove(gsi)

    # Reset.

    def _save(self) -> list[tuple[int, bytes]]:
        pit = ctypes.create_string_buffer(abi.PIT2_SIZE)
        ioctl(self._vm, abi.GET_PIT2, pit)
        state = [(abi.SET_PIT2, pit.raw)]  # first: loading its counters moves its line
        for chip in (abi.CHIP_PIC_MASTER, abi.CHIP_PIC_SLAVE, abi.CHIP_IOAPIC):
            buffer = ctypes.create_string_buffer(abi.IRQCHIP_SIZE)
            ctypes.c_uint32.from_buffer(buffer).value = chip
            ioctl(self._vm, abi.GET_IRQCHIP, buffer)
            state.append((abi.SET_IRQCHIP, buffer.raw))
        return state

    def reset(self) -> None:
        """Put the chips back to what they were after they were made, before devices reset and lower their lines.

        No vCPU is running.
        """
        for request, state in self._fresh:
            ioctl(self._vm, request, ctypes.create_string_buffer(state, len(state)))
