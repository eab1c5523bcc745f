"""An ATA disk behind a channel, as a polling driver sees it."""

from __future__ import annotations

import errno
import os

import pytest

from vm_core.block.request import Op
from vm_core.devices.ata import Geometry, Identity
from vm_core.devices.ata.registers import ABRT, BSY, DRDY, DRQ, DSC, ERR, IDNF, UNC
from vm_core.testing.ata import AtaBench, AtaDriver, AtaError

from .conftest import SECTORS

STATUS, ALTERNATE, DEVICE, COMMAND = 0x1F7, 0x3F6, 0x1F6, 0x1F7


def sector(bench: AtaBench, number: int, count: int = 1, unit: int = 0) -> bytes:
    return bytes(bench.backends[unit].data[512 * number : 512 * (number + count)])


def failure(driver: AtaDriver, opcode: int, **registers: int) -> AtaError:
    with pytest.raises(AtaError) as caught:
        driver.non_data(opcode, **registers)
    return caught.value


# Reading and writing.


@pytest.mark.parametrize("ext", [False, True])
@pytest.mark.parametrize(("lba", "count"), [(0, 1), (7, 3), (4744, 256), (4000, 255)])
def test_read_sectors(bench: AtaBench, driver: AtaDriver, lba: int, count: int, ext: bool) -> None:
    """READ SECTORS gives the sectors asked for, one DRQ block each, and leaves the address of the last."""
    assert driver.read_sectors(lba, count, ext=ext) == sector(bench, lba, count)
    registers = driver.registers()
    assert registers["status"] == DRDY | DSC
    assert registers["count"] == 0
    assert driver.lba() & 0xFFFFFF == lba + count - 1


def test_a_pio_read_is_one_request(bench: AtaBench, driver: AtaDriver) -> None:
    """However small the DRQ blocks are, 256 sectors are fetched with one request."""
    driver.read_sectors(0, 256)
    assert bench.backends[0].log == [(Op.READ, 0, 256 * 512, False)]


def test_a_long_pio_read_goes_in_chunks(bench: AtaBench, driver: AtaDriver) -> None:
    """READ SECTORS EXT of more than 256 sectors never holds more than 128 KiB."""
    assert driver.read_sectors(3, 600, ext=True) == sector(bench, 3, 600)
    assert [entry[2] for entry in bench.backends[0].log] == [256 * 512, 256 * 512, 88 * 512]


def test_read_by_chs(bench: AtaBench, driver: AtaDriver) -> None:
    """With the LBA bit clear the address is cylinder, head and sector."""
    driver.device = 0xA0
    lba = (2 * 16 + 5) * 63 + 9
    assert driver.read_sectors(10 | 2 << 8 | 5 << 24, 1) == sector(bench, lba)


@pytest.mark.parametrize("ext", [False, True])
@pytest.mark.parametrize("count", [1, 17, 256])
def test_write_sectors(bench: AtaBench, driver: AtaDriver, count: int, ext: bool) -> None:
    """WRITE SECTORS stores the sectors, and nothing around them."""
    before = bytes(bench.backends[0].data)
    data = os.urandom(512 * count)
    driver.write_sectors(100, data, ext=ext)
    after = bytes(bench.backends[0].data)
    assert after == before[: 100 * 512] + data + before[(100 + count) * 512 :]
    assert [entry[:3] for entry in bench.backends[0].log] == [(Op.WRITE, 100 * 512, len(data))]


@pytest.mark.parametrize(("opcode", "ext"), [(0xC4, False), (0x29, True)])
def test_read_multiple_moves_blocks_of_the_size_that_was_set(
    bench: AtaBench, driver: AtaDriver, opcode: int, ext: bool
) -> None:
    """READ MULTIPLE interrupts once for each block of SET MULTIPLE MODE's size; the last one is what is left."""
    driver.non_data(0xC6, count=8)
    before = bench.interrupts
    assert driver.pio_in(opcode, 20 * 512, block=8 * 512, count=20, lba=5, ext=ext) == sector(bench, 5, 20)
    assert bench.interrupts - before == 3


