"""Whole runs of ``vm`` with a firmware of our own that greets and echoes on the serial port."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vm_core.errors import VmError
from vm_core.plugins import registry

VM = [sys.executable, "-m", "vm_core.cli.vm"]

#: Real-mode code: print the greeting on COM1, echo what comes in, reset the machine by the keyboard controller on "q".
CODE = bytes.fromhex(
    "fc"  # cld
    "baf803"  # mov dx, 0x3f8
    "be2a00"  # mov si, greeting
    "2eac 84c0 7403 ee ebf7"  # print: cs lodsb; test al, al; jz echo; out dx, al; jmp print
    "bafd03 ec a801 74f8"  # echo: mov dx, 0x3fd; in al, dx; test al, 1; jz echo
    "baf803 ec 3c71 7403 ee ebed"  # mov dx, 0x3f8; in al, dx; cmp al, 'q'; je reset; out dx, al; jmp echo
    "b0fe e664 f4 ebfd"  # reset: mov al, 0xfe; out 0x64, al; hlt; jmp $-1
)
SEABIOS = "/usr/share/seabios/bios-256k.bin"
GREETING = b"HELLO\r\n"


def works(name: str) -> bool:
    """The accelerator *name* is installed and runs here."""
    with contextlib.suppress(VmError):
        return bool(registry().find("accelerator", name).load().availability().ok)
    return False


pytestmark = pytest.mark.skipif(not works("unicorn") and not works("kvm"), reason="no accelerator runs here")


@pytest.fixture
def rom(tmp_path: Path) -> Path:
    """The firmware: 64 KiB that the board maps at the top, entered at F000:FFF0."""
    image = bytearray(65536)
    image[: len(CODE)] = CODE
    image[len(CODE) : len(CODE) + len(GREETING)] = GREETING
    image[0xFFF0:0xFFF5] = bytes.fromhex("ea000000f0")  # jmp F000:0000
    path = tmp_path / "rom.bin"
    path.write_bytes(image)
    return path


@contextlib.contextmanager
def running(*words: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A run with pipes, killed at the end if it is still there."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    process = subprocess.Popen([*VM, "-m", "8", *words], **pipes)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def read_until(fd: int, wanted: bytes, timeout: float = 30) -> bytes:
    """Bytes of *fd* up to *wanted*."""
    data = b""
    deadline = time.monotonic() + timeout
    while wanted not in data:
        ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"{wanted!r} did not come; there was {data!r}"
        piece = os.read(fd, 65536)
        assert piece, f"the end came before {wanted!r}; there was {data!r}"
        data += piece
    return data


def test_nographic_is_the_guests_bytes_and_nothing_else(rom: Path) -> None:
    """With -nographic standard output holds what the guest wrote and nothing else, and input reaches the guest."""
    with running("-nographic", "-no-reboot", "-bios", str(rom)) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert read_until(process.stdout.fileno(), GREETING) == GREETING
        process.stdin.write(b"abc")
        process.stdin.flush()
        assert read_until(process.stdout.fileno(), b"abc") == b"abc"
        out, err = process.communicate(b"q", timeout=30)
        assert (out, err, process.returncode) == (b"", b"", 0)


def test_pipes_get_plain_lines_on_standard_error(rom: Path) -> None:
    """Without a terminal the phases are lines on standard error, and standard output is the guest's alone."""
    with running("-no-reboot", "-bios", str(rom)) as process:
        out, err = process.communicate(b"q", timeout=30)
        assert (out, process.returncode) == (GREETING, 0)
        lines = err.decode().splitlines()
        assert lines
        assert all(line.startswith("vm: ") for line in lines)
        assert any("devices realised" in line for line in lines)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_end_the_machine_in_order(rom: Path, number: int) -> None:
    """SIGTERM, SIGINT and SIGHUP end the machine within seconds and with status 0."""
    with running("-nographic", "-bios", str(rom)) as process:
        assert process.stdout is not None
        read_until(process.stdout.fileno(), GREETING)
        process.send_signal(number)
        assert process.wait(10) == 0


def test_serial_ports_go_where_they_are_sent(rom: Path, tmp_path: Path) -> None:
    """-serial file: holds the guest's output, and standard output stays empty."""
    log = tmp_path / "log"
    words = ["-serial", f"file:{log}", "-monitor", "stdio", "--status", "off", "-bios", str(rom)]
    with running(*words) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        deadline = time.monotonic() + 30
        while not log.exists() or log.read_bytes() != GREETING:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        out, err = process.communicate(b"info status\nquit\n", timeout=30)
        assert b"VM status: running\r\n" in out
        assert (err, process.returncode) == (b"", 0)
    assert log.read_bytes() == GREETING


