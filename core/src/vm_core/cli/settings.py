"""The options that describe the machine itself, as values: ``-m``, ``-smp``, ``-machine``, ``-accel``, ``-boot``, …"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..descriptors import Option
from ..errors import UsageError
from ..options import parse_int, parse_size, split, suggest, typed

if TYPE_CHECKING:
    from ..machine.config import AccelConfig, BootConfig
    from .arguments import CommandLine

BOARDS = {"pc": "i440FX and PIIX3"}

_BOOT_OPTIONS = (
    Option("order", "str", "drives in order of preference"),
    Option("once", "str", "the same, for the first boot only"),
    Option("menu", "bool", "show the boot menu"),
    Option("splash-time", "int", "milliseconds that the menu waits"),
    Option("reboot-timeout", "int", "milliseconds until a reboot when nothing could be booted"),
    Option("strict", "bool", "boot from nothing that is not named"),
)

#: Boot letters there can be devices for.
_BOOT_LETTERS = "abcdn"


def memory(line: CommandLine) -> int:
    """Bytes of RAM."""
    text = line.value("m")
    if text is None:
        return 128 << 20
    values = split(text, "size")
    for name in values:
        if name != "size":
            raise UsageError(f"-m {name}=… is not supported: RAM cannot be plugged in; there is: size")
    ram = parse_size(values.get("size", ""), "-m size", "m")
    if ram < 1 << 20:
        raise UsageError(f"-m {text}: at least 1M is needed")
    return ram


def cpus(line: CommandLine) -> int:
    """Number of processors."""
    text = line.value("smp")
    if text is None:
        return 1
    values = split(text, "cpus")
    for name in values:
        if name != "cpus":
            raise UsageError(f"-smp {name}=… is not supported: there is: cpus")
    count = parse_int(values.get("cpus", ""), "-smp cpus")
    if not 1 <= count <= 255:
        raise UsageError(f"-smp {text}: a number from 1 to 255 is needed")
    return count


def machine(line: CommandLine) -> tuple[str, list[AccelConfig]]:
    """The board, and the accelerators in order of preference (empty: the best there is)."""
    from ..machine.config import AccelConfig

    board = "pc"
    accelerators: list[AccelConfig] = []
    for given in line.all("machine", "accel", "enable-kvm"):
        if given.name == "enable-kvm":
            accelerators.append(AccelConfig("kvm"))
        elif given.name == "accel":
            values = split(given.value, "accel")
            names = values.pop("accel", "").split(":")
            if not all(names):
                raise UsageError(f"{given.spelled} {given.value}: the name of an accelerator is needed")
            accelerators += [AccelConfig(name, dict(values)) for name in names]
        else:
            values = split(given.value, "type")
            board = values.pop("type", board)
            if board not in BOARDS:
                raise UsageError(f"{given.spelled} {board}: no such board; there is: {', '.join(BOARDS)}")
            for name in values.pop("accel", "").split(":"):
                if name:
                    accelerators.append(AccelConfig(name))
            if values:
                name = next(iter(values))
                raise UsageError(f"{given.spelled} {name}=… is not supported{suggest(name, ['type', 'accel'])}")
    return board, accelerators


def boot(line: CommandLine) -> BootConfig:
    """``-boot``, several of them put together."""
    from ..machine.config import BootConfig

    config = BootConfig()
    for given in line.all("boot"):
        values = typed(split(given.value, "order"), _BOOT_OPTIONS, "-boot")
        for name in ("order", "once"):
            for letter in values.get(name, ""):
                if letter not in _BOOT_LETTERS:
                    raise UsageError(f"-boot {name}={values[name]}: {letter!r} is none of a, b, c, d, n")
        for name, value in values.items():
            setattr(config, name.replace("-", "_"), value)
    return config


def rtc_base(line: CommandLine) -> str:
    """What the clock shows at the start: utc, localtime or a date."""
    text = line.value("rtc")
    if text is None:
        return "utc"
    values = split(text)
    base = values.pop("base", "utc")
    if values:
        raise UsageError(f"-rtc {next(iter(values))}=… is not supported; there is: base")
    if base not in ("utc", "localtime"):
        from datetime import datetime

        try:
            datetime.fromisoformat(base)
        except ValueError:
            raise UsageError(f"-rtc base={base}: utc, localtime or a date like 2026-11-21T16:01:21 is needed") from None
    return base


def name(line: CommandLine) -> str | None:
    """The machine's name."""
    text = line.value("name")
    if text is None:
        return None
    values = split(text, "guest")
    others = set(values) - {"guest"}
    if others:
        raise UsageError(f"-name {min(others)}=… is not supported; there is: guest")
    return values.get("guest")


def only_none(line: CommandLine) -> None:
    """Refuse displays, cards and networks: there are none, and ``none`` is what can be asked for."""
    for given in line.all("display", "vga", "parallel", "nic"):
        if given.value != "none":
            what = {
                "display": "there is no display: the guest's console is its serial port",
                "vga": "there is no graphics card: the guest's console is its serial port",
                "parallel": "there is no parallel port",
                "nic": "there is no network",
            }[given.name]
            raise UsageError(f"{given.spelled} {given.value} is not supported: {what}; there is: none")
