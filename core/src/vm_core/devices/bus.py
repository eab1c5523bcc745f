"""Buses: where devices plug in. A bus has a type (``pci``, ``ide``, ``scsi``) and a name (``pci.0``, ``ide.1``)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .device import Device


class Bus:
    """A bus of *type* with places for devices.

    Controllers subclass it, or make plain ones, and give them to ``machine.add_bus``. :meth:`free_address` chooses a
    place for a device that names none; None means that the bus is full.
    """

    def __init__(self, type: str, name: str, parent: Device | None = None) -> None:
        self.type = type
        self.name = name
        self.parent = parent
        self.devices: dict[str, Device] = {}

    def free_address(self, device: Device | None) -> str | None:
        """The first free place for *device* (None: for any)."""
        n = 0
        while str(n) in self.devices:
            n += 1
        return str(n)

    def has_room(self) -> bool:
        """One more device fits without naming an address."""
        return self.free_address(None) is not None
