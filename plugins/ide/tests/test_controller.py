"""The controller: configuration space, ports, buses, places, and the life of its drives in a machine."""

from __future__ import annotations

import os
from typing import Any

import pytest

from vm_core.devices.pci import DmaError
from vm_core.errors import UsageError
from vm_core.testing.ata import Tray, descriptors
from vm_core.testing.backend import MemoryBackend
from vm_ide.controller import PiixIde
from vm_ide.devices import IdeCdRom, IdeDisk
from vm_ide.plugin import vm_device_frontends

from .conftest import Board

TABLE_AT, DATA_AT = 0x100000, 0x200000


def test_identity(board: Board) -> None:
    """8086:7010, class 0x010180 revision 0, no interrupt pin, one port window of 16 bytes at bar 4."""
    config = board.controller.read_config
    assert config(0, 4) == 0x70108086
    assert config(8, 4) == 0x01018000
    assert config(0x3D, 1) == 0
    board.controller.write_config(0x20, 4, 0xFFFFFFFF)
    assert config(0x20, 4) == 0xFFFFFFF1
    for bar in (0, 1, 2, 3, 5):
        board.controller.write_config(0x10 + 4 * bar, 4, 0xFFFFFFFF)
        assert config(0x10 + 4 * bar, 4) == 0


def test_timing_registers(board: Board) -> None:
    """IDETIM and SIDETIM keep what is written, reserved bits aside, and are cleared by a reset."""
    controller = board.controller
    controller.write_config(0x40, 4, 0xFFFFFFFF)
    controller.write_config(0x44, 1, 0xA5)
    assert controller.read_config(0x40, 4) == 0xF3FFF3FF
    assert controller.read_config(0x44, 1) == 0xA5
    with board.lock:
        controller.reset()
    assert controller.read_config(0x40, 4) == 0
    assert controller.read_config(0x44, 1) == 0


def test_interrupts(board: Board) -> None:
    """The primary channel interrupts by line 14, the secondary by 15."""
    board.add_disk(bus=0)
    board.add_disk(bus=1, unit=0)
    for bus, irq in ((0, 14), (1, 15)):
        driver = board.driver(bus)
        driver.issue(0x10)
        assert board.recorder.level[irq]
        driver.finish()
        assert not board.recorder.level[irq]


def test_four_drives_pio_and_dma(board: Board) -> None:
    """Each of the four places has its own disk, by PIO and by DMA of its channel's bus master."""
    disks = [board.add_disk(bus=bus, unit=unit) for bus in (0, 1) for unit in (0, 1)]
    for number, disk in enumerate(disks):
        bus, unit = divmod(number, 2)
        driver = board.driver(bus, unit)
        data = os.urandom(4096)
        driver.write_sectors(number, data)
        backend: Any = disk.backend
        assert backend.data[512 * number : 512 * number + 4096] == data
        board.memory.write(TABLE_AT, descriptors([(DATA_AT, 4096)]))
        assert driver.dma(0xC8, TABLE_AT, to_memory=True, lba=number, count=8) & 7 == 4
        assert board.memory.read(DATA_AT, 4096) == data


def test_bus_mastering_must_be_enabled(board: Board) -> None:
    """With bus mastering off in the command register a transfer ends with the error bit."""
    board.add_disk()
    board.controller.write_config(4, 2, 1)
    with pytest.raises(DmaError):
        board.controller.dma_read(0, 4)
    with pytest.raises(Exception, match="error 0x04"):
        board.driver().dma(0xC8, TABLE_AT, to_memory=True, lba=0, count=1)
    assert board.inb(0xC002) & 2


def test_requests_complete_without_the_lock_and_under_it(board: Board) -> None:
    """The answer of storage is handled on the I/O thread, which takes the device lock."""
    disk = board.add_disk()
    backend: Any = disk.backend
    board.driver().issue(0x20, count=1)
    assert backend.pending
    with board.lock:
        backend.run()
        assert board.inb(0x3F6) & 0x80
    board.poll()
    assert board.inb(0x3F6) == 0x58


