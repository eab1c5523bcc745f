"""What ATA disks and packet devices share: phases, PIO blocks, DMA, resets, power, and the way to storage.

Theory of operation. A drive is a state machine without I/O of its own. A transport (the parallel :class:`~.channel.
Channel`, later a SATA port) fills :attr:`Drive.taskfile` and calls :meth:`Drive.command`. The drive answers by entering
a :class:`Phase`:

=========  ==========================================================  =====================================
phase      the drive                                                   left by
=========  ==========================================================  =====================================
IDLE       waits for a command                                         ``command``
BUSY       waits for storage, or for a copy into guest memory          ``complete``
PIO_IN     has a DRQ block for the host                                ``pio_read`` of all of it
PIO_OUT    wants a DRQ block from the host                             ``pio_write`` of all of it
DMA        wants ``dma_length`` bytes of guest memory                  ``dma_start``, ``dma_underrun``, ``dma_error``
=========  ==========================================================  =====================================

Everything it wants done goes out through its :class:`Link`: requests to storage, the interrupt, the wish for memory.
Completions come back through :meth:`Drive.complete`, possibly before ``Link.submit`` has returned. A reset while
storage works leaves the drive BSY until the storage is done, as a real drive may (ATA/ATAPI-7 volume 2, 11.2): nothing
is ever written into memory that the guest has taken back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import ClassVar, Protocol

from ...block.node import Buffer
from ...block.request import Op, Request
from .commands import DEVICE_RESET, Command, CommandSpec
from .geometry import Geometry
from .modes import TransferModes
from .registers import (
    ABRT,
    BSY,
    DEV,
    DIAGNOSTIC_PASSED,
    DRQ,
    ERR,
    READY,
    TaskFile,
)

#: Guest-physical (address, length) pairs of the memory that views show.
Ranges = Sequence[tuple[int, int]]


class Phase(IntEnum):
    """See the module's text."""

    IDLE = 0
    BUSY = 1
    PIO_IN = 2
    PIO_OUT = 3
    DMA = 4


_PIO_IN = Phase.PIO_IN


class Storage(Protocol):
    """What a drive reads of its :class:`~vm_core.block.backend.BlockBackend`."""

    @property
    def size(self) -> int: ...

    @property
    def write_cache(self) -> bool: ...


class Link(Protocol):
    """Where a drive is plugged in. Every answer is a call of the drive's :meth:`Drive.complete`, with the lock held."""

    def submit(self, drive: Drive, requests: list[Request]) -> None:
        """Give *requests* to the drive's storage; ``complete`` is due once for each."""
        ...

    def set_write_cache(self, drive: Drive, enabled: bool) -> None:
        """Switch the storage's write cache; ``complete`` is due once, when earlier writes are stable."""
        ...

    def copy(self, drive: Drive, views: Sequence[Buffer], guest: Ranges, data: Buffer) -> None:
        """Copy *data* into guest memory and tell the accelerator; ``complete`` is due once."""
        ...

    def interrupt(self, drive: Drive) -> None:
        """:attr:`Drive.interrupt_pending` has changed."""
        ...

    def dma_ready(self, drive: Drive) -> None:
        """The drive has entered the DMA phase."""
        ...

    def dma_done(self, drive: Drive) -> None:
        """The memory given to :meth:`Drive.dma_start` is no longer used."""
        ...

    def now(self) -> int:
        """Virtual time in nanoseconds."""
        ...


def cut(views: Sequence[Buffer], start: int, end: int) -> list[Buffer]:
    """The views of bytes ``[start, end)`` of *views*."""
    found: list[Buffer] = []
    for view in views:
        length = len(view)
        if start < length and end > 0:
            found.append(view[max(start, 0) : min(end, length)])
        start -= length
        end -= length
    return found


def cut_ranges(ranges: Ranges, start: int, end: int) -> list[tuple[int, int]]:
    """The same of (address, length) pairs."""
    found = []
    for address, length in ranges:
        low, high = max(start, 0), min(end, length)
        if low < high:
            found.append((address + low, high - low))
        start -= length
        end -= length
    return found


def _nothing(*_: object) -> None:
    """What follows when nothing does."""


