"""The command tables, parsing, geometry and transfer modes."""

from __future__ import annotations

import pytest

from vm_core.devices.ata import AtaDisk, AtapiCdRom, Geometry
from vm_core.devices.ata.commands import DISK_COMMANDS, PACKET_COMMANDS, Command
from vm_core.devices.ata.modes import TransferModes
from vm_core.devices.ata.registers import COMMAND_BLOCK, TaskFile


def test_every_row_names_a_method() -> None:
    """Each opcode of the tables has code that carries it out."""
    for table, kind in ((DISK_COMMANDS, AtaDisk), (PACKET_COMMANDS, AtapiCdRom)):
        for opcode, spec in table.items():
            assert spec.opcode == opcode
            assert callable(getattr(kind, spec.method))


def test_register_table_covers_the_block() -> None:
    """Each of the eight offsets has a name for reading and one for writing."""
    for access in "rw":
        offsets = {r.offset for r in COMMAND_BLOCK if access in r.access or r.access == f"{access}o"}
        assert offsets == set(range(8))


def test_lba28_and_lba48_and_chs_are_taken_from_the_task_file() -> None:
    """The three forms of addressing give the LBA that the standard says, and a count of 0 is the largest."""
    taskfile = TaskFile()
    geometry = Geometry(100, 16, 63)
    for offset, high, low in ((2, 0x01, 0x00), (3, 0x44, 0x11), (4, 0x55, 0x22), (5, 0x66, 0x33)):
        taskfile.write(offset, high)
        taskfile.write(offset, low)
    taskfile.write(6, 0xE9)
    assert Command.parse(DISK_COMMANDS[0x20], taskfile, geometry)[1:] == (0x9332211, 256)
    assert Command.parse(DISK_COMMANDS[0x24], taskfile, geometry)[1:] == (0x665544332211, 0x100)
    taskfile.write(6, 0xA3)
    assert Command.parse(DISK_COMMANDS[0x20], taskfile, geometry).lba == (0x3322 * 16 + 3) * 63 + 0x10
    taskfile.write(3, 0)
    assert Command.parse(DISK_COMMANDS[0x20], taskfile, geometry).lba is None
    taskfile.write(2, 0)
    taskfile.write(2, 0)
    assert Command.parse(DISK_COMMANDS[0x24], taskfile, geometry).sectors == 65536


def test_chs_and_lba_translate_both_ways() -> None:
    """Every CHS address of a geometry is one LBA, and no other address has one."""
    geometry = Geometry(3, 4, 5)
    seen = [geometry.to_lba(c, h, s) for c in range(3) for h in range(4) for s in range(1, 6)]
    assert seen == list(range(geometry.capacity))
    assert [geometry.to_chs(lba) for lba in (0, 5, 20)] == [(0, 0, 1), (0, 1, 1), (1, 0, 1)]
    assert geometry.to_lba(0, 4, 1) is None
    assert geometry.to_lba(0, 0, 6) is None


@pytest.mark.parametrize(
    ("value", "taken"),
    [
        (0, True),
        (1, True),
        (12, True),
        (13, False),
        (16, False),
        (34, True),
        (35, False),
        (69, True),
        (70, False),
        (255, False),
    ],
)
def test_only_modes_that_exist_are_selected(value: int, taken: bool) -> None:
    """PIO to 4, multiword DMA to 2 and Ultra DMA to 5 are taken; single-word DMA and the rest are not."""
    assert TransferModes().select(value) is taken


def test_the_selected_mode_shows_in_words_63_and_88() -> None:
    """Selecting a multiword mode deselects Ultra DMA, and the reverse."""
    modes = TransferModes()
    assert (modes.multiword_word, modes.ultra_word) == (0x0007, 0x203F)
    modes.select(0x21)
    assert (modes.multiword_word, modes.ultra_word) == (0x0207, 0x003F)
    modes.select(0x42)
    assert (modes.multiword_word, modes.ultra_word) == (0x0007, 0x043F)
