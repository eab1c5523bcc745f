"""QMP's and the human monitor's commands on a machine without processors, and the shapes beside a real QEMU's."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vm_core.block.backend import BlockBackend
from vm_core.block.open import open_node
from vm_core.chardev import make
from vm_core.devices.bus import Bus
from vm_core.devices.pci import PciBus, PciDevice
from vm_core.machine.machine import Machine
from vm_core.machine.memory import GuestMemory
from vm_core.qmp import human
from vm_core.qmp.commands import COMMANDS, execute
from vm_core.qmp.human import PROMPT, LineEditor
from vm_core.qmp.monitor import CommandThread, Drive, Monitor
from vm_core.qmp.protocol import QmpError
from vm_core.qmp.server import QmpServer
from vm_core.version import qapi_version

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-system-x86_64") is None or shutil.which("qemu-img") is None, reason="qemu is not installed"
)

TRAY = "DEVICE_TRAY_MOVED"
INVALID = "Invalid parameter type for"
QEMU = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """disk.raw, other.iso and cd.iso in a directory."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    (tmp_path / "cd.iso").write_bytes(b"cd" * 32768)
    (tmp_path / "other.iso").write_bytes(b"ot" * 65536)
    return tmp_path


def named(id: str) -> Any:
    """A device with a name and nothing else."""
    return SimpleNamespace(id=id)


@pytest.fixture
def monitor(images: Path) -> Iterator[Monitor]:
    """A running machine without processors, with a disk and a CD-ROM drive behind devices that are but names."""
    machine = Machine(GuestMemory(1 << 20))
    disk = BlockBackend(open_node(str(images / "disk.raw"), readonly=False, format="raw"), name="hd0")
    cdrom = BlockBackend(open_node(str(images / "cd.iso"), format="raw"), name="cd0", readonly=True, removable=True)
    for backend in (disk, cdrom):
        machine.attach_backend(backend)
    machine.start()
    yield Monitor(
        machine,
        [Drive("hd0", disk, named("front0")), Drive("cd0", cdrom, named("front1"))],
        "foo",
        qapi_version(),
        [make({"backend": "null", "id": "serial0"})],
        "none",
        open_medium=lambda name, format: open_node(name, format=format or "raw"),
    )
    machine.close()
    disk.close()
    cdrom.close()


def shape(value: Any, depth: int = 6) -> Any:
    """The keys and types of a JSON value."""
    if isinstance(value, dict):
        return {key: shape(each, depth - 1) for key, each in sorted(value.items())} if depth else dict
    if isinstance(value, list):
        return [shape(value[0], depth - 1)] if value else []
    return type(value).__name__


def real_qemu(images: Path, *commands: str) -> list[Any]:
    """What a real QEMU returns for *commands* with the same drives."""
    script = [{"execute": name} for name in ("qmp_capabilities", *commands, "quit")]
    theirs = images / "qemu"  # the originals are locked
    theirs.mkdir()
    for name in ("disk.raw", "cd.iso"):
        shutil.copy(images / name, theirs / name)
    drives = ["-drive", "if=virtio,id=hd0,file=disk.raw,format=raw", "-drive", "media=cdrom,id=cd0,file=cd.iso"]
    shown = subprocess.run(
        [*QEMU, "-name", "foo", "-serial", "null", *drives],
        cwd=theirs,
        input="".join(map(json.dumps, script)).encode(),
        capture_output=True,
        timeout=60,
    )
    answers = [json.loads(line) for line in shown.stdout.splitlines()]
    return [answer["return"] for answer in answers if "return" in answer][1 : len(commands) + 1]


QUERIES = ["query-status", "query-version", "query-name", "query-kvm", "query-chardev", "query-block"]


@needs_qemu
def test_queries_have_the_shapes_of_a_real_qemu(monitor: Monitor, images: Path) -> None:
    """Every member that QEMU's answers have is there, with the same type; members of ours that it lacks are none."""
    for name, theirs in zip(QUERIES, real_qemu(images, *QUERIES), strict=True):
        ours = execute(monitor, name, {})
        if name == "query-block":
            theirs = {block["device"]: block for block in theirs}
            ours = {block["device"]: block for block in ours}
        assert shape(ours) == shape(theirs), name


