"""Clock, timers and the I/O thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest

from vm_core.machine.clock import Clock, ManualClock
from vm_core.machine.iothread import IoThread

MS = 1_000_000


@pytest.fixture
def io() -> Iterator[IoThread]:
    errors: list[BaseException] = []
    thread = IoThread(errors.append)
    thread.start()
    yield thread
    thread.close()
    assert not errors


def test_functions_run_in_order_on_the_thread(io: IoThread) -> None:
    """call_soon keeps the order of one caller and runs everything on the I/O thread."""
    seen: list[tuple[int, bool]] = []
    for n in range(1000):
        io.call_soon(lambda n=n: seen.append((n, io.current)))  # type: ignore[misc]
    io.call(lambda: None)
    assert seen == [(n, True) for n in range(1000)]


def test_many_functions_cost_one_wake_up() -> None:
    """Functions queued while the loop is busy are run by one wake-up."""
    io = IoThread(lambda error: None)
    io.start()
    wakes = 0
    assert io._loop is not None
    original = io._loop.call_soon_threadsafe

    def count(*args: object) -> object:
        nonlocal wakes
        wakes += 1
        return original(*args)  # type: ignore[arg-type]

    io._loop.call_soon_threadsafe = count  # type: ignore[assignment, method-assign]
    busy, done = threading.Event(), threading.Event()
    io.call_soon(busy.wait)
    time.sleep(0.05)
    before = wakes
    for _ in range(500):
        io.call_soon(lambda: None)
    io.call_soon(done.set)
    busy.set()
    assert done.wait(5)
    assert wakes - before <= 1
    io.close()


def test_no_function_is_forgotten_under_load(io: IoThread) -> None:
    """Functions of several threads all run, whatever the timing of queue and wake-up."""
    count = 0

    def add() -> None:
        nonlocal count
        count += 1

    def work() -> None:
        for n in range(2000):
            io.call_soon(add)
            if n % 100 == 0:
                time.sleep(0.0005)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    io.call(lambda: None)
    assert count == 8000


def test_call_returns_results_and_errors(io: IoThread) -> None:
    """call gives the function's result back, and raises what it raised."""
    assert io.call(lambda: 42) == 42
    with pytest.raises(ZeroDivisionError):
        io.call(lambda: 1 // 0)


def test_readers_are_called_until_removed(io: IoThread) -> None:
    """A descriptor's reader runs on the I/O thread when there is something to read."""
    receive, send = os.pipe()
    got: list[bytes] = []
    arrived = threading.Event()

    def read() -> None:
        got.append(os.read(receive, 100))
        arrived.set()

    io.add_reader(receive, read)
    os.write(send, b"one")
    assert arrived.wait(5)
    io.remove_reader(receive)
    io.call(lambda: None)
    os.write(send, b"two")
    time.sleep(0.05)
    assert got == [b"one"]
    os.close(receive)
    os.close(send)


def test_an_error_is_reported_and_the_loop_goes_on() -> None:
    """What a callback raises goes to on_error; the next one runs."""
    errors: list[BaseException] = []
    io = IoThread(errors.append)
    io.start()
    io.call_soon(lambda: 1 // 0)
    assert io.call(lambda: "still there") == "still there"
    io.close()
    assert isinstance(errors[0], ZeroDivisionError)


@pytest.mark.parametrize("descriptor", [True, False])
def test_timers_go_off_in_time(io: IoThread, descriptor: bool) -> None:
    """A timer is called on the I/O thread, not early and soon after, with a timer descriptor or without."""
    io.call(lambda: None)
    if not descriptor:
        timer, io._timer = io._timer, None
        if timer is not None:
            timer.set(None)
    lock = threading.RLock()
    clock = Clock(io)

    def run() -> None:
        with lock:
            clock.run_due()

    io.on_alarm = run
    late: list[int] = []
    done = threading.Event()
    deadlines = [5 * MS, 2 * MS, 11 * MS]

    def make(at: int) -> None:
        def ring() -> None:
            assert io.current
            late.append(clock.now_ns() - at)
            if len(late) == len(deadlines):
                done.set()

        clock.timer(ring).arm(at)

    with lock:
        for at in deadlines:
            make(at)
        clock.start()
    assert done.wait(5)
    assert all(0 <= each < 500 * MS for each in late)
    if descriptor and io._timer is not None:
        assert min(late) < 5 * MS
    if not descriptor and timer is not None:
        io._timer = timer


def test_time_stands_still_while_stopped() -> None:
    """A stopped clock shows the same time, and its timers wait."""
    clock = Clock()
    clock.start()
    time.sleep(0.002)
    clock.stop()
    now = clock.now_ns()
    assert now >= 2 * MS
    time.sleep(0.002)
    assert clock.now_ns() == now
    clock.start()
    assert now <= clock.now_ns() < now + 1000 * MS


def test_timers_in_order_with_cancel_and_rearm() -> None:
    """Timers fire in the order of their deadlines; armed again the old deadline is void; cancelled never."""
    clock = ManualClock()
    seen: list[tuple[str, int]] = []
    timers = {name: clock.timer(lambda name=name: seen.append((name, clock.now_ns()))) for name in "abc"}  # type: ignore[misc]
    timers["a"].arm(30)
    timers["b"].arm(20)
    timers["c"].arm(10)
    timers["a"].arm(5)
    timers["c"].cancel()
    clock.advance(100)
    assert seen == [("a", 5), ("b", 20)]
    assert clock.next_deadline_ns() is None


def test_a_timer_that_is_armed_often_does_not_pile_up() -> None:
    """Forgotten entries are dropped, so memory stays bounded."""
    clock = ManualClock()
    timer = clock.timer(lambda: None)
    for n in range(100_000):
        timer.arm(1_000_000 + n)
    assert len(clock._heap) < 10_000
    assert clock.next_deadline_ns() == 1_099_999