@pytest.mark.parametrize(("opcode", "ext"), [(0xC5, False), (0x39, True), (0xCE, True)])
def test_write_multiple(bench: AtaBench, driver: AtaDriver, opcode: int, ext: bool) -> None:
    """WRITE MULTIPLE interrupts after each block but the first, and at the end."""
    driver.non_data(0xC6, count=4)
    data = os.urandom(10 * 512)
    before = bench.interrupts
    driver.pio_out(opcode, data, block=4 * 512, count=10, lba=40, ext=ext)
    assert sector(bench, 40, 10) == data
    assert bench.interrupts - before == 3


def test_write_multiple_fua_is_stable(bench: AtaBench, driver: AtaDriver) -> None:
    """WRITE MULTIPLE FUA EXT is on stable storage at its end; WRITE MULTIPLE EXT is after a flush."""
    driver.pio_out(0xCE, b"a" * 512, count=1, lba=1, ext=True)
    driver.pio_out(0x39, b"b" * 512, count=1, lba=2, ext=True)
    stable = bench.backends[0].stable
    assert stable[512:1024] == b"a" * 512
    assert stable[1024:1536] != b"b" * 512
    driver.non_data(0xEA)
    assert stable[1024:1536] == b"b" * 512


def test_multiple_mode_takes_powers_of_two_up_to_16(driver: AtaDriver) -> None:
    """SET MULTIPLE MODE aborts other counts; 0 turns READ MULTIPLE off; word 59 follows."""
    for count in (1, 2, 4, 8, 16):
        driver.non_data(0xC6, count=count)
        assert driver.identify()[59] == 0x100 | count
    for count in (3, 17, 32, 255):
        assert failure(driver, 0xC6, count=count).error == ABRT
    driver.non_data(0xC6, count=0)
    assert driver.identify()[59] == 0
    assert failure(driver, 0xC4, count=1).error == ABRT
    assert failure(driver, 0xC5, count=1).error == ABRT


def test_4096_byte_sectors() -> None:
    """With a logical block of 4096 bytes a sector of a command is that long."""
    bench = AtaBench()
    bench.add_disk(64 * 4096, identity=Identity(logical_block=4096, physical_block=4096))
    driver = AtaDriver(bench)
    data = os.urandom(2 * 4096)
    driver.write_sectors(3, data, sector=4096)
    assert bench.backends[0].data[3 * 4096 : 5 * 4096] == data
    assert driver.read_sectors(3, 2, sector=4096) == data
    words = driver.identify()
    assert words[60] == 64
    assert words[106] == 0x5000
    assert words[117] == 2048


# Errors.


@pytest.mark.parametrize("opcode", [0x20, 0x24, 0x25, 0x29, 0x30, 0x34, 0x35, 0x40, 0x42, 0xC4, 0xC8, 0xCA])
def test_an_address_past_the_end_is_not_found(bench: AtaBench, driver: AtaDriver, opcode: int) -> None:
    """IDNF, the first sector that does not exist in the LBA registers, no request, no data."""
    ext = opcode in (0x24, 0x25, 0x29, 0x34, 0x35, 0x42)
    for lba, first_bad in ((SECTORS, SECTORS), (SECTORS - 1, SECTORS), (SECTORS + 9, SECTORS + 9)):
        error = failure(driver, opcode, lba=lba, count=2, ext=ext)
        assert (error.status, error.error) == (DRDY | DSC | ERR, IDNF)
        assert error.lba & 0xFFFFFF == first_bad
    assert not bench.backends[0].log


def test_chs_addresses_that_the_geometry_does_not_have(driver: AtaDriver) -> None:
    """Sector 0, a sector beyond the track and a head beyond the last are not found."""
    driver.device = 0xA0
    driver.non_data(0x91, count=20, lba=3 << 24)
    for address in (0, 21, 1 | 4 << 24):
        assert failure(driver, 0x20, count=1, lba=address).error == IDNF
    driver.read_sectors(20 | 3 << 24, 1)