@needs_qemu
def test_counters_and_nodes_have_the_members_of_a_real_qemu(monitor: Monitor, images: Path) -> None:
    """The statistics have all of QEMU's counters, and nodes all of its members."""
    stats, nodes = real_qemu(images, "query-blockstats", "query-named-block-nodes")
    ours = execute(monitor, "query-blockstats", {})
    assert shape(ours[0]["stats"]) == shape(stats[0]["stats"])
    theirs = next(node for node in nodes if node["drv"] == "raw" and node["file"].endswith("disk.raw"))
    mine = next(node for node in execute(monitor, "query-named-block-nodes", {}) if node["drv"] == "raw")
    assert shape(mine) == shape(theirs)


def test_block_information_is_true(monitor: Monitor, images: Path) -> None:
    """Names, sizes, cache mode and counters are those of the drives."""
    monitor.drives[0].backend.write(0, bytes(4096))
    monitor.drives[0].backend.read(0, 512)
    disk, cdrom = execute(monitor, "query-block", {})
    assert disk["inserted"]["image"]["virtual-size"] == 1 << 20
    assert disk["inserted"]["cache"] == {"writeback": True, "direct": False, "no-flush": False}
    assert (cdrom["removable"], cdrom["tray_open"], cdrom["inserted"]["ro"]) == (True, False, True)
    stats = execute(monitor, "query-blockstats", {})[0]["stats"]
    assert (stats["wr_bytes"], stats["rd_bytes"], stats["wr_operations"]) == (4096, 512, 1)


@pytest.mark.parametrize(
    ("name", "arguments", "error"),
    [
        ("nothing", {}, ("CommandNotFound", "The command nothing has not been found")),
        ("stop", {"x": 1}, ("GenericError", "Parameter 'x' is unexpected")),
        ("block_resize", {"device": "hd0"}, ("GenericError", "Parameter 'size' is missing")),
        ("block_resize", {"device": "x", "size": 1}, ("GenericError", "Cannot find device='x' nor node-name=''")),
        ("block_resize", {"device": 1, "size": 1}, ("GenericError", f"{INVALID} 'device', expected: string")),
        ("eject", {}, ("GenericError", "Need exactly one of 'device' and 'id'")),
        ("eject", {"device": "hd0"}, ("GenericError", "Device 'hd0' is not removable")),
        ("eject", {"device": "zz"}, ("DeviceNotFound", "Device 'zz' not found")),
    ],
)
def test_errors_are_worded_as_qemu_words_them(
    monitor: Monitor, name: str, arguments: dict[str, Any], error: tuple[str, str]
) -> None:
    """Wrong names and arguments get QEMU's classes and sentences."""
    with pytest.raises(QmpError) as raised:
        execute(monitor, name, arguments)
    assert (raised.value.error_class, raised.value.description) == error


def test_stop_and_cont_change_the_state_and_tell(monitor: Monitor) -> None:
    """stop and cont are seen in query-status and as events."""
    events: list[str] = []
    monitor.machine.events.subscribe(lambda name, data: events.append(name))
    execute(monitor, "stop", {})
    assert execute(monitor, "query-status", {}) == {"status": "paused", "running": False, "singlestep": False}
    execute(monitor, "cont", {})
    assert execute(monitor, "query-status", {})["running"] is True
    assert events == ["STOP", "RESUME"]


def test_media_are_ejected_and_changed_with_their_events(monitor: Monitor, images: Path) -> None:
    """The tray moves as the medium is taken out and another put in; a missing file changes nothing."""
    trays: list[Any] = []
    monitor.machine.events.subscribe(lambda name, data: trays.extend(data.values()) if name == TRAY else None)
    drive = monitor.drives[1]
    with pytest.raises(QmpError, match="No such file"):
        execute(monitor, "blockdev-change-medium", {"device": "cd0", "filename": str(images / "absent")})
    assert drive.backend.read(0, 2) == b"cd"
    execute(monitor, "eject", {"id": "cd0"})
    assert trays == ["cd0", "front1", True]
    assert "inserted" not in execute(monitor, "query-block", {})[1]
    execute(monitor, "blockdev-change-medium", {"device": "cd0", "filename": str(images / "other.iso")})
    assert trays == ["cd0", "front1", True, "cd0", "front1", False]
    assert drive.backend.read(0, 2) == b"ot"
    drive.backend.locked = True
    with pytest.raises(QmpError, match="is locked"):
        execute(monitor, "eject", {"id": "cd0"})
    execute(monitor, "eject", {"id": "cd0", "force": True})
    assert drive.backend.node is None


