"""The monitor for people (HMP): commands as a table, and a prompt with a small line editor.

Output lines end in CR LF, as a terminal in raw mode wants it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

import attrs

from ..chardev import Chardev
from ..errors import VmError
from ..options import suggest
from . import blockinfo
from .commands import execute
from .monitor import CommandThread, Monitor
from .protocol import QmpError

PROMPT = b"(vm) "


@attrs.frozen
class HumanCommand:
    """One command: its names, what follows it, one line of help, and the function (monitor, words) → text."""

    names: tuple[str, ...]
    parameters: str
    help: str
    run: Callable[[Monitor, list[str]], str]
    least: int = 0
    most: int = 0


def run(monitor: Monitor, line: str) -> str:
    """Execute *line* and return what it prints; errors are text too."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        return f"{error}\r\n"
    if not words:
        return ""
    table, given = COMMANDS, "command"
    name = words.pop(0)
    if name == "info" and words:
        table, given, name = INFO, "info", words.pop(0)
    found = next((each for each in table if name in each.names), None)
    try:
        if found is None:
            known = [each.names[0] for each in table]
            text = f"unknown {given}: '{name}'{suggest(name, known) if given == 'info' else ''}"
        elif not found.least <= len(words) <= found.most:
            text = f"usage: {'info ' if given == 'info' else ''}{found.names[0]} {found.parameters}".rstrip()
        else:
            text = found.run(monitor, words)
    except QmpError as error:
        text = f"Error: {error.description}"
    except (VmError, OSError) as error:
        text = f"Error: {error}"
    return "".join(f"{each}\r\n" for each in text.splitlines())


def _help(monitor: Monitor, words: list[str]) -> str:
    rows = [(" ".join(filter(None, ["|".join(each.names), each.parameters])), each.help) for each in COMMANDS]
    if words:
        rows = [row for row in rows if words[0] in row[0].split()[0].split("|")]
    return "\n".join(f"{left} -- {text}" for left, text in rows) or f"no command '{words[0]}'"


def _info_help(monitor: Monitor, words: list[str]) -> str:
    return "\n".join(f"info {each.names[0]} -- {each.help}" for each in INFO)


def _qmp(name: str, *keys: str) -> Callable[[Monitor, list[str]], str]:
    """The QMP command *name* with the words as its arguments *keys*; prints nothing."""

    def call(monitor: Monitor, words: list[str]) -> str:
        execute(monitor, name, dict(zip(keys, words, strict=False)))
        return ""

    return call


def _eject(monitor: Monitor, words: list[str]) -> str:
    force = words[0] == "-f"
    if force and len(words) == 1:
        return "usage: eject [-f] device"
    execute(monitor, "eject", {"device": words[-1], "force": force})
    return ""


def _change(monitor: Monitor, words: list[str]) -> str:
    execute(monitor, "blockdev-change-medium", dict(zip(("device", "filename", "format"), words, strict=False)))
    return ""


def _info_status(monitor: Monitor, words: list[str]) -> str:
    status = execute(monitor, "query-status", {})
    if status["running"]:
        return "VM status: running"
    detail = "" if status["status"] == "paused" else f" ({status['status']})"
    return f"VM status: paused{detail}"


def _info_version(monitor: Monitor, words: list[str]) -> str:
    return str(monitor.version.get("package", ""))


def _info_name(monitor: Monitor, words: list[str]) -> str:
    return monitor.name or ""


def _info_block(monitor: Monitor, words: list[str]) -> str:
    return "\n\n".join("\n".join(_block_lines(info)) for info in execute(monitor, "query-block", {}))


