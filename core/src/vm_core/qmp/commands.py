"""QMP's commands as a table: name, arguments with their types, and the function that runs them.

Each function gets the :class:`~.monitor.Monitor` and the checked arguments and returns what ``return`` shall hold.
Shapes follow QEMU's QAPI schema (``qapi/*.json``), so that scripts made for QEMU go on working.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import attrs

from ..errors import VmError
from . import blockinfo
from .monitor import Drive, Monitor
from .protocol import QmpError


@attrs.frozen
class Command:
    """One command. *arguments*: name → (type, required); types are QMP's words."""

    name: str
    arguments: dict[str, tuple[str, bool]]
    run: Callable[[Monitor, dict[str, Any]], Any]
    summary: str


COMMANDS: dict[str, Command] = {}

_Function = Callable[[Monitor, dict[str, Any]], Any]


def command(name: str, **arguments: str) -> Callable[[_Function], _Function]:
    """Enter a function in the table. ``node_name="string?"`` declares an optional argument ``node-name``."""

    def enter(function: _Function) -> _Function:
        declared = {
            key.replace("_", "-"): (type.rstrip("?"), not type.endswith("?")) for key, type in arguments.items()
        }
        COMMANDS[name] = Command(name, declared, function, (function.__doc__ or "").splitlines()[0])
        return function

    return enter


_TYPES: dict[str, type | tuple[type, ...]] = {"string": str, "integer": int, "boolean": bool}


def execute(monitor: Monitor, name: str, arguments: dict[str, Any]) -> Any:
    """Run the command *name*. Raises QmpError, in QEMU's words where a client could depend on them."""
    found = COMMANDS.get(name)
    if found is None:
        raise QmpError(f"The command {name} has not been found", "CommandNotFound")
    for key, (type, required) in found.arguments.items():
        if key in arguments:
            value = arguments[key]
            if not isinstance(value, _TYPES[type]) or (type == "integer" and isinstance(value, bool)):
                raise QmpError(f"Invalid parameter type for '{key}', expected: {type}")
        elif required:
            raise QmpError(f"Parameter '{key}' is missing")
    for key in arguments:
        if key not in found.arguments:
            raise QmpError(f"Parameter '{key}' is unexpected")
    try:
        return found.run(monitor, arguments)
    except VmError as error:
        raise QmpError(str(error)) from error
    except OSError as error:
        raise QmpError(error.strerror or str(error)) from error


