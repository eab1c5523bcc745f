"""An ATA disk: the commands of :data:`~.commands.DISK_COMMANDS` on top of :class:`~.drive.Drive`.

PIO commands move up to :data:`PIO_CHUNK` sectors between host and storage with one request, however small the DRQ
blocks are; DMA commands move all of theirs with one, straight to or from guest memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...block.node import Buffer
from ...block.request import Op, Request
from .commands import DISK_COMMANDS, LBA48, Command
from .drive import Drive, Link, Ranges, Storage
from .geometry import Geometry
from .identify import LBA28_SECTORS, MAX_MULTIPLE, MAX_TRIM_BLOCKS, DiskState, Identity, identify_device
from .registers import ABRT, IDNF, LBA, UNC
from .smart import PASS, FailedCommand, Smart

#: Sectors of a PIO command that one request fetches or stores; a multiple of every DRQ block's size.
PIO_CHUNK = 256
#: Bytes that READ VERIFY checks with one request.
VERIFY_CHUNK = 1 << 20

_HOUR = 3600 * 10**9


def _standby_period(value: int) -> int:
    """Nanoseconds that the count register of IDLE and STANDBY stands for, 0 for never (ACS-2 table 59)."""
    if value <= 240:
        seconds = 5 * value
    elif value <= 251:
        seconds = 1800 * (value - 240)
    else:
        seconds = {252: 21 * 60, 253: 8 * 3600, 254: 0, 255: 21 * 60 + 15}[value]
    return seconds * 10**9


class AtaDisk(Drive):
    """A disk with the contents of *storage*. *geometry* is what it reports; computed from its size if not given."""

    commands = DISK_COMMANDS
    signature = b"\x01\x01\x00\x00"

    def __init__(
        self,
        link: Link,
        storage: Storage,
        identity: Identity,
        *,
        unit: int = 0,
        geometry: Geometry | None = None,
    ) -> None:
        self.identity = identity
        self.smart_state = Smart()
        self._given_geometry = geometry
        self._translation: tuple[int, int] | None = None
        self.multiple = MAX_MULTIPLE
        self.look_ahead = True
        self._standby = False
        self._standby_period = 0
        self._last_active = 0
        self._powered_at = link.now()
        self._lba48 = False
        self._issued = (0, b"")
        super().__init__(link, storage, unit=unit)

    def power_on(self) -> None:
        self.smart_state.power_on()
        self._powered_at = self._last_active = self.link.now()
        self._standby = False
        self._standby_period = 0
        super().power_on()

    def restore_defaults(self) -> None:
        self.modes.reset()
        self.multiple = MAX_MULTIPLE
        self.look_ahead = True
        self._translation = None

    # Addresses.

    @property
    def sectors(self) -> int:
        """The capacity; a rest smaller than a sector is not addressable."""
        return self.storage.size // self.identity.logical_block

    def default_geometry(self) -> Geometry:
        """Words 1, 3 and 6."""
        return self._given_geometry or Geometry.of(self.sectors)

    def geometry(self) -> Geometry:
        if self._translation is None:
            return self.default_geometry()
        return Geometry.current(self.sectors, *self._translation)

    def _in_range(self, command: Command) -> bool:
        """Begin a command with an address; False if it was failed because its sectors do not exist."""
        self._lba48 = command.spec.addressing is LBA48
        self._issued = (command.spec.opcode, bytes(self.taskfile.current))
        self._standby = False
        self._last_active = self.link.now()
        if command.lba is None:
            self._medium_error(IDNF, None)
            return False
        if command.lba + command.sectors > self.sectors:
            self._medium_error(IDNF, max(command.lba, self.sectors))
            return False
        return True

    def _show_address(self, lba: int) -> None:
        """Leave *lba* in the registers, in the form of addressing that the command used."""
        taskfile = self.taskfile
        if self._lba48:
            taskfile.lba48 = lba
        elif taskfile.device & LBA:
            taskfile.lba28 = lba & LBA28_SECTORS
        else:
            cylinder, head, sector = self.geometry().to_chs(lba)
            taskfile.byte_count = cylinder & 0xFFFF
            taskfile.current[3] = sector
            taskfile.current[6] = taskfile.device & 0xF0 | head & 0x0F

    def _medium_error(self, error: int, lba: int | None) -> None:
        """Fail with the address of the first sector that could not be had (None: leave the host's)."""
        if lba is not None:
            self._show_address(lba)
        self.fail(error)
        now = self.link.now()
        opcode, issued = self._issued
        self.smart_state.record(
            FailedCommand(
                opcode,
                issued,
                bytes(self.taskfile.current),
                error,
                self.status,
                (now - self._powered_at) // 10**6 & 0xFFFFFFFF,
                self._hours(),
            ),
            uncorrectable=error == UNC,
        )

    def _sectors_done(self, command: Command, *, interrupt: bool = True) -> None:
        """All sectors were moved: the registers show the last one's address and that none are left."""
        assert command.lba is not None
        self._show_address(command.lba + command.sectors - 1)
        if self._lba48:
            self.taskfile.count16 = 0
        else:
            self.taskfile.count = 0
        self.succeed(interrupt=interrupt)

    def _read(self, lba: int, count: int, views: Sequence[Buffer], guest: Ranges, then: Callable[[int], None]) -> None:
        self._read_media(lba, count, self.identity.logical_block, views, guest, then)

    # Reading and writing by PIO.

    def _block_size(self, command: Command) -> int:
        """Sectors of a DRQ block; 0 for READ or WRITE MULTIPLE while multiple mode is off."""
        return self.multiple if command.spec.multiple else 1

    def read_pio(self, command: Command) -> None:
        """READ SECTORS, READ MULTIPLE and their EXT forms (ACS-2 7.30, 7.35)."""
        if not self._block_size(command):
            self.fail(ABRT)
        elif self._in_range(command):
            self._fetch(command, 0)

    def _fetch(self, command: Command, done: int) -> None:
        assert command.lba is not None
        lba = command.lba + done
        size = self.identity.logical_block
        count = min(command.sectors - done, PIO_CHUNK)
        view = memoryview(bytearray(count * size))

        def fetched(good: int) -> None:
            if good:
                self._pio_in(view[: good * size], self._block_size(command) * size, lambda: taken(good))
            else:
                self._medium_error(UNC, lba)

        def taken(good: int) -> None:
            if good < count:
                self._medium_error(UNC, lba + good)
            elif done + count < command.sectors:
                self._fetch(command, done + count)
            else:
                # The interrupt of a read says that a block is ready; there is none after the last.
                self._sectors_done(command, interrupt=False)

        self._read(lba, count, (view,), (), fetched)

    def write_pio(self, command: Command) -> None:
        """WRITE SECTORS, WRITE MULTIPLE and their EXT and FUA forms (7.67, 7.63)."""
        if not self._block_size(command):
            self.fail(ABRT)
        elif self._in_range(command):
            self._collect(command, 0)

    def _collect(self, command: Command, done: int) -> None:
        assert command.lba is not None
        lba = command.lba + done
        size = self.identity.logical_block
        count = min(command.sectors - done, PIO_CHUNK)
        view = memoryview(bytearray(count * size))

        def filled() -> None:
            request = Request(Op.WRITE, lba * size, len(view), (view,), fua=command.spec.fua)
            self._submit([request], written)

        def written(status: int) -> None:
            if status:
                self._medium_error(ABRT, lba)
            elif done + count < command.sectors:
                self._collect(command, done + count)
            else:
                self._sectors_done(command)

        # The first block of a write is asked for without an interrupt.
        self._pio_out(view, self._block_size(command) * size, filled, interrupt=done > 0)

    # Reading and writing by DMA.

    def read_dma(self, command: Command) -> None:
        """READ DMA and READ DMA EXT (7.26)."""
        if not self._in_range(command):
            return
        lba = command.lba
        assert lba is not None

        def finished(good: int) -> None:
            if good < command.sectors:
                self._medium_error(UNC, lba + good)
            else:
                self._sectors_done(command)

        self._dma(
            True,
            command.sectors * self.identity.logical_block,
            lambda views, guest: self._read(lba, command.sectors, views, guest, finished),
        )

    def write_dma(self, command: Command) -> None:
        """WRITE DMA, WRITE DMA EXT and WRITE DMA FUA EXT (7.60, 7.62)."""
        if not self._in_range(command):
            return
        lba = command.lba
        assert lba is not None
        size = self.identity.logical_block

        def finished(status: int) -> None:
            if status:
                self._medium_error(ABRT, lba)
            else:
                self._sectors_done(command)

        def started(views: Sequence[Buffer], guest: Ranges) -> None:
            request = Request(Op.WRITE, lba * size, command.sectors * size, views, fua=command.spec.fua)
            self._submit([request], finished)

        self._dma(False, command.sectors * size, started)

    def data_set_management(self, command: Command) -> None:
        """DATA SET MANAGEMENT with TRIM (7.9): up to 64 ranges of (LBA, sectors) in each block of 512 bytes."""
        blocks = self.taskfile.count16
        if self.taskfile.features != 0x01 or not self.identity.trim or not 1 <= blocks <= MAX_TRIM_BLOCKS:
            self.fail(ABRT)
            return
        self._lba48 = True
        self._issued = (command.spec.opcode, bytes(self.taskfile.current))
        self._dma(False, 512 * blocks, lambda views, guest: self._trim(b"".join(views)))

    def _trim(self, entries: bytes) -> None:
        size = self.identity.logical_block
        ranges: list[tuple[int, int]] = []
        for at in range(0, len(entries), 8):
            lba = int.from_bytes(entries[at : at + 6], "little")
            count = int.from_bytes(entries[at + 6 : at + 8], "little")
            if not count:
                continue
            if lba + count > self.sectors:
                self._medium_error(IDNF, max(lba, self.sectors))
                return
            if ranges and sum(ranges[-1]) == lba:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + count)
            else:
                ranges.append((lba, count))
        if not ranges:
            self.succeed()
            return
        self._submit(
            [Request(Op.DISCARD, lba * size, count * size) for lba, count in ranges],
            lambda status: self.fail(ABRT) if status else self.succeed(),
        )

    # Commands about the medium without data.

    def verify(self, command: Command) -> None:
        """READ VERIFY SECTORS (7.38): read, and throw away."""
        if not self._in_range(command):
            return
        lba = command.lba
        assert lba is not None
        chunk = min(command.sectors, VERIFY_CHUNK // self.identity.logical_block)
        view = memoryview(bytearray(chunk * self.identity.logical_block))

        def check(done: int) -> None:
            count = min(command.sectors - done, chunk)
            if not count:
                self._sectors_done(command)
                return

            def checked(good: int) -> None:
                if good < count:
                    self._medium_error(UNC, lba + done + good)
                else:
                    check(done + count)

            self._read(lba + done, count, (view[: count * self.identity.logical_block],), (), checked)

        check(0)

    def seek(self, command: Command) -> None:
        """SEEK (ATA/ATAPI-6 8.42): only the address is checked."""
        if self._in_range(command._replace(sectors=1)):
            self.succeed()

    def recalibrate(self, command: Command) -> None:
        """RECALIBRATE (ATA-3 7.18): to cylinder 0."""
        self.succeed()

    def read_native_max(self, command: Command) -> None:
        """READ NATIVE MAX ADDRESS (EXT) (7.32): the last sector; 28 bits say what they can."""
        self._lba48 = command.spec.addressing is LBA48
        last = max(self.sectors, 1) - 1
        if not self._lba48:
            self.taskfile.current[6] |= LBA
            last = min(last, LBA28_SECTORS - 1)
        self._show_address(last)
        self.succeed()

    # Settings.

    def identify_device(self, command: Command) -> None:
        """IDENTIFY DEVICE (7.12)."""
        state = DiskState(
            sectors=self.sectors,
            default_geometry=self.default_geometry(),
            current_geometry=self.geometry(),
            multiple=self.multiple,
            modes=self.modes,
            write_cache=self.storage.write_cache,
            look_ahead=self.look_ahead,
            smart=self.smart_state.enabled,
            unit=self.unit,
        )
        self._pio_sector(identify_device(self.identity, state))

    def _pio_sector(self, data: bytes) -> None:
        self._pio_in(memoryview(data), 512, lambda: self.succeed(interrupt=False))

    def initialize_device_parameters(self, command: Command) -> None:
        """INITIALIZE DEVICE PARAMETERS (ATA/ATAPI-5 8.16): sectors in count, the last head in device."""
        sectors, heads = self.taskfile.count, (self.taskfile.device & 0x0F) + 1
        if not sectors:
            self.fail(ABRT)
            return
        self._translation = (heads, sectors)
        self.succeed()

    def set_multiple_mode(self, command: Command) -> None:
        """SET MULTIPLE MODE (7.46): a power of two up to 16; 0 turns READ and WRITE MULTIPLE off."""
        count = self.taskfile.count
        if count > MAX_MULTIPLE or count & (count - 1):
            self.fail(ABRT)
            return
        self.multiple = count
        self.succeed()

    def set_features(self, command: Command) -> None:
        """SET FEATURES (7.45): write cache and look-ahead beside what every drive has."""
        feature = self.taskfile.features
        if feature in (0x02, 0x82):
            self._expect(1, lambda status: self.fail(ABRT) if status else self.succeed())
            self.link.set_write_cache(self, feature == 0x02)
        elif feature in (0x55, 0xAA):
            self.look_ahead = feature == 0xAA
            self.succeed()
        else:
            super().set_features(command)

    # Power.

    def _enter(self, standby: bool) -> None:
        self._standby = standby
        self._last_active = self.link.now()
        self.succeed()

    def standby_immediate(self, command: Command) -> None:
        """STANDBY IMMEDIATE (7.52): what the write cache holds is written first."""
        self._spin_down()

    def standby(self, command: Command) -> None:
        """STANDBY (7.51) with a new period of the standby timer."""
        self._standby_period = _standby_period(self.taskfile.count)
        self._spin_down()

    def _spin_down(self) -> None:
        self._submit([Request(Op.FLUSH)], lambda status: self.fail(ABRT) if status else self._enter(True))

    def idle(self, command: Command) -> None:
        """IDLE (7.14) with a new period of the standby timer."""
        self._standby_period = _standby_period(self.taskfile.count)
        self._enter(False)

    def idle_immediate(self, command: Command) -> None:
        """IDLE IMMEDIATE (7.15)."""
        self._enter(False)

    def check_power_mode(self, command: Command) -> None:
        """CHECK POWER MODE (7.3): 0x00 in standby, else 0xFF."""
        expired = self._standby_period and self.link.now() - self._last_active >= self._standby_period
        self.taskfile.count = 0x00 if self._standby or expired else 0xFF
        self.succeed()

    def sleep(self, command: Command) -> None:
        """SLEEP (7.50)."""

        def flushed(status: int) -> None:
            if status:
                self.fail(ABRT)
            else:
                self.succeed()
                self._sleeping = True

        self._submit([Request(Op.FLUSH)], flushed)

    # SMART.

    def _hours(self) -> int:
        return (self.link.now() - self._powered_at) // _HOUR

    def smart(self, command: Command) -> None:
        """SMART (ATA/ATAPI-7 6.54): the subcommand is in features, the key 0xC24F in LBA mid and high."""
        taskfile, state = self.taskfile, self.smart_state
        method = _SMART.get(taskfile.features)
        if taskfile.byte_count != PASS or method is None or not (state.enabled or taskfile.features == 0xD8):
            self.fail(ABRT)
            return
        method(self)

    def _smart_read_data(self) -> None:
        self._pio_sector(self.smart_state.data(self._hours()))

    def _smart_read_thresholds(self) -> None:
        self._pio_sector(self.smart_state.thresholds())

    def _smart_read_log(self) -> None:
        log = self.smart_state.log(self.taskfile.current[3])
        if log is None or self.taskfile.count != 1:
            self.fail(ABRT)
        else:
            self._pio_sector(log)

    def _smart_autosave(self) -> None:
        count = self.taskfile.count
        if count not in (0x00, 0xF1):
            self.fail(ABRT)
            return
        self.smart_state.autosave = count == 0xF1
        self.succeed()

    def _smart_auto_offline(self) -> None:
        count = self.taskfile.count
        if count not in (0x00, 0xF8):
            self.fail(ABRT)
            return
        self.smart_state.auto_offline = count == 0xF8
        self.succeed()

    def _smart_save(self) -> None:
        self.succeed()

    def _smart_execute_offline(self) -> None:
        if self.smart_state.execute_offline(self.taskfile.current[3], self._hours()):
            self.succeed()
        else:
            self.fail(ABRT)

    def _smart_enable(self) -> None:
        self.smart_state.enabled = True
        self.succeed()

    def _smart_disable(self) -> None:
        self.smart_state.enabled = False
        self.succeed()

    def _smart_return_status(self) -> None:
        # No threshold is ever exceeded: LBA mid and high keep the key.
        self.succeed()


#: SMART subcommands by the value of features.
_SMART: dict[int, Callable[[AtaDisk], None]] = {
    0xD0: AtaDisk._smart_read_data,
    0xD1: AtaDisk._smart_read_thresholds,
    0xD2: AtaDisk._smart_autosave,
    0xD3: AtaDisk._smart_save,
    0xD4: AtaDisk._smart_execute_offline,
    0xD5: AtaDisk._smart_read_log,
    0xD8: AtaDisk._smart_enable,
    0xD9: AtaDisk._smart_disable,
    0xDA: AtaDisk._smart_return_status,
    0xDB: AtaDisk._smart_auto_offline,
}
