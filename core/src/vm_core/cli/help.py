"""``-OPTION help`` and ``-device NAME,help``, made from descriptors."""

from __future__ import annotations

from ..descriptors import Option
from ..options import describe
from ..plugins import registry
from . import listing

#: What every ``-device`` takes besides its driver's options.
DEVICE_OPTIONS: tuple[Option, ...] = (
    Option("id", "str", "name of the device"),
    Option("bus", "str", "bus it plugs into (default: the first of its type with room)"),
    Option("addr", "str", "address on a PCI bus: slot or slot.function, hexadecimal"),
    Option("drive", "str", "id of the -drive, or node name of the -blockdev, behind it"),
)


_BOOT = (
    "order=cdn          drives in order of preference: a, b floppy, c disk, d CD-ROM, n network",
    "once=d             the same, for the first boot only",
    "menu=on|off        let the firmware show its boot menu",
    "splash-time=MS     how long the menu waits",
    "reboot-timeout=MS  reboot after so long when nothing could be booted",
    "strict=on|off      boot from nothing that is not named",
)


def text(option: str, name: str) -> str | None:
    """The help of ``-option name,help`` (*name* is ``help`` for ``-option help``); None where there is none."""
    asked_all = name in ("help", "?")
    if option == "device":
        return listing.devices() if asked_all else listing.driver_options("device", name, DEVICE_OPTIONS)
    if option == "drive":
        return _drive()
    if option == "blockdev":
        return _block_drivers() if asked_all else _block_driver(name)
    if option == "accel":
        return _accelerators() if asked_all else listing.driver_options("accelerator", name)
    if option == "machine":
        return _boards()
    if option == "chardev":
        return _chardevs()
    if option == "boot":
        return "\n".join(_BOOT)
    return None


def _drive() -> str:
    from .drives import DRIVE_OPTIONS

    plugins = registry()
    interfaces = sorted({word for each in plugins.all("device") for word in getattr(each, "interfaces", ())})
    lines = ["-drive OPTION=VALUE[,…]", *describe(DRIVE_OPTIONS), ""]
    lines.append(f"if=      none, {', '.join(interfaces)}")
    for key, kind in (("format", "format"), ("aio", "engine")):
        found = [each.name for each in plugins.all(kind)]
        lines.append(f"{key + '=':<8} {', '.join(found) or 'none is installed'}")
    lines.append(f"{'file=':<8} protocols: {', '.join(each.name for each in plugins.all('protocol'))}")
    lines += ["", "Options of a format: -blockdev FORMAT,help; of what holds the image: file.OPTION=VALUE."]
    return "\n".join(lines)


def _block_drivers() -> str:
    hint = "-blockdev NAME,help lists the options of one."
    return "\n\n".join([listing.drivers("format", "Formats:"), listing.drivers("protocol", "Protocols:"), hint])


def _block_driver(name: str) -> str:
    from ..errors import PluginError

    try:
        return listing.driver_options("format", name)
    except PluginError as error:
        try:
            return listing.driver_options("protocol", name)
        except PluginError:
            raise error from None


def _accelerators() -> str:
    lines = ["Accelerators (the first that runs here is used; -accel may be repeated):"]
    for each in registry().all("accelerator"):
        try:
            availability = each.load().availability()
            state = "runs here" if availability.ok else "does not run here"
            state += f": {availability.reason}" if availability.reason else ""
        except Exception as error:  # the listing goes on
            state = f"broken: {error}"
        lines.append(f"  {each.name:<10} {each.summary} ({state})")
    return "\n".join(lines)


def _boards() -> str:
    return "Boards:\n  pc         i440FX and PIIX3 (default)"


def _chardevs() -> str:
    from ..chardev import CHARDEV_KINDS

    lines = ["-chardev KIND,id=ID[,OPTION=VALUE…]"]
    for kind, (summary, options) in CHARDEV_KINDS.items():
        lines += [f"{kind}: {summary}", *describe(options)]
    return "\n".join(lines)
