"""The command line of ``vm``: QEMU's option names as a table, and the parser that the table drives.

Options start with one dash or two, take their value as the next word, and may be repeated; what a value means is the
business of the modules that use it. A word that is no option is the first disk, as in QEMU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import UsageError


class Argument(NamedTuple):
    """One option: *value* names what follows it (empty: nothing; in brackets: may be left out)."""

    name: str
    value: str
    help: str
    group: str
    aliases: tuple[str, ...] = ()
    #: Given twice, the last one holds (otherwise all count).
    once: bool = False


_MACHINE, _BLOCK, _CONSOLE, _RUN, _TOOL = "Machine", "Disks", "Console and monitor", "Running", "Asking"

ARGUMENTS: tuple[Argument, ...] = (
    Argument("machine", "BOARD[,OPTION=VALUE…]", "the board: pc (i440FX and PIIX3)", _MACHINE, ("M",)),
    Argument("accel", "NAME[,OPTION=VALUE…]", "what runs the guest, in order of preference", _MACHINE),
    Argument("enable-kvm", "", "same as -accel kvm", _MACHINE),
    Argument("smp", "[cpus=]N", "number of processors", _MACHINE, once=True),
    Argument("m", "[size=]MEGABYTES", "RAM, with an optional suffix M or G (default: 128M)", _MACHINE, once=True),
    Argument("bios", "FILE", "firmware to use in place of SeaBIOS", _MACHINE, once=True),
    Argument("kernel", "FILE", "boot this Linux kernel (bzImage) directly", _MACHINE, once=True),
    Argument("initrd", "FILE", "initial RAM disk of the kernel", _MACHINE, once=True),
    Argument("append", "TEXT", "command line of the kernel", _MACHINE, once=True),
    Argument("boot", "[order=]DRIVES[,OPTION=VALUE…]", "boot order: c disk, d CD-ROM; once=, menu=, strict=", _MACHINE),
    Argument("rtc", "base=utc|localtime|DATE", "what the guest's clock shows at the start", _MACHINE, once=True),
    Argument("device", "DRIVER[,OPTION=VALUE…]", "add a device; DRIVER,help lists its options", _MACHINE),
    Argument("nodefaults", "", "no default serial port and monitor", _MACHINE),
    Argument("name", "NAME", "name of the machine, shown in the status and to QMP", _MACHINE, once=True),
    Argument("drive", "OPTION=VALUE…", "add a drive: file=, if=, format=, cache=, media=, …; -drive help", _BLOCK),
    Argument("blockdev", "OPTION=VALUE…|JSON", "define a block node for -device …,drive=NODE-NAME", _BLOCK),
    Argument("hda", "FILE", "first IDE disk (hdb, hdc, hdd: the others); a plain FILE is the same", _BLOCK),
    Argument("hdb", "FILE", "second IDE disk", _BLOCK),
    Argument("hdc", "FILE", "third IDE disk", _BLOCK),
    Argument("hdd", "FILE", "fourth IDE disk", _BLOCK),
    Argument("cdrom", "FILE", "IDE CD-ROM (the third IDE drive)", _BLOCK),
    Argument("fda", "FILE", "first floppy disk", _BLOCK),
    Argument("fdb", "FILE", "second floppy disk", _BLOCK),
    Argument("snapshot", "", "write to temporary files in place of the images", _BLOCK),
    Argument("trust", "DIR", "images may name files in DIR as their backing and data files", _BLOCK),
    Argument("nographic", "", "the guest's serial port and the monitor on this terminal, and nothing else", _CONSOLE),
    Argument("serial", "WHERE", "connect a serial port: stdio, mon:stdio, file:PATH, unix:PATH, tcp:…, null", _CONSOLE),
    Argument("monitor", "WHERE", "a monitor for people", _CONSOLE),
    Argument("qmp", "WHERE", "a monitor for programs (QMP): unix:PATH,server=on,wait=off, tcp:…, stdio", _CONSOLE),
    Argument("chardev", "KIND,id=ID[,OPTION=VALUE…]", "define a character device; -chardev help", _CONSOLE),
    Argument("mon", "[chardev=]ID[,mode=readline|control]", "put a monitor on a character device", _CONSOLE),
    Argument("display", "none", "there is no display", _CONSOLE, once=True),
    Argument("vga", "none", "there is no graphics card", _CONSOLE, once=True),
    Argument("parallel", "none", "there is no parallel port", _CONSOLE, once=True),
    Argument("nic", "none", "there is no network", _CONSOLE, ("net",), once=True),
    Argument("status", "auto|rich|plain|off", "how to show the boot (auto: rich on a terminal)", _CONSOLE, once=True),
    Argument("S", "", "do not start the guest; the monitor's cont does", _RUN),
    Argument("no-reboot", "", "exit where the guest would reboot", _RUN),
    Argument("no-shutdown", "", "stop where the guest would power off, and do not exit", _RUN),
    Argument("no-user-config", "", "there is no user configuration", _RUN),
    Argument("help", "", "show this text", _TOOL, ("h",)),
    Argument("version", "", "show the version", _TOOL),
    Argument("list-plugins", "[KIND]", "list what is installed, with its health", _TOOL, once=True),
    Argument("json", "", "list as JSON", _TOOL),
    Argument("verify", "", "import every implementation before listing", _TOOL),
    Argument("completion", "bash", "print a completion script for a shell", _TOOL, once=True),
)

#: Options of qemu-system-x86_64 that mean something this machine has not got, and what to say.
ELSEWHERE: dict[str, str] = {
    "audio": "there is no sound",
    "audiodev": "there is no sound",
    "cpu": "the accelerator's processor is used as it is",
    "curses": "there is no display; the serial port is the console",
    "d": "there is no log of translated code",
    "daemonize": "run it in the background with the shell or a service manager",
    "global": "give the option to its -device",
    "incoming": "there is no migration",
    "loadvm": "there are no snapshots of a running machine",
    "mem-path": "RAM is anonymous memory",
    "mem-prealloc": "RAM is anonymous memory",
    "netdev": "there is no network",
    "numa": "there is one node",
    "object": "there are no user-creatable objects",
    "spice": "there is no display; the serial port is the console",
    "tpmdev": "there is no TPM",
    "usb": "there is no USB controller",
    "usbdevice": "there is no USB controller",
    "uuid": "there is no SMBIOS table to show it to the guest",
    "virtfs": "there is no 9p device",
    "vnc": "there is no display; the serial port is the console",
    "watchdog": "there is no watchdog",
}

_BY_NAME = {name: argument for argument in ARGUMENTS for name in (argument.name, *argument.aliases)}


class Given(NamedTuple):
    """One option as it was given: *name* is the table's, *spelled* the user's (``-hda``)."""

    name: str
    value: str
    spelled: str


class CommandLine:
    """The options of one call, in order."""

    def __init__(self, given: Sequence[Given]) -> None:
        self.given = tuple(given)

    def __contains__(self, name: str) -> bool:
        return any(given.name == name for given in self.given)

    def all(self, *names: str) -> Iterator[Given]:
        """Those called one of *names*, in the order of the command line."""
        return (given for given in self.given if given.name in names)

    def value(self, name: str) -> str | None:
        """The value of the last one called *name*."""
        return next((given.value for given in reversed(self.given) if given.name == name), None)


def parse(words: Sequence[str]) -> CommandLine:
    """The command line *words* (without the program's name). Raises UsageError for what is no option."""
    given: list[Given] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("-") or word == "-":
            given.append(Given("hda", word, word))
            continue
        spelled, equals, attached = word.partition("=")
        name = spelled[1 + word.startswith("--") :]
        argument = _BY_NAME.get(name)
        if argument is None:
            raise _unknown(spelled, name)
        value = attached
        if not argument.value and equals:
            raise UsageError(f"{spelled}: this option takes no value")
        if argument.value and not equals:
            optional = argument.value.startswith("[") and argument.value.endswith("]")
            following = words[position] if position < len(words) else None
            if optional and (following is None or following.startswith("-")):
                following = ""
            elif following is None:
                raise UsageError(f"{spelled}: {argument.value} is needed behind it: {argument.help}")
            else:
                position += 1
            value = following
        given.append(Given(argument.name, value, spelled))
    return CommandLine(given)


def _unknown(spelled: str, name: str) -> UsageError:
    if name in ELSEWHERE:
        return UsageError(f"{spelled} is not supported: {ELSEWHERE[name]}")
    import difflib

    close = difflib.get_close_matches(name, _BY_NAME, 1)
    hint = f"did you mean -{close[0]}? " if close else ""
    return UsageError(f"{spelled}: no such option; {hint}vm -h lists them")


def usage() -> str:
    """The text of ``-h``."""
    lines = ["usage: vm [options] [disk image]", ""]
    for group in dict.fromkeys(argument.group for argument in ARGUMENTS):
        lines.append(f"{group}:")
        for argument in ARGUMENTS:
            if argument.group == group:
                double = "--" if group == _TOOL and argument.name not in ("help", "version") else "-"
                double = "--" if argument.name in ("trust", "status") else double
                names = ", ".join([*(f"-{alias}" for alias in argument.aliases), f"{double}{argument.name}"])
                left = f"  {names} {argument.value}".rstrip()
                lines += [f"{left:<30}  {argument.help}"] if len(left) <= 30 else [left, f"{'':<30}  {argument.help}"]
        lines.append("")
    lines += [
        "While the guest has the terminal: Ctrl-a x ends the machine, Ctrl-a c is the monitor, Ctrl-a h is help.",
        "Plugins: VM_PLUGINS, VM_DISABLE_PLUGINS and VM_STRICT_PLUGINS choose what is loaded; VM_TRUST is as --trust.",
        "VM_DEBUG=1 shows where an error came from.",
    ]
    return "\n".join(lines)
