"""The drives on a real machine's threads: I/O thread, worker threads, image files; the driver on its own thread."""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vm_core.block.backend import BlockBackend
from vm_core.block.cache import CacheMode
from vm_core.block.open import open_node
from vm_core.devices.pci import PciBus
from vm_core.machine.machine import Machine
from vm_core.machine.memory import GuestMemory, Region, RegionKind
from vm_core.testing.ata import AtaDriver, CheckConditionError, descriptors
from vm_ide.controller import PiixIde
from vm_ide.devices import IdeCdRom, IdeDisk

SECTORS = 4096
RAM = 8 << 20
TABLE_AT, DATA_AT = 0x100000, 0x200000


class LockedPorts:
    """A machine's ports, as a vCPU uses them: with the lock held."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def inb(self, port: int) -> int:
        with self.machine.lock:
            return self.machine.ports.read(port, 1)

    def outb(self, port: int, value: int) -> None:
        with self.machine.lock:
            self.machine.ports.write(port, 1, value)

    def outl(self, port: int, value: int) -> None:
        with self.machine.lock:
            self.machine.ports.write(port, 4, value)

    def insw(self, port: int, count: int) -> bytes:
        with self.machine.lock:
            return self.machine.ports.read_block(port, 2, count)

    def outsw(self, port: int, data: bytes) -> None:
        with self.machine.lock:
            self.machine.ports.write_block(port, 2, data)

    def poll(self) -> None:
        time.sleep(0.0001)


class Running:
    """A running machine without a CPU: a disk on ide.0, a CD-ROM on ide.1."""

    def __init__(self, folder: Path, cache: str) -> None:
        self.path, disc = folder / "disk.raw", folder / "disc.iso"
        self.path.write_bytes(os.urandom(SECTORS * 512))
        disc.write_bytes(os.urandom(500 * 2048))
        self.disc = disc.read_bytes()
        mode = CacheMode.parse(cache)
        self.backends = [
            BlockBackend(open_node(str(self.path), readonly=False, cache=mode, format="raw"), cache=mode),
            BlockBackend(open_node(str(disc), readonly=True, format="raw"), readonly=True, removable=True),
        ]
        self.machine = machine = Machine(GuestMemory(RAM))
        machine.memory.add(Region("ram", 0, RAM, RegionKind.RAM))
        bus = PciBus()
        machine.add_bus(bus)
        controller = PiixIde("ide", {})
        controller.realize(machine, bus, "1.1")
        machine.devices["ide"] = controller
        disk, cd = IdeDisk("disk", {}, self.backends[0]), IdeCdRom("cd", {}, self.backends[1])
        for device, place in ((disk, "ide.0"), (cd, "ide.1")):
            machine.attach_backend(device.need_backend())
            device.realize(machine, machine.buses[place], "0")
            machine.devices[device.id] = device
        machine.start()
        with machine.lock:
            controller.write_config(0x20, 4, 0xC000)
            controller.write_config(0x04, 2, 5)
        ports = LockedPorts(machine)
        self.disk = AtaDriver(ports)
        self.cd = AtaDriver(ports, command=0x170, control=0x376, busmaster=0xC008)

    def close(self) -> None:
        self.machine.close()
        for backend in self.backends:
            backend.close()


@pytest.fixture
def boot(tmp_path: Path) -> Iterator[Callable[[str], Running]]:
    made: list[Running] = []

    def make(cache: str) -> Running:
        made.append(Running(tmp_path, cache))
        return made[-1]

    yield make
    for running in made:
        running.close()


@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough", "unsafe"])
def test_random_reads_and_writes(boot: Callable[[str], Running], cache: str) -> None:
    """A hundred random PIO and DMA operations on a file agree with a bytearray, and so does the file afterwards."""
    running = boot(cache)
    driver, memory = running.disk, running.machine.memory
    model = bytearray(running.path.read_bytes())
    chance = random.Random(cache)
    for _ in range(100):
        count = chance.randint(1, 200)
        lba = chance.randrange(SECTORS - count)
        span = slice(512 * lba, 512 * (lba + count))
        data = chance.randbytes(512 * count)
        way = chance.randrange(4)
        if way == 0:
            assert driver.read_sectors(lba, count) == model[span]
        elif way == 1:
            driver.write_sectors(lba, data)
            model[span] = data
        else:
            half = 256 * count
            pieces = [(DATA_AT, half), (DATA_AT + 0x40000, half)]
            runs = [(at + i, min(0x10000, half - i)) for at, _ in pieces for i in range(0, half, 0x10000)]
            memory.write(TABLE_AT, descriptors(runs))
            if way == 2:
                driver.dma(0xC8, TABLE_AT, to_memory=True, lba=lba, count=count)
                assert b"".join(memory.read(at, length) for at, length in pieces) == model[span]
            else:
                memory.write(DATA_AT, data[:half])
                memory.write(DATA_AT + 0x40000, data[half:])
                driver.dma(0xCA, TABLE_AT, to_memory=False, lba=lba, count=count)
                model[span] = data
    driver.non_data(0xE7)
    assert running.path.read_bytes() == model


def test_resets_among_transfers(boot: Callable[[str], Running]) -> None:
    """Software resets at any moment of a transfer leave a drive that works, and a disk that was only read."""
    running = boot("none")
    driver = running.disk
    before = running.path.read_bytes()
    chance = random.Random(5)
    running.machine.memory.write(TABLE_AT, descriptors([(DATA_AT, 0x10000)]))
    for _ in range(60):
        driver.ports.outl(0xC004, TABLE_AT)
        driver.issue(chance.choice([0x20, 0xC8]), lba=chance.randrange(SECTORS - 128), count=128)
        driver.ports.outb(0xC000, 9)
        time.sleep(chance.choice([0, 0, 0.0002]))
        driver.reset()
        driver.ports.outb(0xC000, 0)
        assert driver.ports.inb(0xC002) & 1 == 0
        lba = chance.randrange(SECTORS)
        assert driver.read_sectors(lba, 1) == before[512 * lba : 512 * lba + 512]
    assert running.path.read_bytes() == before


def test_a_disc(boot: Callable[[str], Running]) -> None:
    """A CD-ROM is read by PIO and by DMA from a file, ejected by the guest and loaded again."""
    running = boot("writeback")
    cd, memory = running.cd, running.machine.memory
    with pytest.raises(CheckConditionError):
        cd.packet(b"\0")
    assert cd.packet(struct.pack(">BxIxH", 0x28, 7, 100)) == running.disc[7 * 2048 : 107 * 2048]
    memory.write(TABLE_AT, descriptors([(DATA_AT, 0x10000), (DATA_AT + 0x10000, 0x10000)]))
    cd.packet(struct.pack(">BxIxH", 0x28, 9, 60), dma=True, table=TABLE_AT)
    assert memory.read(DATA_AT, 60 * 2048) == running.disc[9 * 2048 : 69 * 2048]
    cd.packet(struct.pack(">BBBxB", 0x12, 1, 0x80, 255), dma=True, table=TABLE_AT)
    assert memory.read(DATA_AT + 4, 7) == b"QM00003"
    cd.packet(b"\x1b\0\0\0\x02")
    assert running.backends[1].tray_open
    with pytest.raises(CheckConditionError, match="2/3a/02"):
        cd.packet(b"\0")
    cd.packet(b"\x1b\0\0\0\x03")
    with pytest.raises(CheckConditionError, match="6/28/00"):
        cd.packet(b"\0")
    cd.packet(b"\0")


def test_the_write_cache_switch(boot: Callable[[str], Running]) -> None:
    """SET FEATURES reaches the backend, and a system reset restores what the user chose."""
    running = boot("writeback")
    running.disk.non_data(0xEF, features=0x82)
    assert not running.backends[0].write_cache
    running.disk.write_sectors(1, b"w" * 512)
    running.machine.system_reset()
    assert running.backends[0].write_cache