def _block_lines(info: dict[str, Any]) -> list[str]:
    name = info["device"] or info.get("qdev", "")
    inserted = info.get("inserted")
    if inserted is None:
        lines = [f"{name}: [not inserted]"]
    else:
        node = f" ({inserted['node-name']})" if inserted["node-name"] else ""
        readonly = ", read-only" if inserted["ro"] else ""
        lines = [f"{name}{node}: {inserted['file']} ({inserted['drv']}{readonly})"]
    if "qdev" in info:
        lines.append(f"    Attached to:      {info['qdev']}")
    if info["removable"]:
        locked, tray = "" if info["locked"] else "not ", "open" if info.get("tray_open") else "closed"
        lines.append(f"    Removable device: {locked}locked, tray {tray}")
    if inserted is not None:
        cache = inserted["cache"]
        words = ["writeback" if cache["writeback"] else "writethrough"]
        words += [word for word, key in (("direct", "direct"), ("ignore flushes", "no-flush")) if cache[key]]
        lines.append(f"    Cache mode:       {', '.join(words)}")
        if inserted["backing_file_depth"]:
            depth = inserted["backing_file_depth"]
            lines.append(f"    Backing file:     {inserted['backing_file']} (chain depth: {depth})")
    return lines


def _info_blockstats(monitor: Monitor, words: list[str]) -> str:
    lines = []
    for drive in monitor.drives:
        stats = blockinfo.block_stats(drive)["stats"]
        names = ("rd_bytes", "wr_bytes", "rd_operations", "wr_operations", "flush_operations", "unmap_operations")
        lines.append(f"{drive.id}: " + " ".join(f"{name}={stats[name]}" for name in names))
    return "\n".join(lines)


def _info_chardev(monitor: Monitor, words: list[str]) -> str:
    return "\n".join(f"{each.id}: filename={each.filename}" for each in monitor.chardevs)


def _info_pci(monitor: Monitor, words: list[str]) -> str:
    from .pciinfo import lines

    return "\n".join(lines(monitor.machine.buses))


def _info_qtree(monitor: Monitor, words: list[str]) -> str:
    lines: list[str] = []
    for bus in monitor.machine.buses.values():
        lines.append(f"bus: {bus.name} (type {bus.type})")
        for address, device in bus.devices.items():
            lines.append(f'  {address}: {device.driver}, id "{device.id}" – {device.describe()}')
    return "\n".join(lines)


def _info_registers(monitor: Monitor, words: list[str]) -> str:
    machine = monitor.machine
    running = str(machine.status) == "running"
    if running:  # registers can be read of a processor that stands still
        machine.stop()
    try:
        lines = []
        for index, vcpu in enumerate(machine.vcpus):
            cells = [f"{name.upper()}={value:08x}" for name, value in vcpu.registers().items()]
            lines += [f"CPU#{index}", *(" ".join(cells[at : at + 4]) for at in range(0, len(cells), 4))]
    finally:
        if running:
            machine.cont()
    return "\n".join(lines)


def _info_plugins(monitor: Monitor, words: list[str]) -> str:
    from ..cli.listing import plugins
    from ..plugins import registry

    return plugins("", as_json=False, terminal=False, plugin_registry=registry())


COMMANDS: tuple[HumanCommand, ...] = (
    HumanCommand(("help", "?"), "[command]", "show what commands there are", _help, 0, 1),
    HumanCommand(("info",), "[subject]", "show something; 'info' alone lists the subjects", _info_help),
    HumanCommand(("stop", "s"), "", "pause the machine", _qmp("stop")),
    HumanCommand(("cont", "c"), "", "let the machine run (again)", _qmp("cont")),
    HumanCommand(("system_reset",), "", "press the reset button", _qmp("system_reset")),
    HumanCommand(("system_powerdown",), "", "press the power button", _qmp("system_powerdown")),
    HumanCommand(("quit", "q"), "", "end the machine", _qmp("quit")),
    HumanCommand(("eject",), "[-f] device", "take the medium out of a CD-ROM drive", _eject, 1, 2),
    HumanCommand(("change",), "device filename [format]", "put another medium into a CD-ROM drive", _change, 2, 3),
)

INFO: tuple[HumanCommand, ...] = (
    HumanCommand(("block",), "", "the drives and what is in them", _info_block),
    HumanCommand(("blockstats",), "", "the drives' counters", _info_blockstats),
    HumanCommand(("chardev",), "", "the character devices", _info_chardev),
    HumanCommand(("name",), "", "the machine's name", _info_name),
    HumanCommand(("pci",), "", "the PCI buses and their functions", _info_pci),
    HumanCommand(("plugins",), "", "what is installed, with its health", _info_plugins),
    HumanCommand(("qtree",), "", "the buses and their devices", _info_qtree),
    HumanCommand(("registers",), "", "the processors' registers (pauses the machine for a moment)", _info_registers),
    HumanCommand(("status",), "", "whether the machine runs", _info_status),
    HumanCommand(("version",), "", "the version of this program", _info_version),
)


