"""The device on a real machine's threads: I/O thread, worker threads, a raw file; the driver on a thread of its own."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.backend import BlockBackend
from vm_core.block.cache import CacheMode
from vm_core.block.open import open_node
from vm_core.devices.pci import PciBus
from vm_core.machine.machine import Machine
from vm_core.machine.memory import GuestMemory, Region, RegionKind
from vm_core.testing.virtio import BlockDriver, Heap, LegacyPci, ModernPci, PciAccess, Pending
from vm_virtio_blk.pci import VirtioBlkPci

SIZE = 4 << 20
RAM = 64 << 20

Boot = Callable[..., tuple[Machine, BlockBackend, BlockDriver]]


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Boot]:
    """A running machine without a CPU that has one disk, and a started driver of it."""
    ends: list[Callable[[], object]] = []

    def make(
        cache: str = "writeback", legacy: bool = False, **options: Any
    ) -> tuple[Machine, BlockBackend, BlockDriver]:
        path = tmp_path / "disk.raw"
        path.write_bytes(bytes(SIZE))
        mode = CacheMode.parse(cache)
        node = open_node(str(path), readonly=False, cache=mode, format="raw")
        backend = BlockBackend(node, cache=mode)
        machine = Machine(GuestMemory(RAM))
        machine.memory.add(Region("ram", 0, RAM, RegionKind.RAM))
        bus = PciBus()
        machine.add_bus(bus)
        device = VirtioBlkPci("disk", dict(options), backend)
        machine.attach_backend(backend)
        device.realize(machine, bus, "4.0")
        machine.devices["disk"] = device
        machine.start()
        ends.extend((machine.close, backend.close))
        kind = LegacyPci if legacy else ModernPci
        pci = kind(PciAccess(machine, 4), Heap(1 << 20, RAM))
        pci.start()
        return machine, backend, BlockDriver(pci, lambda: time.sleep(0.0001))

    yield make
    for end in ends:
        end()


@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough", "directsync", "unsafe"])
@pytest.mark.parametrize("packed", ["on", "off"])
@pytest.mark.parametrize("ioeventfd", ["on", "off"])
def test_a_busy_disk_keeps_its_contents(boot: Boot, tmp_path: Path, cache: str, packed: str, ioeventfd: str) -> None:
    """Many requests under way over two queues, in every cache mode: what was written is read, and is in the file."""
    _, _, disk = boot(cache, **{"packed": packed, "num-queues": 2, "ioeventfd": ioeventfd})
    rng = random.Random(2)
    model = bytearray(SIZE)
    for _ in range(12):
        busy: set[int] = set()
        sent: list[tuple[Pending, bytes]] = []
        for _ in range(20):
            count = rng.choice([1, 8, 64])
            sector = rng.randrange(SIZE // 512 - count)
            if busy & set(range(sector, sector + count)):
                continue
            busy |= set(range(sector, sector + count))
            at = slice(512 * sector, 512 * (sector + count))
            queue = rng.randrange(2)
            if rng.random() < 0.5:
                model[at] = rng.randbytes(512 * count)
                sent.append((disk.send(disk.OUT, sector, data=bytes(model[at]), queue=queue), b""))
            else:
                sent.append((disk.send(disk.IN, sector, length=512 * count, queue=queue), bytes(model[at])))
        sent.append((disk.send(disk.FLUSH), b""))
        for pending, data in sent:
            assert disk.wait(pending, 20) == (0, data)
    assert (tmp_path / "disk.raw").read_bytes() == model


@pytest.mark.parametrize("legacy", [False, True], ids=["modern", "legacy"])
def test_resets_in_the_middle_of_everything(boot: Boot, legacy: bool) -> None:
    """Resetting with requests in flight, again and again, loses nothing, hangs nothing and touches no old memory."""
    machine, backend, disk = boot("none", legacy=legacy)
    content = random.Random(4).randbytes(SIZE)
    for at in range(0, SIZE, 1 << 18):
        disk.write(at // 512, content[at : at + (1 << 18)])
    for turn in range(25):
        heap = disk.pci.heap
        heap.next = 8 << 20
        sent = [disk.send(disk.IN, 256 * i, length=256 * 512) for i in range(8)]
        time.sleep(0.0005 * (turn % 5))
        disk.pci.status = 0
        while disk.pci.status:
            time.sleep(0.0001)
        # The memory is the driver's again: nobody may write to it.
        for pending in sent:
            (room,) = pending.data
            machine.memory.view(room.address, room.length + 1)[:] = b"\x55" * (room.length + 1)
        heap.next = 16 << 20
        disk._used.clear()
        disk.pci.start()
        assert disk.read(256 * (turn % 32), 256) == content[(turn % 32) << 17 : (turn % 32 + 1) << 17]
        for pending in sent:
            (room,) = pending.data
            assert machine.memory.read(room.address, room.length + 1) == b"\x55" * (room.length + 1)
    assert backend.drain(5)


def test_pausing_and_resetting_the_machine(boot: Boot) -> None:
    """A pause waits for requests and answers them; a system reset leaves a disk that works."""
    machine, backend, disk = boot()
    sent = [disk.send(disk.OUT, 8 * i, data=bytes([i]) * 4096) for i in range(16)]
    machine.stop()
    assert backend.inflight == 0
    machine.cont()
    assert [disk.wait(p)[0] for p in sent] == [0] * 16
    machine.system_reset()
    assert disk.pci.access.read(4, 2) == 0
    disk.pci = ModernPci(disk.pci.access, Heap(16 << 20, RAM))
    disk.pci.start()
    assert disk.read(8, 8) == bytes([1]) * 4096
