"""The command tables of disks and of packet devices, and the parsing of a task file into a command.

A row says all that the state machines need to know: opcode, name, how its data move, how its LBA is addressed, and
which method carries it out. Source: ACS-2 clause 7 and, for what it made obsolete, ATA-1 to ATA/ATAPI-7.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from .geometry import Geometry
from .registers import COUNT, DEVICE, LBA, LBA_LOW, TaskFile


class Protocol(Enum):
    """How a command's data move (ACS-2 clause 4.1 of the transport standards)."""

    NON_DATA = "non-data"
    PIO_IN = "PIO data-in"
    PIO_OUT = "PIO data-out"
    DMA_IN = "DMA data-in"
    DMA_OUT = "DMA data-out"
    PACKET = "PACKET"
    RESET = "DEVICE RESET"
    DIAGNOSTIC = "EXECUTE DEVICE DIAGNOSTIC"


class Addressing(Enum):
    """What the LBA registers hold."""

    #: Nothing, or something of the command's own.
    NONE = 0
    #: 28 bits, or CHS where the device register's LBA bit is clear; count 0 means 256.
    LBA28 = 28
    #: 48 bits; count 0 means 65,536.
    LBA48 = 48


class CommandSpec(NamedTuple):
    """A row of a command table."""

    opcode: int
    name: str
    protocol: Protocol
    method: str
    addressing: Addressing = Addressing.NONE
    #: READ and WRITE MULTIPLE: a DRQ block has as many sectors as SET MULTIPLE MODE said.
    multiple: bool = False
    #: The data are on stable storage before the command completes.
    fua: bool = False


class Command(NamedTuple):
    """A command taken from the task file. *lba* is None for a CHS address that the geometry does not have."""

    spec: CommandSpec
    lba: int | None
    sectors: int

    @classmethod
    def parse(cls, spec: CommandSpec, taskfile: TaskFile, geometry: Geometry) -> Command:
        """Take address and count out of *taskfile* as *spec* says."""
        if spec.addressing is Addressing.NONE:
            return cls(spec, 0, taskfile.count)
        if spec.addressing is Addressing.LBA48:
            return cls(spec, taskfile.lba48, taskfile.count16 or 65536)
        count = taskfile.current[COUNT] or 256
        if taskfile.device & LBA:
            return cls(spec, taskfile.lba28, count)
        head = taskfile.current[DEVICE] & 0x0F
        return cls(spec, geometry.to_lba(taskfile.byte_count, head, taskfile.current[LBA_LOW]), count)


NON_DATA, PIO_IN, PIO_OUT = Protocol.NON_DATA, Protocol.PIO_IN, Protocol.PIO_OUT
DMA_IN, DMA_OUT = Protocol.DMA_IN, Protocol.DMA_OUT
LBA28, LBA48 = Addressing.LBA28, Addressing.LBA48

# Opcodes that other modules name.
DEVICE_RESET = 0x08
EXECUTE_DIAGNOSTIC = 0x90
PACKET = 0xA0

#: What disks and packet devices share.
_COMMON: tuple[CommandSpec, ...] = (
    CommandSpec(0x00, "NOP", NON_DATA, "nop"),
    CommandSpec(0x90, "EXECUTE DEVICE DIAGNOSTIC", Protocol.DIAGNOSTIC, "diagnostic"),
    CommandSpec(0xE0, "STANDBY IMMEDIATE", NON_DATA, "standby_immediate"),
    CommandSpec(0xE1, "IDLE IMMEDIATE", NON_DATA, "idle_immediate"),
    CommandSpec(0xE5, "CHECK POWER MODE", NON_DATA, "check_power_mode"),
    CommandSpec(0xE6, "SLEEP", NON_DATA, "sleep"),
    CommandSpec(0xEF, "SET FEATURES", NON_DATA, "set_features"),
    # The opcodes of ATA-1 for the same four commands.
    CommandSpec(0x94, "STANDBY IMMEDIATE", NON_DATA, "standby_immediate"),
    CommandSpec(0x95, "IDLE IMMEDIATE", NON_DATA, "idle_immediate"),
    CommandSpec(0x98, "CHECK POWER MODE", NON_DATA, "check_power_mode"),
    CommandSpec(0x99, "SLEEP", NON_DATA, "sleep"),
)

