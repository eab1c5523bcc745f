"""Getting a vCPU back, and signals of guest writes without an exit."""

from __future__ import annotations

import os
import random
import select
import signal
import statistics
import threading
import time

from kvm_guest import DONE, Recorder, guest, needs_kvm, until

from vm_core.machine.memory import Region, RegionKind
from vm_kvm import kick

pytestmark = needs_kvm

FINISH = bytes((0xB0, 0x01, 0xE6, DONE))  # mov al, 1; out DONE, al
#: 1: inc dword [0x3000]; jmp 1
SPIN = b"\x66\xff\x06\x00\x30\xeb\xf9"


def test_a_guest_that_never_exits_is_interrupted() -> None:
    """A loop without any exit gives its thread back within a fraction of a second of the kick, and can go on."""
    with guest(SPIN) as g:
        latencies = []
        for _ in range(10):
            before = g.memory.read(0x3000, 4)
            with g.running():
                until(lambda before=before: g.memory.read(0x3000, 4) != before)
                start = time.perf_counter()
                g.halt()
                until(lambda: g.cpus[0]._thread is None)
                latencies.append(time.perf_counter() - start)
        assert statistics.median(latencies) < 0.1


def test_no_kick_is_lost() -> None:
    """Kicks at arbitrary instants, many of them before or just as KVM_RUN begins, always end the run."""
    generator = random.Random(7)
    with guest(b"\xeb\xfe") as g:  # jmp .
        vcpu = g.cpus[0]
        for _ in range(300):
            g._stop = False
            thread = threading.Thread(target=vcpu.run, daemon=True)
            thread.start()
            for _ in range(generator.randrange(200)):
                pass
            g.halt()
            thread.join(5)
            assert not thread.is_alive()


def test_a_kick_without_a_reason_changes_nothing() -> None:
    """A vCPU that is kicked while the machine runs goes on, and does so after a thousand kicks."""
    with guest(SPIN) as g, g.running():
        for _ in range(1000):
            g.cpus[0].kick()
        before = g.memory.read(0x3000, 4)
        until(lambda: g.memory.read(0x3000, 4) != before)
        assert g.cpus[0]._thread is not None


def test_a_kick_interrupts_no_other_call_of_the_thread() -> None:
    """The signal neither ends a blocking read of the thread nor runs a Python handler."""
    kick.install_handler()
    inlet, outlet = os.pipe()
    got: list[bytes] = []
    thread = threading.Thread(target=lambda: got.append(os.read(inlet, 1)), daemon=True)
    thread.start()
    assert thread.ident is not None
    for _ in range(20):
        signal.pthread_kill(thread.ident, kick.KICK_SIGNAL)
        time.sleep(0.001)
    os.write(outlet, b"x")
    thread.join(5)
    assert got == [b"x"]
    os.close(inlet)
    os.close(outlet)


def test_writes_to_a_bound_port_signal_the_eventfd_instead_of_the_handler() -> None:
    """A bound port write reaches the eventfd and no handler; another value, or after unbinding, the handler."""
    code = (
        b"\xba\x00\x03\xb8\x05\x00\xef\xef"  # mov dx, 0x300; mov ax, 5; out dx, ax; out dx, ax
        b"\xb8\x06\x00\xef"  # mov ax, 6; out dx, ax
    ) + FINISH
    with guest(code) as g:
        handler = Recorder()
        g.ports.add(0x300, 2, handler)
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        assert g.accel.bind_kick(0x300, 2, fd, port=True, value=5)
        g.run()
        assert os.eventfd_read(fd) == 2
        assert handler.log == [("w", 0, 2, 6)]
        g.accel.unbind_kick(0x300, 2, fd, port=True, value=5)
        g.accel.unbind_kick(0x300, 2, fd, port=True, value=5)  # what is not bound is left alone
        g.reset()
        handler.log.clear()
        g.run()
        assert handler.log == [("w", 0, 2, 5), ("w", 0, 2, 5), ("w", 0, 2, 6)]
        os.close(fd)


def test_writes_to_bound_memory_signal_the_eventfd() -> None:
    """A write of any size to a bound address in a register range reaches the eventfd; its neighbour the handler."""
    code = (
        b"\xb8\x00\xb0\x8e\xd8"  # mov ax, 0xb000; mov ds, ax
        b"\xc7\x06\x10\x00\x01\x00"  # mov word [0x10], 1
        b"\xc6\x06\x10\x00\x02"  # mov byte [0x10], 2
        b"\xc7\x06\x14\x00\x03\x00"  # mov word [0x14], 3
    ) + FINISH
    with guest(code) as g:
        handler = Recorder()
        g.memory.add(Region("dev", 0xB0000, 0x1000, RegionKind.MMIO, handler=handler, priority=1))
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        assert g.accel.bind_kick(0xB0010, 0, fd, port=False)
        g.run()
        assert os.eventfd_read(fd) == 2
        assert handler.log == [("w", 0x14, 2, 3)]
        os.close(fd)


def test_an_address_is_bound_once() -> None:
    """A second eventfd at the same address and value is refused, so that the caller keeps its handler."""
    with guest(FINISH) as g:
        fds = [os.eventfd(0) for _ in range(2)]
        assert g.accel.bind_kick(0x300, 2, fds[0], port=True)
        assert not g.accel.bind_kick(0x300, 2, fds[1], port=True)
        for fd in fds:
            os.close(fd)


def test_a_waiting_thread_wakes_while_the_guest_runs_on() -> None:
    """The I/O thread's poll wakes for a bound kick while the vCPU stays inside the guest."""
    code = b"\xba\x00\x03\xef" + SPIN  # mov dx, 0x300; out dx, ax
    with guest(code) as g:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        assert g.accel.bind_kick(0x300, 2, fd, port=True)
        with g.running():
            assert select.select([fd], [], [], 5)[0] == [fd]
            before = g.memory.read(0x3000, 4)
            until(lambda: g.memory.read(0x3000, 4) != before)
        os.close(fd)