@needs_qemu
def test_a_drive_without_medium_as_in_qemu(monitor: Monitor, images: Path) -> None:
    """A drive that nobody uses and that is empty: what is told of it, on both monitors, and what cannot be done."""
    empty = BlockBackend(None, name="em0", removable=True)
    monitor.drives = [Drive("em0", empty)]
    events: list[str] = []
    monitor.machine.events.subscribe(lambda name, data: events.append(name))
    lines: list[tuple[str, dict[str, Any]]] = [
        ("query-block", {}),
        ("query-named-block-nodes", {}),
        ("human-monitor-command", {"command-line": "info block"}),
        ("block_resize", {"device": "em0", "size": 512}),
        ("eject", {"device": "em0"}),
    ]
    script = [{"execute": name, "arguments": arguments} for name, arguments in lines]
    script = [{"execute": "qmp_capabilities"}, *script, {"execute": "quit"}]
    shown = subprocess.run(
        [*QEMU, "-drive", "if=none,id=em0"],
        input="".join(map(json.dumps, script)).encode(),
        capture_output=True,
        timeout=60,
    )
    answers = [json.loads(line) for line in shown.stdout.splitlines()]
    theirs = [answer for answer in answers if "return" in answer or "error" in answer][1 : len(lines) + 1]
    for (name, arguments), answer in zip(lines, theirs, strict=True):
        if "error" in answer:
            with pytest.raises(QmpError) as caught:
                execute(monitor, name, arguments)
            assert caught.value.description == answer["error"]["desc"]
            continue
        ours = execute(monitor, name, arguments)
        if isinstance(ours, str):  # the blank lines at the end are a terminal's
            assert ours.split() == answer["return"].split()
        else:
            assert ours == answer["return"], name
    assert not events


def test_an_empty_drive_of_the_host(monitor: Monitor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host's drive without a disc is inserted, as in QEMU, but is empty to the guest and cannot be resized."""
    cdrom = monitor.drives[1].backend
    assert cdrom.node is not None
    assert cdrom.size == 65536
    monkeypatch.setattr(type(cdrom.node.children()["file"]), "present", False)
    assert cdrom.size == 0
    image = execute(monitor, "query-block", {})[1]["inserted"]["image"]
    assert image["virtual-size"] == 65536
    assert "dirty-flag" not in image
    with pytest.raises(QmpError, match="No medium inserted"):
        execute(monitor, "block_resize", {"device": "cd0", "size": 512})


def test_a_disk_is_resized(monitor: Monitor, images: Path) -> None:
    """block_resize changes the image and tells the device."""
    sizes: list[int] = []
    monitor.drives[0].backend.on_resize.append(sizes.append)
    execute(monitor, "block_resize", {"device": "hd0", "size": 2 << 20})
    assert (images / "disk.raw").stat().st_size == 2 << 20
    assert sizes == [2 << 20]


class Client:
    """A QMP client on a socket."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rwb")
        self.greeting = json.loads(self._file.readline())

    def send(self, name: str, **arguments: Any) -> None:
        self._file.write(json.dumps({"execute": name, "arguments": arguments}).encode())
        self._file.flush()

    def receive(self) -> Any:
        return json.loads(self._file.readline())

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def test_a_client_on_a_socket(monitor: Monitor, images: Path) -> None:
    """Greeting, negotiation, commands, events before their answers, and a second client afterwards."""
    path = images / "qmp"
    chardev = make({"backend": "socket", "id": "qmp0", "path": str(path), "server": True, "wait": False})
    thread = CommandThread()
    QmpServer(chardev, monitor, thread)
    chardev.open(monitor.machine.iothread)  # type: ignore[attr-defined]
    for _ in range(2):
        client = Client(path)
        assert client.greeting["QMP"]["version"] == qapi_version()
        client.send("stop")
        assert client.receive()["error"]["class"] == "CommandNotFound"
        client.send("qmp_capabilities")
        assert client.receive() == {"return": {}}
        client.send("stop")
        client.send("cont")
        names = [client.receive().get("event", "return") for _ in range(4)]
        assert names == ["STOP", "return", "RESUME", "return"]
        client.send("human-monitor-command", **{"command-line": "info status"})
        assert client.receive() == {"return": "VM status: running\r\n"}
        client.close()
    thread.close()
    chardev.close()


def test_every_command_has_a_summary() -> None:
    """The table that query-commands shows documents each command."""
    assert all(each.summary.endswith(".") for each in COMMANDS.values())
    assert {"stop", "cont", "quit", "system_reset", "system_powerdown", "query-block"} <= set(COMMANDS)


# The monitor for people


def test_human_commands(monitor: Monitor, images: Path) -> None:
    """Commands and subjects work, unknown ones are named, errors are sentences."""
    run = lambda line: human.run(monitor, line)  # noqa: E731
    assert run("info status") == "VM status: running\r\n"
    assert run("stop") == ""
    assert run("info status") == "VM status: paused\r\n"
    assert "cd0 (#block" in run("info block")
    assert "Removable device: not locked, tray closed" in run("info block")
    assert run("info blockstats").startswith("hd0: rd_bytes=0 wr_bytes=0")
    assert run("foo") == "unknown command: 'foo'\r\n"
    assert "did you mean 'block'" in run("info blok")
    assert run("eject hd0") == "Error: Device 'hd0' is not removable\r\n"
    assert run("change cd0") == "usage: change device filename [format]\r\n"
    assert run(f"change cd0 {images / 'other.iso'}") == ""
    assert monitor.drives[1].backend.read(0, 2) == b"ot"
    assert run("eject -f cd0") == ""
    assert "[not inserted]" in run("info block")
    assert run("'unfinished") == "No closing quotation\r\n"
    assert "system_powerdown" in run("help")
    assert run("") == ""


@needs_qemu
def test_info_block_reads_as_in_qemu(monitor: Monitor, images: Path) -> None:
    """The lines of info block are QEMU's, but for the names of nodes and devices."""
    script = [
        {"execute": "qmp_capabilities"},
        {"execute": "human-monitor-command", "arguments": {"command-line": "info block"}},
        {"execute": "quit"},
    ]
    drives = ["-drive", "if=none,id=hd0,file=disk.raw,format=raw,file.locking=off"]
    drives += ["-drive", "if=none,media=cdrom,id=cd0,file=cd.iso,format=raw"]
    shown = subprocess.run(
        [*QEMU, *drives],
        cwd=images,
        input="".join(map(json.dumps, script)).encode(),
        capture_output=True,
        timeout=60,
    )
    theirs = next(answer for line in shown.stdout.splitlines() if "#block" in str(answer := json.loads(line)))

    def comparable(text: str) -> list[str]:
        lines = [line.replace(f"{images}/", "") for line in text.splitlines()]
        return [
            line.partition(" (#")[0] + line.partition(")")[2]
            for line in lines
            if "Removable" not in line and "Attached" not in line
        ]

    assert comparable(human.run(monitor, "info block")) == comparable(theirs["return"])


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        (b"info\r", ["info"]),
        (b"infx\x7fo\n", ["info"]),
        (b"one\x15two\r\n", ["two"]),
        (b"a\rb\r\x1b[A\x1b[A\r", ["a", "b", "a"]),
        (b"a\r\x1b[A\x1b[Bc\r", ["a", "c"]),
        (b"info sta\t\r", ["info status "]),
        (b"x\x1b[1;5Cy\x1bOHz\r", ["xyz"]),
    ],
)
@pytest.mark.parametrize("step", [1, 3, 100])
def test_the_line_editor(keys: bytes, lines: list[str], step: int) -> None:
    """Backspace, Ctrl-U, history, completion, and escape sequences that mean nothing, however the keys arrive."""
    editor = LineEditor()
    assert [line for at in range(0, len(keys), step) for line in editor.feed(keys[at : at + step])[1]] == lines
    assert PROMPT.endswith(b" ")


