"""An ATAPI CD-ROM drive: the PACKET protocol around the command set of :mod:`.mmc`.

Source: ATA/ATAPI-7 volume 2 clause 11.8 (PACKET non-data, PIO and DMA), 6.24 (PACKET), SFF-8020i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from ...block.node import Buffer
from . import cdsector, mmc
from .commands import PACKET_COMMANDS, Command
from .drive import Drive, Link, Ranges, Storage, cut, cut_ranges
from .identify import Identity, identify_packet_device
from .registers import ABRT, REASON_COMMAND, REASON_TO_HOST

#: Blocks that one request fetches for a PIO transfer, or for sectors that are made up in memory.
CHUNK = 64

PACKET_BYTES = 12


class RemovableStorage(Storage, mmc.Tray, Protocol):
    """Storage with a tray."""


class AtapiCdRom(Drive):
    """A CD-ROM drive with the medium and the tray of *storage*."""

    commands = PACKET_COMMANDS
    signature = b"\x01\x01\x14\xeb"
    #: A packet device has DRDY clear until its first command.
    reset_status = 0x00

    def __init__(self, link: Link, storage: RemovableStorage, identity: Identity, *, unit: int = 0) -> None:
        self.identity = identity
        self.unit_state = mmc.CdRom(storage, identity)
        self._use_dma = False
        self._limit = 0
        self._reason = REASON_COMMAND
        super().__init__(link, storage, unit=unit)

    def power_on(self) -> None:
        self.unit_state.power_on()
        super().power_on()

    def restore_defaults(self) -> None:
        self.modes.reset()

    def medium_changed(self, present: bool) -> None:
        """A medium was put in or taken out."""
        self.unit_state.medium_changed(present)

    # ATA commands.

    def abort_with_signature(self, command: Command) -> None:
        """IDENTIFY DEVICE and READ SECTORS: aborted, showing what kind of device this is (ATA/ATAPI-7 6.17.5)."""
        device = self.taskfile.device
        self.taskfile.set_signature(self.signature)
        self.taskfile.current[6] = device
        self.fail(ABRT)

    def identify_packet_device(self, command: Command) -> None:
        data = identify_packet_device(self.identity, self.modes, self.unit)
        self._reason = REASON_TO_HOST
        self._pio_in(memoryview(data), 512, lambda: self.succeed(interrupt=False))

    # The PACKET protocol.

    def packet(self, command: Command) -> None:
        """PACKET: features bit 0 chooses DMA; LBA mid and high limit the bytes of a DRQ block."""
        features = self.taskfile.features
        if features & ~0x05:  # overlap is not offered; bit 2 is the direction of DMA, for bridges
            self.fail(ABRT)
            return
        self._use_dma = bool(features & 1)
        self._limit = self.taskfile.byte_count
        packet = bytearray(PACKET_BYTES)
        self._reason = REASON_COMMAND
        # Accelerated DRQ: the packet is asked for without an interrupt.
        self._pio_out(memoryview(packet), PACKET_BYTES, lambda: self._run(bytes(packet)), interrupt=False)

    def block_ready(self, length: int) -> None:
        self.taskfile.count = self._reason
        if not self._reason & REASON_COMMAND:
            self.taskfile.byte_count = length

    def _run(self, packet: bytes) -> None:
        self._finish(self.unit_state.execute(packet))

    def _finish(self, outcome: mmc.Outcome) -> None:
        match outcome:
            case mmc.Good(data):
                self._send(memoryview(data))
            case mmc.Blocks():
                self._read_blocks(outcome)
            case mmc.Receive(length, then):
                self._receive(length, then)
            case mmc.Check(sense, _):
                self._check(sense)

    def succeed(self, *, interrupt: bool = True) -> None:
        self.taskfile.count = REASON_TO_HOST | REASON_COMMAND
        super().succeed(interrupt=interrupt)

    def _check(self, sense: mmc.Sense) -> None:
        """CHECK CONDITION: the sense key in the error register."""
        self.taskfile.count = REASON_TO_HOST | REASON_COMMAND
        self.fail(sense.key << 4 | ABRT)

    def _block_limit(self) -> int:
        """Bytes of a DRQ block: the host's limit made even; 0xFFFF means 0xFFFE (6.24.4)."""
        return self._limit & 0xFFFE

    def _no_limit(self) -> bool:
        """Fail a PIO command with data for which the host allows no bytes."""
        if self._use_dma or self._block_limit():
            return False
        self.taskfile.count = REASON_TO_HOST | REASON_COMMAND
        self.fail(ABRT)
        return True

    def _send(self, data: Buffer) -> None:
        if not len(data):
            self.succeed()
        elif self._use_dma:
            self._dma(
                True,
                len(data),
                lambda views, guest: self._copy_out(views, guest, data, lambda status: self.succeed()),
            )
        elif not self._no_limit():
            self._reason = REASON_TO_HOST
            self._pio_in(data, self._block_limit(), self.succeed)

    def _receive(self, length: int, then: Callable[[bytes], mmc.Outcome]) -> None:
        if self._use_dma:
            self._dma(False, length, lambda views, guest: self._finish(then(b"".join(views))))
        elif not self._no_limit():
            data = bytearray(length)
            self._reason = 0
            self._pio_out(memoryview(data), self._block_limit(), lambda: self._finish(then(bytes(data))))

    # Blocks of the medium.

    def _read_failed(self, lba: int) -> None:
        self._check(self.unit_state.check(mmc.READ_ERROR, lba).sense)

    def _read_blocks(self, blocks: mmc.Blocks) -> None:
        lba, count, raw = blocks
        if not self._use_dma:
            if not self._no_limit():
                self._fetch(blocks)
        elif raw:
            self._dma(True, count * cdsector.RAW, lambda views, guest: self._copy_raw(views, guest, lba, count, 0))
        else:

            def finished(good: int) -> None:
                if good < count:
                    self._read_failed(lba + good)
                else:
                    self.succeed()

            self._dma(
                True,
                count * mmc.BLOCK,
                lambda views, guest: self._read_media(lba, count, mmc.BLOCK, views, guest, finished),
            )

    def _fetch(self, blocks: mmc.Blocks) -> None:
        """Read the next blocks of a PIO transfer and hand them out."""
        lba, left, raw = blocks
        count = min(left, CHUNK)
        view = memoryview(bytearray(count * mmc.BLOCK))

        def fetched(good: int) -> None:
            if not good:
                self._read_failed(lba)
                return
            data = _raw(lba, view[: good * mmc.BLOCK]) if raw else view[: good * mmc.BLOCK]
            self._reason = REASON_TO_HOST
            self._pio_in(data, self._block_limit(), lambda: taken(good))

        def taken(good: int) -> None:
            if good < count:
                self._read_failed(lba + good)
            elif left > count:
                self._fetch(mmc.Blocks(lba + count, left - count, raw))
            else:
                self.succeed()

        self._read_media(lba, count, mmc.BLOCK, (view,), (), fetched)

    def _copy_raw(self, views: Sequence[Buffer], guest: Ranges, lba: int, left: int, position: int) -> None:
        """Read blocks, make raw sectors of them and copy those into guest memory, a chunk at a time."""
        count = min(left, CHUNK)
        if not count:
            self.succeed()
            return
        view = memoryview(bytearray(count * mmc.BLOCK))

        def read(good: int) -> None:
            if good < count:
                self._read_failed(lba + good)
                return
            data = _raw(lba, view)
            end = position + len(data)
            self._copy_out(
                cut(views, position, end),
                cut_ranges(guest, position, end),
                data,
                lambda status: self._copy_raw(views, guest, lba + count, left - count, end),
            )

        self._read_media(lba, count, mmc.BLOCK, (view,), (), read)


def _raw(lba: int, user: Buffer) -> Buffer:
    """The raw sectors of consecutive blocks."""
    size = mmc.BLOCK
    return memoryview(
        b"".join(cdsector.encode(lba + i, bytes(user[size * i : size * (i + 1)])) for i in range(len(user) // size))
    )
