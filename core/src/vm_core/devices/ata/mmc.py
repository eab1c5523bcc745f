"""The command set of a CD-ROM drive (MMC): packets in, outcomes out.

Theory of operation. :meth:`CdRom.execute` takes the bytes of a command packet and answers with an :class:`Outcome`:
data for the host, blocks of the medium that somebody has to read, a list of parameters it wants, or a failure with its
sense. It moves no data itself, so PIO, DMA and other transports of packets share it. Each command is a row of a table:
opcode, name, method, and whether it needs a medium and yields to a pending unit attention.

Source: MMC-5 (T10/1675-D), SPC-3 (T10/1416-D), and for old fields SFF-8020i revision 2.6.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import NamedTuple, Protocol

from .cdsector import USER, lba_of, msf
from .identify import Identity

#: Bytes of a logical block.
BLOCK = USER
#: More blocks than a CD of 80 minutes has: it is a DVD.
CD_BLOCKS = 80 * 60 * 75


class Sense(NamedTuple):
    """Sense key, additional sense code and qualifier (SPC-3 4.5.6, annex D)."""

    key: int
    asc: int
    ascq: int = 0


NO_SENSE = Sense(0x0, 0x00)
NO_MEDIUM_CLOSED = Sense(0x2, 0x3A, 0x01)
NO_MEDIUM_OPEN = Sense(0x2, 0x3A, 0x02)
READ_ERROR = Sense(0x3, 0x11)
INVALID_OPCODE = Sense(0x5, 0x20)
OUT_OF_RANGE = Sense(0x5, 0x21)
INVALID_FIELD = Sense(0x5, 0x24)
INVALID_PARAMETER = Sense(0x5, 0x26)
PARAMETER_LENGTH = Sense(0x5, 0x1A)
SAVING_UNSUPPORTED = Sense(0x5, 0x39)
REMOVAL_PREVENTED = Sense(0x5, 0x53, 0x02)
WRONG_TRACK_MODE = Sense(0x5, 0x64)
MEDIUM_CHANGED = Sense(0x6, 0x28)
POWER_ON = Sense(0x6, 0x29)


class Good(NamedTuple):
    """Success, with *data* for the host."""

    data: bytes = b""


class Blocks(NamedTuple):
    """Success once *number* blocks from *lba* on have been read; with *raw*, as 2,352-byte sectors."""

    lba: int
    number: int
    raw: bool = False


class Receive(NamedTuple):
    """The host is to send *length* bytes, which *then* turns into the outcome."""

    length: int
    then: Callable[[bytes], Outcome]


class Check(NamedTuple):
    """CHECK CONDITION, and the block it is about."""

    sense: Sense
    lba: int | None = None


Outcome = Good | Blocks | Receive | Check


class Tray(Protocol):
    """What a CD-ROM drive needs of its :class:`~vm_core.block.backend.BlockBackend`."""

    @property
    def size(self) -> int: ...

    @property
    def tray_open(self) -> bool: ...

    @property
    def locked(self) -> bool: ...

    @locked.setter
    def locked(self, value: bool) -> None: ...

    def move_tray(self, *, is_open: bool) -> None: ...


class CommandRow(NamedTuple):
    """A row of the table."""

    opcode: int
    name: str
    method: str
    #: Fails with NOT READY while there is no medium.
    medium: bool = False
    #: A pending unit attention is reported first, and the command is not carried out.
    attention: bool = True


COMMANDS: tuple[CommandRow, ...] = (
    CommandRow(0x00, "TEST UNIT READY", "test_unit_ready", medium=True),
    CommandRow(0x03, "REQUEST SENSE", "request_sense", attention=False),
    CommandRow(0x12, "INQUIRY", "inquiry", attention=False),
    CommandRow(0x1B, "START STOP UNIT", "start_stop_unit"),
    CommandRow(0x1E, "PREVENT ALLOW MEDIUM REMOVAL", "prevent_allow"),
    CommandRow(0x25, "READ CAPACITY", "read_capacity", medium=True),
    CommandRow(0x28, "READ (10)", "read_10", medium=True),
    CommandRow(0x2B, "SEEK (10)", "seek", medium=True),
    CommandRow(0x43, "READ TOC/PMA/ATIP", "read_toc", medium=True),
    CommandRow(0x46, "GET CONFIGURATION", "get_configuration", attention=False),
    CommandRow(0x4A, "GET EVENT STATUS NOTIFICATION", "get_event_status", attention=False),
    CommandRow(0x51, "READ DISC INFORMATION", "read_disc_information", medium=True),
    CommandRow(0x52, "READ TRACK INFORMATION", "read_track_information", medium=True),
    CommandRow(0x55, "MODE SELECT (10)", "mode_select"),
    CommandRow(0x5A, "MODE SENSE (10)", "mode_sense"),
    CommandRow(0xA8, "READ (12)", "read_12", medium=True),
    CommandRow(0xB9, "READ CD MSF", "read_cd_msf", medium=True),
    CommandRow(0xBB, "SET CD SPEED", "set_speed"),
    CommandRow(0xBD, "MECHANISM STATUS", "mechanism_status"),
    CommandRow(0xBE, "READ CD", "read_cd", medium=True),
)

_BY_OPCODE = {row.opcode: row for row in COMMANDS}

# READ (10), READ (12), SEEK (10): opcode, flags, LBA, …
_READ_10 = struct.Struct(">xxIxHx")
_READ_12 = struct.Struct(">xxII")

# Profiles (MMC-5 5.3.1).
PROFILE_CD_ROM, PROFILE_DVD_ROM = 0x0008, 0x0010

# Media events of GET EVENT STATUS NOTIFICATION (MMC-5 6.7.2.5.4).
EVENT_NONE, EVENT_NEW_MEDIA, EVENT_REMOVAL = 0, 2, 3

# Mode pages.
PAGE_ERROR_RECOVERY, PAGE_CD, PAGE_CAPABILITIES, PAGE_ALL = 0x01, 0x0D, 0x2A, 0x3F

#: KiB/s of a drive of 32×, and of one without limit.
MAX_SPEED, NO_LIMIT = 5632, 0xFFFF


class CdRom:
    """The logical unit in a CD-ROM drive with *tray*."""

    def __init__(self, tray: Tray, identity: Identity) -> None:
        self.tray = tray
        self.identity = identity
        self._methods: dict[int, Callable[[bytes], Outcome]] = {
            row.opcode: getattr(self, row.method) for row in COMMANDS
        }
        self.power_on()

    def power_on(self) -> None:
        """Power-on or hardware reset."""
        self.sense = NO_SENSE
        self.sense_lba: int | None = None
        self.attention: Sense | None = POWER_ON
        self.event = EVENT_NEW_MEDIA if self.blocks else EVENT_NONE
        self.retries = 0x20
        self.recovery = 0x00
        self.speed = MAX_SPEED
        if self.tray.locked:
            self.tray.locked = False

    def medium_changed(self, present: bool) -> None:
        """Somebody put a medium in, or took it out."""
        if present:
            self.attention = MEDIUM_CHANGED
            self.event = EVENT_NEW_MEDIA
        else:
            self.event = EVENT_REMOVAL

    @property
    def blocks(self) -> int:
        """Blocks of the medium that a host can reach, 0 without one."""
        return 0 if self.tray.tray_open else self.tray.size // BLOCK

    @property
    def profile(self) -> int:
        """The current profile, 0 without a medium."""
        blocks = self.blocks
        if not blocks:
            return 0
        return PROFILE_CD_ROM if blocks <= CD_BLOCKS else PROFILE_DVD_ROM

    def execute(self, packet: bytes) -> Outcome:
        """Carry out the 12 bytes of *packet*. A failure is remembered for REQUEST SENSE."""
        row = _BY_OPCODE.get(packet[0])
        if row is None:
            return self.check(INVALID_OPCODE)
        if row.attention and self.attention is not None:
            sense, self.attention = self.attention, None
            return self.check(sense)
        if row.medium and not self.blocks:
            return self.check(NO_MEDIUM_OPEN if self.tray.tray_open else NO_MEDIUM_CLOSED)
        outcome = self._methods[row.opcode](packet)
        if isinstance(outcome, Check):
            return self.check(*outcome)
        if row.opcode != 0x03:
            self.sense, self.sense_lba = NO_SENSE, None
        return outcome

    def check(self, sense: Sense, lba: int | None = None) -> Check:
        """Remember *sense*, and the block it is about, for REQUEST SENSE."""
        self.sense, self.sense_lba = sense, lba
        return Check(sense, lba)

    # Who and how.

    def test_unit_ready(self, packet: bytes) -> Outcome:
        return Good()

    def request_sense(self, packet: bytes) -> Outcome:
        """REQUEST SENSE (SPC-3 6.27), fixed format. A pending unit attention is told where there is nothing else."""
        if packet[1] & 1:  # descriptor format
            return Check(INVALID_FIELD)
        sense, lba = self.sense, self.sense_lba
        if sense == NO_SENSE and self.attention is not None:
            sense, self.attention = self.attention, None
        self.sense, self.sense_lba = NO_SENSE, None
        data = bytearray(18)
        data[0] = 0x70 | (0x80 if lba is not None else 0)
        data[2] = sense.key
        data[3:7] = (lba or 0).to_bytes(4, "big")
        data[7] = 10
        data[12], data[13] = sense.asc, sense.ascq
        return Good(bytes(data[: packet[4]]))

    def inquiry(self, packet: bytes) -> Outcome:
        """INQUIRY (SPC-3 6.4): standard data, and the vital product data pages 0x00, 0x80 and 0x83."""
        allocation = packet[3] << 8 | packet[4]
        if packet[1] & 1:
            page = self._vital_product_data(packet[2])
            return Check(INVALID_FIELD) if page is None else Good(page[:allocation])
        if packet[2]:
            return Check(INVALID_FIELD)
        vendor, _, product = self.identity.model.partition(" ")
        data = bytearray(36)
        data[0] = 0x05  # CD/DVD
        data[1] = 0x80  # removable
        data[2] = 0x05  # SPC-3
        data[3] = 0x32  # response format of MMC over ATAPI (MMC-5 annex on ATAPI)
        data[4] = len(data) - 5
        data[8:16] = vendor.encode("ascii", "replace")[:8].ljust(8)
        data[16:32] = product.encode("ascii", "replace")[:16].ljust(16)
        data[32:36] = self.identity.firmware.encode("ascii", "replace")[:4].ljust(4)
        return Good(bytes(data[:allocation]))

    def _vital_product_data(self, page: int) -> bytes | None:
        serial = self.identity.serial.encode("ascii", "replace")[:20]
        if page == 0x00:
            body = bytes((0x00, 0x80, 0x83))
        elif page == 0x80:
            body = serial
        elif page == 0x83:
            # T10 vendor identification: vendor (8 bytes), then what makes it unique.
            vendor = self.identity.model.partition(" ")[0].encode("ascii", "replace")[:8].ljust(8)
            name = vendor + serial
            body = bytes((0x02, 0x01, 0x00, len(name))) + name
            if self.identity.wwn:
                body += b"\x01\x03\x00\x08" + self.identity.wwn.to_bytes(8, "big")
        else:
            return None
        return bytes((0x05, page)) + len(body).to_bytes(2, "big") + body

    # The tray.

    def start_stop_unit(self, packet: bytes) -> Outcome:
        """START STOP UNIT (MMC-5 6.42): LoEj moves the tray; power conditions need nothing done."""
        if packet[4] >> 4 or not packet[4] & 0x02:
            return Good()
        opening = not packet[4] & 0x01
        if opening and self.tray.locked:
            return Check(REMOVAL_PREVENTED)
        if opening != self.tray.tray_open:
            self.tray.move_tray(is_open=opening)
            self.medium_changed(bool(self.blocks))
        return Good()

    def prevent_allow(self, packet: bytes) -> Outcome:
        """PREVENT ALLOW MEDIUM REMOVAL (MMC-5 6.15)."""
        self.tray.locked = bool(packet[4] & 1)
        return Good()

    def get_event_status(self, packet: bytes) -> Outcome:
        """GET EVENT STATUS NOTIFICATION (MMC-5 6.7): polled, media events."""
        if not packet[1] & 1:
            return Check(INVALID_FIELD)
        allocation = packet[7] << 8 | packet[8]
        media = 0x10
        if not packet[4] & media:
            # No event available: the header alone, with the classes there are.
            return Good(bytes((0x00, 0x02, 0x80, media))[:allocation])
        state = (0x01 if self.tray.tray_open else 0) | (0x02 if self.blocks else 0)
        data = bytes((0x00, 0x06, 0x04, media, self.event, state, 0x00, 0x00))
        if allocation > 4:
            self.event = EVENT_NONE
        return Good(data[:allocation])

    def mechanism_status(self, packet: bytes) -> Outcome:
        """MECHANISM STATUS (MMC-5 6.11): no changer."""
        data = bytearray(8)
        data[1] = 0x10 if self.tray.tray_open else 0x00
        data[5] = 0x01  # one slot
        return Good(bytes(data[: packet[8] << 8 | packet[9]]))

    def set_speed(self, packet: bytes) -> Outcome:
        """SET CD SPEED (MMC-4 6.39): shown in the capabilities page."""
        wanted = packet[2] << 8 | packet[3]
        self.speed = MAX_SPEED if wanted == NO_LIMIT else min(max(wanted, 176), MAX_SPEED)
        return Good()

    # The medium.

    def read_capacity(self, packet: bytes) -> Outcome:
        """READ CAPACITY (MMC-5 6.23): the last block and the size of one."""
        return Good(struct.pack(">II", min(self.blocks - 1, 0xFFFFFFFF), BLOCK))

    def read_10(self, packet: bytes) -> Outcome:
        return self._read(*_READ_10.unpack_from(packet))

    def read_12(self, packet: bytes) -> Outcome:
        return self._read(*_READ_12.unpack_from(packet))

    def _read(self, lba: int, count: int, raw: bool = False) -> Outcome:
        if lba < 0 or lba + count > self.blocks:
            return Check(OUT_OF_RANGE, max(lba, self.blocks))
        return Blocks(lba, count, raw) if count else Good()

    def seek(self, packet: bytes) -> Outcome:
        """SEEK (10) (MMC-5 6.36)."""
        (lba,) = struct.unpack_from(">I", packet, 2)
        return Good() if lba < self.blocks else Check(OUT_OF_RANGE)

    def read_cd(self, packet: bytes) -> Outcome:
        """READ CD (MMC-5 6.19)."""
        (lba,) = struct.unpack_from(">I", packet, 2)
        return self._read_cd(packet, lba, int.from_bytes(packet[6:9], "big"))

    def read_cd_msf(self, packet: bytes) -> Outcome:
        """READ CD MSF (MMC-5 6.20): from a position up to, but not including, another."""
        start, end = lba_of(*packet[3:6]), lba_of(*packet[6:9])
        if end < start:
            return Check(INVALID_FIELD)
        return self._read_cd(packet, start, end - start)

    def _read_cd(self, packet: bytes, lba: int, count: int) -> Outcome:
        # Expected sector type: any, or mode 1.
        if packet[1] >> 2 & 7 not in (0, 2):
            return Check(WRONG_TRACK_MODE)
        if packet[10] & 7 or packet[9] & 0x06:  # sub-channels, C2 error flags
            return Check(INVALID_FIELD)
        fields = packet[9] & 0xF8
        if not fields:
            return Good()
        # Of mode 1 sectors there are no sub-headers, so 0x40 changes nothing (MMC-5 table 351).
        fields &= ~0x40
        if fields == 0x10:
            return self._read(lba, count)
        if fields == 0xB8:
            return self._read(lba, count, raw=True)
        return Check(INVALID_FIELD)

    def read_toc(self, packet: bytes) -> Outcome:
        """READ TOC/PMA/ATIP (MMC-5 6.26): one session with one data track."""
        allocation = packet[7] << 8 | packet[8]
        use_msf = bool(packet[1] & 0x02)
        # SFF-8020i has the format in the two top bits of the control byte.
        form = packet[2] & 0x0F or packet[9] >> 6
        if form == 0:
            toc = self._toc(use_msf, packet[6])
        elif form == 1:
            toc = self._sessions(use_msf)
        elif form == 2:
            toc = self._full_toc()
        else:
            toc = None
        return Check(INVALID_FIELD) if toc is None else Good(toc[:allocation])

    def _position(self, lba: int, use_msf: bool) -> bytes:
        return bytes((0, *msf(lba))) if use_msf else lba.to_bytes(4, "big")

    def _toc(self, use_msf: bool, first: int) -> bytes | None:
        """Format 0: track descriptors from *first* on; 0xAA is the lead-out."""
        if first > 1 and first != 0xAA:
            return None
        body = b"\x01\x01"  # first and last track
        if first <= 1:
            body += b"\x00\x14\x01\x00" + self._position(0, use_msf)
        body += b"\x00\x14\xaa\x00" + self._position(self.blocks, use_msf)
        return len(body).to_bytes(2, "big") + body

    def _sessions(self, use_msf: bool) -> bytes:
        """Format 1: the first track of the last session."""
        return b"\x00\x0a\x01\x01\x00\x14\x01\x00" + self._position(0, use_msf)

    def _full_toc(self) -> bytes:
        """Format 2: the entries of the lead-in, in BCD-free MSF (MMC-5 6.26.3.4)."""
        entries = b""
        for point, position in (
            (0xA0, (1, 0, 0)),  # first track, disc type CD-ROM
            (0xA1, (1, 0, 0)),  # last track
            (0xA2, msf(self.blocks)),  # lead-out
            (0x01, msf(0)),
        ):
            # Session, ADR and control, TNO, POINT, elapsed time (3), zero, position (3).
            entries += bytes((1, 0x14, 0, point, 0, 0, 0, 0, *position))
        return (len(entries) + 2).to_bytes(2, "big") + b"\x01\x01" + entries

    def read_disc_information(self, packet: bytes) -> Outcome:
        """READ DISC INFORMATION (MMC-5 6.22): a complete disc."""
        if packet[1] & 0x07:
            return Check(INVALID_FIELD)
        data = bytearray(34)
        data[1] = len(data) - 2
        data[2] = 0x0E  # last session complete, disc finalised
        data[3] = data[4] = data[5] = data[6] = 1  # first track; sessions; first and last track of the last session
        data[7] = 0x20  # unrestricted use
        data[8] = 0x00  # CD-ROM
        # There is no place for another session or a lead-out of one.
        data[16:24] = b"\xff" * 8
        return Good(bytes(data[: packet[7] << 8 | packet[8]]))

    def read_track_information(self, packet: bytes) -> Outcome:
        """READ TRACK INFORMATION (MMC-5 6.27), by LBA, track or session."""
        (number,) = struct.unpack_from(">I", packet, 2)
        by = packet[1] & 0x03
        known = number < self.blocks if by == 0 else number == 1
        if not known or by == 3:
            return Check(INVALID_FIELD)
        data = bytearray(36)
        data[1] = len(data) - 2
        data[2] = data[3] = 1  # track, session
        data[5] = 0x04  # data track, copied digitally
        data[6] = 0x01  # mode 1
        data[24:28] = min(self.blocks, 0xFFFFFFFF).to_bytes(4, "big")
        return Good(bytes(data[: packet[7] << 8 | packet[8]]))

    # Configuration and mode pages.

    def get_configuration(self, packet: bytes) -> Outcome:
        """GET CONFIGURATION (MMC-5 6.6)."""
        select = packet[1] & 0x03
        if select == 3:
            return Check(INVALID_FIELD)
        first = packet[2] << 8 | packet[3]
        body = b""
        for code, current, persistent, version, data in self._features():
            wanted = code == first if select == 2 else code >= first and (current or select == 0)
            if wanted:
                body += struct.pack(">HBB", code, version << 2 | persistent << 1 | current, len(data)) + data
        header = struct.pack(">IHH", len(body) + 4, 0, self.profile)
        return Good((header + body)[: packet[7] << 8 | packet[8]])

    def _features(self) -> list[tuple[int, bool, bool, int, bytes]]:
        """Code, current, persistent, version, data (MMC-5 5.3)."""
        profile = self.profile
        cd, dvd = profile == PROFILE_CD_ROM, profile == PROFILE_DVD_ROM
        profiles = struct.pack(">HBxHBx", PROFILE_DVD_ROM, dvd, PROFILE_CD_ROM, cd)
        # Tray loader that the drive can open and that can be locked.
        removable = struct.pack(">B3x", 0x01 << 5 | 0x08 | 0x01)
        return [
            (0x0000, True, True, 0, profiles),
            (0x0001, True, True, 2, struct.pack(">IB3x", 2, 0x01)),  # core: ATAPI; device busy events
            (0x0003, True, True, 1, removable),
            (0x0010, bool(profile), False, 0, struct.pack(">IHBx", BLOCK, 1, 0)),  # random readable
            (0x001E, cd, False, 2, bytes(4)),  # CD read
            (0x001F, dvd, False, 0, b""),  # DVD read
            (0x0100, True, True, 0, b""),  # power management
            (0x0105, True, True, 0, b""),  # time-out
        ]

    def _page(self, code: int, changeable: bool) -> bytes | None:
        if code == PAGE_ERROR_RECOVERY:
            body = bytes((0xFF, 0xFF)) if changeable else bytes((self.recovery, self.retries))
            return b"\x01\x0a" + body.ljust(10, b"\0")
        if code == PAGE_CD:
            # Inactivity timer; 60 seconds a minute, 75 frames a second.
            return b"\x0d\x06" + (bytes(6) if changeable else b"\x00\x00\x00\x3c\x00\x4b")
        if code == PAGE_CAPABILITIES:
            return b"\x2a\x14" + (bytes(20) if changeable else self._capabilities())
        return None

    def _capabilities(self) -> bytes:
        """C/DVD capabilities and mechanical status (MMC-3 5.5.10)."""
        locked = self.tray.locked
        return struct.pack(
            ">BBBBBBHHHHxBHH",
            0x08,  # reads DVD-ROM
            0x00,  # writes nothing
            0x71,  # multi-session, mode 2 forms 1 and 2; audio play for drivers that expect it
            0x00,
            0x01 << 5 | 0x08 | (0x02 if locked else 0) | 0x01,  # tray; eject; locked now; can be locked
            0x00,
            MAX_SPEED,
            2,  # volume levels
            512,  # KiB of buffer
            self.speed,
            0x00,
            MAX_SPEED,
            0,
        )

    def mode_sense(self, packet: bytes) -> Outcome:
        """MODE SENSE (10) (SPC-3 6.10): no block descriptors."""
        control, code = packet[2] >> 6, packet[2] & 0x3F
        if control == 3:
            return Check(SAVING_UNSUPPORTED)
        if packet[3] not in (0x00, 0xFF):
            return Check(INVALID_FIELD)
        codes = (PAGE_ERROR_RECOVERY, PAGE_CD, PAGE_CAPABILITIES) if code == PAGE_ALL else (code,)
        body = b""
        for wanted in codes:
            page = self._default_page(wanted) if control == 2 else self._page(wanted, control == 1)
            if page is None:
                return Check(INVALID_FIELD)
            body += page
        # Medium type (SFF-8020i table 49): door open, no disc, 120 mm data disc.
        medium = 0x71 if self.tray.tray_open else 0x01 if self.blocks else 0x70
        head = struct.pack(">HB5x", len(body) + 6, medium)
        return Good((head + body)[: packet[7] << 8 | packet[8]])

    def _default_page(self, code: int) -> bytes | None:
        if code == PAGE_ERROR_RECOVERY:
            return b"\x01\x0a\x00\x20".ljust(12, b"\0")
        return self._page(code, False)

    def mode_select(self, packet: bytes) -> Outcome:
        """MODE SELECT (10) (SPC-3 6.8): what is changeable may change, the rest must be as it is."""
        if packet[1] & 0x01:
            return Check(SAVING_UNSUPPORTED)
        length = packet[7] << 8 | packet[8]
        return Receive(length, self._select) if length else Good()

    def _select(self, data: bytes) -> Outcome:
        if len(data) < 8:
            return self.check(PARAMETER_LENGTH)
        at = 8 + int.from_bytes(data[6:8], "big")
        if at > len(data):
            return self.check(PARAMETER_LENGTH)
        pages = []
        while at < len(data):
            page = data[at : at + 2 + (data[at + 1] if at + 1 < len(data) else 0)]
            current = self._page(page[0] & 0x3F, False)
            mask = self._page(page[0] & 0x3F, True)
            if current is None or mask is None or len(page) < 2 or len(page) != 2 + page[1]:
                return self.check(INVALID_PARAMETER)
            if len(page) != len(current):
                return self.check(PARAMETER_LENGTH)
            if any((new ^ old) & ~free & 0xFF for new, old, free in zip(page[2:], current[2:], mask[2:], strict=True)):
                return self.check(INVALID_PARAMETER)
            pages.append(page)
            at += len(page)
        for page in pages:
            if page[0] & 0x3F == PAGE_ERROR_RECOVERY:
                self.recovery, self.retries = page[2], page[3]
        return Good()
