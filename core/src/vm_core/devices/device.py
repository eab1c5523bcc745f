"""The contract of a device frontend.

Theory of operation. The machine makes a device from its descriptor and its ``-device``/``-drive`` options, then calls
:meth:`Device.realize` with the bus it sits on; from there the device claims ports, memory, PCI slots and interrupt
lines through the machine. Register handlers are called with ``machine.lock`` held. A device never does host I/O in a
handler: it makes :class:`~vm_core.block.request.Request` objects and hands them in batches to its backend; their
``done`` runs on the machine's I/O thread *without* the lock, and takes it (``with machine.lock``) before it touches
registers, rings or interrupt lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..block.backend import BlockBackend
    from ..machine.machine import Machine
    from .bus import Bus


class Device(ABC):
    """One device of a machine.

    *options* are the strings the user gave, without ``driver``, ``id``, ``bus``, ``addr``, ``unit`` and ``drive``;
    the constructor pops what it understands and the machine refuses the rest by name.
    """

    #: Name of the driver, filled in by the machine from the descriptor.
    driver: str = ""

    def __init__(self, id: str, options: dict[str, Any], backend: BlockBackend | None = None) -> None:
        self.id = id
        self.backend = backend

    @abstractmethod
    def realize(self, machine: Machine, bus: Bus, address: str | None) -> None:
        """Plug into *bus* at *address* (its own grammar: ``slot.function`` on PCI, a unit number on IDE).

        Raises UsageError where the address is taken or does not exist, or a needed backend is missing.
        """

    def reset(self) -> None:
        """Return to the power-on state. Called with the lock held; requests in flight were drained."""

    def unrealize(self) -> None:
        """Unplug: release ports, memory and interrupts."""

    def boot_path(self) -> str | None:
        """Its OpenFirmware path for the ``bootorder`` file, as SeaBIOS matches it; None where it cannot be booted from.

        For example ``/pci@i0cf8/ide@1,1/drive@0/disk@0``. The device is realized.
        """
        return None

    def describe(self) -> str:
        """A few words for the boot status and ``info qtree``: ``IDE disk, 64 MiB, ide.0 unit 0``."""
        return self.driver

    def need_backend(self) -> BlockBackend:
        """The backend, or the error of a device that was given none."""
        if self.backend is None:
            raise UsageError(f"{self.driver}: the device needs a drive: add drive=ID")
        return self.backend