@pytest.mark.parametrize("opcode", [0x01, 0x22, 0x32, 0x50, 0x92, 0xA0, 0xA1, 0xB1, 0xC7, 0xCC, 0xF1, 0xF9, 0xFF])
def test_unknown_commands_abort(driver: AtaDriver, opcode: int) -> None:
    """A command that is not in the table ends at once with ABRT and an interrupt."""
    error = failure(driver, opcode)
    assert (error.status, error.error) == (DRDY | DSC | ERR, ABRT)


@pytest.mark.parametrize("bad", [0, 1, 37, 255])
def test_a_bad_sector_ends_a_pio_read_where_it_is(bench: AtaBench, driver: AtaDriver, bad: int) -> None:
    """The sectors before a bad one are given out; then UNC, with its address."""
    backend = bench.backends[0]
    backend.bad = range((100 + bad) * 512, (100 + bad) * 512 + 1)
    driver.issue(0x24, count=256, lba=100, ext=True)
    got = b""
    for _ in range(bad):
        assert driver.finish() & DRQ
        got += bench.insw(0x1F0, 256)
    with pytest.raises(AtaError) as caught:
        driver.finish()
    assert got == sector(bench, 100, bad)
    assert (caught.value.error, caught.value.lba) == (UNC, 100 + bad)


def test_a_failed_write_aborts(bench: AtaBench, driver: AtaDriver) -> None:
    """A write that storage refuses ends with ABRT."""
    bench.backends[0].fail = errno.EIO
    with pytest.raises(AtaError) as caught:
        driver.write_sectors(5, bytes(512))
    assert caught.value.error == ABRT
    assert failure(driver, 0xE7).error == ABRT


def test_verify_reads_and_finds_bad_sectors(bench: AtaBench, driver: AtaDriver) -> None:
    """READ VERIFY SECTORS passes over good sectors and names a bad one."""
    driver.non_data(0x42, lba=0, count=SECTORS, ext=True)
    bench.backends[0].bad = range(3333 * 512, 3334 * 512)
    error = failure(driver, 0x42, lba=0, count=SECTORS, ext=True)
    assert (error.error, error.lba) == (UNC, 3333)
    assert failure(driver, 0x40, lba=3333, count=1).error == UNC
    driver.non_data(0x40, lba=3334, count=100)


# Registers, selection, interrupts.


def test_status_read_ends_the_interrupt_and_alternate_status_does_not(bench: AtaBench, driver: AtaDriver) -> None:
    """Reading status lowers the line; reading alternate status leaves it."""
    driver.issue(0x10)
    assert bench.irq
    bench.inb(ALTERNATE)
    assert bench.irq
    bench.inb(STATUS)
    assert not bench.irq


def test_nien_holds_the_interrupt_back(bench: AtaBench, driver: AtaDriver) -> None:
    """With nIEN set the line stays low, and a pending interrupt appears when it is cleared."""
    bench.outb(ALTERNATE, 0x02)
    driver.issue(0x10)
    assert not bench.irq
    bench.outb(ALTERNATE, 0x00)
    assert bench.irq


def test_hob_shows_the_older_value_until_the_next_write(bench: AtaBench, driver: AtaDriver) -> None:
    """With HOB set the two-deep registers show what was written before; any command block write clears HOB."""
    for value in (0x12, 0x34):
        bench.outb(0x1F3, value)
    bench.outb(ALTERNATE, 0x80)
    assert bench.inb(0x1F3) == 0x12
    bench.outb(0x1F4, 0)
    assert bench.inb(0x1F3) == 0x34


def test_a_command_is_ignored_while_the_drive_is_busy(bench: AtaBench, driver: AtaDriver) -> None:
    """Neither a command nor a register write disturbs one that is under way."""
    driver.issue(0x20, count=1, lba=9)
    assert bench.inb(ALTERNATE) & BSY
    bench.outb(0x1F3, 77)
    bench.outb(COMMAND, 0x10)
    bench.poll()
    assert bench.insw(0x1F0, 256) == sector(bench, 9)


