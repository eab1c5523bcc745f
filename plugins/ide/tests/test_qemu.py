"""The same driver on this controller and on QEMU's: everything it can find out, compared; differences explained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from vm_core.testing import qtest

from .conftest import Board
from .observe import SECTORS, Observations, Observer

DISC = b"".join(i.to_bytes(4, "big") * 512 for i in range(200))

#: What differs on purpose: names of observations, and why.
DIFFERENT: tuple[tuple[str, str], ...] = (
    (r"(disk|cd): word (2|255)$", "set here: specific configuration, integrity word"),
    (r"disk: word [45]$", "obsolete since ATA-3: unformatted bytes"),
    (r"(disk|cd): word 2[0-2]$", "obsolete since ATA-3: buffer type, size, ECC bytes"),
    (r"(disk|cd): word 62$", "no single-word DMA here"),
    (r"(disk|cd): word 48$", "no trusted computing (ACS-2); the bit QEMU sets is ATA-1's double-word I/O"),
    (r"(disk|cd): word (49|50)$", "standby timer values and IORDY disabling are told here"),
    (r"(disk|cd): word 8[01]$", "versions: ATA-4 to ATA8-ACS here"),
    (r"(disk|cd): word (82|85)$", "power management, look-ahead and for CDs PACKET and NOP are told here"),
    (r"disk: word (84|87)$", "WRITE DMA FUA EXT and SMART logs and self-tests, which both have, are told here"),
    (r"(disk|cd): word 93$", "details of the hardware reset"),
    (r"disk: word 105$", "eight blocks of TRIM ranges here"),
    (r"disk: word 106$", "bit 13 only where a physical sector has several logical ones"),
    (r"disk: word 209$", "alignment word is valid here"),
    (r"cd: word (51|52|65|66|67|68)$", "timings of PIO 4 and multiword DMA 2"),
    (r"cd: word (83|84|86|87)$", "FLUSH CACHE is told; validity bits"),
    (r"disk: words 54-58 then$", "INITIALIZE DEVICE PARAMETERS changes the current geometry"),
    (r"disk: 0x\w+ at the end", "IDNF rather than ABRT for sectors that do not exist (ACS-2 7.25.7)"),
    (r"disk: 0x1f$", "all sixteen opcodes of RECALIBRATE"),
    (r"disk: unknown 0xf5$", "SECURITY FREEZE LOCK without the security feature set aborts"),
    (r"disk: SET FEATURES 0x(05|85|42|c2) ", "power and acoustic management are not offered, so they abort"),
    (r"disk: SET FEATURES 0x03 0x11$", "no single-word DMA here"),
    (r"disk: SMART 0xd4 0xc24f7f$", "aborting a self-test succeeds"),
    (r"disk: DMA 0x3d", "WRITE DMA FUA EXT is told as supported, and works"),
    (r"cd: senses until ready$", "unit attention after power-on"),
    (r"cd: INQUIRY$", "SPC-3 version; vendor and product are the two parts of the model"),
    (r"cd: REQUEST SENSE$", "the information field is not marked valid without a block"),
    (r"cd: READ CD, raw$", "error detection and correction codes are there"),
    (r"cd: READ TOC [12] ", "the format of MMC's own field is served, too"),
    (r"cd: READ TOC", "the lead-out's control bits"),
    (r"cd: GET CONFIGURATION$", "more features are told"),
    (r"cd: GESN", "the length counts all bytes behind it (MMC-5 table 265); a medium at power-on is an event"),
    (r"cd: READ DISC INFORMATION$", "no next session or lead-out (MMC-5 6.22.3.1.15)"),
    (r"cd: MODE SENSE", "MMC-5's pages: ten bytes of error recovery, CD timing, all pages at once; medium type"),
    (r"cd: eject, locked$", "MEDIUM REMOVAL PREVENTED is an illegal request"),
    (r"cd: (TEST UNIT READY|READ 10), tray open$", "the qualifier says that the tray is open"),
    (r"cd: TEST UNIT READY after loading$", "unit attention: the medium may have changed"),
)


class QtestPorts:
    """Port accesses by qtest commands."""

    def __init__(self, machine: qtest.QtestMachine) -> None:
        self.machine = machine

    def inb(self, port: int) -> int:
        return self.machine.command(f"inb {port:#x}")

    def outb(self, port: int, value: int) -> None:
        self.machine.command(f"outb {port:#x} {value:#x}")

    def outl(self, port: int, value: int) -> None:
        self.machine.command(f"outl {port:#x} {value:#x}")

    def insw(self, port: int, count: int) -> bytes:
        command = self.machine.command
        return b"".join(command(f"inw {port:#x}").to_bytes(2, "little") for _ in range(count))

    def outsw(self, port: int, data: bytes) -> None:
        for at in range(0, len(data), 2):
            self.machine.command(f"outw {port:#x} {int.from_bytes(data[at : at + 2], 'little'):#x}")

    def poll(self) -> None:
        """QEMU works by itself."""


def observe_qemu(folder: Path) -> Observations:
    disk, disc = folder / "disk.raw", folder / "disc.iso"
    with disk.open("wb") as file:
        file.truncate(SECTORS * 512)
    disc.write_bytes(DISC)
    arguments = [
        "-drive", f"file={disk},format=raw,if=none,id=d", "-device", "ide-hd,drive=d,bus=ide.0,unit=0",
        "-drive", f"file={disc},format=raw,if=none,id=c,media=cdrom", "-device", "ide-cd,drive=c,bus=ide.1,unit=0",
    ]  # fmt: skip
    with qtest.QtestMachine(arguments) as machine:
        function = qtest.QtestAccess(machine, 1, 1)
        function.write(0x20, 0xC000)
        function.write(0x04, 5, 2)
        memory = machine.memory
        return Observer(QtestPorts(machine), 0xC000, memory.write, memory.read).run()


def observe_ours() -> Observations:
    board = Board()
    board.add_disk(SECTORS * 512)
    disc: Any = board.add_cdrom(len(DISC)).backend
    disc.data[:] = DISC
    return Observer(board, 0xC000, board.memory.write, board.memory.read).run()


def comparable(value: Any) -> Any:
    """Status without DSC, which is obsolete, and which QEMU clears on errors and in standby."""
    if isinstance(value, tuple) and len(value) == 2:
        return value[0] & ~0x10, value[1]
    if isinstance(value, dict):
        return {**value, "status": value["status"] & ~0x10}
    return value


@pytest.mark.skipif(not qtest.available(), reason="qemu-system-x86_64 is not installed")
def test_a_driver_sees_what_it_sees_with_qemu(tmp_path: Path) -> None:
    """Some 680 observations are equal, or differ for a reason that is written down; no reason is left over."""
    theirs, ours = observe_qemu(tmp_path), observe_ours()
    assert theirs.keys() == ours.keys()
    used = set()
    for name, value in ours.items():
        if comparable(value) == comparable(theirs[name]):
            continue
        reason = next((pattern for pattern, _ in DIFFERENT if re.match(pattern, name)), None)
        assert reason is not None, f"{name}: {value!r} here, {theirs[name]!r} with QEMU"
        used.add(reason)
    assert used == {pattern for pattern, _ in DIFFERENT}
