"""Making devices from descriptors: bus, id, options, boot index."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from ..descriptors import DeviceFrontend
from ..errors import UsageError
from ..options import parse_int, suggest, typed

if TYPE_CHECKING:
    from ..block.backend import BlockBackend
    from ..devices.device import Device
    from .machine import Machine

#: Options that belong to the machine, not to a driver.
_PLACE = ("addr", "unit")
#: Kinds of media that a drive may be without.
_REMOVABLE = frozenset({"cdrom", "floppy"})


def add_device(machine: Machine, driver: str, options: dict[str, Any], backend: BlockBackend | None) -> Device:
    """See :meth:`vm_core.machine.machine.Machine.add_device`."""
    from ..plugins import registry

    descriptor = cast(DeviceFrontend, registry().find("device", driver))
    where = f"-device {descriptor.name}"
    if backend is not None and backend.node is None and not _REMOVABLE.intersection(descriptor.media):
        raise UsageError(f"{where}: Device needs media, but drive is empty: drive={backend.name} has no file=")
    values = dict(options)
    id = str(values.pop("id", "") or _free_id(machine, descriptor.name))
    if id in machine.devices:
        raise UsageError(f"{where}: there is a device with id={id} already")
    bus_name = values.pop("bus", None)
    places = [values.pop(name) for name in _PLACE if name in values]
    if len(places) > 1:
        raise UsageError(f"{where}: give addr= or unit=, not both")
    address = str(places[0]) if places else None
    own_bootindex = any(option.name == "bootindex" for option in descriptor.options)
    bootindex = None if own_bootindex else values.pop("bootindex", None)
    values = typed(values, descriptor.options, where)
    if own_bootindex:
        bootindex = values.get("bootindex")
    bus = machine.find_bus(descriptor.bus, bus_name)
    device: Device = descriptor.load()(id, values, backend)
    device.driver = descriptor.name
    left = set(values) - {"bootindex"}
    if left:
        known = [option.name for option in descriptor.options if option.name not in left]
        raise UsageError(f"{where}: no option {min(left)!r}{suggest(min(left), known)}")
    if backend is not None:
        machine.attach_backend(backend)
    with machine.lock:
        device.realize(machine, bus, address)
    machine.devices[id] = device
    if bootindex is not None:
        machine.boot_order.add(device, parse_int(bootindex, f"{where}: bootindex"))
    machine.events.emit("DEVICE_REALIZED", device=id, driver=descriptor.name, text=device.describe())
    return device


def _free_id(machine: Machine, driver: str) -> str:
    """A name for a device that was given none."""
    n = 0
    while f"{driver}.{n}" in machine.devices:
        n += 1
    return f"{driver}.{n}"
