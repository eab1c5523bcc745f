"""Character devices: the command line's forms, sockets, files, and the Ctrl-a mux."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vm_core.chardev import Chardev, make, parse_legacy, parse_options
from vm_core.chardev.mux import Mux
from vm_core.errors import UsageError
from vm_core.machine.iothread import IoThread


@pytest.fixture
def loop() -> Iterator[IoThread]:
    """A running I/O thread."""
    errors: list[BaseException] = []
    thread = IoThread(errors.append)
    thread.start()
    yield thread
    thread.close()
    assert not errors


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within five seconds"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("stdio", {"backend": "stdio"}),
        ("mon:stdio", {"backend": "stdio", "mux": True, "signal": False}),
        ("file:/tmp/x", {"backend": "file", "path": "/tmp/x"}),
        ("unix:/s,server=on,wait=off", {"backend": "socket", "path": "/s", "server": True, "wait": False}),
        ("unix:/s,server,nowait", {"backend": "socket", "path": "/s", "server": True, "wait": False}),
        ("tcp:127.0.0.1:44,server", {"backend": "socket", "host": "127.0.0.1", "port": 44, "server": True}),
        ("tcp:[::1]:44,nodelay", {"backend": "socket", "host": "::1", "port": 44, "nodelay": True}),
        ("null", {"backend": "null"}),
    ],
)
def test_short_forms(text: str, expected: dict[str, Any]) -> None:
    """The short forms of -serial and -qmp are those of QEMU."""
    assert parse_legacy(text, "c", "-serial") == {**expected, "id": "c"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("vc", "there is no display"),
        ("udp:1", "not supported; there is: stdio, mon:stdio"),
        ("tcp:localhost:http", "a whole number is needed"),
        ("unix:/s,serve=on", "did you mean 'server'"),
        ("file:", "something is needed behind file:"),
    ],
)
def test_short_forms_that_are_wrong(text: str, part: str) -> None:
    """What is not supported is refused with what is."""
    with pytest.raises(UsageError) as error:
        parse_legacy(text, "c", "-serial")
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("socket,path=/s", "id=NAME is needed"),
        ("sockett,id=x", "did you mean 'socket'"),
        ("socket,id=x", "either path= (a Unix socket) or host= and port="),
        ("socket,id=x,path=/s,port=1", "either path="),
        ("file,id=x", "path=… is needed"),
    ],
)
def test_long_forms_that_are_wrong(text: str, part: str) -> None:
    """-chardev is checked against the table of kinds."""
    with pytest.raises(UsageError) as error:
        parse_options(text)
    assert part in str(error.value)


def server(loop: IoThread, **options: Any) -> tuple[Chardev, list[bytes], list[str]]:
    chardev = make({"backend": "socket", "id": "c", "server": True, "wait": False, **options})
    data: list[bytes] = []
    states: list[str] = []
    chardev.connect(data.append, lambda: states.append("open"), lambda: states.append("close"))
    chardev.open(loop)
    return chardev, data, states


def test_a_listening_socket_serves_one_client_after_another(loop: IoThread, tmp_path: Path) -> None:
    """Clients are served in turn, each with its open and close, and the socket's file goes with the device."""
    path = tmp_path / "s"
    chardev, data, states = server(loop, path=str(path))
    assert chardev.filename.startswith("disconnected:")
    for number in range(2):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(b"hello %d" % number)
            until(lambda number=number: b"".join(data).endswith(b"hello %d" % number))
            chardev.write(b"answer")
            assert client.recv(100) == b"answer"
        until(lambda number=number: states == ["open", "close"] * (number + 1))
    chardev.close()
    assert not path.exists()


def test_a_slow_reader_gets_everything_in_order(loop: IoThread) -> None:
    """Output beyond the socket's buffer is kept and sent as the reader takes it, without blocking the writer."""
    chardev, _, states = server(loop, host="127.0.0.1", port=0)
    client = socket.create_connection(("127.0.0.1", chardev.port))  # type: ignore[attr-defined]
    until(lambda: states == ["open"])
    sent = b"".join(b"%07d\n" % number for number in range(1_000_000))
    began = time.monotonic()
    for at in range(0, len(sent), 65536):
        chardev.write(sent[at : at + 65536])
    assert time.monotonic() - began < 2
    received = bytearray()
    while len(received) < len(sent):
        received += client.recv(1 << 20)
    assert received == sent
    client.close()
    chardev.close()


def test_writing_to_nobody_is_no_error(loop: IoThread, tmp_path: Path) -> None:
    """Output without a client is dropped, and a client that vanishes is no error."""
    chardev, _, states = server(loop, path=str(tmp_path / "s"))
    chardev.write(b"lost")
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "s"))
    until(lambda: states == ["open"])
    client.close()
    for _ in range(100):
        chardev.write(b"x" * 10_000)
    until(lambda: states == ["open", "close"])
    chardev.close()