@command("query-commands")
def query_commands(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """The commands there are."""
    return [{"name": name} for name in sorted([*COMMANDS, "qmp_capabilities"])]


@command("query-version")
def query_version(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """The version of this program, in the member that QEMU's has."""
    return monitor.version


@command("query-name")
def query_name(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """The machine's name."""
    return {"name": monitor.name} if monitor.name else {}


@command("query-status")
def query_status(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Whether the machine runs, and why not."""
    status = str(monitor.machine.status)
    return {"status": status, "singlestep": False, "running": status == "running"}


@command("query-kvm")
def query_kvm(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Whether KVM is in use and present."""
    return {"enabled": monitor.accelerator == "kvm", "present": os.access("/dev/kvm", os.R_OK | os.W_OK)}


@command("query-cpus-fast")
def query_cpus_fast(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """The processors and the host threads that run them."""
    import threading

    threads = {thread.name: thread.native_id for thread in threading.enumerate()}
    return [
        {
            "cpu-index": index,
            "qom-path": f"/machine/cpu[{index}]",
            "thread-id": next((n for name, n in threads.items() if name.lower().endswith(f"cpu{index}")), 0) or 0,
            "props": {"socket-id": 0, "core-id": index, "thread-id": 0},
            "target": "x86_64",
        }
        for index in range(monitor.cpus)
    ]


@command("query-chardev")
def query_chardev(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """The character devices."""
    return [
        {"label": each.id, "filename": each.filename, "frontend-open": each.frontend_open} for each in monitor.chardevs
    ]


@command("query-block")
def query_block(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """The drives and what is in them."""
    return [blockinfo.block_info(drive) for drive in monitor.drives]


@command("query-blockstats", query_nodes="boolean?")
def query_blockstats(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """The drives' counters."""
    return [blockinfo.block_stats(drive) for drive in monitor.drives]


@command("query-named-block-nodes", flat="boolean?")
def query_named_block_nodes(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Every node of the block graph."""
    nodes = blockinfo.all_nodes(list(monitor.drives))
    result = [blockinfo.device_info(node, backend) for node, backend in nodes]
    if arguments.get("flat"):
        for info in result:
            info["image"].pop("backing-image", None)
    return result


@command("query-pci")
def query_pci(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """The PCI buses and their functions."""
    from .pciinfo import pci_info

    return pci_info(monitor.machine.buses)


@command("stop")
def stop(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Pause the machine."""
    monitor.machine.stop()
    return {}


@command("cont")
def cont(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Let the machine run (again)."""
    monitor.machine.cont()
    return {}


@command("system_reset")
def system_reset(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Press the reset button."""
    monitor.machine.system_reset()
    return {}


@command("system_powerdown")
def system_powerdown(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Press the power button: the guest shuts down if it listens."""
    monitor.machine.system_powerdown()
    return {}


@command("quit")
def quit_machine(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """End the machine and the program, at once for the guest; written data is flushed."""
    monitor.machine.quit()
    return {}


def _named_drive(monitor: Monitor, arguments: dict[str, Any]) -> Drive:
    if ("device" in arguments) == ("id" in arguments):
        raise QmpError("Need exactly one of 'device' and 'id'")
    return monitor.drive(arguments.get("device") or arguments.get("id") or "")


def _removable(drive: Drive, force: bool) -> None:
    if not drive.backend.removable:
        raise QmpError(f"Device '{drive.id}' is not removable")
    if drive.backend.locked and not force:
        raise QmpError(
            f"Device '{drive.id}' is locked and force was not specified, wait for tray to open and try again"
        )


@command("eject", device="string?", id="string?", force="boolean?")
def eject(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Take the medium out of a CD-ROM drive."""
    drive = _named_drive(monitor, arguments)
    _removable(drive, arguments.get("force", False))
    _open_tray(monitor, drive)
    return {}


@command(
    "blockdev-change-medium",
    device="string?",
    id="string?",
    filename="string",
    format="string?",
    force="boolean?",
    read_only_mode="string?",
)
def blockdev_change_medium(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Put another medium into a CD-ROM drive."""
    drive = _named_drive(monitor, arguments)
    _removable(drive, arguments.get("force", False))
    if arguments.get("read-only-mode", "retain") not in ("retain", "read-only"):
        raise QmpError("read-only-mode: a CD-ROM's medium is read-only: 'retain' or 'read-only'")
    if monitor.open_medium is None:
        raise QmpError("this machine cannot open media")
    node = monitor.open_medium(arguments["filename"], arguments.get("format"))
    _open_tray(monitor, drive)
    drive.backend.set_medium(node)
    _tray_moved(monitor, drive)
    return {}


def _open_tray(monitor: Monitor, drive: Drive) -> None:
    """Open the tray and take out what is in it."""
    was_open = drive.backend.tray_open
    former = drive.backend.eject(force=True)
    if not was_open:
        _tray_moved(monitor, drive)
    if former is not None:
        former.close()


def _tray_moved(monitor: Monitor, drive: Drive) -> None:
    if drive.device is None:  # then there is no tray
        return
    data = {
        "device": drive.id,
        "id": drive.device.id,
        "tray-open": drive.backend.tray_open,
    }
    monitor.machine.events.emit("DEVICE_TRAY_MOVED", **data)


@command("block_resize", device="string?", node_name="string?", size="integer")
def block_resize(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Change the size of a drive (bytes)."""
    from ..block.medium import present

    device, node_name = arguments.get("device"), arguments.get("node-name")
    for drive in monitor.drives:
        node = drive.backend.node
        if node is not None and ((device and drive.id == device) or (node_name and node.node_name == node_name)):
            break
    else:
        if device and any(drive.id == device for drive in monitor.drives):
            raise QmpError(f"Device '{device}' has no medium")
        raise QmpError(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'")
    if arguments["size"] < 0:
        raise QmpError("Parameter 'size' expects a >0 size")
    assert node is not None
    if not present(node):
        raise QmpError("No medium inserted")
    drive.backend.resize(arguments["size"])
    return {}


@command("human-monitor-command", command_line="string", cpu_index="integer?")
def human_monitor_command(monitor: Monitor, arguments: dict[str, Any]) -> Any:
    """Run a command of the monitor for people and return what it prints."""
    from .human import run

    return run(monitor, arguments["command-line"])