def test_a_command_is_ignored_while_data_are_due(bench: AtaBench, driver: AtaDriver) -> None:
    """A command written while DRQ is set changes nothing."""
    driver.issue(0xEC)
    bench.outb(COMMAND, 0x10)
    assert bench.inb(STATUS) & DRQ
    assert bench.insw(0x1F0, 256)[54:64] == b"ETTSD SI K"


def test_absent_slave_beside_a_master(bench: AtaBench, driver: AtaDriver) -> None:
    """An absent device 1 has status 0, keeps what is written, ignores commands, and never interrupts."""
    bench.outb(DEVICE, 0xB0)
    bench.outb(0x1F2, 0x55)
    bench.outb(0x1F3, 0xAA)
    assert [bench.inb(port) for port in (0x1F2, 0x1F3, DEVICE, STATUS, ALTERNATE)] == [0x55, 0xAA, 0xB0, 0, 0]
    bench.outb(COMMAND, 0xEC)
    assert bench.inb(STATUS) == 0
    assert bench.insw(0x1F0, 2) == b"\xff" * 4
    assert bench.interrupts == 0


def test_an_empty_channel_floats() -> None:
    """Without any drive every register reads as ones."""
    bench = AtaBench()
    bench.outb(DEVICE, 0xA0)
    assert {bench.inb(port) for port in (*range(0x1F0, 0x1F8), ALTERNATE)} == {0xFF}
    assert bench.inw(0x1F0) == 0xFFFF


def test_two_drives_answer_for_themselves() -> None:
    """Device 0 and device 1 have their own contents, names and interrupts."""
    bench = AtaBench()
    for unit in (0, 1):
        bench.add_disk(100 * 512, unit=unit, identity=Identity(model=f"DISK {unit}"))
        bench.backends[unit].data[:4] = b"unit"
        bench.backends[unit].data[4] = unit
    drivers = [AtaDriver(bench, unit=unit) for unit in (0, 1)]
    for unit, driver in enumerate(drivers):
        assert driver.read_sectors(0, 1)[4] == unit
        assert driver.identify()[27:30] == tuple(
            int.from_bytes(b"DISK "[i : i + 2].ljust(2, b"%d" % unit), "big") for i in (0, 2, 4)
        )
    drivers[0].issue(0x10)
    assert bench.irq
    drivers[1].select()
    assert not bench.irq
    drivers[0].select()
    assert bench.irq


def test_software_reset(bench: AtaBench, driver: AtaDriver) -> None:
    """SRST: BSY while it is set; then the signature, device 0 selected, error 1, no interrupt."""
    driver.non_data(0xC6, count=4)
    bench.outb(DEVICE, 0xB0)
    bench.outb(ALTERNATE, 0x04)
    bench.outb(DEVICE, 0xA0)
    assert bench.inb(ALTERNATE) == BSY
    bench.outb(ALTERNATE, 0x00)
    assert driver.registers() == {
        "error": 1, "count": 1, "lba_low": 1, "lba_mid": 0, "lba_high": 0, "device": 0xA0, "status": DRDY | DSC,
    }  # fmt: skip
    assert not bench.irq
    assert driver.identify()[59] == 0x104


def test_reset_waits_for_storage(bench: AtaBench, driver: AtaDriver) -> None:
    """A drive that was reset while storage works stays BSY until it is done, and forgets the command."""
    driver.issue(0x20, count=1, lba=9)
    bench.outb(ALTERNATE, 0x04)
    bench.outb(ALTERNATE, 0x00)
    assert bench.inb(ALTERNATE) == BSY
    bench.poll()
    assert bench.inb(ALTERNATE) == DRDY | DSC
    assert bench.insw(0x1F0, 256) == bytes(512)


def test_diagnostics(bench: AtaBench) -> None:
    """EXECUTE DEVICE DIAGNOSTIC runs on both drives, selects device 0, reports 01 and interrupts once."""
    bench.add_disk(512 * 100, unit=1)
    driver = AtaDriver(bench, unit=1)
    driver.issue(0x90)
    assert bench.irq
    assert driver.registers()["error"] == 1
    assert driver.registers()["device"] == 0xA0
    bench.inb(STATUS)
    bench.outb(DEVICE, 0xB0)
    assert not bench.irq
    assert bench.inb(0x1F1) == 1