def test_an_accelerator_may_have_requests_served_at_once(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kicks are served by the vCPU, what storage answers at once is there when OUT returns."""

    class Accel:
        serve_kicks = True
        ranges: list[Any] = []  # noqa: RUF012

        def dma_written(self, ranges: Any) -> None:
            self.ranges += ranges

    disk = board.add_disk()
    cd = board.add_cdrom(4096)
    board.accel = Accel()  # type: ignore[assignment]
    monkeypatch.setattr(type(board.io), "current", False)  # this thread is a vCPU's
    for device in (disk, cd):
        backend: Any = device.backend
        backend.immediate = True
    board.memory.write(TABLE_AT, descriptors([(DATA_AT, 4096)]))
    driver = board.driver()
    board.outl(0xC004, TABLE_AT)
    driver.issue(0xC8, count=8)
    board.outb(0xC000, 9)
    assert board.inb(0x3F6) == 0x50
    assert Accel.ranges == [(DATA_AT, 4096)]
    reader = board.driver(1)
    reader.packet(b"\x12\0\0\0\x24", dma=True, table=TABLE_AT)
    assert Accel.ranges[1:] == [(DATA_AT, 36)]
    assert board.memory.read(DATA_AT + 8, 4) == b"QEMU"


def test_reset_restores_the_power_on_state(board: Board) -> None:
    """A system reset undoes what the guest chose: write cache, modes, tray lock; and stops the bus master."""
    disk = board.add_disk()
    cd = board.add_cdrom(4096)
    driver = board.driver()
    before = driver.identify()
    driver.non_data(0xEF, features=0x82)
    driver.non_data(0xEF, features=0x03, count=0x20)
    with pytest.raises(Exception, match="6/29"):
        board.driver(1).packet(b"\0")
    board.driver(1).packet(b"\x1e\0\0\0\x01")
    storage: Any = disk.backend
    tray: Any = cd.backend
    assert (storage.write_cache, tray.locked) == (False, True)
    board.outb(0xC000, 9)
    with board.lock:
        for device in board.devices.values():
            device.reset()
    board.map_bars(board.controller)
    assert (storage.write_cache, tray.locked) == (True, False)
    assert driver.identify() == before
    assert board.inb(board.controller.bars[4].address or 0) == 0


def test_places(board: Board) -> None:
    """Drives take the free units in order; a taken or impossible one is refused by name."""
    first, second = board.add_disk(), board.add_disk()
    assert (first.drive.unit, second.drive.unit) == (0, 1)
    with pytest.raises(UsageError, match=r"ide-hd: ide\.0 has two drives already"):
        board.add_disk()
    with pytest.raises(UsageError, match=r"ide-hd: ide\.0 unit 1 is taken by disk2"):
        board.add_disk(unit=1)
    with pytest.raises(UsageError, match="unit=2: an IDE bus has units 0 and 1"):
        board.add_disk(bus=1, unit=2)
    with pytest.raises(UsageError, match=r"bus pci\.0 is no IDE bus"):
        IdeDisk("x", {}, MemoryBackend(512)).realize(board, board.pci, None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a controller at the legacy IDE ports already"):
        PiixIde("second", {}).realize(board, board.pci, "5.0")


def test_a_drive_can_be_unplugged(board: Board) -> None:
    """After unrealize the place is free, and the registers are those of an absent drive."""
    disk = board.add_disk()
    board.driver().identify()
    disk.unrealize()
    assert board.inb(0x1F7) == 0xFF
    board.add_disk()
    board.driver().identify()


def test_boot_paths(board: Board) -> None:
    """The paths are SeaBIOS' for controller, channel and unit; the controller itself has none."""
    disk = board.add_disk(bus=0, unit=1)
    cd = board.add_cdrom(bus=1)
    assert disk.boot_path() == "/pci@i0cf8/pci@1,1/drive@0/disk@1"
    assert cd.boot_path() == "/pci@i0cf8/pci@1,1/drive@1/disk@0"
    assert board.controller.boot_path() is None


def test_descriptions(board: Board) -> None:
    """What the boot status shows of each."""
    assert board.add_disk(64 << 20).describe() == "IDE disk, 64 MiB, ide.0 unit 0"
    assert board.add_cdrom().describe() == "IDE CD-ROM, empty, ide.1 unit 0"
    assert board.add_cdrom(1 << 20).describe() == "IDE CD-ROM, 1 MiB, ide.1 unit 1"


def test_default_names(board: Board) -> None:
    """Serial numbers go by place; the models are those that guests know from QEMU."""
    board.add_disk(bus=0, unit=1)
    board.add_cdrom(bus=1)

    def text(data: bytes) -> str:
        return b"".join(data[i : i + 2][::-1] for i in range(0, len(data), 2)).decode().strip()

    disk = board.driver(0, 1).pio_in(0xEC)
    assert (text(disk[20:40]), text(disk[46:54]), text(disk[54:94])) == ("QM00002", "2.5+", "QEMU HARDDISK")
    cd = board.driver(1).pio_in(0xA1)
    assert (text(cd[20:40]), text(cd[54:94])) == ("QM00003", "QEMU DVD-ROM")


def test_options(board: Board) -> None:
    """Every option shows in IDENTIFY."""
    board.add_disk(
        8 << 20, serial="S", model="M", ver="V", wwn=0x1122334455667788, logical_block_size=4096,
        physical_block_size=8192, rotation_rate=7200, cyls=10, heads=5, secs=20, write_cache="off",
    )  # fmt: skip
    words = board.driver().identify()
    assert (words[10], words[23], words[27]) == (0x5320, 0x5620, 0x4D20)
    assert words[108:112] == (0x1122, 0x3344, 0x5566, 0x7788)
    assert (words[106], words[117], words[217]) == (0x7001, 2048, 7200)
    assert (words[1], words[3], words[6]) == (10, 5, 20)
    assert words[60] == (8 << 20) // 4096
    assert not words[85] & 0x20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"serial": "x" * 21}, "serial=x+: up to 20 printable ASCII"),
        ({"model": "é"}, "model=é: up to 40"),
        ({"ver": "123456789"}, "ver=123456789: up to 8"),
        ({"wwn": 1 << 64}, "64 bits"),
        ({"logical_block_size": 1024}, "512 and 4096 are supported"),
        ({"physical_block_size": 3000}, "a power of two from 512"),
        ({"logical_block_size": 4096, "physical_block_size": 512}, "a power of two from 4096"),
        ({"rotation_rate": 2}, "0, 1, or 1025 to 65534"),
        ({"cyls": 5}, "cyls, heads and secs go together: heads is missing"),
        ({"cyls": 5, "heads": 17, "secs": 1}, "heads=17: 1 to 16"),
    ],
)
def test_wrong_options(board: Board, options: dict[str, Any], message: str) -> None:
    """One line that names the option and says what is accepted."""
    with pytest.raises(UsageError, match=message):
        board.add_disk(**options)


