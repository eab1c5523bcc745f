"""IDENTIFY DEVICE and IDENTIFY PACKET DEVICE: the 256 words in which a drive describes itself.

Source: ACS-2 (T13/2015-D) 7.12 and 7.13; words that it calls obsolete: ATA-1 to ATA/ATAPI-7. Pure functions of facts.
"""

from __future__ import annotations

import attrs

from .geometry import Geometry
from .modes import TransferModes

#: Sectors of a DRQ block of READ and WRITE MULTIPLE, at most.
MAX_MULTIPLE = 16
#: 512-byte blocks of ranges that one DATA SET MANAGEMENT command takes.
MAX_TRIM_BLOCKS = 8
#: What LBA28 reaches.
LBA28_SECTORS = 0x0FFFFFFF

_VERSION_ATA4_TO_ACS = 0x01F0


@attrs.frozen(kw_only=True)
class Identity:
    """What does not change while a drive lives. Sizes are bytes."""

    serial: str = ""
    model: str = ""
    firmware: str = ""
    #: World wide name, 64 bits; 0 for none.
    wwn: int = 0
    logical_block: int = 512
    physical_block: int = 512
    #: Revolutions a minute; 1 for storage that does not rotate, 0 to say nothing.
    rotation_rate: int = 0
    #: DATA SET MANAGEMENT is offered.
    trim: bool = True


@attrs.frozen(kw_only=True)
class DiskState:
    """What does change: settings that the host made, and the size in sectors of the identity's ``logical_block``."""

    sectors: int
    default_geometry: Geometry
    current_geometry: Geometry
    multiple: int
    modes: TransferModes
    write_cache: bool
    look_ahead: bool
    smart: bool
    #: 0 or 1: which device of a parallel channel.
    unit: int = 0


def text(value: str, length: int) -> bytes:
    """An ATA string: printable ASCII padded with spaces, the two characters of each word swapped."""
    data = bytearray(value.encode("ascii", "replace")[:length].ljust(length))
    data[0::2], data[1::2] = data[1::2], data[0::2]
    return bytes(data)


class _Words:
    """256 words in the making."""

    def __init__(self) -> None:
        self.data = bytearray(512)

    def __setitem__(self, word: int, value: int) -> None:
        self.data[2 * word : 2 * word + 2] = value.to_bytes(2, "little")

    def number(self, word: int, words: int, value: int) -> None:
        """A number over several words, the low one first."""
        self.data[2 * word : 2 * (word + words)] = value.to_bytes(2 * words, "little")

    def text(self, word: int, words: int, value: str) -> None:
        self.data[2 * word : 2 * (word + words)] = text(value, 2 * words)

    def strings(self, identity: Identity) -> None:
        """Serial number, firmware revision and model."""
        self.text(10, 10, identity.serial)
        self.text(23, 4, identity.firmware)
        self.text(27, 20, identity.model)

    def modes(self, modes: TransferModes) -> None:
        """Words 53, 63–68 and 88: PIO 4, multiword DMA 2, Ultra DMA 5."""
        self[51] = self[52] = 0x0200  # PIO and single-word DMA timing, mode 2
        self[53] = 0x0007  # words 54–58, 64–70 and 88 are valid
        self[63] = modes.multiword_word
        self[64] = 0x0003  # PIO 3 and 4
        for word in range(65, 69):
            self[word] = 120  # nanoseconds of the fastest multiword DMA and PIO cycle
        self[88] = modes.ultra_word

    def finish(self) -> bytes:
        """Word 255: signature and checksum, so that the sum of all bytes is zero."""
        self.data[510] = 0xA5
        self.data[511] = -sum(self.data[:511]) & 0xFF
        return bytes(self.data)


def _hardware_reset_result(unit: int) -> int:
    """Word 93: 80-conductor cable seen (bit 13), diagnostics passed, device number by jumper."""
    return 0x600B if unit == 0 else 0x6B00


