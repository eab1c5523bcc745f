"""The vCPU: runs translated guest code, delivers what interrupts it, and hands port and memory accesses to devices.

Theory of operation. :meth:`UnicornCpu.run` enters the library again and again. It comes back because an exception was
raised (delivered by :mod:`.exceptions`), because a block hook saw that another thread wants attention (:mod:`.stopper`),
because an interrupt that was pending while interrupts were off can now be delivered, or because the guest executed HLT.
Everything that is not allowed while guest code runs — changes of the memory map, dropping translations of code that a
device has overwritten — is queued by whoever wants it and done here, between two entries.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from typing import Any

from unicorn import Uc, UcError, x86_const
from unicorn import unicorn_const as uc_const

from vm_core.machine.accel import AccelMachine, CpuState, Segment, VCpu
from vm_core.machine.memory import GuestMemory, RegionKind

from . import library
from .exceptions import UD, WITH_CODE, Delivery, TripleFault
from .memorymap import MemoryMap
from .paging import LinearMemory
from .state import (
    BASE,
    CR0,
    CR2,
    CR3,
    CR4,
    CS,
    DS,
    EFLAGS,
    EIP,
    ES,
    FS,
    GDT,
    GS,
    HF_ADDSEG,
    HF_CPL,
    HF_CS32,
    HF_SHADOW,
    HF_SS32,
    HFLAGS,
    IDT,
    IF,
    LIMIT,
    SEGMENTS,
    SS,
    Context,
    find_layout,
)
from .stopper import Control, make_stopper
from .strings import StringMoves

_u32 = struct.Struct("<I")
_u64 = struct.Struct("<Q")
_REGISTERS = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
#: Seconds that a halted guest sleeps at most where HLT cannot be told apart from the end of a slice.
_UNSURE_HALT = 0.001


class UnicornCpu(VCpu):
    """The only vCPU of a machine. *choice* selects how a running guest is stopped (see :mod:`.stopper`)."""

    def __init__(self, machine: AccelMachine, choice: str) -> None:
        self._machine = machine
        self._choice = choice
        self._layout = find_layout()
        self._linear = LinearMemory(machine.memory)
        self._interrupts = machine.cpu_interrupts(0)
        self._control = Control()
        self._wake = threading.Event()
        self._halted = False
        self._map_changed = False
        self._failure: BaseException | None = None
        #: Guards the two below: whether run() is executing, and what it is to do between two entries.
        self._guard = threading.Lock()
        self._running = False
        self._posted: list[tuple[Sequence[tuple[int, int]], threading.Event | None]] = []
        self._ram = ctypes.addressof(ctypes.c_char.from_buffer(machine.memory.buffer))
        self._eflags = ctypes.c_uint64()
        self._eflags_at = ctypes.addressof(self._eflags)
        self._build()

    # The engine.

    def _build(self) -> None:
        """A fresh engine: caches, model-specific registers and the FPU are as after power-on."""
        uc = Uc(uc_const.UC_ARCH_X86, uc_const.UC_MODE_32)
        uc.ctl_set_cpu_model(x86_const.UC_CPU_X86_QEMU32)
        # No exit addresses: comparing every address with one would make a hidden page fault at each return.
        uc.ctl_exits_enabled(True)
        self._uc = uc
        engine = self._engine = uc._uch.value
        self._context = Context(engine)
        self._scratch = Context(engine)
        self._control.context = self._scratch.handle
        self._bytes = self._context.bytes
        self._delivery = Delivery(self._context, self._layout, self._linear)
        self._strings = StringMoves(engine, Context(engine), self._layout, self._linear)
        self._stopper = make_stopper(self._choice, engine, self._control, self._layout)
        self._in = library.IN_CALLBACK(self._port_in)
        self._out = library.OUT_CALLBACK(self._port_out)
        instruction = int(uc_const.UC_HOOK_INSN)
        library.hook(engine, instruction, library.address_of(self._in), 0, int(x86_const.UC_X86_INS_IN))
        library.hook(engine, instruction, library.address_of(self._out), 0, int(x86_const.UC_X86_INS_OUT))
        self._map = MemoryMap(uc, self._machine.memory, self._ram, self._mmio_read, self._mmio_write)
        uc.hook_add(uc_const.UC_HOOK_MEM_WRITE_PROT, self._rom_write)
        self._map.follow(self._machine.memory)
        self._linear.refresh(self._machine.memory)
        self._map_changed = False

    def _get(self, offset: int) -> int:
        return int(_u32.unpack_from(self._bytes, self._layout.base + offset)[0])

    def _put(self, offset: int, value: int) -> None:
        _u64.pack_into(self._bytes, self._layout.base + offset, value & 0xFFFFFFFF)

    def _full_eflags(self) -> int:
        library.reg_read(self._engine, library.EFLAGS, self._eflags_at)
        return self._eflags.value & 0xFFFFFFFF

    # The contract.

    def reset(self, state: CpuState) -> None:
        """Load *state* into a fresh engine."""
        self._close_engine()
        self._build()
        self._halted = False
        uc = self._uc
        uc.reg_write(x86_const.UC_X86_REG_CR4, 0)
        uc.reg_write(x86_const.UC_X86_REG_CR3, 0)
        uc.reg_write(x86_const.UC_X86_REG_CR0, state.cr0)
        uc.reg_write(x86_const.UC_X86_REG_EFLAGS, state.eflags)
        self._context.load()
        for index, name in enumerate(_REGISTERS):
            self._put(8 * index, state.regs.get(name, 0))
        self._put(EIP, state.eip)
        segments = {ES: state.es, CS: state.cs, SS: state.ss, DS: state.ds, FS: state.fs, GS: state.gs}
        for index, segment in segments.items():
            _load_segment(self._bytes, self._layout.base + SEGMENTS + 24 * index, segment)
        for table, (base, limit) in ((GDT, state.gdt), (IDT, state.idt)):
            self._put(table + BASE, base)
            _u32.pack_into(self._bytes, self._layout.base + table + LIMIT, limit)
        hflags = self._get(HFLAGS) & ~(HF_CPL | HF_SHADOW | HF_CS32 | HF_SS32 | HF_ADDSEG)
        hflags |= (HF_CS32 if state.cs.db else HF_ADDSEG) | (HF_SS32 if state.ss.db else 0)
        if state.ds.base or state.es.base or state.ss.base:
            hflags |= HF_ADDSEG
        _u32.pack_into(self._bytes, self._layout.base + HFLAGS, hflags)
        self._context.store()

    def kick(self) -> None:
        """Set the word that every basic block looks at, and wake a halted guest."""
        self._control.attention = 1
        self._wake.set()

    def registers(self) -> dict[str, int]:
        """General, flags, segment and control registers."""
        self._context.load()
        found = {name: self._get(8 * index) for index, name in enumerate(_REGISTERS)}
        found |= {"eip": self._get(EIP), "eflags": self._full_eflags()}
        found |= {
            n: self._get(SEGMENTS + 24 * i) for n, i in zip(("es", "cs", "ss", "ds", "fs", "gs"), range(6), strict=True)
        }
        found |= {"cr0": self._get(CR0), "cr2": self._get(CR2), "cr3": self._get(CR3), "cr4": self._get(CR4)}
        return found

    def close(self) -> None:
        """Free the engine."""
        self._close_engine()

    def _close_engine(self) -> None:
        for context in (self._context, self._scratch, self._strings.context):
            context.close()
        # The wheel frees the engine when its wrapper goes.
        del self._uc

    def run(self) -> None:
        """Execute until the machine wants the thread back."""
        with self._guard:
            self._running = True
        try:
            self._loop()
        except Exception as error:
            self._machine.internal_error(f"unicorn: {error!r} at {self._where()}")
        finally:
            with self._guard:
                self._running = False
                self._serve()

    def _loop(self) -> None:
        machine, control, context = self._machine, self._control, self._context
        engine, start, slice_ = self._engine, library.emu_start, self._stopper.slice
        eip_at = self._layout.base + EIP
        while True:
            control.attention = 0
            self._wake.clear()
            if self._posted:
                with self._guard:
                    self._serve()
            if self._map_changed:
                self._follow_map()
            if machine.must_return():
                return
            try:
                self._interrupt()
            except TripleFault:
                self._triple_fault()
                continue
            if self._halted:
                self._wake.wait(_UNSURE_HALT if slice_ else None)
                if not slice_:
                    continue
                self._halted = False
            control.stopped = control.raised = 0
            context.load()
            eip = _u64.unpack_from(self._bytes, eip_at)[0]
            code = start(engine, eip, 0xFFFFFFFFFFFF, 0, slice_)
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            try:
                if control.raised:
                    self._exception(control.vector)
                elif code == library.ERR_INSN_INVALID:
                    context.load()
                    self._deliver(UD, None)
                elif code != library.ERR_OK:
                    machine.internal_error(f"unicorn: {library.describe(code)} at {self._where()}")
                    return
                elif not control.stopped:
                    self._maybe_halt(counted=bool(slice_))
            except TripleFault:
                self._triple_fault()

    def _triple_fault(self) -> None:
        self._machine.request_reset("triple fault")
        self._halted = True
        self._control.window = 0
        # Nothing is executed until the machine has reset the vCPU.
        while not self._machine.must_return():
            self._wake.wait(0.1)

    def _maybe_halt(self, *, counted: bool) -> None:
        """The guest executed HLT, or (when counting) came to the end of its slice."""
        if not counted:
            self._halted = True
            return
        self._context.load()
        linear = self._linear
        linear.cr0, linear.cr3, linear.cr4 = self._get(CR0), self._get(CR3), self._get(CR4)
        at = self._get(SEGMENTS + 24 * CS + BASE) + self._get(EIP) - 1
        self._halted = linear.read(at, 1) == b"\xf4"

    # Interrupts and exceptions.

    def _interrupt(self) -> None:
        """Deliver a pending interrupt if the guest can take it now, else ask to be stopped when it can."""
        machine, control = self._machine, self._control
        with machine.lock:
            if not self._interrupts.pending():
                control.window = 0
                return
            context = self._context
            context.load()
            if not self._get(EFLAGS) & IF or self._get(HFLAGS) & HF_SHADOW:
                control.window = 1
                return
            vector = self._interrupts.acknowledge()
            control.window = 1 if self._interrupts.pending() else 0
        self._halted = False
        self._delivery.deliver(vector, None, self._full_eflags())
        context.store()

    def _exception(self, vector: int) -> None:
        """An exception or an INT instruction; EIP is where the handler shall return to."""
        self._context.load()
        code = None
        software = False
        layout = self._layout
        if vector < 32:
            software = bool(_u32.unpack_from(self._bytes, layout.is_software)[0])
            if vector in WITH_CODE and not software:
                code = _u32.unpack_from(self._bytes, layout.error_code)[0]
            # Never cleared by the library, which would take the next page fault for a double fault.
            struct.pack_into("<i", self._bytes, layout.previous, -1)
        else:
            software = True
        self._deliver(vector, code, software=software)

    def _deliver(self, vector: int, code: int | None, *, software: bool = False) -> None:
        self._delivery.deliver(vector, code, self._full_eflags(), software=software)
        self._context.store()

    # Accesses by the guest, called from inside the library on this thread.

    def _port_in(self, engine: Any, port: int, size: int, data: Any) -> int:
        try:
            machine = self._machine
            with machine.lock:
                if size > 1:
                    found = machine.ports.find(port)
                    if found is not None and hasattr(found.handler, "read_block"):
                        first = self._strings.read(machine.ports, port, size)
                        if first is not None:
                            return first
                return machine.ports.read(port, size)
        except BaseException as error:
            return self._fail(error)

    def _port_out(self, engine: Any, port: int, size: int, value: int, data: Any) -> None:
        try:
            machine = self._machine
            with machine.lock:
                if size > 1:
                    found = machine.ports.find(port)
                    if (
                        found is not None
                        and hasattr(found.handler, "write_block")
                        and self._strings.write(machine.ports, port, size, value)
                    ):
                        return
                machine.ports.write(port, size, value & ((1 << (8 * size)) - 1))
        except BaseException as error:
            self._fail(error)

    def _mmio_read(self, address: int, size: int) -> int:
        try:
            machine = self._machine
            with machine.lock:
                found = machine.memory.find(address)
                if found is None or found.region.handler is None:
                    return (1 << (8 * size)) - 1
                return found.region.handler.read(found.offset + address - found.start, size)
        except BaseException as error:
            return self._fail(error)

    def _mmio_write(self, address: int, size: int, value: int) -> None:
        try:
            machine = self._machine
            with machine.lock:
                found = machine.memory.find(address)
                if found is not None and found.region.handler is not None:
                    found.region.handler.write(found.offset + address - found.start, size, value)
        except BaseException as error:
            self._fail(error)

    def _rom_write(self, uc: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        """A write to ROM: let it happen, and put the old bytes back before the next block."""
        self._map.open_rom(address, size)
        self._map_changed = True
        self._control.attention = 1
        return True

    def _fail(self, error: BaseException) -> int:
        """Remember what a handler raised; the loop raises it again outside of the library."""
        if self._failure is None:
            self._failure = error
        self._control.attention = 1
        return 0

    # Work that must not happen while guest code runs.

    def memory_changed(self) -> None:
        """The map is another: follow it before the next block."""
        self._map_changed = True
        self._control.attention = 1

    def _follow_map(self) -> None:
        self._map_changed = False
        with self._machine.lock:
            self._map.close_rom()
            self._map.follow(self._machine.memory)
            self._linear.refresh(self._machine.memory)

    def dma_written(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Drop translations of code in *ranges*; returns when they can no longer be executed."""
        with self._guard:
            if not self._running:
                self._posted.append((ranges, None))
                return
            done = threading.Event()
            self._posted.append((ranges, done))
        self.kick()
        done.wait()

    def _serve(self) -> None:
        """Do what was posted. Called with the guard held, outside of guest code."""
        posted, self._posted = self._posted, []
        for ranges, done in posted:
            for address, length in ranges:
                self._drop(self._machine.memory, address, length)
            if done is not None:
                done.set()

    def _drop(self, memory: GuestMemory, address: int, length: int) -> None:
        # Writing bytes over themselves is how the library is told that they changed. Nothing else writes them now: the
        # device is done with them and the guest is not running.
        while length > 0:
            found = memory.find(address)
            if found is None:
                return
            n = min(length, found.start + found.size - address)
            if found.region.kind is RegionKind.RAM:
                place = self._ram + found.region.backing + found.offset + address - found.start
                library.mem_write(self._engine, address, place, n)
            address += n
            length -= n

    def _where(self) -> str:
        try:
            names = self.registers()
        except UcError:
            return "an unknown place"
        words = " ".join(f"{name}={value:08x}" for name, value in names.items())
        return f"CS:EIP {names['cs']:04x}:{names['eip']:08x} ({words})"


def _load_segment(data: memoryview, at: int, segment: Segment) -> None:
    access = segment.type | segment.s << 4 | segment.dpl << 5 | segment.present << 7
    flags = access << 8 | segment.l << 21 | segment.db << 22 | segment.g << 23
    struct.pack_into("<IIQII", data, at, segment.selector, 0, segment.base, segment.limit, flags)
