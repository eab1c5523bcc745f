"""SMART: attributes, thresholds, the error log and the self-test log (ATA/ATAPI-7 6.54, ACS-2 7.48 and annex A).

The 512-byte structures are laid out as their tables in the standard are; offsets are in the right-hand column.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

#: LBA mid and high of every SMART command; RETURN STATUS changes them if a threshold is exceeded.
PASS = 0xC24F

_DATA = struct.Struct(
    "<H"  #    structure revision                          0
    "360s"  #  30 attributes of 12 bytes                   2
    "B"  #     off-line data collection status           362
    "B"  #     self-test execution status                363
    "H"  #     seconds to complete off-line collection   364
    "x"  #                                               366
    "B"  #     off-line data collection capability       367
    "H"  #     SMART capability                          368
    "B"  #     error logging capability                  370
    "x"  #                                               371
    "B"  #     minutes to poll a short self-test         372
    "B"  #     minutes to poll an extended self-test     373
    "B"  #     minutes to poll a conveyance self-test    374
    "136x"  #                                            375
    "x"  #     checksum                                  511
)
_ATTRIBUTE = struct.Struct("<BHBB6sx")  # id, flags, value, worst, raw
_THRESHOLD = struct.Struct("<BB10x")
#: Command data structure and error data structure of the error log: 5 × 12 + 30 bytes an entry.
_LOGGED_COMMAND = struct.Struct("<B BBBBB B B I")  # device control, features, count, LBA ×3, device, command, ms
_LOGGED_ERROR = struct.Struct("<x B BBBB B B 19x B H")  # error, count, LBA ×3, device, status, state, hours
_SELF_TEST = struct.Struct("<BBHB4s15x")  # subcommand, status, hours, checkpoint, failing LBA

#: Off-line immediate, off-line tests aborted by a command, short and extended self-tests, all in captive mode too.
_OFFLINE_CAPABILITY = 0x01 | 0x10


class _Attribute(NamedTuple):
    """One attribute: its id, the flags (bit 0: pre-failure, bit 1: collected on-line) and its threshold."""

    id: int
    flags: int
    threshold: int
    raw: str


#: What there is to count about a disk without mechanics.
ATTRIBUTES: tuple[_Attribute, ...] = (
    _Attribute(1, 0x0003, 6, "nothing"),  # raw read error rate
    _Attribute(5, 0x0003, 36, "nothing"),  # reallocated sectors
    _Attribute(9, 0x0002, 0, "hours"),  # power-on hours
    _Attribute(12, 0x0002, 0, "cycles"),  # power cycles
    _Attribute(187, 0x0002, 0, "uncorrectable"),  # reported uncorrectable errors
    _Attribute(199, 0x0002, 0, "nothing"),  # interface CRC errors
)

#: Subcommands of EXECUTE OFF-LINE IMMEDIATE that run a test; bit 7 is the captive mode.
OFFLINE_ROUTINE, SHORT_TEST, EXTENDED_TEST, ABORT_TEST, CAPTIVE = 0x00, 0x01, 0x02, 0x7F, 0x80

LOG_DIRECTORY, LOG_SUMMARY_ERRORS, LOG_SELF_TESTS = 0x00, 0x01, 0x06


class FailedCommand(NamedTuple):
    """Registers of a command that failed, as it was issued and as it ended."""

    command: int
    issued: bytes
    ended: bytes
    error: int
    status: int
    milliseconds: int
    hours: int


def _checked(data: bytearray) -> bytes:
    """Byte 511 makes the sum of all bytes zero."""
    data[511] = -sum(data[:511]) & 0xFF
    return bytes(data)


class Smart:
    """What SMART remembers: settings, and the two logs. *hours* are those since power-on."""

    def __init__(self) -> None:
        self.enabled = True
        self.autosave = True
        self.auto_offline = False
        self.offline_collected = False
        self.cycles = 0
        self.uncorrectable = 0
        self.error_count = 0
        self._errors: deque[FailedCommand] = deque(maxlen=5)
        #: (subcommand, hours), the latest last.
        self._tests: deque[tuple[int, int]] = deque(maxlen=21)

    def power_on(self) -> None:
        self.enabled = True
        self.cycles += 1

    def data(self, hours: int) -> bytes:
        """READ DATA."""
        raw = {"nothing": 0, "hours": hours, "cycles": self.cycles, "uncorrectable": self.uncorrectable}
        attributes = b"".join(
            _ATTRIBUTE.pack(a.id, a.flags, 100, 100, raw[a.raw].to_bytes(6, "little")) for a in ATTRIBUTES
        )
        collected = (0x02 if self.offline_collected else 0x00) | (0x80 if self.auto_offline else 0)
        return _checked(
            bytearray(_DATA.pack(0x0010, attributes, collected, 0, 1, _OFFLINE_CAPABILITY, 0x0003, 1, 1, 1, 0))
        )

    def thresholds(self) -> bytes:
        """READ THRESHOLDS."""
        data = bytearray(512)
        data[:2] = b"\x10\x00"
        for i, attribute in enumerate(ATTRIBUTES):
            _THRESHOLD.pack_into(data, 2 + 12 * i, attribute.id, attribute.threshold)
        return _checked(data)

    def log(self, address: int) -> bytes | None:
        """READ LOG: the one sector of log *address*, None for a log that does not exist."""
        if address == LOG_DIRECTORY:
            data = bytearray(512)
            data[0] = 1  # version; multi-sector logs are possible
            for present in (LOG_SUMMARY_ERRORS, LOG_SELF_TESTS):
                data[2 * present] = 1
            return bytes(data)
        if address == LOG_SUMMARY_ERRORS:
            return self._error_log()
        if address == LOG_SELF_TESTS:
            return self._self_test_log()
        return None

    def _error_log(self) -> bytes:
        data = bytearray(512)
        data[0] = 1
        data[1] = len(self._errors)  # index of the latest entry, 0 for none
        for i, failed in enumerate(self._errors):
            at = 2 + 90 * i
            # The failed command is the fifth and last of the command structures.
            _LOGGED_COMMAND.pack_into(data, at + 48, 0, *failed.issued[1:7], failed.command, failed.milliseconds)
            ended = failed.ended
            _LOGGED_ERROR.pack_into(
                data, at + 60, failed.error, *ended[2:6], ended[6], failed.status, 0x03, min(failed.hours, 0xFFFF)
            )
        data[452:454] = min(self.error_count, 0xFFFF).to_bytes(2, "little")
        return _checked(data)

    def _self_test_log(self) -> bytes:
        data = bytearray(512)
        data[:2] = b"\x01\x00"
        for i, (subcommand, hours) in enumerate(self._tests):
            _SELF_TEST.pack_into(data, 2 + 24 * i, subcommand, 0, min(hours, 0xFFFF), 0, bytes(4))
        data[508] = len(self._tests)
        return _checked(data)

    def execute_offline(self, subcommand: int, hours: int) -> bool:
        """EXECUTE OFF-LINE IMMEDIATE: False for a routine that there is not. All end at once and pass."""
        if subcommand == OFFLINE_ROUTINE:
            self.offline_collected = True
        elif subcommand & ~CAPTIVE in (SHORT_TEST, EXTENDED_TEST):
            self._tests.append((subcommand, hours))
        elif subcommand != ABORT_TEST:
            return False
        return True

    def record(self, failed: FailedCommand, *, uncorrectable: bool) -> None:
        """Remember a command that failed on the medium."""
        self.error_count += 1
        self.uncorrectable += uncorrectable
        self._errors.append(failed)
