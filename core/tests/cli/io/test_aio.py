"""Asynchronous requests run side by side, and are reported in an order that can be relied on."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic, sleep

import pytest

from vm_core.block import waiting
from vm_core.cli.io.aio import HEAD_START, Queue
from vm_core.cli.io.texts import BadNumberError, clock, dump, human, parse_c_number, parse_size, report


def test_quick_requests_finish_in_order() -> None:
    """A thousand requests that do not wait are carried out and reported in the order of submission."""
    out = io.StringIO()
    queue = Queue(out)
    ran: list[int] = []

    def work(number: int) -> str:
        ran.append(number)
        return f"{number}\n"

    for number in range(1000):
        queue.submit(lambda number=number: work(number))  # type: ignore[misc]
    queue.flush()
    queue.stop()
    assert ran == list(range(1000))
    assert out.getvalue() == "".join(f"{number}\n" for number in range(1000))


def test_requests_that_wait_run_side_by_side() -> None:
    """Requests that say that they wait do so at the same time, and one that follows overtakes them."""
    out = io.StringIO()
    queue = Queue(out)
    together = threading.Barrier(20)

    def wait() -> str:
        waiting.announce()
        together.wait(10)
        sleep(0.05)
        return "waited\n"

    for _ in range(20):
        queue.submit(wait)
    queue.submit(lambda: "quick\n")
    queue.flush()
    queue.stop()
    assert out.getvalue() == "quick\n" + "waited\n" * 20


def test_a_slow_request_holds_up_others_only_for_its_head_start() -> None:
    """One that takes long without a word lets the next start after a moment."""
    out = io.StringIO()
    queue = Queue(out)
    go = threading.Event()

    def slow() -> str:
        go.wait(10)
        return "slow\n"

    before = monotonic()
    queue.submit(slow)
    queue.submit(lambda: "next\n")
    while "next" not in out.getvalue() and monotonic() < before + 5:
        queue.wait(0.01)
    assert HEAD_START <= monotonic() - before < 5
    go.set()
    queue.flush()
    queue.stop()
    assert out.getvalue() == "next\nslow\n"


@pytest.mark.parametrize("trial", range(3))
def test_concurrent_writes_leave_a_sound_image(trial: int, tmp_path: Path) -> None:
    """Hundreds of writes in flight to shared and fresh clusters end as their sequence would."""
    pytest.importorskip("vm_qcow2")
    from vm_core.block.open import create_image, open_node

    path = tmp_path / "a.qcow2"
    create_image(str(path), "qcow2", 8 << 20)
    lines = []
    model = bytearray(8 << 20)
    for number in range(300):
        offset, length = number * 7 * 3000 % (7 << 20), 3000
        lines.append(f"aio_write -q -P {number % 255 + 1} {offset} {length}")
        model[offset : offset + length] = bytes([number % 255 + 1]) * length
    script = "\n".join([*lines, "aio_flush", ""])
    done = subprocess.run(
        [sys.executable, "-m", "vm_core.cli.io.main", "-t", "writeback", str(path)],
        input=script.encode(),
        capture_output=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    with open_node(str(path)) as node:
        assert node.pread(0, node.size) == model
        assert not node.format.check().get("corruptions")  # type: ignore[attr-defined]


def test_words_for_sizes_and_times() -> None:
    """Sizes, durations and reports read as the peer prints them."""
    assert human(512) == "512 bytes"
    assert human(1536) == "1.500 KiB"
    assert human(0.040791) == "0.040791 bytes"
    assert human(5 << 60) == "5 EiB"
    assert clock(10_000_000, full=False) == "00.01 sec"
    assert clock(1_500_000_000, full=False) == "0:00:01.50"
    assert clock(0, full=True) == "0:00:00.00"
    assert report("read", 0, 65536, 65536, 1, 1_000_000_000, bare=False).startswith(
        "read 65536/65536 bytes at offset 0\n"
    )
    assert report("read", 0, 512, 512, 1, 500_000_000, bare=True) == "512,1,0:00:00.50,1024.000,2.000\n"
    assert dump(memoryview(b"Hello, World_09 az"), 16) == (
        "00000010:  48 65 6c 6c 6f 2c 20 57 6f 72 6c 64 5f 30 39 20  Hello..World.09.\n00000020:  61 7a  az\n"
    )


def test_numbers_as_c_reads_them() -> None:
    """Decimal, octal and hexadecimal, with a sign; anything else is none."""
    assert [parse_c_number(text) for text in ("10", "010", "0x10", "-1", "+3", "0")] == [10, 8, 16, -1, 3, 0]
    assert [parse_c_number(text) for text in ("", "x", "08", "1k", "0x", "1.0")] == [None] * 6
    assert parse_size("1.5k", "vm-io") == 1536
    with pytest.raises(BadNumberError, match="too large"):
        parse_size("8E", "vm-io")


def test_interrupt_leaves_no_traceback(tmp_path: Path) -> None:
    """Ctrl-C ends the program quietly, whatever it waits for."""
    import signal

    (tmp_path / "a.img").write_bytes(bytes(4096))
    process = subprocess.Popen(
        [sys.executable, "-m", "vm_core.cli.io.main", "-f", "raw", "-c", "sleep 60000", str(tmp_path / "a.img")],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"Traceback" not in err