_DISK: tuple[CommandSpec, ...] = (
    CommandSpec(0x06, "DATA SET MANAGEMENT", DMA_OUT, "data_set_management"),
    CommandSpec(0x20, "READ SECTORS", PIO_IN, "read_pio", LBA28),
    CommandSpec(0x21, "READ SECTORS without retry", PIO_IN, "read_pio", LBA28),
    CommandSpec(0x24, "READ SECTORS EXT", PIO_IN, "read_pio", LBA48),
    CommandSpec(0x25, "READ DMA EXT", DMA_IN, "read_dma", LBA48),
    CommandSpec(0x27, "READ NATIVE MAX ADDRESS EXT", NON_DATA, "read_native_max", LBA48),
    CommandSpec(0x29, "READ MULTIPLE EXT", PIO_IN, "read_pio", LBA48, multiple=True),
    CommandSpec(0x30, "WRITE SECTORS", PIO_OUT, "write_pio", LBA28),
    CommandSpec(0x31, "WRITE SECTORS without retry", PIO_OUT, "write_pio", LBA28),
    CommandSpec(0x34, "WRITE SECTORS EXT", PIO_OUT, "write_pio", LBA48),
    CommandSpec(0x35, "WRITE DMA EXT", DMA_OUT, "write_dma", LBA48),
    CommandSpec(0x39, "WRITE MULTIPLE EXT", PIO_OUT, "write_pio", LBA48, multiple=True),
    CommandSpec(0x3C, "WRITE VERIFY", PIO_OUT, "write_pio", LBA28),
    CommandSpec(0x3D, "WRITE DMA FUA EXT", DMA_OUT, "write_dma", LBA48, fua=True),
    CommandSpec(0x40, "READ VERIFY SECTORS", NON_DATA, "verify", LBA28),
    CommandSpec(0x41, "READ VERIFY SECTORS without retry", NON_DATA, "verify", LBA28),
    CommandSpec(0x42, "READ VERIFY SECTORS EXT", NON_DATA, "verify", LBA48),
    CommandSpec(0x91, "INITIALIZE DEVICE PARAMETERS", NON_DATA, "initialize_device_parameters"),
    CommandSpec(0x96, "STANDBY", NON_DATA, "standby"),
    CommandSpec(0x97, "IDLE", NON_DATA, "idle"),
    CommandSpec(0xB0, "SMART", NON_DATA, "smart"),
    CommandSpec(0xC4, "READ MULTIPLE", PIO_IN, "read_pio", LBA28, multiple=True),
    CommandSpec(0xC5, "WRITE MULTIPLE", PIO_OUT, "write_pio", LBA28, multiple=True),
    CommandSpec(0xC6, "SET MULTIPLE MODE", NON_DATA, "set_multiple_mode"),
    CommandSpec(0xC8, "READ DMA", DMA_IN, "read_dma", LBA28),
    CommandSpec(0xC9, "READ DMA without retry", DMA_IN, "read_dma", LBA28),
    CommandSpec(0xCA, "WRITE DMA", DMA_OUT, "write_dma", LBA28),
    CommandSpec(0xCB, "WRITE DMA without retry", DMA_OUT, "write_dma", LBA28),
    CommandSpec(0xCE, "WRITE MULTIPLE FUA EXT", PIO_OUT, "write_pio", LBA48, multiple=True, fua=True),
    CommandSpec(0xE2, "STANDBY", NON_DATA, "standby"),
    CommandSpec(0xE3, "IDLE", NON_DATA, "idle"),
    CommandSpec(0xE7, "FLUSH CACHE", NON_DATA, "flush_cache"),
    CommandSpec(0xEA, "FLUSH CACHE EXT", NON_DATA, "flush_cache"),
    CommandSpec(0xEC, "IDENTIFY DEVICE", PIO_IN, "identify_device"),
    CommandSpec(0xF8, "READ NATIVE MAX ADDRESS", NON_DATA, "read_native_max", LBA28),
    *(CommandSpec(0x10 + i, "RECALIBRATE", NON_DATA, "recalibrate") for i in range(16)),
    *(CommandSpec(0x70 + i, "SEEK", NON_DATA, "seek", LBA28) for i in range(16)),
)

_PACKET: tuple[CommandSpec, ...] = (
    CommandSpec(DEVICE_RESET, "DEVICE RESET", Protocol.RESET, "device_reset"),
    CommandSpec(0x20, "READ SECTORS", PIO_IN, "abort_with_signature"),
    CommandSpec(PACKET, "PACKET", Protocol.PACKET, "packet"),
    CommandSpec(0xA1, "IDENTIFY PACKET DEVICE", PIO_IN, "identify_packet_device"),
    CommandSpec(0xE7, "FLUSH CACHE", NON_DATA, "flush_cache"),
    CommandSpec(0xEC, "IDENTIFY DEVICE", PIO_IN, "abort_with_signature"),
)


def _table(*rows: Iterable[CommandSpec]) -> dict[int, CommandSpec]:
    found: dict[int, CommandSpec] = {}
    for spec in (spec for part in rows for spec in part):
        if spec.opcode in found:
            raise ValueError(f"opcode {spec.opcode:#04x} has two rows")
        found[spec.opcode] = spec
    return found


DISK_COMMANDS: dict[int, CommandSpec] = _table(_COMMON, _DISK)
PACKET_COMMANDS: dict[int, CommandSpec] = _table(_COMMON, _PACKET)
