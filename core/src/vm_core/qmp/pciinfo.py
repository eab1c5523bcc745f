"""PCI buses in QAPI's shapes: PciInfo and PciDeviceInfo (``qapi/pci.json``), and as ``info pci`` shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..devices.bus import Bus
    from ..devices.pci import PciDevice

#: Base class and subclass → what it is, in QEMU's words (the PCI Code and ID Assignment Specification's classes).
_CLASSES = {
    0x0100: "SCSI controller",
    0x0101: "IDE controller",
    0x0106: "SATA controller",
    0x0200: "Ethernet controller",
    0x0300: "VGA controller",
    0x0600: "Host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0680: "Bridge",
}


def pci_info(buses: Mapping[str, Bus]) -> list[dict[str, Any]]:
    """``PciInfo`` of every PCI bus."""
    from ..devices.pci import PciBus

    found = [bus for bus in buses.values() if isinstance(bus, PciBus)]
    return [
        {"bus": bus.number, "devices": [_device(each, bus.number) for each in bus.functions if each is not None]}
        for bus in found
    ]


def _device(device: PciDevice, bus: int) -> dict[str, Any]:
    def word(offset: int, size: int = 2) -> int:
        return int.from_bytes(device.config[offset : offset + size], "little")

    kind = word(0x0A)
    pin = device.config[0x3D]
    info: dict[str, Any] = {
        "bus": bus,
        "slot": device.slot,
        "function": device.function,
        "class_info": {"class": kind, "desc": _CLASSES.get(kind, f"Class {kind:04x}")},
        "id": {"vendor": word(0), "device": word(2), "subsystem-vendor": word(0x2C), "subsystem": word(0x2E)},
        "irq_pin": pin,
        "qdev_id": device.id,
        "regions": [],
    }
    if pin:
        info["irq"] = device.config[0x3C]
    for index, bar in sorted(device.bars.items()):
        region: dict[str, Any] = {
            "bar": index,
            "type": "io" if bar.io else "memory",
            "size": bar.size,
            "address": -1 if bar.address is None else bar.address,
        }
        if not bar.io:
            region |= {"prefetch": bar.prefetch, "mem_type_64": bar.bits64}
        info["regions"].append(region)
    return info


def lines(buses: Mapping[str, Bus]) -> list[str]:
    """The lines of ``info pci``."""
    found = []
    for info in pci_info(buses):
        for each in info["devices"]:
            found.append(f"  Bus {each['bus']:2d}, device {each['slot']:3d}, function {each['function']}:")
            ids = each["id"]
            found.append(f"    {each['class_info']['desc']}: PCI device {ids['vendor']:04x}:{ids['device']:04x}")
            found.append(f"      PCI subsystem {ids['subsystem-vendor']:04x}:{ids['subsystem']:04x}")
            if each["irq_pin"]:
                found.append(f"      IRQ {each['irq']}, pin {chr(64 + each['irq_pin'])}")
            found += [f"      {_region(region)}" for region in each["regions"]]
            found.append(f'      id "{each["qdev_id"]}"')
    return found


def _region(region: dict[str, Any]) -> str:
    address = region["address"]
    where = "not mapped" if address < 0 else f"{address:#x}–{address + region['size'] - 1:#x}"
    if region["type"] == "io":
        return f"BAR{region['bar']}: I/O at {where}"
    prefetch = " prefetchable" if region["prefetch"] else ""
    return f"BAR{region['bar']}: {64 if region['mem_type_64'] else 32} bit{prefetch} memory at {where}"