class Drive(ABC):
    """One device. Called with the device lock held."""

    commands: ClassVar[dict[int, CommandSpec]]
    #: Count and LBA low, mid, high after a reset: how a host tells disks from packet devices.
    signature: ClassVar[bytes]
    #: Status of a drive that was reset.
    reset_status: ClassVar[int] = READY

    def __init__(self, link: Link, storage: Storage, *, unit: int = 0) -> None:
        self.link = link
        self.storage = storage
        #: 0 or 1: device 0 or device 1 of a parallel channel.
        self.unit = unit
        self.taskfile = TaskFile()
        self.status = self.reset_status
        self.error = DIAGNOSTIC_PASSED
        self.phase = Phase.IDLE
        self.interrupt_pending = False
        self.modes = TransferModes()
        #: Bytes wanted in the DMA phase, and whether they go to the host.
        self.dma_length = 0
        self.dma_to_host = False
        self._methods: dict[int, tuple[CommandSpec, Callable[[Command], None]]] = {
            opcode: (spec, getattr(self, spec.method)) for opcode, spec in self.commands.items()
        }
        self._data: Buffer = memoryview(bytearray())
        self._position = 0
        self._block = 0
        self._block_end = 0
        self._end_of_data: Callable[[], None] = _nothing
        self._memory: Callable[[Sequence[Buffer], Ranges], None] = _nothing
        self._resume: Callable[[int], None] = _nothing
        self._outstanding = 0
        self._failure = 0
        self._finished = False
        self._running = False
        self._dma_busy = False
        self._resetting = False
        self._reset_held = False
        self._keep_device = 0
        self._sleeping = False
        #: A software reset brings the settings of power-on back (SET FEATURES 0xCC; 0x66 keeps them).
        self.revert_on_reset = False
        self.power_on()

    # Resets.

    def power_on(self) -> None:
        """Power-on or hardware reset. Nothing of the drive's is in flight any more."""
        self._outstanding = 0
        self._dma_busy = False
        self._resetting = self._reset_held = False
        self._keep_device = 0
        self.revert_on_reset = False
        self.restore_defaults()
        self._present_signature()

    @abstractmethod
    def restore_defaults(self) -> None:
        """Back to the settings of power-on: transfer mode, features.

        The write cache is not among them: the storage has it, and what a guest made stable must stay so.
        """

    def reset_begin(self) -> None:
        """SRST is set: BSY until :meth:`reset_end` and until storage has finished what it was given."""
        self._reset_held = True
        self._keep_device = 0
        self._begin_reset()

    def _begin_reset(self) -> None:
        self._resetting = True
        self._set_interrupt(False)
        self.phase = Phase.BUSY
        self.status = BSY

    def reset_end(self) -> None:
        """SRST is clear again."""
        if self._reset_held:
            self._reset_held = False
            self._finish_reset()

    def _finish_reset(self) -> None:
        if self._resetting and not self._reset_held and not self._outstanding:
            self._resetting = False
            if self.revert_on_reset:
                self.restore_defaults()
            self._present_signature()

    def _present_signature(self) -> None:
        self._sleeping = False
        self._forget()
        self.taskfile.set_signature(self.signature)
        self.taskfile.current[6] = self._keep_device
        self.error = DIAGNOSTIC_PASSED
        self.status = self.reset_status
        self.phase = Phase.IDLE
        self._set_interrupt(False)

    def _forget(self) -> None:
        """Drop buffers and continuations."""
        self._data = memoryview(bytearray())
        self._position = self._block_end = 0
        self._end_of_data = _nothing
        self._memory = _nothing

    # Commands.

    def command(self, opcode: int) -> None:
        """The host writes the command register."""
        if self.status & (BSY | DRQ) and not (opcode == DEVICE_RESET and opcode in self._methods):
            return
        if self._resetting:
            return
        self._set_interrupt(False)
        found = self._methods.get(opcode)
        if found is None or (self._sleeping and opcode != DEVICE_RESET):
            self.fail(ABRT)
            return
        spec, method = found
        method(Command.parse(spec, self.taskfile, self.geometry()))

    def geometry(self) -> Geometry:
        """The CHS translation in force."""
        return Geometry(0, 1, 1)

    def succeed(self, *, interrupt: bool = True) -> None:
        """The command has completed."""
        self._release_memory()
        self.phase = Phase.IDLE
        self.status = READY
        self.error = 0
        if interrupt:
            self._set_interrupt(True)

    def fail(self, error: int) -> None:
        """The command has failed with the error register at *error*."""
        self._release_memory()
        self._forget()
        self.phase = Phase.IDLE
        self.status = READY | ERR
        self.error = error
        self._set_interrupt(True)

    def _set_interrupt(self, pending: bool) -> None:
        self.interrupt_pending = pending
        self.link.interrupt(self)

    def acknowledge(self) -> int:
        """The host reads the status register: its value; the interrupt ends."""
        if self.interrupt_pending:
            self._set_interrupt(False)
        return self.status

    # PIO.

    def block_ready(self, length: int) -> None:
        """A DRQ block of *length* bytes begins: where packet devices set their registers."""

    def _pio(self, phase: Phase, data: Buffer, block: int, then: Callable[[], None], *, interrupt: bool) -> None:
        """Move *data* in DRQ blocks of *block* bytes, then call *then*."""
        self._data = data
        self._position = 0
        self._block = block
        self._end_of_data = then
        self._next_block(phase, interrupt)

    def _pio_in(self, data: Buffer, block: int, then: Callable[[], None]) -> None:
        self._pio(Phase.PIO_IN, data, block, then, interrupt=True)

    def _pio_out(self, data: Buffer, block: int, then: Callable[[], None], *, interrupt: bool = True) -> None:
        self._pio(Phase.PIO_OUT, data, block, then, interrupt=interrupt)

    def _next_block(self, phase: Phase, interrupt: bool) -> None:
        left = len(self._data) - self._position
        length = min(self._block, left)
        self._block_end = self._position + length
        self.phase = phase
        self.status = READY | DRQ
        self.error = 0
        self.block_ready(length)
        if interrupt:
            self._set_interrupt(True)

    def _block_moved(self) -> None:
        if self._position < len(self._data):
            self._next_block(self.phase, True)
            return
        then = self._end_of_data
        self._forget()
        then()

    def pio_read_item(self, size: int) -> int:
        """One item of 2 or 4 bytes from the data register."""
        position = self._position
        end = position + size
        if end < self._block_end and self.phase is _PIO_IN:
            self._position = end
            return int.from_bytes(self._data[position:end], "little")
        return int.from_bytes(self.pio_read(size), "little")

    def pio_read(self, length: int) -> bytes:
        """*length* bytes from the data register, an even number; zeroes where there are no data."""
        parts = []
        while length and self.phase == Phase.PIO_IN:
            take = min(length, self._block_end - self._position)
            parts.append(bytes(self._data[self._position : self._position + take]))
            self._position += take
            length -= take
            if self._position == self._block_end:
                if take & 1 and length:  # an odd block ends with half a word
                    parts.append(b"\0")
                    length -= 1
                self._block_moved()
        parts.append(bytes(length))
        return b"".join(parts)

    def pio_write(self, data: bytes) -> None:
        """*data*, an even number of bytes, to the data register; dropped where none are wanted."""
        at = 0
        while at < len(data) and self.phase == Phase.PIO_OUT:
            take = min(len(data) - at, self._block_end - self._position)
            self._data[self._position : self._position + take] = data[at : at + take]
            self._position += take
            at += take
            if self._position == self._block_end:
                at += take & 1
                self._block_moved()

    # DMA.

    def _dma(self, to_host: bool, length: int, then: Callable[[Sequence[Buffer], Ranges], None]) -> None:
        """Ask for *length* bytes of memory and go on with *then*."""
        self.phase = Phase.DMA
        self.status = READY | DRQ
        self.error = 0
        self.dma_length = length
        self.dma_to_host = to_host
        self._memory = then
        self.link.dma_ready(self)

    def dma_start(self, views: Sequence[Buffer], guest: Ranges) -> None:
        """Here are the :attr:`dma_length` bytes of memory. They are the drive's until ``Link.dma_done``."""
        then = self._memory
        self._memory = _nothing
        self._dma_busy = True
        then(views, guest)

    def dma_underrun(self) -> None:
        """There is less memory than the command needs: it ends without data and without an interrupt.

        That is what hosts expect of a controller that ran out of descriptors (PIIX datasheet, 3.1.3): they see a
        controller that is neither active nor interrupting, and reset the drive.
        """
        self._forget()
        self.phase = Phase.IDLE
        self.status = READY

    def dma_error(self) -> None:
        """The memory does not exist: the command is aborted."""
        self.fail(ABRT)

    def _copy_out(self, views: Sequence[Buffer], guest: Ranges, data: Buffer, then: Callable[[int], None]) -> None:
        """Copy *data* into guest memory, then call *then* with 0."""
        self._expect(1, then)
        self.link.copy(self, views, guest, data)

    # Storage.

    def _expect(self, count: int, then: Callable[[int], None]) -> None:
        self.phase = Phase.BUSY
        self.status = BSY | READY
        self._outstanding = count
        self._failure = 0
        self._resume = then

    def _submit(self, requests: list[Request], then: Callable[[int], None]) -> None:
        """Have *requests* carried out, then call *then* with 0 or the errno of one that failed."""
        self._expect(len(requests), then)
        self.link.submit(self, requests)

    def complete(self, request: Request) -> None:
        """*request* is complete."""
        if not self._outstanding:
            return  # it belongs to a life before the last power-on
        self._outstanding -= 1
        self._failure = self._failure or request.status
        if self._outstanding:
            return
        if self._resetting:
            self._release_memory()
            self._finish_reset()
            return
        self._finished = True
        if self._running:
            return
        # Storage that completes within submit() must not make the stack grow with the length of a command.
        self._running = True
        try:
            while self._finished:
                self._finished = False
                self._resume(self._failure)
        finally:
            self._running = False

    def _release_memory(self) -> None:
        """The command's use of guest memory is over."""
        if self._dma_busy:
            self._dma_busy = False
            self.link.dma_done(self)

    def _read_media(
        self, lba: int, count: int, unit: int, views: Sequence[Buffer], guest: Ranges, then: Callable[[int], None]
    ) -> None:
        """Read *count* blocks of *unit* bytes into *views*, then call *then* with the number of good ones.

        Where the read fails, the first bad block is searched by halves; the blocks before it are in *views* then.
        """

        def read(low: int, high: int, done: Callable[[int], None]) -> None:
            start, end = low * unit, high * unit
            whole = high - low == count
            pieces = views if whole else cut(views, start, end)
            ranges = guest if whole else cut_ranges(guest, start, end)
            self._submit([Request(Op.READ, lba * unit + start, end - start, pieces, guest=ranges)], done)

        def search(low: int, high: int) -> None:
            # Good below low, bad in [low, high).
            if high - low == 1:
                then(low)
                return
            middle = (low + high) // 2
            read(low, middle, lambda status: search(low, middle) if status else search(middle, high))

        read(0, count, lambda status: search(0, count) if status else then(count))

    # Commands that every drive has.

    def nop(self, command: Command) -> None:
        """NOP fails by definition (ACS-2 7.24)."""
        self.fail(ABRT)

    def diagnostic(self, command: Command) -> None:
        """EXECUTE DEVICE DIAGNOSTIC (7.11): the signature, then the interrupt."""
        self._keep_device = 0
        self._present_signature()
        self._set_interrupt(True)

    def device_reset(self, command: Command) -> None:
        """DEVICE RESET (ATA/ATAPI-7 6.10): at any time, without an interrupt; DEV stays."""
        self._keep_device = self.taskfile.device & DEV
        self._reset_held = False
        self._begin_reset()
        self._finish_reset()

    def standby_immediate(self, command: Command) -> None:
        self.succeed()

    def idle_immediate(self, command: Command) -> None:
        self.succeed()

    def check_power_mode(self, command: Command) -> None:
        """CHECK POWER MODE (7.3): 0xFF, active or idle."""
        self.taskfile.count = 0xFF
        self.succeed()

    def sleep(self, command: Command) -> None:
        """SLEEP (7.50): only a reset wakes the drive."""
        self.succeed()
        self._sleeping = True

    def set_features(self, command: Command) -> None:
        """SET FEATURES (7.45), subcommands that all drives have."""
        feature = self.taskfile.features
        if feature == 0x03 and self.modes.select(self.taskfile.count):
            self.succeed()
        elif feature in (0x66, 0xCC):
            self.revert_on_reset = feature == 0xCC
            self.succeed()
        else:
            self.fail(ABRT)

    def flush_cache(self, command: Command) -> None:
        """FLUSH CACHE (7.13)."""
        self._submit([Request(Op.FLUSH)], lambda status: self.fail(ABRT) if status else self.succeed())
