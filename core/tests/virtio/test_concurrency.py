"""Both sides of a ring on two processors at once: the driver is another process that shares the memory."""

from __future__ import annotations

import os
import random
import select
import signal
import time

import pytest

from vm_core.devices.virtio.chain import Ring
from vm_core.devices.virtio.packed import PackedRing
from vm_core.devices.virtio.ram import GuestRam
from vm_core.devices.virtio.split import SplitRing
from vm_core.machine.memory import GuestMemory, Region, RegionKind
from vm_core.testing.virtio import DriverRing, Heap, PackedDriver, Part, SplitDriver, packed_layout, split_layout

CHAINS = 20_000
#: Seconds without a wakeup that mean it was lost.
LOST = 5.0

pytestmark = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="needs eventfds")


def wait(fd: int) -> bool:
    """Wait for a signal; False: none came."""
    if not select.select([fd], [], [], LOST)[0]:
        return False
    os.eventfd_read(fd)
    return True


def drive(driver: DriverRing, kick: int, interrupt: int) -> int:
    """The driver: sends chains, sleeps when it likes, and must be woken. Returns its exit status."""
    rng = random.Random(1)
    sent = answered = 0
    while answered < CHAINS:
        added = 0
        while driver.room >= 2 and sent < CHAINS and added < rng.choice([1, 1, 2, 5]):
            driver.add([Part(0x10000, 8), Part(0x20000, 8, True)])
            sent += 1
            added += 1
        if added and driver.publish():
            os.eventfd_write(kick, 1)
        answered += len(driver.collect())
        if answered < sent and (driver.room < 2 or sent == CHAINS or rng.random() < 0.3):
            if not driver.enable_interrupts() and not wait(interrupt):
                return 2
            driver.disable_interrupts()
    return 0


def serve(device: Ring, kick: int, interrupt: int, child: int) -> None:
    """The device: sleeps whenever nothing is there, and must be woken."""
    served = 0
    while served < CHAINS:
        chains = device.pop()
        if chains:
            device.disable_kicks()
            served += len(chains)
            if device.push([(chain, 8) for chain in chains]):
                os.eventfd_write(interrupt, 1)
        elif not device.enable_kicks():
            assert wait(kick), f"no kick after {served} chains"


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event-idx"])
def test_no_wakeup_is_lost_between_processors(packed: bool, event_idx: bool) -> None:
    """Twenty thousand chains with both sides falling asleep all the time arrive without a hang."""
    memory = GuestMemory(1 << 20)
    memory.add(Region("ram", 0, 1 << 20, RegionKind.RAM))
    heap = Heap(4096, 1 << 20)
    layout = (packed_layout if packed else split_layout)(8, heap, event_idx=event_idx)
    driver = (PackedDriver if packed else SplitDriver)(layout, memory, heap)
    device: Ring = (PackedRing if packed else SplitRing)(layout, GuestRam.of(memory))
    kick, interrupt = os.eventfd(0), os.eventfd(0)
    child = os.fork()
    if child == 0:
        status = 3
        try:
            status = drive(driver, kick, interrupt)
        finally:
            os._exit(status)
    try:
        serve(device, kick, interrupt, child)
        deadline = time.monotonic() + LOST + 1
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done or time.monotonic() > deadline:
                break
            time.sleep(0.01)
        assert done, "the driver hangs"
        child = 0
        assert os.waitstatus_to_exitcode(status) == 0, "the driver waited for an interrupt that never came"
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(kick)
        os.close(interrupt)
