"""Serial ports, monitors and QMP servers: which character devices there are, and what is connected to them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import attrs

from ..chardev import Chardev, make, parse_legacy, parse_options
from ..chardev.mux import Channel, Mux
from ..errors import UsageError
from ..options import split, suggest

if TYPE_CHECKING:
    from ..machine.machine import Machine
    from ..qmp.monitor import CommandThread, Monitor
    from .arguments import CommandLine

#: Serial ports of a PC.
_PORTS = 4


@attrs.define
class MonitorPlace:
    """A monitor that was asked for: its character device, and whether it is for programs (QMP)."""

    chardev: Chardev
    control: bool


class Consoles:
    """The character devices of one command line. *on_quit* is called for Ctrl-a x."""

    def __init__(self, line: CommandLine, on_quit: Callable[[], object]) -> None:
        self._on_quit = on_quit
        self._options: dict[str, dict[str, Any]] = {}
        self._devices: dict[str, Chardev] = {}
        self._muxes: dict[str, Mux] = {}
        self._used: dict[str, str] = {}
        self.monitors: list[MonitorPlace] = []
        self.serials: list[Chardev | None] = []
        #: The character device on this terminal and what the guest's console is called.
        self.stdio: Any = None
        self.console = ""
        for given in line.all("chardev"):
            self._define(parse_options(given.value), f"-chardev {given.value}")
        try:
            self._connect(line)
        except BaseException:
            self.close()
            raise

    def _connect(self, line: CommandLine) -> None:
        serials = [given.value for given in line.all("serial")]
        monitors = [given.value for given in line.all("monitor")]
        if len(serials) > _PORTS:
            raise UsageError(f"-serial: a PC has {_PORTS} serial ports")
        # The default console has the monitor behind it unless that was put elsewhere; "mon:" always has.
        shared = bool(serials) or not monitors
        if not serials and "nodefaults" not in line:
            serials = ["null" if self._stdio_wanted(line) else "mon:stdio"]
        for number, text in enumerate(serials):
            if text == "none":
                self.serials.append(None)
                continue
            chardev = self._place(text, f"serial{number}", "-serial")
            self.serials.append(chardev)
            if text.startswith("mon:") and shared and isinstance(chardev, Channel):
                self.monitors.append(MonitorPlace(chardev.mux.channel(), False))
        if serials:
            self.console = serials[0].removeprefix("mon:")
        for number, text in enumerate(text for text in monitors if text != "none"):
            self.monitors.append(MonitorPlace(self._place(text, f"monitor{number}", "-monitor"), False))
        for number, given in enumerate(line.all("qmp")):
            if given.value != "none":
                self.monitors.append(MonitorPlace(self._place(given.value, f"qmp{number}", "-qmp"), True))
        for given in line.all("mon"):
            self._mon(given.value)

    @staticmethod
    def _stdio_wanted(line: CommandLine) -> bool:
        """Something else than the default console is put on this terminal."""
        if any(given.value.split(",")[0] in ("stdio", "mon:stdio") for given in line.all("monitor", "qmp")):
            return True
        return any(given.value.split(",")[0] in ("stdio", "backend=stdio") for given in line.all("chardev"))

    def _mon(self, text: str) -> None:
        values = split(text, "chardev")
        mode = values.pop("mode", "readline")
        name = values.pop("chardev", "")
        pretty = values.pop("pretty", "off")
        if values or pretty != "off":
            raise UsageError(f"-mon {text}: {next(iter(values), 'pretty')}=… is not supported; there is: chardev, mode")
        if mode not in ("readline", "control"):
            raise UsageError(f"-mon {text}: mode=readline or mode=control is needed")
        self.monitors.append(MonitorPlace(self._frontend(name, f"-mon {text}"), mode == "control"))

    def _place(self, text: str, id: str, where: str) -> Chardev:
        """The frontend's end of what *text* (a short form, or ``chardev:ID``) names."""
        if text.startswith("chardev:"):
            return self._frontend(text.partition(":")[2], f"{where} {text}")
        self._define(parse_legacy(text, id, where), f"{where} {text}")
        return self._frontend(id, f"{where} {text}")

    def _define(self, options: dict[str, Any], where: str) -> None:
        id = options["id"]
        if id in self._options:
            raise UsageError(f"{where}: there is a character device with id={id} already")
        self._options[id] = options
        self._devices[id] = device = make(options)
        if device.kind == "stdio":
            self.stdio = device

    def _frontend(self, id: str, where: str) -> Chardev:
        if id not in self._options:
            raise UsageError(f"{where}: no character device {id!r}{suggest(id, self._options)}")
        if self._options[id].get("mux"):
            mux = self._muxes.get(id)
            if mux is None:
                mux = self._muxes[id] = Mux(self._devices[id], self._on_quit)
            return mux.channel()
        if id in self._used:
            raise UsageError(f"{where}: character device {id!r} is in use by {self._used[id]}: define it with mux=on")
        self._used[id] = where
        return self._devices[id]

    @property
    def devices(self) -> list[Chardev]:
        """All character devices, for ``query-chardev``."""
        for id, mux in self._muxes.items():
            self._devices[id].frontend_open = any(channel.frontend_open for channel in mux.channels)
        return list(self._devices.values())

    @property
    def console_here(self) -> bool:
        """The guest's first serial port is on this terminal."""
        first = self.serials[0] if self.serials else None
        below = first.mux.below if isinstance(first, Channel) else first
        return below is not None and below is self.stdio

    def start_monitors(self, monitor: Monitor, thread: CommandThread) -> None:
        """Put the monitors on their character devices."""
        from ..qmp.human import HumanMonitor
        from ..qmp.server import QmpServer

        for place in self.monitors:
            if place.control:
                QmpServer(place.chardev, monitor, thread)
            else:
                shared = isinstance(place.chardev, Channel) and not place.chardev.focused
                human = HumanMonitor(place.chardev, monitor, thread, announce=not shared)
                if isinstance(place.chardev, Channel):
                    place.chardev.on_focus = human.prompt

    def open(self, machine: Machine) -> None:
        """Open all character devices. With ``wait=on`` this returns when the client is there."""
        # The terminal last: while we wait for a client, Ctrl-C still means us.
        for id, device in sorted(self._devices.items(), key=lambda item: item[1] is self.stdio):
            mux = self._muxes.get(id)
            if mux is not None:
                mux.open(machine.iothread)
            else:
                device.open(machine.iothread)

    def close(self) -> None:
        """Let what was written leave, and close everything; the terminal is as it was."""
        for device in self._devices.values():
            with contextlib.suppress(OSError):
                device.drain()
            device.close()