def test_byte_registers_can_be_read_as_words(bench: AtaBench) -> None:
    """A 16-bit access to byte registers is two accesses of a byte."""
    bench.outw(0x1F2, 0x2211)
    assert bench.inw(0x1F2) == 0x2211
    assert bench.inb(0x1F3) == 0x22


def test_32_bit_data_accesses(bench: AtaBench, driver: AtaDriver) -> None:
    """The data register takes double words as two words."""
    driver.issue(0x20, count=1, lba=6)
    driver.wait()
    got = b"".join(bench.inl(0x1F0).to_bytes(4, "little") for _ in range(128))
    assert got == sector(bench, 6)
    driver.issue(0x30, count=1, lba=7)
    for i in range(0, 512, 4):
        bench.outl(0x1F0, int.from_bytes(got[i : i + 4], "little"))
    driver.finish()
    assert sector(bench, 7) == got


def test_data_register_outside_a_transfer(bench: AtaBench) -> None:
    """Without DRQ the data register gives zeroes and takes nothing."""
    assert bench.insw(0x1F0, 4) == bytes(8)
    bench.outsw(0x1F0, b"12345678")
    assert not bench.backends[0].log


# Settings and power.


def test_initialize_device_parameters(driver: AtaDriver) -> None:
    """INITIALIZE DEVICE PARAMETERS changes the current geometry, not the default one; no sectors abort."""
    driver.non_data(0x91, count=17, lba=3 << 24)
    words = driver.identify()
    assert words[54:59] == (SECTORS // 68, 4, 17, SECTORS // 68 * 68, 0)
    assert (words[1], words[3], words[6]) == (SECTORS // 1008, 16, 63)
    assert failure(driver, 0x91, count=0).error == ABRT


def test_write_cache(bench: AtaBench, driver: AtaDriver) -> None:
    """SET FEATURES 0x82 turns the write cache off (word 85), from when on writes are stable; 0x02 turns it on."""
    backend = bench.backends[0]
    assert driver.identify()[85] & 0x20
    driver.write_sectors(1, b"x" * 512)
    driver.non_data(0xEF, features=0x82)
    assert not backend.write_cache
    assert backend.stable[512:1024] == b"x" * 512
    assert not driver.identify()[85] & 0x20
    driver.write_sectors(2, b"y" * 512)
    assert backend.stable[1024:1536] == b"y" * 512
    driver.reset()
    assert not backend.write_cache
    driver.non_data(0xEF, features=0x02)
    assert backend.write_cache
    assert driver.identify()[85] & 0x20


def test_other_features(driver: AtaDriver) -> None:
    """Look-ahead and transfer modes can be set; features that are not offered abort."""
    driver.non_data(0xEF, features=0x55)
    assert not driver.identify()[85] & 0x40
    driver.non_data(0xEF, features=0xAA)
    assert driver.identify()[85] & 0x40
    driver.non_data(0xEF, features=0x03, count=0x44)
    assert driver.identify()[88] == 0x103F
    for feature, count in ((0x03, 0x47), (0x05, 0x80), (0x85, 0), (0x42, 0x80), (0x00, 0), (0xFF, 0)):
        assert failure(driver, 0xEF, features=feature, count=count).error == ABRT


def test_settings_survive_a_reset_unless_reverting_was_asked_for(bench: AtaBench, driver: AtaDriver) -> None:
    """After SET FEATURES 0xCC a software reset restores multiple and transfer mode; after 0x66 it keeps them."""
    for feature, kept in ((0x66, True), (0xCC, False)):
        driver.non_data(0xEF, features=feature)
        driver.non_data(0xEF, features=0x03, count=0x21)
        driver.non_data(0xC6, count=2)
        driver.reset()
        words = driver.identify()
        assert (words[59] == 0x102, words[63] == 0x0207) == (kept, kept)


def test_power_modes(bench: AtaBench, driver: AtaDriver) -> None:
    """CHECK POWER MODE tells standby (0) from active (0xFF); an access ends standby; the timer begins it."""

    def mode() -> int:
        driver.non_data(0xE5)
        return driver.registers()["count"]

    assert mode() == 0xFF
    driver.non_data(0xE0)
    assert mode() == 0x00
    driver.read_sectors(0, 1)
    assert mode() == 0xFF
    driver.non_data(0xE2, count=1)
    assert mode() == 0x00
    driver.non_data(0xE3, count=12)  # a minute
    assert mode() == 0xFF
    bench.time += 59 * 10**9
    assert mode() == 0xFF
    bench.time += 1 * 10**9
    assert mode() == 0x00
    driver.read_sectors(0, 1)
    assert mode() == 0xFF
    driver.non_data(0xE1)
    assert mode() == 0xFF


def test_standby_flushes(bench: AtaBench, driver: AtaDriver) -> None:
    """What is in the write cache is stable before the drive goes to standby or sleep."""
    for opcode, lba in ((0xE0, 1), (0xE2, 2), (0xE6, 3)):
        driver.write_sectors(lba, b"z" * 512)
        driver.non_data(opcode)
        assert bench.backends[0].stable[512 * lba : 512 * lba + 512] == b"z" * 512


def test_sleep_ends_with_a_reset(driver: AtaDriver) -> None:
    """After SLEEP commands abort until the drive is reset."""
    driver.non_data(0xE6)
    assert failure(driver, 0xE5).error == ABRT
    driver.reset()
    driver.non_data(0xE5)


def test_native_max_address(driver: AtaDriver) -> None:
    """READ NATIVE MAX ADDRESS (EXT) gives the last sector."""
    driver.non_data(0xF8)
    assert driver.lba() & 0xFFFFFF == SECTORS - 1
    driver.non_data(0x27, ext=True)
    assert driver.lba() == SECTORS - 1


@pytest.mark.parametrize("opcode", [0x10, 0x1F, 0x70, 0x7F])
def test_seek_and_recalibrate(driver: AtaDriver, opcode: int) -> None:
    """The sixteen opcodes of each succeed; SEEK checks the address."""
    driver.non_data(opcode, lba=5)
    if opcode >= 0x70:
        assert failure(driver, opcode, lba=SECTORS).error == IDNF


def test_nop_aborts(driver: AtaDriver) -> None:
    """NOP always fails with ABRT."""
    assert failure(driver, 0x00).error == ABRT


def test_flush(bench: AtaBench, driver: AtaDriver) -> None:
    """FLUSH CACHE and FLUSH CACHE EXT end when storage has flushed."""
    for opcode in (0xE7, 0xEA):
        driver.issue(opcode)
        assert bench.inb(ALTERNATE) & BSY
        driver.finish()
    assert [entry[0] for entry in bench.backends[0].log] == [Op.FLUSH, Op.FLUSH]


def test_power_on_restores_everything(bench: AtaBench, driver: AtaDriver) -> None:
    """A hardware reset brings back transfer mode, multiple mode, geometry and SMART."""
    before = driver.identify()
    driver.non_data(0xEF, features=0x03, count=0x20)
    driver.non_data(0xC6, count=0)
    driver.non_data(0x91, count=17, lba=3 << 24)
    driver.non_data(0xB0, features=0xD9, lba=0xC24F00)
    assert driver.identify() != before
    bench.channel.power_on()
    assert driver.identify() == before


def test_a_given_geometry_is_reported() -> None:
    """cyls, heads and secs of the user appear in words 1, 3 and 6 and translate CHS addresses."""
    bench = AtaBench()
    bench.add_disk(5000 * 512, geometry=Geometry(50, 5, 20))
    driver = AtaDriver(bench)
    words = driver.identify()
    assert (words[1], words[3], words[6]) == (50, 5, 20)
    bench.backends[0].data[120 * 512] = 0x77
    driver.device = 0xA0
    assert driver.read_sectors(1 | 1 << 8 | 1 << 24, 1)[0] == 0x77
