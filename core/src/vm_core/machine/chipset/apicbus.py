"""What carries interrupt messages from I/O APICs and devices to local APICs, and their ends back.

A message says who is meant (one APIC by its ID, or a set by the logical address each APIC was given) and what to do
(Intel SDM vol. 3, 11.6.1 and 11.6.2; for messages written by devices, 11.11).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from .lapic import LocalApic

#: The destination, physical or logical, that means every local APIC.
BROADCAST = 0xFF

#: Memory writes of devices that are interrupts: 0xFEE00000 and the MiB behind it.
MSI_WINDOW = 0xFEE00000


class DeliveryMode(IntEnum):
    """Bits 8–10 of a message, of a redirection entry and of a local vector."""

    FIXED = 0
    LOWEST_PRIORITY = 1
    SMI = 2
    NMI = 4
    INIT = 5
    STARTUP = 6
    EXTINT = 7


@attrs.frozen
class ApicMessage:
    """One interrupt on its way. *level*: triggered by level, so that its end is told to the I/O APICs."""

    vector: int
    destination: int
    mode: int = DeliveryMode.FIXED
    logical: bool = False
    level: bool = False


class ApicBus:
    """The local APICs of a machine, and those who want to hear of the ends of level-triggered interrupts."""

    def __init__(self) -> None:
        self.apics: list[LocalApic] = []
        #: Called with a vector when a local APIC has ended it (EOI).
        self.on_end: list[Callable[[int], object]] = []

    def targets(self, destination: int, logical: bool) -> list[LocalApic]:
        """The APICs that *destination* means."""
        if destination == BROADCAST:
            return list(self.apics)
        if logical:
            return [apic for apic in self.apics if apic.answers_to(destination)]
        return [apic for apic in self.apics if apic.id == destination]

    def deliver(self, message: ApicMessage) -> bool:
        """Hand *message* to those it is for. False: nobody is there, or takes it."""
        return self.deliver_to(self.targets(message.destination, message.logical), message)

    def deliver_to(self, apics: list[LocalApic], message: ApicMessage) -> bool:
        """Hand *message* to *apics*; at lowest priority, to the one of them that does the least important work."""
        if message.mode == DeliveryMode.LOWEST_PRIORITY:
            able = [apic for apic in apics if apic.software_enabled]
            apics = [min(able, key=lambda apic: (apic.processor_priority, apic.id))] if able else []
        taken = [apic.accept(message) for apic in apics]
        return any(taken)

    def deliver_msi(self, address: int, data: int) -> bool:
        """The interrupt that a device's write of *data* to *address* means (11.11.1 and 11.11.2)."""
        if address >> 20 != MSI_WINDOW >> 20:
            return False
        return self.deliver(
            ApicMessage(
                vector=data & 0xFF,
                destination=address >> 12 & 0xFF,
                mode=data >> 8 & 7,
                # Destination mode (bit 2) counts by itself. The manual ties it to the redirection hint (bit 3), but
                # chipsets do not, and Linux sends to logical destinations without the hint.
                logical=bool(address & 4),
                level=bool(data & 0x8000),
            )
        )

    def end(self, vector: int) -> None:
        """A local APIC has ended the level-triggered interrupt *vector*."""
        for listener in self.on_end:
            listener(vector)
