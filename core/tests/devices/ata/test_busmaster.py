"""Bus-master DMA: descriptor tables in guest memory, the status bits, and zero-copy requests."""

from __future__ import annotations

import errno
import os
import struct

import pytest

from vm_core.block.request import Op
from vm_core.devices.ata.registers import ABRT, BSY, DRDY, DSC, UNC
from vm_core.testing.ata import AtaBench, AtaDriver, AtaError, descriptors

BASE, STATUS, TABLE = 0xC000, 0xC002, 0xC004
ACTIVE, ERROR, INTERRUPT = 1, 2, 4
TABLE_AT = 0x10000
DATA_AT = 0x20000
DSM = 0x06


def put(bench: AtaBench, address: int, data: bytes) -> None:
    bench.memory.ram.write(address, data)


def get(bench: AtaBench, address: int, length: int) -> bytes:
    return bench.memory.ram.read(address, length)


def sectors(bench: AtaBench, lba: int, count: int) -> bytes:
    return bytes(bench.backends[0].data[512 * lba : 512 * (lba + count)])


@pytest.mark.parametrize(("opcode", "ext"), [(0xC8, False), (0xC9, False), (0x25, True)])
def test_read_dma(bench: AtaBench, driver: AtaDriver, opcode: int, ext: bool) -> None:
    """READ DMA scatters over the descriptors with one request, whose buffers are guest memory itself."""
    runs = [(DATA_AT, 1024), (DATA_AT + 0x3000, 512), (DATA_AT + 0x2000, 0x10000), (DATA_AT + 0x20000, 0x800)]
    total = sum(length for _, length in runs)
    put(bench, TABLE_AT, descriptors(runs))
    status = driver.dma(opcode, TABLE_AT, to_memory=True, lba=3, count=total // 512, ext=ext)
    assert status & (ACTIVE | ERROR | INTERRUPT) == INTERRUPT
    # The second and third descriptors overlap; later bytes win, as they do on the wire.
    expected = bytearray(0x30000)
    data, at = sectors(bench, 3, total // 512), 0
    for address, length in runs:
        expected[address - DATA_AT : address - DATA_AT + length] = data[at : at + length]
        at += length
    assert get(bench, DATA_AT, 0x30000) == expected
    assert bench.backends[0].log == [(Op.READ, 3 * 512, total, False)]


@pytest.mark.parametrize(("opcode", "ext"), [(0xCA, False), (0xCB, False), (0x35, True), (0x3D, True)])
def test_write_dma(bench: AtaBench, driver: AtaDriver, opcode: int, ext: bool) -> None:
    """WRITE DMA gathers from the descriptors with one request; with FUA the data are stable at its end."""
    data = os.urandom(20 * 512)
    put(bench, DATA_AT, data[:700])
    put(bench, DATA_AT + 0x5000, data[700:])
    put(bench, TABLE_AT, descriptors([(DATA_AT, 700), (DATA_AT + 0x5000, len(data) - 700)]))
    driver.dma(opcode, TABLE_AT, to_memory=False, lba=77, count=20, ext=ext)
    assert sectors(bench, 77, 20) == data
    assert len(bench.backends[0].log) == 1
    assert (bench.backends[0].stable[77 * 512 : 97 * 512] == data) is (opcode == 0x3D)


def test_a_write_with_the_cache_off_is_stable(bench: AtaBench, driver: AtaDriver) -> None:
    """After SET FEATURES 0x82, WRITE DMA ends when its data are stable."""
    driver.non_data(0xEF, features=0x82)
    put(bench, DATA_AT, b"s" * 512)
    put(bench, TABLE_AT, descriptors([(DATA_AT, 512)]))
    driver.dma(0xCA, TABLE_AT, to_memory=False, lba=1, count=1)
    assert bench.backends[0].stable[512:1024] == b"s" * 512


def test_adjoining_descriptors_are_joined(bench: AtaBench, driver: AtaDriver) -> None:
    """Pages that follow each other in guest memory reach the backend as one buffer, and one range of RAM."""
    runs = [(DATA_AT + 4096 * i, 4096) for i in range(16)]
    put(bench, TABLE_AT, descriptors(runs))
    driver.issue(0xC8, count=128)
    bench.outl(TABLE, TABLE_AT)
    bench.outb(BASE, 9)
    request = bench.backends[0].pending[0]
    assert [len(view) for view in request.buffers] == [65536]
    assert list(request.guest) == [(DATA_AT, 65536)]


def test_start_before_the_command(bench: AtaBench, driver: AtaDriver) -> None:
    """The bus master may be started before the drive gets its command."""
    put(bench, TABLE_AT, descriptors([(DATA_AT, 512)]))
    bench.outl(TABLE, TABLE_AT)
    bench.outb(BASE, 9)
    assert bench.inb(STATUS) & ACTIVE
    driver.issue(0xC8, count=1, lba=5)
    bench.poll()
    assert get(bench, DATA_AT, 512) == sectors(bench, 5, 1)
    assert bench.inb(STATUS) == INTERRUPT


def test_while_storage_works(bench: AtaBench, driver: AtaDriver) -> None:
    """Under way: drive BSY, bus master active, no interrupt."""
    put(bench, TABLE_AT, descriptors([(DATA_AT, 512)]))
    driver.issue(0xC8, count=1, lba=5)
    bench.outl(TABLE, TABLE_AT)
    bench.outb(BASE, 9)
    assert bench.inb(0x3F6) & BSY
    assert bench.inb(STATUS) == ACTIVE
    assert not bench.irq
    bench.poll()
    assert bench.irq
    assert bench.inb(STATUS) == INTERRUPT


def test_more_memory_than_data(bench: AtaBench, driver: AtaDriver) -> None:
    """Descriptors for more than the command moves: it completes, and the bus master stays active."""
    put(bench, TABLE_AT, descriptors([(DATA_AT, 4096)]))
    status = driver.dma(0xC8, TABLE_AT, to_memory=True, lba=5, count=2)
    assert status == INTERRUPT | ACTIVE
    assert get(bench, DATA_AT, 1536) == sectors(bench, 5, 2) + bytes(512)
    assert bench.inb(STATUS) & ACTIVE == 0  # the driver stopped it


def test_less_memory_than_data(bench: AtaBench, driver: AtaDriver) -> None:
    """Descriptors for less than the command moves: neither active nor interrupt, and no request."""
    put(bench, TABLE_AT, descriptors([(DATA_AT, 512)]))
    status = driver.dma(0xC8, TABLE_AT, to_memory=True, lba=5, count=2)
    assert status == 0
    assert not bench.irq
    assert not bench.backends[0].log
    assert bench.inb(0x1F7) == DRDY | DSC


@pytest.mark.parametrize(
    ("table", "runs"),
    [
        (TABLE_AT, [(0x7FFFF000, 512)]),
        (TABLE_AT, [(DATA_AT, 256), (0xFFFFFE00, 256)]),
        (TABLE_AT, [((4 << 20) - 256, 512)]),
        (0x7FFF0000, []),
    ],
)
def test_memory_that_is_not_there(bench: AtaBench, driver: AtaDriver, table: int, runs: list[tuple[int, int]]) -> None:
    """A descriptor or a table outside RAM sets the error bit and aborts the command; nothing is read."""
    if runs:
        put(bench, table, descriptors(runs))
    with pytest.raises(AtaError) as caught:
        driver.dma(0xC8, table, to_memory=True, lba=0, count=1)
    assert caught.value.error == ABRT
    assert bench.inb(STATUS) == ERROR | INTERRUPT
    assert not bench.backends[0].log
    bench.outb(STATUS, 0x06)
    put(bench, TABLE_AT, descriptors([(DATA_AT, 512)]))
    driver.dma(0xC8, TABLE_AT, to_memory=True, lba=1, count=1)
    assert get(bench, DATA_AT, 512) == sectors(bench, 1, 1)


def test_a_table_without_end_stops_at_64_kib(bench: AtaBench, driver: AtaDriver) -> None:
    """A table has no more than 64 KiB, whether or not an entry says that it is the last."""
    entry = struct.pack("<II", DATA_AT, 2)
    put(bench, 0x30000 + 0x8000, entry * 4096 + entry * 100)
    status = driver.dma(0x25, 0x38000, to_memory=True, lba=0, count=17, ext=True)
    assert status == 0
    driver.dma(0x25, 0x38000, to_memory=True, lba=0, count=16, ext=True)
    assert bench.backends[0].log == [(Op.READ, 0, 8192, False)]


def test_32_mib_in_one_request() -> None:
    """READ DMA EXT of 65,536 sectors is one request of 32 MiB."""
    bench = AtaBench(ram=40 << 20)
    bench.add_disk(33 << 20)
    bench.backends[0].data[(32 << 20) - 1] = 0x5A
    driver = AtaDriver(bench)
    put(bench, TABLE_AT, descriptors([((1 << 20) + 65536 * i, 65536) for i in range(512)]))
    driver.dma(0x25, TABLE_AT, to_memory=True, count=0, ext=True)
    assert [entry[:3] for entry in bench.backends[0].log] == [(Op.READ, 0, 32 << 20)]
    assert get(bench, (33 << 20) - 1, 1) == b"\x5a"


@pytest.mark.parametrize("bad", [0, 5, 127])
def test_a_bad_sector_in_a_dma_read(bench: AtaBench, driver: AtaDriver, bad: int) -> None:
    """UNC with the address of the bad sector; the sectors before it are in memory."""
    put(bench, TABLE_AT, descriptors([(DATA_AT, 1000), (DATA_AT + 0x2000, 65536 - 1000)]))
    bench.backends[0].bad = range((10 + bad) * 512, (10 + bad) * 512 + 1)
    with pytest.raises(AtaError) as caught:
        driver.dma(0xC8, TABLE_AT, to_memory=True, lba=10, count=128)
    assert (caught.value.error, caught.value.lba & 0xFFFFFF) == (UNC, 10 + bad)
    got = get(bench, DATA_AT, 1000) + get(bench, DATA_AT + 0x2000, 65536 - 1000)
    assert got[: 512 * bad] == sectors(bench, 10, bad)


def test_a_failed_dma_write(bench: AtaBench, driver: AtaDriver) -> None:
    """A write that storage refuses ends with ABRT and an interrupt."""
    bench.backends[0].fail = errno.ENOSPC
    put(bench, TABLE_AT, descriptors([(DATA_AT, 512)]))
    with pytest.raises(AtaError) as caught:
        driver.dma(0xCA, TABLE_AT, to_memory=False, lba=10, count=1)
    assert caught.value.error == ABRT


def test_stopping_while_storage_works(bench: AtaBench, driver: AtaDriver) -> None:
    """Clearing START leaves the active bit until storage no longer uses the memory."""
    put(bench, TABLE_AT, descriptors([(DATA_AT, 512)]))
    driver.issue(0xC8, count=1, lba=5)
    bench.outl(TABLE, TABLE_AT)
    bench.outb(BASE, 9)
    bench.outb(BASE, 0)
    assert bench.inb(STATUS) & ACTIVE
    bench.poll()
    assert not bench.inb(STATUS) & ACTIVE


def test_reset_while_storage_works(bench: AtaBench, driver: AtaDriver) -> None:
    """A reset during DMA: BSY until storage is done, then no interrupt, and the next transfer works."""
    put(bench, TABLE_AT, descriptors([(DATA_AT, 512)]))
    driver.issue(0xC8, count=1, lba=5)
    bench.outl(TABLE, TABLE_AT)
    bench.outb(BASE, 9)
    bench.outb(0x3F6, 4)
    bench.outb(0x3F6, 0)
    assert bench.inb(0x3F6) == BSY
    bench.poll()
    assert bench.inb(0x3F6) == DRDY | DSC
    assert not bench.irq
    driver.dma(0xC8, TABLE_AT, to_memory=True, lba=6, count=1)
    assert get(bench, DATA_AT, 512) == sectors(bench, 6, 1)


def test_reset_of_a_drive_that_waits_for_memory(bench: AtaBench, driver: AtaDriver) -> None:
    """A reset ends the wait for the bus master; a later START moves nothing."""
    driver.issue(0xC8, count=1, lba=5)
    driver.reset()
    put(bench, TABLE_AT, descriptors([(DATA_AT, 512)]))
    bench.outl(TABLE, TABLE_AT)
    bench.outb(BASE, 9)
    bench.poll()
    assert not bench.backends[0].log


def test_status_register(bench: AtaBench) -> None:
    """Bits 5 and 6 are the firmware's; error and interrupt are cleared by ones; active is read-only; bit 7 is 0."""
    bench.outb(STATUS, 0xFF)
    assert bench.inb(STATUS) == 0x60
    bench.outb(STATUS, 0x20)
    assert bench.inb(STATUS) == 0x20
    bench.busmaster.status |= 6
    bench.outb(STATUS, 0x22)
    assert bench.inb(STATUS) == 0x24


def test_registers_are_bytes_words_or_double_words(bench: AtaBench) -> None:
    """The table's address is kept with its two low bits clear, whatever the width of the access."""
    bench.outl(TABLE, 0x12345677)
    assert bench.inl(TABLE) == 0x12345674
    bench.outb(TABLE + 3, 0xAA)
    assert bench.inb(TABLE + 1) == 0x56
    assert bench.inl(TABLE) == 0xAA345674
    bench.outb(BASE, 0xF8)
    assert bench.inb(BASE) == 0x08
    assert bench.inb(BASE + 1) == 0xFF


# TRIM.


def trim(driver: AtaDriver, bench: AtaBench, ranges: list[tuple[int, int]], blocks: int = 1) -> None:
    entries = b"".join(struct.pack("<Q", lba | count << 48) for lba, count in ranges)
    put(bench, DATA_AT, entries.ljust(512 * blocks, b"\0"))
    put(bench, TABLE_AT, descriptors([(DATA_AT, 512 * blocks)]))
    driver.dma(DSM, TABLE_AT, to_memory=False, features=1, count=blocks, ext=True)


def test_trim(bench: AtaBench, driver: AtaDriver) -> None:
    """DATA SET MANAGEMENT becomes one batch of discards; ranges that adjoin are joined, empty ones ignored."""
    trim(driver, bench, [(10, 5), (15, 5), (0, 0), (4999, 1), (100, 65)])
    backend = bench.backends[0]
    assert [entry[:3] for entry in backend.log] == [
        (Op.DISCARD, 10 * 512, 10 * 512),
        (Op.DISCARD, 4999 * 512, 512),
        (Op.DISCARD, 100 * 512, 65 * 512),
    ]
    assert backend.batches == [3]


def test_trim_of_nothing(bench: AtaBench, driver: AtaDriver) -> None:
    """A list without any range succeeds."""
    trim(driver, bench, [])
    assert not bench.backends[0].log


def test_trim_past_the_end(bench: AtaBench, driver: AtaDriver) -> None:
    """A range that leaves the disk fails the whole command before anything is discarded."""
    with pytest.raises(AtaError) as caught:
        trim(driver, bench, [(1, 1), (4999, 2)])
    assert (caught.value.error, caught.value.lba) == (0x10, 5000)
    assert not bench.backends[0].log


@pytest.mark.parametrize(("features", "count"), [(0, 1), (2, 1), (1, 0), (1, 9), (1, 0xFFFF)])
def test_trim_refusals(driver: AtaDriver, features: int, count: int) -> None:
    """Only the TRIM bit, and one to eight blocks, are accepted."""
    with pytest.raises(AtaError) as caught:
        driver.non_data(DSM, features=features, count=count, ext=True)
    assert caught.value.error == ABRT
