"""The interrupts of a PC with APICs: the 8259A pair, an I/O APIC and a local APIC, and how they are wired.

Every ISA line reaches the pair and the I/O APIC, which the guest enables as it likes; the guest masks one or the other.
The timer's line is input 2 of the I/O APIC, whose input 0 is free: firmware tells the guest so with the fw_cfg item
:data:`FW_CFG_IRQ0_OVERRIDE`. Messages of devices go to the local APIC.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..clock import Clock
from ..memory import GuestMemory, Region, RegionKind
from .apicbus import ApicBus
from .ioapic import INPUTS, IOAPIC_BASE, IOAPIC_SIZE, IoApic
from .lapic import LAPIC_BASE, LAPIC_SIZE, LocalApic
from .pic import PicPair

#: fw_cfg item (x86's own numbers start at 0x8000) with which SeaBIOS learns that IRQ 0 is input 2 of the I/O APIC.
FW_CFG_IRQ0_OVERRIDE: Final = 0x8002


class ApicInterrupts:
    """The interrupt controllers of a one-processor PC (an ``InterruptController``). Call with the device lock held.

    *pic* is taken over: its output goes to the local APIC, which calls *wake* when the processor should look.
    """

    def __init__(self, pic: PicPair, memory: GuestMemory, clock: Clock, wake: Callable[[], object]) -> None:
        self._pic = pic
        self._bus = ApicBus()
        #: What the vCPU asks (a ``CpuInterrupts``).
        self.lapic = LocalApic(0, self._bus, clock, wake, pic)
        self.ioapic = IoApic(self._bus)
        pic.notify = self.lapic.pic_changed
        memory.add(Region("local apic", LAPIC_BASE, LAPIC_SIZE, RegionKind.MMIO, handler=self.lapic, priority=1))
        memory.add(Region("i/o apic", IOAPIC_BASE, IOAPIC_SIZE, RegionKind.MMIO, handler=self.ioapic, priority=1))

    def reset(self) -> None:
        """Power-on, of the APICs; the pair is reset by whoever made it."""
        self.lapic.reset()
        self.ioapic.reset()

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive ISA line *irq* (0–15), or input 16–23 of the I/O APIC."""
        if irq < 16:
            self._pic.set_irq(irq, level)
        if irq != 2 and irq < INPUTS:
            self.ioapic.set_input(irq or 2, level)

    def send_msi(self, address: int, data: int) -> None:
        """Deliver the interrupt that a device's write of *data* to *address* means."""
        self._bus.deliver_msi(address, data)