def test_disks_need_a_writable_drive(board: Board) -> None:
    """ide-hd without drive=, and with a read-only one, is refused with what to do."""
    with pytest.raises(UsageError, match="add drive=ID"):
        board.add(IdeDisk("d", {}))
    with pytest.raises(UsageError, match="an IDE disk cannot be read-only"):
        board.add(IdeDisk("d", {}, MemoryBackend(512, readonly=True)))  # type: ignore[arg-type]


def test_a_cdrom_without_drive_is_empty(board: Board) -> None:
    """ide-cd without drive= reports that there is no medium, and takes one later."""
    device = board.add(IdeCdRom("cd", {}), bus=1)
    driver = board.driver(1)
    for sense in ("6/29/00", "2/3a/01"):
        with pytest.raises(Exception, match=sense):
            driver.packet(b"\0")
    assert device.backend is not None
    assert device.backend.removable


def test_media_change(board: Board) -> None:
    """A medium that is put into the backend is announced to the guest, and read."""
    device = board.add_cdrom()
    driver = board.driver(1)
    for sense in ("6/29/00", "2/3a/01"):
        with pytest.raises(Exception, match=sense):
            driver.packet(b"\0")
    tray: Any = device.backend
    assert isinstance(tray, Tray)
    tray.insert(b"disc" * 1024)
    with pytest.raises(Exception, match="6/28/00"):
        driver.packet(b"\0")
    assert driver.packet(b"\x28\0\0\0\0\1\0\0\1") == b"disc" * 512
    device.unrealize()
    assert not tray.on_medium_change


def test_descriptors() -> None:
    """The frontends name what exists: every option of a disk is taken by its constructor."""
    found = {d.name: d for d in vm_device_frontends()}
    assert found["piix3-ide"].builtin == {"pc": "01.1"}
    for name in ("ide-hd", "ide-cd"):
        options: dict[str, Any] = {option.name: option.default for option in found[name].options}
        found[name].load()("id", options)
        assert not options
