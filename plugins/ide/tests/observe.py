"""What a driver can find out about a controller with a disk as ide.0 unit 0 and a CD-ROM as ide.1 unit 0."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from vm_core.testing.ata import AtaDriver, AtaError, CheckConditionError, Ports, descriptors

TABLE_AT, DATA_AT = 0x100000, 0x200000
SECTORS = 131072

#: What a step saw: numbers, bytes, words.
Observations = dict[str, Any]


class Observer:
    """Runs the steps; *write* and *read* reach guest memory."""

    def __init__(
        self,
        ports: Ports,
        busmaster: int,
        write: Callable[[int, bytes], None],
        read: Callable[[int, int], bytes],
    ) -> None:
        self.ports = ports
        self.write = write
        self.read = read
        self.disk = AtaDriver(ports, busmaster=busmaster)
        self.slave = AtaDriver(ports, unit=1, busmaster=busmaster)
        self.cd = AtaDriver(ports, command=0x170, control=0x376, busmaster=busmaster + 8)
        self.seen: Observations = {}

    def run(self) -> Observations:
        """Everything."""
        self.resets()
        self.identify()
        self.transfers()
        self.non_data()
        self.dma()
        self.packets()
        return self.seen

    def outcome(self, driver: AtaDriver, opcode: int, **registers: int) -> tuple[int, int]:
        """Status and error of a command without data."""
        try:
            return driver.non_data(opcode, **registers), 0
        except AtaError as error:
            return error.status, error.error

    def resets(self) -> None:
        for name, driver in (("disk", self.disk), ("cd", self.cd)):
            driver.reset()
            self.seen[f"{name}: registers after SRST"] = driver.registers()
        self.ports.outb(0x1F6, 0xB0)
        self.seen["slave: status after SRST"] = (self.ports.inb(0x1F7), self.ports.inb(0x3F6))
        self.ports.outb(0x1F2, 0x55)
        self.ports.outb(0x1F3, 0xAA)
        self.seen["slave: registers keep what is written"] = [self.ports.inb(p) for p in (0x1F2, 0x1F3, 0x1F6)]
        self.ports.outb(0x1F7, 0xEC)
        self.seen["slave: status after a command"] = self.ports.inb(0x1F7)
        self.slave.select()
        self.disk.issue(0x90)
        self.disk.finish()
        self.seen["disk: registers after diagnostics"] = self.disk.registers()

    def identify(self) -> None:
        words = self.disk.identify()
        self.seen |= {f"disk: word {i}": word for i, word in enumerate(words)}
        words = struct.unpack("<256H", self.cd.pio_in(0xA1))
        self.seen |= {f"cd: word {i}": word for i, word in enumerate(words)}
        self.seen["cd: IDENTIFY DEVICE"] = self.outcome(self.cd, 0xEC)
        self.seen["cd: registers after IDENTIFY DEVICE"] = self.cd.registers()
        self.seen["disk: IDENTIFY PACKET DEVICE"] = self.outcome(self.disk, 0xA1)
        self.seen["disk: PACKET"] = self.outcome(self.disk, 0xA0)

    def transfers(self) -> None:
        disk, seen = self.disk, self.seen
        data = bytes((7 * i + i // 512) & 0xFF for i in range(40 * 512))
        disk.write_sectors(1000, data)
        seen["disk: READ SECTORS"] = disk.read_sectors(1000, 40)
        seen["disk: READ SECTORS EXT"] = disk.read_sectors(999, 42, ext=True)
        seen["disk: SET MULTIPLE MODE 8"] = self.outcome(disk, 0xC6, count=8)
        seen["disk: READ MULTIPLE"] = disk.pio_in(0xC4, 20 * 512, block=8 * 512, count=20, lba=1000)
        disk.pio_out(0xC5, data[: 20 * 512], block=8 * 512, count=20, lba=5000)
        seen["disk: WRITE MULTIPLE, read back"] = disk.read_sectors(5000, 20)
        disk.device = 0xA0
        seen["disk: CHS 1/0/1"] = disk.read_sectors(1 | 1 << 8, 1)
        seen["disk: INITIALIZE DEVICE PARAMETERS"] = self.outcome(disk, 0x91, count=32, lba=7 << 24)
        disk.device = 0xE0
        seen["disk: words 54-58 then"] = disk.identify()[54:59]
        disk.non_data(0x91, count=63, lba=15 << 24)
        for opcode in (0x20, 0x24, 0x30, 0x34, 0xC8, 0x25):
            ext = opcode in (0x24, 0x34, 0x25)
            for lba in (SECTORS, SECTORS + 100):
                name = f"disk: {opcode:#04x} at the end + {lba - SECTORS}"
                if opcode in (0xC8, 0x25):
                    seen[name] = self.dma_outcome(opcode, [(DATA_AT, 512)], lba=lba, count=1, ext=ext)
                elif opcode in (0x30, 0x34):
                    seen[name] = self.write_outcome(opcode, lba, ext)
                else:
                    seen[name] = self.outcome(disk, opcode, lba=lba, count=1, ext=ext)

    def write_outcome(self, opcode: int, lba: int, ext: bool) -> tuple[int, int]:
        try:
            self.disk.pio_out(opcode, bytes(512), lba=lba, count=1, ext=ext)
        except AtaError as error:
            return error.status, error.error
        return 0x50, 0

    def non_data(self) -> None:
        disk, seen = self.disk, self.seen
        for opcode in (0x00, 0x10, 0x1F, 0x70, 0x95, 0x97, 0x98, 0xE0, 0xE1, 0xE2, 0xE3, 0xE5, 0xE7, 0xEA, 0xF8, 0x40):
            seen[f"disk: {opcode:#04x}"] = self.outcome(disk, opcode, count=1)
        for opcode in (0x01, 0x22, 0x32, 0x50, 0x92, 0xB1, 0xC7, 0xF1, 0xF5, 0xF9, 0xFF):
            seen[f"disk: unknown {opcode:#04x}"] = self.outcome(disk, opcode)
        disk.non_data(0xE5)
        seen["disk: CHECK POWER MODE count"] = disk.registers()["count"]
        disk.non_data(0xF8)
        seen["disk: native max"] = disk.lba() & 0xFFFFFF
        disk.non_data(0x27, ext=True)
        seen["disk: native max ext"] = disk.lba()
        for count in (0, 1, 2, 3, 16, 17, 32, 128):
            seen[f"disk: SET MULTIPLE MODE {count}"] = self.outcome(disk, 0xC6, count=count)
        disk.non_data(0xC6, count=16)
        for feature, count in (
            (0x02, 0), (0x82, 0), (0x02, 0), (0x55, 0), (0xAA, 0), (0x66, 0), (0xCC, 0), (0x05, 0x80), (0x85, 0),
            (0x42, 0x80), (0xC2, 0), (0x03, 0x00), (0x03, 0x0C), (0x03, 0x22), (0x03, 0x45), (0x03, 0x11), (0x77, 0),
        ):  # fmt: skip
            seen[f"disk: SET FEATURES {feature:#04x} {count:#04x}"] = self.outcome(
                disk, 0xEF, features=feature, count=count
            )
        disk.non_data(0xEF, features=0x82)
        seen["disk: word 85 without write cache"] = disk.identify()[85] & 0x20
        disk.non_data(0xEF, features=0x02)
        disk.non_data(0xEF, features=0x03, count=0x21)
        words = disk.identify()
        seen["disk: words 63 and 88 after MWDMA 1"] = (words[63], words[88])
        disk.non_data(0xEF, features=0x03, count=0x44)
        words = disk.identify()
        seen["disk: words 63 and 88 after UDMA 4"] = (words[63], words[88])
        key = 0xC24F00
        for features, count, lba in (
            (0xD8, 0, key), (0xDA, 0, key), (0xDA, 0, 0), (0xD2, 0xF1, key), (0xD4, 0, key | 1), (0xD4, 0, key | 0x7F),
            (0xD9, 0, key), (0xDA, 0, key), (0xD8, 0, key), (0xD7, 0, key),
        ):  # fmt: skip
            name = f"disk: SMART {features:#04x} {lba:#x}"
            while name in seen:
                name += " again"
            seen[name] = self.outcome(disk, 0xB0, features=features, count=count, lba=lba)
        disk.non_data(0xB0, features=0xDA, lba=key)
        seen["disk: SMART RETURN STATUS, LBA"] = disk.lba() & 0xFFFF00
        for name, features in (("data", 0xD0), ("thresholds", 0xD1)):
            data = disk.pio_in(0xB0, features=features, lba=key, count=1)
            seen[f"disk: SMART {name} checksum"] = sum(data) & 0xFF
        seen["disk: SMART log 1 length"] = len(disk.pio_in(0xB0, features=0xD5, count=1, lba=key | 1))

    def dma_outcome(self, opcode: int, runs: list[tuple[int, int]], **registers: int) -> Any:
        self.write(TABLE_AT, descriptors(runs))
        try:
            return self.disk.dma(opcode, TABLE_AT, to_memory=opcode in (0xC8, 0x25), **registers)
        except AtaError as error:
            return error.status, error.error

    def dma(self) -> None:
        seen = self.seen
        runs = [(DATA_AT, 1000), (DATA_AT + 0x3000, 4096), (DATA_AT + 0x8000, 20 * 512 - 5096)]
        for opcode, ext in ((0xC8, False), (0x25, True)):
            self.write(DATA_AT, bytes(0x10000))
            seen[f"disk: DMA {opcode:#x}, status"] = self.dma_outcome(opcode, runs, lba=1000, count=20, ext=ext)
            seen[f"disk: DMA {opcode:#x}, memory"] = self.read(DATA_AT, 0x10000)
        self.write(DATA_AT, bytes(i * 3 & 0xFF for i in range(0x10000)))
        for opcode, ext in ((0xCA, False), (0x35, True), (0x3D, True)):
            seen[f"disk: DMA {opcode:#x}, status"] = self.dma_outcome(opcode, runs, lba=2000, count=20, ext=ext)
            seen[f"disk: DMA {opcode:#x}, read back"] = self.disk.read_sectors(2000, 20)
        seen["disk: DMA, descriptors too long"] = self.dma_outcome(0xC8, [(DATA_AT, 8192)], lba=5, count=1)
        self.ports.outb(self.disk.busmaster, 0)
        seen["disk: DMA, too long, then stopped"] = self.ports.inb(self.disk.busmaster + 2)
        seen["disk: DMA, descriptors too short"] = self.dma_outcome(0xC8, [(DATA_AT, 512)], lba=5, count=4)
        seen["disk: DMA, too short, registers"] = (self.ports.inb(0x1F7), self.ports.inb(self.disk.busmaster + 2))
        self.ports.outb(self.disk.busmaster + 2, 0x66)
        seen["disk: bus master status after 0x66"] = self.ports.inb(self.disk.busmaster + 2)
        self.ports.outb(self.disk.busmaster + 2, 0x00)

    def packets(self) -> None:
        seen, cd = self.seen, self.cd
        sense: list[tuple[int, int, int]] = []
        for _ in range(4):  # attentions of power-on and of the medium
            try:
                cd.packet(b"\0")
                break
            except CheckConditionError as error:
                sense.append(error.sense)
        seen["cd: senses until ready"] = sense

        def packet(name: str, cdb: bytes, **more: Any) -> None:
            try:
                seen[f"cd: {name}"] = cd.packet(cdb, **more)
            except CheckConditionError as error:
                seen[f"cd: {name}"] = error.sense
            except AtaError as error:
                seen[f"cd: {name}"] = (error.status, error.error)

        packet("INQUIRY", struct.pack(">BxxxB", 0x12, 36))
        packet("REQUEST SENSE", struct.pack(">BxxxB", 0x03, 18))
        packet("READ CAPACITY", b"\x25")
        packet("READ 10", struct.pack(">BxIxH", 0x28, 3, 2))
        packet("READ 10 in small blocks", struct.pack(">BxIxH", 0x28, 3, 2), limit=1000)
        packet("READ 12", struct.pack(">BxII", 0xA8, 3, 40))
        packet("READ 10 past the end", struct.pack(">BxIxH", 0x28, 199, 2))
        packet("READ 10 of nothing", struct.pack(">BxIxH", 0x28, 3, 0))
        packet("READ 10 with limit 0", struct.pack(">BxIxH", 0x28, 3, 1), limit=0)
        packet("READ CD", struct.pack(">BxIBHB", 0xBE, 3, 0, 2, 0x10))
        packet("READ CD, nothing", struct.pack(">BxIBHB", 0xBE, 3, 0, 2, 0x00))
        packet("READ CD, raw", struct.pack(">BxIBHB", 0xBE, 3, 0, 1, 0xF8))
        packet("SEEK", struct.pack(">BxI", 0x2B, 3))
        packet("SEEK past the end", struct.pack(">BxI", 0x2B, 200))
        for form in (0, 1, 2):
            for msf in (0, 2):
                packet(f"READ TOC {form} {msf}", struct.pack(">BBB4xH", 0x43, msf, form, 255))
        packet("READ TOC from 0xaa", struct.pack(">BBB3xBH", 0x43, 0, 0, 0xAA, 255))
        packet("READ TOC from 2", struct.pack(">BBB3xBH", 0x43, 0, 0, 2, 255))
        packet("GET CONFIGURATION", struct.pack(">BBH3xH", 0x46, 0, 0, 255))
        packet("GESN, media", struct.pack(">BB2xB2xH", 0x4A, 1, 0x10, 8))
        packet("GESN, media again", struct.pack(">BB2xB2xH", 0x4A, 1, 0x10, 8))
        packet("GESN, other", struct.pack(">BB2xB2xH", 0x4A, 1, 0x02, 8))
        packet("GESN, not polled", struct.pack(">BB2xB2xH", 0x4A, 0, 0x10, 8))
        packet("READ DISC INFORMATION", struct.pack(">BB5xH", 0x51, 0, 255))
        for page in (0x01, 0x2A, 0x0D, 0x3F, 0x08):
            packet(f"MODE SENSE {page:#x}", struct.pack(">BBB4xH", 0x5A, 0, page, 255))
        packet("MODE SENSE saved", struct.pack(">BBB4xH", 0x5A, 0, 0xC1, 255))
        packet("MECHANISM STATUS", struct.pack(">B7xH", 0xBD, 8))
        packet("PREVENT", b"\x1e\0\0\0\x01")
        packet("eject, locked", b"\x1b\0\0\0\x02")
        packet("ALLOW", b"\x1e\0\0\0\x00")
        packet("unknown opcode", b"\xd9")
        packet("eject", b"\x1b\0\0\0\x02")
        packet("TEST UNIT READY, tray open", b"\0")
        packet("GESN, tray open", struct.pack(">BB2xB2xH", 0x4A, 1, 0x10, 8))
        packet("READ 10, tray open", struct.pack(">BxIxH", 0x28, 3, 2))
        packet("load", b"\x1b\0\0\0\x03")
        packet("GESN, loaded", struct.pack(">BB2xB2xH", 0x4A, 1, 0x10, 8))
        packet("TEST UNIT READY after loading", b"\0")
        packet("TEST UNIT READY after loading, again", b"\0")
        packet("READ 10 after loading", struct.pack(">BxIxH", 0x28, 3, 2))
        self.write(TABLE_AT, descriptors([(DATA_AT, 3000), (DATA_AT + 0x2000, 6 * 2048 - 3000)]))
        self.write(DATA_AT, bytes(0x10000))
        cd.packet(struct.pack(">BxIxH", 0x28, 3, 6), dma=True, table=TABLE_AT)
        seen["cd: DMA"] = self.read(DATA_AT, 0x10000)
