"""An ATAPI CD-ROM drive, as a polling driver sees it."""

from __future__ import annotations

import struct

import pytest

from vm_core.devices.ata import cdsector
from vm_core.devices.ata.mmc import COMMANDS
from vm_core.devices.ata.registers import ABRT, BSY, DRDY, DRQ, DSC, ERR
from vm_core.testing.ata import AtaBench, AtaDriver, AtaError, CheckConditionError, Tray, descriptors

TABLE_AT, DATA_AT = 0x10000, 0x20000
BLOCKS = 300


def blocks(cd: AtaBench, lba: int, count: int = 1) -> bytes:
    return bytes(cd.backends[0].data[2048 * lba : 2048 * (lba + count)])


def sense(driver: AtaDriver, cdb: bytes, **more: object) -> tuple[int, int, int]:
    with pytest.raises(CheckConditionError) as caught:
        driver.packet(cdb, **more)  # type: ignore[arg-type]
    return caught.value.sense


def read_10(lba: int, count: int) -> bytes:
    return struct.pack(">BxIxHx", 0x28, lba, count)


def tray(cd: AtaBench) -> Tray:
    backend = cd.backends[0]
    assert isinstance(backend, Tray)
    return backend


# The ATA side.


def test_signature_and_identify_device(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """After a reset, and when IDENTIFY DEVICE or READ SECTORS abort, the registers show a packet device."""
    cd_driver.reset()
    assert cd_driver.registers() == {
        "error": 1, "count": 1, "lba_low": 1, "lba_mid": 0x14, "lba_high": 0xEB, "device": 0xA0, "status": 0,
    }  # fmt: skip
    for opcode in (0xEC, 0x20):
        with pytest.raises(AtaError) as caught:
            cd_driver.non_data(opcode)
        assert caught.value.error == ABRT
        assert caught.value.lba & 0xFFFFFF == 0xEB1401


def test_identify_packet_device(cd_driver: AtaDriver) -> None:
    """Removable CD/DVD with 12-byte packets, DMA, and its names; the checksum is right."""
    data = cd_driver.pio_in(0xA1)
    words = struct.unpack("<256H", data)
    assert words[0] == 0x85C0
    assert words[49] & 0x0300 == 0x0300
    assert b"".join(w.to_bytes(2, "big") for w in words[27:47]).decode().rstrip() == "TEST CD-ROM"
    assert (sum(data) & 0xFF, words[255] & 0xFF) == (0, 0xA5)


def test_phases_of_a_pio_packet(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """Interrupt reason and byte count follow the protocol: packet, data, status; each but the first interrupts."""
    cd_driver.issue(0xA0, lba=20 << 8)
    assert not cd.irq
    assert cd.inb(0x3F6) == DRDY | DSC | DRQ
    assert cd.inb(0x1F2) == 1
    cd.outsw(0x1F0, struct.pack(">BxxxB7x", 0x12, 36))
    seen: list[tuple[int, int]] = []
    while cd.inb(0x3F6) & DRQ:
        assert cd.irq
        cd.inb(0x1F7)
        seen.append((cd.inb(0x1F2), cd.inb(0x1F4) | cd.inb(0x1F5) << 8))
        cd.insw(0x1F0, seen[-1][1] // 2)
    assert seen == [(2, 20), (2, 16)]
    assert cd.irq
    assert cd.inb(0x1F2) == 3
    assert cd.inb(0x1F7) == DRDY | DSC


@pytest.mark.parametrize(("limit", "expected"), [(2048, [2048, 2048]), (3000, [3000, 1096]), (2047, [2046] * 2 + [4])])
def test_byte_count_limits(cd: AtaBench, cd_driver: AtaDriver, limit: int, expected: list[int]) -> None:
    """DRQ blocks are as long as the limit made even; the last one is what is left."""
    before = cd.interrupts
    assert cd_driver.packet(read_10(5, 2), limit=limit) == blocks(cd, 5, 2)
    assert cd.interrupts - before == len(expected) + 1


def test_a_limit_of_zero(cd_driver: AtaDriver) -> None:
    """A PIO command with data for which no bytes are allowed aborts; one without data succeeds."""
    with pytest.raises(AtaError) as caught:
        cd_driver.packet(read_10(5, 1), limit=0)
    assert caught.value.error == ABRT
    cd_driver.packet(b"\x00", limit=0)


def test_odd_lengths(cd_driver: AtaDriver) -> None:
    """Data of an odd length end with half a word."""
    whole = cd_driver.packet(struct.pack(">BxxxB", 0x12, 36))
    assert cd_driver.packet(struct.pack(">BxxxB", 0x12, 7)) == whole[:7]
    assert cd_driver.packet(struct.pack(">BxxxB", 0x12, 0)) == b""


def test_overlapped_packets_abort(cd_driver: AtaDriver) -> None:
    """The overlap bit is refused."""
    with pytest.raises(AtaError):
        cd_driver.non_data(0xA0, features=2)


def test_device_reset_at_any_time(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """DEVICE RESET ends a command that storage still works on, without an interrupt, and keeps the device bit."""
    cd_driver.issue(0xA0, lba=2048 << 8)
    cd.outsw(0x1F0, read_10(1, 1).ljust(12, b"\0"))
    assert cd.inb(0x3F6) & BSY
    before = cd.interrupts
    cd.outb(0x1F7, 0x08)
    assert cd.inb(0x3F6) == BSY
    cd.poll()
    assert cd.inb(0x3F6) == 0
    assert cd.interrupts == before
    assert cd_driver.packet(read_10(1, 1)) == blocks(cd, 1)


def test_dma(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """READ by DMA is one request straight into guest memory; small answers are copied there."""
    table = descriptors([(DATA_AT, 3000), (DATA_AT + 0x4000, 65536), (DATA_AT + 0x20000, 65536)])
    cd.memory.ram.write(TABLE_AT, table)
    cd_driver.packet(read_10(7, 60), dma=True, table=TABLE_AT)
    data = blocks(cd, 7, 60)
    assert cd.memory.ram.read(DATA_AT, 3000) == data[:3000]
    assert cd.memory.ram.read(DATA_AT + 0x4000, 65536) == data[3000:68536]
    assert len(cd.backends[0].log) == 1
    cd_driver.packet(struct.pack(">BxxxB", 0x12, 36), dma=True, table=TABLE_AT)
    assert cd.memory.ram.read(DATA_AT, 36) == cd_driver.packet(struct.pack(">BxxxB", 0x12, 36))


def test_dma_of_parameters(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """MODE SELECT takes its list by DMA too."""
    data = bytes(8) + b"\x01\x0a\x00\x05".ljust(12, b"\0")
    cd.memory.ram.write(DATA_AT, data)
    cd.memory.ram.write(TABLE_AT, descriptors([(DATA_AT, len(data))]))
    cd_driver.packet(struct.pack(">BBxxxxxH", 0x55, 0x10, len(data)), dma=True, table=TABLE_AT, out=data)
    assert cd_driver.packet(struct.pack(">BxBxxxxH", 0x5A, 0x01, 255))[8 + 3] == 5


def test_dma_with_too_little_memory(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """Descriptors shorter than the data: neither active nor interrupt."""
    cd.memory.ram.write(TABLE_AT, descriptors([(DATA_AT, 2048)]))
    before = cd.interrupts
    cd_driver.packet(read_10(7, 2), dma=True, table=TABLE_AT)
    assert cd.interrupts == before
    assert cd.inb(0xC002) & 5 == 0


# Reading.


@pytest.mark.parametrize(("lba", "count"), [(0, 1), (299, 1), (10, 200), (0, 300)])
def test_read_10_and_12(cd: AtaBench, cd_driver: AtaDriver, lba: int, count: int) -> None:
    """READ (10) and READ (12) give blocks of 2048 bytes."""
    assert cd_driver.packet(read_10(lba, count)) == blocks(cd, lba, count)
    assert cd_driver.packet(struct.pack(">BxII", 0xA8, lba, count)) == blocks(cd, lba, count)


def test_pio_reads_are_fetched_in_chunks(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """However small the DRQ blocks are, up to 64 blocks come with one request."""
    cd_driver.packet(read_10(0, 130), limit=2048)
    assert [entry[2] // 2048 for entry in cd.backends[0].log] == [64, 64, 2]


def test_reads_out_of_range(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """LOGICAL BLOCK ADDRESS OUT OF RANGE, with the block in the sense data; no request."""
    for lba, count in ((BLOCKS, 1), (BLOCKS - 1, 2), (0xFFFFFFFF, 1), (0, BLOCKS + 1)):
        assert sense(cd_driver, read_10(lba, count)) == (5, 0x21, 0)
    with pytest.raises(AtaError):
        cd_driver.packet(read_10(BLOCKS - 1, 2), sense=False)
    data = cd_driver.packet(struct.pack(">BxxxB", 0x03, 18))
    assert (data[0], int.from_bytes(data[3:7], "big")) == (0xF0, BLOCKS)
    assert cd_driver.packet(read_10(5, 0)) == b""
    assert not cd.backends[0].log


@pytest.mark.parametrize("bad", [0, 3, 70])
@pytest.mark.parametrize("dma", [False, True])
def test_unreadable_blocks(cd: AtaBench, cd_driver: AtaDriver, bad: int, dma: bool) -> None:
    """UNRECOVERED READ ERROR, with the first bad block in the sense data."""
    cd.backends[0].bad = range((20 + bad) * 2048, (20 + bad) * 2048 + 1)
    cd.memory.ram.write(TABLE_AT, descriptors([(DATA_AT + 65536 * i, 65536) for i in range(4)]))
    with pytest.raises(AtaError) as caught:
        cd_driver.packet(read_10(20, 100), dma=dma, table=TABLE_AT, sense=False)
    assert caught.value.error == 3 << 4 | ABRT
    data = cd_driver.packet(struct.pack(">BxxxB", 0x03, 18))
    assert (data[2], data[12], int.from_bytes(data[3:7], "big")) == (3, 0x11, 20 + bad)


@pytest.mark.parametrize("dma", [False, True])
def test_read_cd(cd: AtaBench, cd_driver: AtaDriver, dma: bool) -> None:
    """READ CD gives user data or whole sectors; by position too."""
    cd.memory.ram.write(TABLE_AT, descriptors([(DATA_AT + 65536 * i, 65536) for i in range(8)]))

    def read(cdb: bytes, length: int) -> bytes:
        got = cd_driver.packet(cdb, dma=dma, table=TABLE_AT)
        return cd.memory.ram.read(DATA_AT, length) if dma else got

    user = struct.pack(">BBIBHBxx", 0xBE, 0, 10, 0, 70, 0x10)
    raw = struct.pack(">BBIBHBxx", 0xBE, 8, 10, 0, 70, 0xF8)
    assert read(user, 70 * 2048) == blocks(cd, 10, 70)
    expected = b"".join(cdsector.encode(lba, blocks(cd, lba)) for lba in range(10, 80))
    assert read(raw, 70 * 2352) == expected
    positions = bytes((0xB9, 0, 0, *cdsector.msf(10), *cdsector.msf(12), 0xF8, 0, 0))
    assert read(positions, 2 * 2352) == expected[: 2 * 2352]


def test_read_cd_refusals(cd_driver: AtaDriver) -> None:
    """Audio, sub-channels, parts of sectors and reversed positions are refused with their sense."""
    assert sense(cd_driver, struct.pack(">BBIBHBxx", 0xBE, 1 << 2, 0, 0, 1, 0x10)) == (5, 0x64, 0)
    assert sense(cd_driver, struct.pack(">BBIBHBBx", 0xBE, 0, 0, 0, 1, 0x10, 1)) == (5, 0x24, 0)
    assert sense(cd_driver, struct.pack(">BBIBHBxx", 0xBE, 0, 0, 0, 1, 0x20)) == (5, 0x24, 0)
    assert sense(cd_driver, bytes((0xB9, 0, 0, 0, 2, 5, 0, 2, 4, 0x10))) == (5, 0x24, 0)
    assert sense(cd_driver, bytes((0xB9, 0, 0, 0, 0, 0, 0, 2, 4, 0x10))) == (5, 0x21, 0)
    assert cd_driver.packet(struct.pack(">BBIBHBxx", 0xBE, 0, 0, 0, 1, 0)) == b""


# Who and what.


def test_inquiry(cd_driver: AtaDriver) -> None:
    """INQUIRY names a removable CD drive; the vital product data carry the serial number."""
    data = cd_driver.packet(struct.pack(">BxxxB", 0x12, 255))
    assert (data[0], data[1], data[4]) == (5, 0x80, 31)
    assert data[8:] == b"TEST    CD-ROM          1.0 "
    serial = cd_driver.packet(struct.pack(">BBBxB", 0x12, 1, 0x80, 255))
    assert serial == b"\x05\x80\x00\x02S2"
    pages = cd_driver.packet(struct.pack(">BBBxB", 0x12, 1, 0x00, 255))
    for page in pages[4:]:
        data = cd_driver.packet(struct.pack(">BBBxB", 0x12, 1, page, 255))
        assert (data[1], data[3]) == (page, len(data) - 4)
    assert sense(cd_driver, struct.pack(">BBBxB", 0x12, 1, 0xB0, 255)) == (5, 0x24, 0)
    assert sense(cd_driver, struct.pack(">BBBxB", 0x12, 0, 0x80, 255)) == (5, 0x24, 0)


def test_unknown_opcodes(cd_driver: AtaDriver) -> None:
    """Every opcode that has no row ends with INVALID COMMAND OPERATION CODE."""
    known = {row.opcode for row in COMMANDS}
    for opcode in set(range(256)) - known:
        assert sense(cd_driver, bytes((opcode,))) == (5, 0x20, 0)


def test_capacity(cd_driver: AtaDriver) -> None:
    """READ CAPACITY gives the last block and 2048."""
    assert cd_driver.packet(b"\x25") == struct.pack(">II", BLOCKS - 1, 2048)


@pytest.mark.parametrize("start", [0, 1])
def test_toc_format_0(cd_driver: AtaDriver, start: int) -> None:
    """One data track and the lead-out, as LBA and as MSF; cut to the allocation length."""
    lba = cd_driver.packet(struct.pack(">BB4xBH", 0x43, 0, start, 0xFFFF))
    assert lba == struct.pack(">HBB BBBBI BBBBI", 18, 1, 1, 0, 0x14, 1, 0, 0, 0, 0x14, 0xAA, 0, BLOCKS)
    msf = cd_driver.packet(struct.pack(">BB4xBH", 0x43, 2, start, 0xFFFF))
    assert (msf[8:12], msf[16:20]) == (b"\x00\x00\x02\x00", b"\x00\x00\x06\x00")
    assert cd_driver.packet(struct.pack(">BB4xBH", 0x43, 0, start, 6)) == lba[:6]


def test_toc_lead_out_alone(cd_driver: AtaDriver) -> None:
    """From track 0xAA on there is the lead-out; a track that does not exist is refused."""
    data = cd_driver.packet(struct.pack(">BB4xBH", 0x43, 0, 0xAA, 0xFFFF))
    assert (data[1], data[6], data[8:]) == (10, 0xAA, BLOCKS.to_bytes(4, "big"))
    assert sense(cd_driver, struct.pack(">BB4xBH", 0x43, 0, 2, 0xFFFF)) == (5, 0x24, 0)


def test_toc_formats_1_and_2(cd_driver: AtaDriver) -> None:
    """Session information and the full table; the format may be in the control byte; others are refused."""
    sessions = cd_driver.packet(struct.pack(">BBB4xH", 0x43, 0, 1, 0xFFFF))
    assert sessions == bytes((0, 10, 1, 1, 0, 0x14, 1, 0, 0, 0, 0, 0))
    assert cd_driver.packet(struct.pack(">BBB4xHB", 0x43, 0, 0, 0xFFFF, 0x40)) == sessions
    full = cd_driver.packet(struct.pack(">BBB4xH", 0x43, 2, 2, 0xFFFF))
    entries = [full[at : at + 11] for at in range(4, len(full), 11)]
    assert int.from_bytes(full[:2], "big") == len(full) - 2
    assert [entry[3] for entry in entries] == [0xA0, 0xA1, 0xA2, 1]
    assert entries[2][8:] == bytes(cdsector.msf(BLOCKS))
    assert sense(cd_driver, struct.pack(">BBB4xH", 0x43, 0, 4, 0xFFFF)) == (5, 0x24, 0)


def test_configuration(cd_driver: AtaDriver) -> None:
    """GET CONFIGURATION lists profile and features, all, the current ones, or one."""

    def features(select: int, first: int) -> tuple[int, dict[int, bytes]]:
        data = cd_driver.packet(struct.pack(">BBH3xH", 0x46, select, first, 0xFFFF))
        assert int.from_bytes(data[:4], "big") == len(data) - 4
        found, at = {}, 8
        while at < len(data):
            found[data[at] << 8 | data[at + 1]] = data[at : at + 4 + data[at + 3]]
            at += 4 + data[at + 3]
        return data[6] << 8 | data[7], found

    profile, every = features(0, 0)
    assert profile == 0x0008
    assert set(every) == {0, 1, 3, 0x10, 0x1E, 0x1F, 0x100, 0x105}
    _, current = features(1, 0)
    assert set(current) == set(every) - {0x1F}
    assert all(feature[2] & 1 for feature in current.values())
    assert set(features(2, 0x1E)[1]) == {0x1E}
    assert set(features(2, 0x99)[1]) == set()
    assert set(features(0, 0x10)[1]) == {0x10, 0x1E, 0x1F, 0x100, 0x105}
    assert sense(cd_driver, struct.pack(">BBH3xH", 0x46, 3, 0, 0xFFFF)) == (5, 0x24, 0)


def test_a_large_medium_is_a_dvd(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """More blocks than a CD can have make the profile DVD-ROM."""
    tray(cd).data = bytearray(0)
    disc = cd.channel.drives[0]
    assert disc is not None

    class Dvd(Tray):
        size = 4_700_000_000

    disc.unit_state.tray = Dvd()  # type: ignore[attr-defined]
    data = cd_driver.packet(struct.pack(">BBH3xH", 0x46, 0, 0, 8))
    assert data[6:8] == b"\x00\x10"


def test_mode_sense_and_select(cd_driver: AtaDriver) -> None:
    """Pages current, changeable and default; only what is changeable changes."""

    def page(code: int, control: int = 0) -> bytes:
        data = cd_driver.packet(struct.pack(">BBB4xH", 0x5A, 0, control << 6 | code, 0xFFFF))
        assert int.from_bytes(data[:2], "big") == len(data) - 2
        return data[8:]

    def select(data: bytes) -> None:
        cd_driver.packet(struct.pack(">BB5xH", 0x55, 0x10, len(data)), out=data)

    recovery = page(0x01)
    assert recovery[:4] == b"\x01\x0a\x00\x20"
    assert page(0x3F) == recovery + page(0x0D) + page(0x2A)
    assert len(page(0x2A)) == 22
    select(bytes(8) + b"\x01\x0a\x01\x07".ljust(12, b"\0"))
    assert page(0x01)[:4] == b"\x01\x0a\x01\x07"
    assert page(0x01, 2) == recovery
    assert page(0x01, 1)[2:5] == b"\xff\xff\x00"
    assert sense(cd_driver, struct.pack(">BBB4xH", 0x5A, 0, 0xC1, 255)) == (5, 0x39, 0)
    assert sense(cd_driver, struct.pack(">BBB4xH", 0x5A, 0, 0x08, 255)) == (5, 0x24, 0)
    for wrong, code in (
        (b"\x01\x0a\x00\x20\x01".ljust(12, b"\0"), 0x26),  # a byte that cannot change
        (page(0x2A)[:4] + b"\xff" + page(0x2A)[5:], 0x26),
        (b"\x08\x02\x00\x00", 0x26),  # a page that there is not
        (b"\x01\x0a\x00", 0x26),  # cut short
        (b"\x01\x02\x00\x00", 0x1A),  # another length
        (b"\x01", 0x26),
    ):
        data = bytes(8) + wrong
        cdb = struct.pack(">BB5xH", 0x55, 0x10, len(data))
        assert sense(cd_driver, cdb, out=data) == (5, code, 0)
    assert sense(cd_driver, struct.pack(">BB5xH", 0x55, 0x10, 4), out=bytes(4)) == (5, 0x1A, 0)
    assert page(0x01)[:4] == b"\x01\x0a\x01\x07"
    select(bytes(8) + page(0x2A) + recovery)
    assert page(0x01) == recovery


def test_speed_shows_in_the_capabilities(cd_driver: AtaDriver) -> None:
    """SET CD SPEED changes the current speed, within what the drive can."""

    def speed() -> int:
        data = cd_driver.packet(struct.pack(">BBB4xH", 0x5A, 0, 0x2A, 255))
        return int.from_bytes(data[8 + 14 : 8 + 16], "big")

    for wanted, got in ((706, 706), (0xFFFF, 5632), (0, 176), (9999, 5632)):
        cd_driver.packet(struct.pack(">BxH", 0xBB, wanted))
        assert speed() == got


def test_disc_and_track_information(cd_driver: AtaDriver) -> None:
    """A finalised disc with one session and one data track of all blocks."""
    disc = cd_driver.packet(struct.pack(">BB5xH", 0x51, 0, 255))
    assert (int.from_bytes(disc[:2], "big"), disc[2], disc[3:7]) == (32, 0x0E, b"\x01\x01\x01\x01")
    for by, number in ((0, 0), (0, BLOCKS - 1), (1, 1), (2, 1)):
        track = cd_driver.packet(struct.pack(">BBIxH", 0x52, by, number, 255))
        assert (track[2], int.from_bytes(track[24:28], "big")) == (1, BLOCKS)
    for by, number in ((0, BLOCKS), (1, 2), (2, 0), (3, 1)):
        assert sense(cd_driver, struct.pack(">BBIxH", 0x52, by, number, 255)) == (5, 0x24, 0)


def test_seek(cd_driver: AtaDriver) -> None:
    """SEEK checks its address."""
    cd_driver.packet(struct.pack(">BxI", 0x2B, BLOCKS - 1))
    assert sense(cd_driver, struct.pack(">BxI", 0x2B, BLOCKS)) == (5, 0x21, 0)


# The tray.


def event(driver: AtaDriver) -> tuple[int, int]:
    data = driver.packet(struct.pack(">BB2xB2xH", 0x4A, 1, 0x10, 8))
    assert data[:4] == b"\x00\x06\x04\x10"
    return data[4], data[5]


def test_eject_and_load(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """START STOP UNIT opens and closes the tray; commands then say why there is no medium, or that it is new."""
    assert event(cd_driver) == (2, 2)
    assert event(cd_driver) == (0, 2)
    cd_driver.packet(b"\x1b\0\0\0\x02")
    assert tray(cd).tray_open
    assert event(cd_driver) == (3, 1)
    for cdb in (b"\x00", read_10(0, 1), b"\x25", struct.pack(">BB5xH", 0x43, 0, 255)):
        assert sense(cd_driver, cdb) == (2, 0x3A, 2)
    assert cd_driver.packet(struct.pack(">B7xH", 0xBD, 8))[1] == 0x10
    cd_driver.packet(b"\x1b\0\0\0\x03")
    assert not tray(cd).tray_open
    assert event(cd_driver) == (2, 2)
    assert sense(cd_driver, b"\x00") == (6, 0x28, 0)
    cd_driver.packet(b"\x00")
    assert cd_driver.packet(struct.pack(">B7xH", 0xBD, 8))[1] == 0x00
    cd_driver.packet(b"\x1b\0\0\0\x00")
    cd_driver.packet(b"\x1b\0\0\0\x32")
    assert not tray(cd).tray_open


def test_a_locked_tray_stays_shut(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """PREVENT forbids ejecting until ALLOW or a hardware reset; a software reset keeps the lock."""
    cd_driver.packet(b"\x1e\0\0\0\x01")
    assert tray(cd).locked
    assert sense(cd_driver, b"\x1b\0\0\0\x02") == (5, 0x53, 2)
    assert cd_driver.packet(struct.pack(">BBB4xH", 0x5A, 0, 0x2A, 255))[8 + 6] & 2
    cd_driver.reset()
    assert tray(cd).locked
    cd_driver.packet(b"\x1e\0\0\0\x00")
    cd_driver.packet(b"\x1b\0\0\0\x02")
    assert tray(cd).tray_open
    cd_driver.packet(b"\x1e\0\0\0\x01")
    cd.channel.power_on()
    assert not tray(cd).locked


def test_media_change(cd: AtaBench, cd_driver: AtaDriver) -> None:
    """A new medium is announced once by a unit attention, and read with its own size."""
    event(cd_driver)
    tray(cd).insert(b"new!" * 512 * 5)
    assert event(cd_driver) == (2, 2)
    assert sense(cd_driver, read_10(0, 1)) == (6, 0x28, 0)
    assert cd_driver.packet(read_10(0, 1))[:4] == b"new!"
    assert cd_driver.packet(b"\x25") == struct.pack(">II", 4, 2048)


def test_attention_lets_some_commands_through(cd: AtaBench) -> None:
    """INQUIRY, GET CONFIGURATION and events work while an attention is pending; REQUEST SENSE takes it."""
    driver = AtaDriver(cd)
    driver.packet(struct.pack(">BxxxB", 0x12, 36))
    driver.packet(struct.pack(">BBH3xH", 0x46, 0, 0, 255))
    event(driver)
    data = driver.packet(struct.pack(">BxxxB", 0x03, 18))
    assert (data[2], data[12]) == (6, 0x29)
    driver.packet(b"\x00")


def test_an_empty_drive() -> None:
    """Without a medium: NOT READY, MEDIUM NOT PRESENT, tray closed; no profile; then a disc is put in."""
    bench = AtaBench()
    bench.add_cdrom()
    driver = AtaDriver(bench)
    assert sense(driver, b"\x00") == (6, 0x29, 0)
    assert sense(driver, b"\x00") == (2, 0x3A, 1)
    assert event(driver) == (0, 0)
    assert driver.packet(struct.pack(">BBH3xH", 0x46, 0, 0, 8))[6:] == b"\0\0"
    assert driver.packet(struct.pack(">BBB4xH", 0x5A, 0, 0x01, 255))[2] == 0x70
    tray(bench).insert(bytes(4096))
    assert event(driver) == (2, 2)
    assert sense(driver, b"\x00") == (6, 0x28, 0)
    assert driver.packet(b"\x25") == struct.pack(">II", 1, 2048)


def test_events_must_be_polled(cd_driver: AtaDriver) -> None:
    """Asynchronous notification is refused; classes without events give the header alone."""
    assert sense(cd_driver, struct.pack(">BB2xB2xH", 0x4A, 0, 0x10, 8)) == (5, 0x24, 0)
    assert cd_driver.packet(struct.pack(">BB2xB2xH", 0x4A, 1, 0x02, 8)) == b"\x00\x02\x80\x10"


def test_sense_is_told_once(cd_driver: AtaDriver) -> None:
    """REQUEST SENSE clears what it tells; a successful command clears it too; descriptor format is refused."""
    with pytest.raises(AtaError) as caught:
        cd_driver.packet(b"\xff", sense=False)
    assert caught.value.error == 5 << 4 | ABRT
    assert caught.value.status & ERR
    assert cd_driver.packet(struct.pack(">BxxxB", 0x03, 18))[2] == 5
    assert cd_driver.packet(struct.pack(">BxxxB", 0x03, 18))[2] == 0
    with pytest.raises(AtaError):
        cd_driver.packet(b"\xff", sense=False)
    cd_driver.packet(b"\x00")
    assert cd_driver.packet(struct.pack(">BxxxB", 0x03, 18))[2] == 0
    assert sense(cd_driver, struct.pack(">BBxxB", 0x03, 1, 18)) == (5, 0x24, 0)
