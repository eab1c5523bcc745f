"""The registers of an ATA device: names, offsets, bits, and the task file that holds them.

Source: ATA/ATAPI-7 volume 1 clause 7 and volume 2 (T13/1532D), ACS-2 (T13/2015-D) clause 6. Offsets are those of the
parallel interface's command block; a serial link carries the same registers in FIS fields.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Access = Literal["rw", "ro", "wo"]


class Register(NamedTuple):
    """One register: its *offset* in the block, what the host may do, its value after a reset of an ATA disk."""

    name: str
    offset: int
    access: Access
    reset: int
    meaning: str


# Offsets in the command block. Features and command are what is behind error and status for writing.
DATA = 0
ERROR = FEATURES = 1
COUNT = 2
LBA_LOW = 3
LBA_MID = 4
LBA_HIGH = 5
DEVICE = 6
STATUS = COMMAND = 7

COMMAND_BLOCK: tuple[Register, ...] = (
    Register("data", DATA, "rw", 0, "16 bits; the sectors of PIO commands"),
    Register("error", ERROR, "ro", 0x01, "why the command failed, or the diagnostic code after a reset"),
    Register("features", FEATURES, "wo", 0, "two deep"),
    Register("count", COUNT, "rw", 0x01, "sectors, two deep; interrupt reason of a PACKET command"),
    Register("lba_low", LBA_LOW, "rw", 0x01, "LBA 7:0 and 31:24, two deep; CHS: sector"),
    Register("lba_mid", LBA_MID, "rw", 0x00, "LBA 15:8 and 39:32, two deep; CHS: cylinder low; PACKET: byte count low"),
    Register("lba_high", LBA_HIGH, "rw", 0x00, "LBA 23:16 and 47:40, two deep; CHS: cylinder high; byte count high"),
    Register("device", DEVICE, "rw", 0x00, "DEV, LBA, and LBA 27:24 or the head"),
    Register("status", STATUS, "ro", 0x50, "reading it ends the interrupt"),
    Register("command", COMMAND, "wo", 0, "writing it starts a command"),
)

CONTROL_BLOCK: tuple[Register, ...] = (
    Register("alternate status", 0, "ro", 0x50, "status; reading it leaves the interrupt alone"),
    Register("device control", 0, "wo", 0, "HOB, SRST, nIEN"),
)

# Status (ACS-2 6.2).
BSY = 0x80
DRDY = 0x40
DF = 0x20
DSC = 0x10
DRQ = 0x08
#: ERR; CHK for PACKET commands.
ERR = 0x01
#: A device that waits for a command.
READY = DRDY | DSC

# Error (ACS-2 6.3). For PACKET commands bits 7:4 are the sense key.
ICRC = 0x80
UNC = 0x40
IDNF = 0x10
ABRT = 0x04

# Device.
DEV = 0x10
LBA = 0x40
#: Bits 7 and 5 are obsolete and read as ones (ATA-3 and before; drivers still compare them).
DEVICE_OBSOLETE = 0xA0

# Device control.
HOB = 0x80
SRST = 0x04
NIEN = 0x02

# Interrupt reason: the count register of a PACKET command (ATA/ATAPI-7 volume 2, 11.8).
REASON_COMMAND = 0x01
REASON_TO_HOST = 0x02

#: Diagnostic code "device 0 passed, device 1 passed or not present" (ACS-2 table 49).
DIAGNOSTIC_PASSED = 0x01


class TaskFile:
    """Features, count and LBA registers, each with the value before the last write, and the device register.

    ``current`` and ``previous`` are indexed by register offset. 48-bit commands take the older value as the high byte
    and leave their high bytes there, where the host reads them with HOB set.
    """

    __slots__ = ("current", "previous")

    def __init__(self) -> None:
        self.current = bytearray(8)
        self.previous = bytearray(8)

    def write(self, offset: int, value: int) -> None:
        """The host writes register *offset* (1–6)."""
        self.previous[offset] = self.current[offset]
        self.current[offset] = value

    def set_signature(self, signature: bytes) -> None:
        """Count, LBA low, mid and high as a reset or diagnostics leave them; the device register is cleared."""
        self.current[COUNT:DEVICE] = signature
        self.previous[COUNT:DEVICE] = bytes(4)
        self.current[DEVICE] = self.previous[DEVICE] = 0

    @property
    def features(self) -> int:
        return self.current[FEATURES]

    @property
    def device(self) -> int:
        return self.current[DEVICE]

    @property
    def count(self) -> int:
        """The count register as last written."""
        return self.current[COUNT]

    @count.setter
    def count(self, value: int) -> None:
        self.current[COUNT] = value

    @property
    def count16(self) -> int:
        """Count with its high byte, for 48-bit commands."""
        return self.current[COUNT] | self.previous[COUNT] << 8

    @count16.setter
    def count16(self, value: int) -> None:
        self.current[COUNT] = value & 0xFF
        self.previous[COUNT] = value >> 8

    @property
    def lba28(self) -> int:
        """LBA low, mid, high and the low half of device."""
        c = self.current
        return c[LBA_LOW] | c[LBA_MID] << 8 | c[LBA_HIGH] << 16 | (c[DEVICE] & 0x0F) << 24

    @lba28.setter
    def lba28(self, value: int) -> None:
        self.current[LBA_LOW:DEVICE] = (value & 0xFFFFFF).to_bytes(3, "little")
        self.current[DEVICE] = self.current[DEVICE] & 0xF0 | value >> 24 & 0x0F

    @property
    def lba48(self) -> int:
        """The six bytes of the two-deep LBA registers."""
        low, high = self.current[LBA_LOW:DEVICE], self.previous[LBA_LOW:DEVICE]
        return int.from_bytes(low + high, "little")

    @lba48.setter
    def lba48(self, value: int) -> None:
        data = value.to_bytes(6, "little")
        self.current[LBA_LOW:DEVICE] = data[:3]
        self.previous[LBA_LOW:DEVICE] = data[3:]

    @property
    def byte_count(self) -> int:
        """LBA mid and high: the byte count of a PACKET command, or a 16-bit cylinder."""
        return self.current[LBA_MID] | self.current[LBA_HIGH] << 8

    @byte_count.setter
    def byte_count(self, value: int) -> None:
        self.current[LBA_MID] = value & 0xFF
        self.current[LBA_HIGH] = value >> 8