class Function(PciDevice):
    """A PCI function with the windows of a virtio disk."""

    vendor_id, device_id, class_code, interrupt_pin = 0x1AF4, 0x1001, 0x010000, 1

    def realize(self, machine: Machine, bus: Bus, address: str | None) -> None:
        super().realize(machine, bus, address)
        self.add_bar(0, 128, Nothing(), io=True)
        self.add_bar(1, 4096, Nothing())
        self.add_bar(4, 16384, Nothing(), prefetch=True, bits64=True)


class Nothing:
    """Registers that read as zero."""

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


@needs_qemu
def test_pci_functions_have_the_shape_of_a_real_qemu(monitor: Monitor, images: Path) -> None:
    """query-pci shows a function's identity and windows with QEMU's members, before anything is mapped."""
    assert isinstance(monitor.machine, Machine)
    bus = monitor.machine.add_bus(PciBus())
    Function("", {}).realize(monitor.machine, bus, "02.0")
    (mine,) = execute(monitor, "query-pci", {})[0]["devices"]
    (theirs,) = real_qemu(images, "query-pci")
    other = next(each for each in theirs[0]["devices"] if each["id"]["device"] == 0x1001)
    assert {**mine, "id": {}} == {**other, "id": {}}
    assert "SCSI controller: PCI device 1af4:1001" in human.run(monitor, "info pci")
    assert "BAR4: 64 bit prefetchable memory at not mapped" in human.run(monitor, "info pci")
