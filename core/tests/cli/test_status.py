"""What is shown while a guest boots: the picture of the stack, plain lines, and the live display."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from vm_core.block.backend import BlockBackend
from vm_core.block.cache import CacheMode
from vm_core.block.open import open_node
from vm_core.cli import picture
from vm_core.cli.richstatus import RichStatus
from vm_core.cli.status import Assembly, PlainStatus, Status, make
from vm_core.errors import UsageError
from vm_core.qmp.monitor import Drive


@pytest.fixture
def drives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Drive]]:
    """A disk of 3 MiB with writethrough, and an empty CD-ROM drive."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk.raw").write_bytes(bytes(3 << 20))
    node = open_node(str(tmp_path / "disk.raw"), readonly=False, format="raw")
    disk = BlockBackend(node, name="ide0-hd0", cache=CacheMode.parse("writethrough"))
    cdrom = BlockBackend(None, name="ide1-cd0", readonly=True, removable=True)
    yield [Drive("ide0-hd0", disk), Drive("ide1-cd0", cdrom)]
    disk.close()
    cdrom.close()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1 << 16, "64 KiB"), (3 << 29, "1.5 GiB"), (5081088, "4.8 MiB")],
)
def test_sizes_for_people(count: int, text: str) -> None:
    """Bytes are told in the unit that keeps the number short."""
    assert picture.size(count) == text


def test_the_picture_has_every_layer(drives: list[Drive]) -> None:
    """Frontend, backend, format and protocol stand below each other, with sizes, cache mode and engine."""
    lines = picture.plain([picture.drive_layers(drive) for drive in drives])
    assert lines[0] == "frontend: ide0-hd0: not connected to a device"
    assert lines[1] == "  backend: cache=writethrough, aio=threads, write cache off"
    assert lines[2].startswith("    format: raw: 3 MiB, ")
    assert lines[3] == "      protocol: file: disk.raw"
    assert lines[5:] == ["  backend: cache=writeback, aio=threads, read-only", "    medium: none: the tray is empty"]


def boot(status: Status, drives: list[Drive]) -> None:
    """What a run tells its status."""
    status.begin("plugins")
    status.end("9 drivers of 4 distributions")
    status.begin("images")
    status.end("2 drives")
    status.assembled(Assembly("pc, 128 MiB RAM", drives, "stdio", True))
    status.begin("firmware")
    status.event("PHASE", {"phase": "firmware", "text": "SeaBIOS rel-1"})
    status.event("PHASE", {"phase": "boot-device", "text": "Booting from Hard Disk..."})
    status.event("PHASE", {"phase": "kernel", "text": "Linux version 6.1"})


def test_plain_lines(drives: list[Drive]) -> None:
    """Without a terminal each phase is one line with its time, and the stack is indented text."""
    stream = io.StringIO()
    boot(PlainStatus(stream), drives)
    lines = stream.getvalue().splitlines()
    assert all(line.startswith("vm: ") for line in lines)
    told = [line.partition("] ")[2] for line in lines if line.startswith("vm: [")]
    assert told == [
        "plugins loaded: 9 drivers of 4 distributions",
        "images opened: 2 drives",
        "firmware",
        "firmware: SeaBIOS rel-1",
        "boot device: Booting from Hard Disk...",
        "kernel: Linux version 6.1",
    ]
    assert "vm:   frontend: ide0-hd0: not connected to a device" in lines


def test_the_live_picture_shows_stack_phases_and_counters(drives: list[Drive]) -> None:
    """On a terminal the stack, the phases with their times and the drives' counters are drawn, and stay."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=50, color_system=None)
    status = RichStatus(console)
    boot(status, drives)
    drives[0].backend.write(0, bytes(8192))
    time.sleep(0.3)
    status.hand_over()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    final = text[text.rindex("pc, 128 MiB RAM") :]
    for part in ("✓   plugins loaded", "✓   kernel", "cache=writethrough", "file  disk.raw", "8 KiB", "guest console"):
        assert part in final
    size = len(text)
    status.event("PHASE", {"phase": "kernel", "text": "late"})
    time.sleep(0.3)
    assert len(console.file.getvalue()) == size, "nothing is drawn once the guest has the terminal"


def waiting_console(status: RichStatus, data: bytes) -> tuple[threading.Thread, list[bytes]]:
    """A thread that waits to print *data*, and what it was given to print."""
    printed: list[bytes] = []
    thread = threading.Thread(target=lambda: printed.append(status.await_console(data)), daemon=True)
    thread.start()
    return thread, printed


@pytest.mark.parametrize("end", ["boot-loader", "kernel", "key", "stop"])
def test_firmware_waits_for_what_it_boots(drives: list[Drive], end: str) -> None:
    """The firmware's own messages wait until a loader or kernel prints, a key is pressed, or the machine stops."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=50, color_system=None)
    status = RichStatus(console)
    status.begin("firmware")
    status.event("PHASE", {"phase": "firmware", "text": "SeaBIOS"})
    thread, printed = waiting_console(status, b"\x1bc\x1b[?7l\x1b[2J\x1b[0mSeaBIOS\r\n")
    thread.join(0.4)
    assert thread.is_alive(), "the console was given away too early"
    if end == "key":
        status.want_console()
    elif end == "stop":
        status.event("STOP", {})
    else:
        status.event("PHASE", {"phase": end, "text": "hello"})
    thread.join(5)
    assert printed == [b"SeaBIOS\r\n"], "what would clear the picture is taken out"
    status.close()


def test_unknown_firmware_is_shown_at_once(drives: list[Drive]) -> None:
    """Firmware that does not announce itself gets the terminal with its first byte."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=50, color_system=None)
    status = RichStatus(console)
    status.begin("firmware")
    thread, printed = waiting_console(status, b"hello")
    thread.join(5)
    assert printed == [b"hello"]


def test_a_failed_start_is_marked(drives: list[Drive]) -> None:
    """The phase in which an error happened is not shown as done."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=50, color_system=None)
    status = RichStatus(console)
    boot(status, drives)
    status.fail()
    status.close()
    assert isinstance(console.file, io.StringIO)
    last = [line for line in console.file.getvalue().splitlines() if "kernel" in line][-1]
    assert "✗" in last


def test_an_error_before_there_is_a_machine_leaves_no_picture(drives: list[Drive]) -> None:
    """When images cannot be opened, what was drawn is erased, and the error is all that remains."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=50, color_system=None)
    status = RichStatus(console)
    status.begin("images")
    status.fail()
    status.close()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith("\x1b[1A\x1b[2K")


def test_the_kind_of_status_follows_the_options() -> None:
    """-nographic shows nothing of its own, pipes get plain lines, and other kinds are refused."""
    assert type(make(None, nographic=True)) is Status
    assert type(make("plain", nographic=True)) is PlainStatus
    assert type(make("off", nographic=False)) is Status
    with pytest.raises(UsageError, match="one of auto, rich, plain, off"):
        make("loud", nographic=False)