class Qmp:
    """A QMP client that has negotiated."""

    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + 30
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                self._socket.close()
                assert time.monotonic() < deadline
                time.sleep(0.02)
        self._socket.settimeout(30)
        self._file = self._socket.makefile("rwb")
        self.events: list[str] = []
        assert "QMP" in json.loads(self._file.readline())
        self.execute("qmp_capabilities")

    def execute(self, name: str, **arguments: Any) -> Any:
        """Run a command; events that come before its answer are kept."""
        self._file.write(json.dumps({"execute": name, "arguments": arguments}).encode())
        self._file.flush()
        while True:
            message = json.loads(self._file.readline())
            if "event" not in message:
                return message.get("return", message.get("error"))
            self.events.append(message["event"])

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def test_qmp_controls_a_running_machine(rom: Path, tmp_path: Path) -> None:
    """A machine started with -S runs on cont, stops on stop, starts over on system_reset, and ends on quit."""
    path = tmp_path / "qmp"
    words = ["-nographic", "-S", "-name", "guest=tester", "-bios", str(rom)]
    with running(*words, "-qmp", f"unix:{path},server=on,wait=off") as process:
        assert process.stdout is not None
        client = Qmp(path)
        assert client.execute("query-status")["status"] == "prelaunch"
        assert client.execute("query-name") == {"name": "tester"}
        assert not select.select([process.stdout], [], [], 0.3)[0], "a machine that was not started prints nothing"
        client.execute("cont")
        assert read_until(process.stdout.fileno(), GREETING) == GREETING
        assert client.execute("query-status") == {"status": "running", "running": True, "singlestep": False}
        client.execute("stop")
        assert client.execute("query-status")["status"] == "paused"
        registers = client.execute("human-monitor-command", **{"command-line": "info registers"})
        assert registers.startswith("CPU#0\r\n")
        assert "EIP=" in registers or "RIP=" in registers
        client.execute("cont")
        (cpu,) = client.execute("query-cpus-fast")
        assert cpu["thread-id"] in [int(name) for name in os.listdir(f"/proc/{process.pid}/task")]
        assert len(client.execute("query-pci")[0]["devices"]) >= 2
        client.execute("system_reset")
        assert read_until(process.stdout.fileno(), GREETING) == GREETING
        assert client.events == ["RESUME", "STOP", "RESUME", "RESET"]
        assert client.execute("quit") == {}
        assert process.wait(10) == 0
        client.close()
    assert not path.exists()


def test_waiting_for_a_client_can_be_interrupted(rom: Path, tmp_path: Path) -> None:
    """A server with wait=on says that it waits, and a signal ends it."""
    with running("-nographic", "-bios", str(rom), "-qmp", f"unix:{tmp_path}/qmp,server=on") as process:
        assert process.stderr is not None
        assert b"waiting for connection on: disconnected:unix:" in read_until(process.stderr.fileno(), b"\n")
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM


class Terminal:
    """A run on a pseudo-terminal of 100 columns and 50 lines."""

    def __init__(self, *words: str) -> None:
        self.master, self.slave = pty.openpty()
        termios.tcsetwinsize(self.slave, (50, 100))
        self.before = termios.tcgetattr(self.slave)
        environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "50"}
        self.process = subprocess.Popen(
            [*VM, "-m", "8", *words],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            env=environ,
            start_new_session=True,
        )

    def until(self, wanted: bytes) -> str:
        """What is shown up to *wanted*, without the colours."""
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", read_until(self.master, wanted).decode())

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def terminal(rom: Path) -> Iterator[Terminal]:
    """``vm`` on a terminal with the test's firmware."""
    made = Terminal("-bios", str(rom))
    yield made
    made.close()


def test_a_terminal_shows_the_picture_then_the_guests_console(terminal: Terminal) -> None:
    """On a terminal the stack and phases are drawn until the guest prints; Ctrl-a reaches monitor and exit."""
    shown = terminal.until(b"HELLO")
    assert "8 MiB RAM" in shown
    assert "✓   devices realised" in shown
    assert shown.index("guest console") < shown.index("HELLO")
    assert termios.tcgetattr(terminal.slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG) == 0
    terminal.type(b"\x03xyz")  # Ctrl-C is the guest's
    terminal.until(b"\x03xyz")
    terminal.type(b"\x01c")
    terminal.until(b"(vm) ")
    terminal.type(b"info status\r")
    assert "VM status: running" in terminal.until(b"(vm) ")
    terminal.type(b"info qtree\r")
    assert "bus: pci.0" in terminal.until(b"(vm) ")
    terminal.type(b"\x01cback")
    terminal.until(b"back")
    terminal.type(b"\x01x")
    assert "ended by Ctrl-a x" in terminal.until(b"Ctrl-a x")
    assert terminal.process.wait(10) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


@pytest.mark.skipif(not os.path.exists(SEABIOS), reason="SeaBIOS is not here: apt-get install seabios")
def test_seabios_without_a_disk_is_told_phase_by_phase() -> None:
    """Real firmware is named, the search for something to boot is shown, and its console follows when it gives up."""
    made = Terminal("-bios", SEABIOS)
    try:
        shown = made.until(b"No bootable device.\r")
        assert "✓   firmware          SeaBIOS (version" in shown
        assert "boot device" in shown
        assert shown.index("guest console") < shown.rindex("SeaBIOS (version")
    finally:
        made.close()


def test_the_terminal_is_restored_when_a_signal_ends_the_machine(terminal: Terminal) -> None:
    """After SIGTERM the terminal is as it was, and the cursor is shown."""
    terminal.until(b"HELLO")
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.process.wait(10) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.before


def test_ctrl_c_ends_a_machine_whose_console_leaves_it_to_us(rom: Path) -> None:
    """With -serial stdio, as in QEMU, Ctrl-C ends the machine, and the terminal is restored."""
    made = Terminal("-serial", "stdio", "-bios", str(rom))
    try:
        made.until(b"HELLO")
        # The run has no controlling terminal here, so the terminal's own signal is sent by hand.
        assert termios.tcgetattr(made.slave)[3] & termios.ISIG
        made.process.send_signal(signal.SIGINT)
        assert made.process.wait(10) == 0
        assert termios.tcgetattr(made.slave) == made.before
    finally:
        made.close()


def test_firmware_that_is_missing_is_asked_for(tmp_path: Path) -> None:
    """A -bios that is not there is one line."""
    with running("-nographic", "-bios", str(tmp_path / "absent.bin")) as process:
        _, err = process.communicate(timeout=30)
        assert process.returncode == 1
        (line,) = err.decode().splitlines()
        assert line.startswith("vm: ")
        assert "absent.bin" in line