def identify_device(identity: Identity, state: DiskState) -> bytes:
    """The 512 bytes of IDENTIFY DEVICE."""
    w = _Words()
    default, current = state.default_geometry, state.current_geometry
    w[0] = 0x0040  # fixed device
    w[1], w[3], w[6] = default
    w[2] = 0xC837  # needs no SET FEATURES to spin up; this data is complete
    w.strings(identity)
    w[47] = 0x8000 | MAX_MULTIPLE
    w[48] = 0x4000  # no trusted computing
    w[49] = 0x2F00  # standby timer values, IORDY and its disabling, LBA, DMA
    w[50] = 0x4000
    w[54], w[55], w[56] = current
    w.number(57, 2, current.capacity)
    w[59] = 0x0100 | state.multiple if state.multiple else 0
    w.number(60, 2, min(state.sectors, LBA28_SECTORS))
    w.modes(state.modes)
    if identity.trim:
        # Deterministic data after TRIM: a range keeps or loses its data, and does not change its mind.
        w[69] = 0x4000
        w[105] = MAX_TRIM_BLOCKS
        w[169] = 0x0001
    w[80] = _VERSION_ATA4_TO_ACS
    # Supported: NOP, look-ahead, write cache, power management, SMART.
    w[82] = 1 << 14 | 1 << 6 | 1 << 5 | 1 << 3 | 1 << 0
    # FLUSH CACHE EXT, FLUSH CACHE, 48-bit addresses.
    w[83] = 1 << 14 | 1 << 13 | 1 << 12 | 1 << 10
    # WRITE DMA FUA EXT, SMART self-test, SMART error log; world wide name.
    extension = 1 << 14 | 1 << 6 | 1 << 1 | 1 << 0 | (1 << 8 if identity.wwn else 0)
    w[84] = extension
    # Enabled.
    w[85] = 1 << 14 | state.look_ahead << 6 | state.write_cache << 5 | 1 << 3 | int(state.smart)
    w[86] = 1 << 13 | 1 << 12 | 1 << 10
    w[87] = extension
    w[93] = _hardware_reset_result(state.unit)
    w.number(100, 4, state.sectors)
    ratio = (identity.physical_block // identity.logical_block).bit_length() - 1
    w[106] = 1 << 14 | (1 << 13 if ratio else 0) | (1 << 12 if identity.logical_block > 512 else 0) | ratio
    for i in range(4):
        w[108 + i] = identity.wwn >> 48 - 16 * i & 0xFFFF  # the highest word first
    if identity.logical_block > 512:
        w.number(117, 2, identity.logical_block // 2)  # counted in words
    w[209] = 0x4000  # logical sector 0 begins a physical sector
    w[217] = identity.rotation_rate
    return w.finish()


def identify_packet_device(identity: Identity, modes: TransferModes, unit: int = 0) -> bytes:
    """The 512 bytes of IDENTIFY PACKET DEVICE for a CD-ROM drive."""
    w = _Words()
    # Packet device, CD/DVD (5), removable, DRQ within 50 µs of PACKET, 12-byte packets.
    w[0] = 0x8000 | 5 << 8 | 1 << 7 | 2 << 5
    w.strings(identity)
    w[49] = 0x0F00  # IORDY and its disabling, LBA, DMA
    w[50] = 0x4000
    w.modes(modes)
    w[71] = w_release = 30  # nanoseconds from PACKET to bus release; overlap is not offered
    w[72] = w_release
    w[80] = _VERSION_ATA4_TO_ACS
    # Supported and enabled: NOP, DEVICE RESET, PACKET, power management.
    commands = 1 << 14 | 1 << 9 | 1 << 4 | 1 << 3
    w[82] = commands
    w[83] = 1 << 14 | 1 << 12  # FLUSH CACHE
    w[84] = 1 << 14 | (1 << 8 if identity.wwn else 0)
    w[85] = commands
    w[86] = 1 << 12
    w[87] = 1 << 14 | (1 << 8 if identity.wwn else 0)
    w[93] = _hardware_reset_result(unit)
    for i in range(4):
        w[108 + i] = identity.wwn >> 48 - 16 * i & 0xFFFF
    return w.finish()