class LineEditor:
    """A line being typed: echo, backspace, Ctrl-U, Ctrl-C, and the arrow keys for history. Bytes in, bytes out.

    *run* is called with each finished line and returns the text to print.
    """

    def __init__(self) -> None:
        self.line = ""
        self._history: list[str] = []
        self._position = 0
        self._escape = b""
        self._after_cr = False

    def feed(self, data: bytes) -> tuple[bytes, list[str]]:
        """What to echo, and the lines that *data* finished. The echo of a finished line ends in CR LF."""
        echo = bytearray()
        lines: list[str] = []
        for byte in data:
            after_cr, self._after_cr = self._after_cr, byte == 0x0D
            if self._escape or byte == 0x1B:
                echo += self._escaped(byte)
            elif byte == 0x0A and after_cr:
                continue
            elif byte in (0x0A, 0x0D):
                echo += b"\r\n"
                lines.append(self.line)
                if self.line.strip() and self._history[-1:] != [self.line]:
                    self._history.append(self.line)
                self.line, self._position = "", len(self._history)
            elif byte in (0x08, 0x7F):
                if self.line:
                    self.line = self.line[:-1]
                    echo += b"\b \b"
            elif byte in (0x03, 0x15):
                echo += self._replace("")
            elif byte == 0x09:
                echo += self._complete()
            elif 0x20 <= byte < 0x7F:
                self.line += chr(byte)
                echo.append(byte)
        return bytes(echo), lines

    def _escaped(self, byte: int) -> bytes:
        """A byte of an escape sequence: ESC [ A and B walk through the history, all others do nothing."""
        self._escape += bytes([byte])
        if len(self._escape) == 1 or (len(self._escape) == 2 and byte in b"[O"):
            return b""
        if len(self._escape) > 2 and not 0x40 <= byte < 0x7F and len(self._escape) < 16:
            return b""
        sequence, self._escape = self._escape, b""
        step = {b"A": -1, b"B": 1}.get(sequence[2:], 0)
        if not step:
            return b""
        self._position = min(max(self._position + step, 0), len(self._history))
        past = self._position == len(self._history)
        return self._replace("" if past else self._history[self._position])

    def _replace(self, text: str) -> bytes:
        erase = b"\b \b" * len(self.line)
        self.line = text
        return erase + text.encode()

    def _complete(self) -> bytes:
        """The rest of the only command that begins with the line."""
        table, start = (INFO, 5) if self.line.startswith("info ") else (COMMANDS, 0)
        word = self.line[start:]
        names = [each.names[0] for each in table if each.names[0].startswith(word)]
        if not word or len(names) != 1:
            return b""
        rest = names[0][len(word) :] + " "
        self.line += rest
        return rest.encode()


class HumanMonitor:
    """The prompt on *chardev*."""

    def __init__(self, chardev: Chardev, monitor: Monitor, thread: CommandThread, *, announce: bool = True) -> None:
        self._chardev = chardev
        self._monitor = monitor
        self._thread = thread
        self._editor = LineEditor()
        chardev.connect(self._on_data, self.greet if announce else lambda: None)

    def greet(self) -> None:
        """Say who is there, and prompt."""
        package = self._monitor.version.get("package", "")
        self._chardev.write(f"{package} monitor - type 'help' for more information\r\n".encode() + PROMPT)

    def prompt(self) -> None:
        """Show the prompt with what was typed so far (the focus came back)."""
        self._chardev.write(b"\r\n" + PROMPT + self._editor.line.encode())

    def _on_data(self, data: bytes) -> None:
        echo, lines = self._editor.feed(data)
        if not lines:
            if echo:
                self._chardev.write(echo)
            return
        self._chardev.write(echo)
        for line in lines:
            self._thread.submit(lambda line=line: self._execute(line))  # type: ignore[misc]

    def _execute(self, line: str) -> None:
        self._chardev.write(run(self._monitor, line).encode() + PROMPT)