def test_a_socket_path_that_is_a_file_is_never_removed(loop: IoThread, tmp_path: Path) -> None:
    """A server refuses a path where a file lies, and takes over one where a dead socket lies."""
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(UsageError, match="cannot listen on unix:"):
        server(loop, path=str(path))
    assert path.read_text() == "precious"
    path.unlink()
    socket.socket(socket.AF_UNIX).bind(str(path))
    server(loop, path=str(path))[0].close()


def test_a_file_gets_what_is_written(loop: IoThread, tmp_path: Path) -> None:
    """-serial file: writes all there is before it is closed; append keeps what was there."""
    path = tmp_path / "log"
    for append in (False, True):
        chardev = make({"backend": "file", "id": "c", "path": str(path), "append": append})
        chardev.open(loop)
        for number in range(1000):
            chardev.write(b"%03d," % number)
        chardev.close()
    assert path.read_bytes() == b"".join(b"%03d," % number for number in range(1000)) * 2


class Recorder(Chardev):
    """A device that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__("r")
        self.written = b""

    def write(self, data: bytes) -> None:
        self.written += data


def muxed() -> tuple[Mux, Recorder, list[bytes], list[bytes], list[str]]:
    below, quits = Recorder(), []
    mux = Mux(below, lambda: quits.append("quit"))
    serial, monitor = mux.channel(), mux.channel()
    typed_serial: list[bytes] = []
    typed_monitor: list[bytes] = []
    serial.connect(typed_serial.append)
    monitor.connect(typed_monitor.append)
    return mux, below, typed_serial, typed_monitor, quits


@pytest.mark.parametrize("step", [1, 2, 100])
def test_ctrl_a_commands(step: int) -> None:
    """However the keys arrive: Ctrl-a c switches, Ctrl-a Ctrl-a is one Ctrl-a, Ctrl-a x ends, other keys pass."""
    mux, below, serial, monitor, quits = muxed()
    keys = b"ls\r\x01\x01\x01cinfo status\r\x01cback\x01h\x01x"
    for at in range(0, len(keys), step):
        mux.input(keys[at : at + step])
    assert b"".join(serial) == b"ls\r\x01back"
    assert b"".join(monitor) == b"info status\r"
    assert quits == ["quit"]
    assert b"C-a x" in below.written


def test_time_stamps_stand_before_lines() -> None:
    """Ctrl-a t puts the time before each line of output, whole lines or parts."""
    mux, below, *_ = muxed()
    mux.input(b"\x01t")
    mux.output(b"one\ntw")
    mux.output(b"o\n")
    lines = below.written.splitlines()
    assert [line.partition(b"] ")[2] for line in lines] == [b"one", b"two"]
    assert all(line.startswith(b"[00:00:0") for line in lines)


@pytest.mark.parametrize("regular", [False, True], ids=["pipe", "file"])
def test_what_is_piped_in_comes_after_the_opening(loop: IoThread, tmp_path: Path, regular: bool) -> None:
    """Bytes that wait already when a stream begins are handed on after *on_open*, all of them, and the end after them;
    it makes no difference whether they come from a pipe or from a file."""
    from vm_core.chardev.stream import Stream

    text = b"command\n" * 2000
    for _ in range(30):
        if regular:
            (tmp_path / "in").write_bytes(text)
            reading = os.open(tmp_path / "in", os.O_RDONLY)
        else:
            reading, writing = os.pipe()
            os.write(writing, text)
            os.close(writing)
        seen: list[bytes | str] = []
        stream = Stream("c")
        stream.connect(
            lambda data, seen=seen: seen.append(data),  # type: ignore[misc]
            lambda seen=seen: seen.append("open"),  # type: ignore[misc]
            lambda seen=seen: seen.append("end"),  # type: ignore[misc]
        )
        stream.start(loop, reading, None)
        until(lambda seen=seen: "end" in seen)  # type: ignore[misc]
        assert (seen[0], seen[-1]) == ("open", "end")
        assert b"".join(piece for piece in seen if isinstance(piece, bytes)) == text
        stream.close()
        os.close(reading)


def test_commands_that_are_piped_in_are_answered(loop: IoThread, tmp_path: Path) -> None:
    """``printf … | vm -qmp stdio``: commands are carried out and answered although the input has ended long ago."""
    from types import SimpleNamespace

    from vm_core.chardev.stream import Stream
    from vm_core.machine.events import EventHub
    from vm_core.qmp.monitor import CommandThread, Monitor
    from vm_core.qmp.server import QmpServer

    reading, writing = os.pipe()
    os.write(writing, b'{"execute": "qmp_capabilities"}' + b'{"execute": "query-name"}' * 20)
    os.close(writing)
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    machine: Any = SimpleNamespace(events=EventHub())
    thread = CommandThread(running=False)
    stream = Stream("c")
    QmpServer(stream, Monitor(machine, name="foo"), thread)
    ended: list[bool] = []
    told = stream.on_close
    stream.on_close = lambda: (told(), ended.append(True))
    stream.start(loop, reading, out)
    until(lambda: ended)
    thread.start()
    until(lambda: (tmp_path / "out").read_bytes().count(b'"foo"') == 20)
    thread.close()
    stream.close()
    os.close(out)
    os.close(reading)
