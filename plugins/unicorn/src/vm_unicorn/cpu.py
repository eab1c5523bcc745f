"""The vCPU: runs translated guest code, delivers what interrupts it, and hands port and memory accesses to devices.

Theory of operation. :meth:`UnicornCpu.run` enters the engine again and again. It comes back because the machine code of
:mod:`.native` saw at the start of a block that another thread wants attention or that a waiting interrupt can be taken,
because the guest executed HLT, or because of a failure. Whatever must not happen while guest code runs — changes of the
memory map, dropping translations of what a device has overwritten — is queued by whoever wants it and done between two
entries.

Three modes, best first. ``native``: as above, and exceptions and interrupts are delivered by the engine's own code
without leaving it. ``block``: stopped by machine code, delivered by :mod:`.exceptions`. ``count``: the engine is
entered for so many instructions at a time; it needs nothing of the host, but counting costs most of the speed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence

import unicorn
from unicorn import x86_const as x86

from vm_core.errors import UsageError
from vm_core.machine.accel import AccelMachine, CpuState, VCpu
from vm_core.machine.memory import PAGE, DmaError, RegionKind

from . import fills, native
from .address_space import AddressSpace
from .cpuid import Cpuid
from .engine import (
    GENERAL,
    INTR_CALLBACK,
    INVALID_CALLBACK,
    MMIO_READ_CALLBACK,
    MMIO_WRITE_CALLBACK,
    Context,
    Engine,
)
from .exceptions import DF, UD, WITH_CODE, Delivery, TripleFault
from .paging import LinearMemory
from .portio import PortIo
from .state import SEGMENT_NAMES, CpuRecord, StateLayout, find_layout

#: Instructions in a slice where there is no other way to stop: about 2 ms.
SLICE = 200_000
#: Seconds after which a halted CPU is woken where HLT cannot be told from the end of a slice.
_UNSURE_HALT = 0.02
#: How many blocks to go through one by one, in mode ``block``, for a guest to accept interrupts, before waiting for a
#: moment between two looks (seconds).
_PATIENCE = 32
_LOOK_AGAIN = 0.001

_LOCAL_APIC = 0xFEE00000


class UnicornCpu(VCpu):
    """The vCPU of a machine."""

    def __init__(self, machine: AccelMachine, mode: str) -> None:
        self._machine = machine
        self._interrupts = machine.cpu_interrupts(0)
        self._wake = threading.Event()
        self._halted = False
        self._running = False
        self._thread = 0
        #: Guards _running together with _dirty, so that a writer knows whether to wait.
        self._guard = threading.Lock()
        self._dirty: list[tuple[int, int]] = []
        self._cleaned = threading.Condition(self._guard)
        self._map_changed = True
        self._failure: BaseException | None = None
        self._exception = -1
        self._closed_windows = 0

        self._engine = engine = Engine()
        self._pristine = Context(engine)
        self._pristine.save()
        self._kept = Context(engine)
        layout = find_layout(engine)
        if layout is None:
            raise UsageError(
                "-accel unicorn: this version keeps CPU state in an unknown way: pip install unicorn==2.1.4"
            )
        leaf1 = _ask_cpuid(engine)
        self._control, internals, self._mode = _choose(engine, layout, mode)
        self._cpu = CpuRecord(engine, layout, internals.env if internals is not None else 0)
        self._linear = LinearMemory(machine.memory)
        self._delivery = Delivery(self._cpu, self._linear)
        stores = None
        if self._control is not None and internals is not None:
            stores = fills.install(engine, self._control, internals, machine.memory.size)
        self._slice = SLICE if self._control is None else 0

        self._mmio = (MMIO_READ_CALLBACK(self._mmio_read), MMIO_WRITE_CALLBACK(self._mmio_write))
        self._space = AddressSpace(engine, machine.memory, *self._mmio, stores)
        self._portio = PortIo(engine, machine, self._cpu, self._linear, self._stored, self._fail)
        engine.hook(unicorn.UC_HOOK_INSN, self._portio.callback_in, 0, x86.UC_X86_INS_IN)
        engine.hook(unicorn.UC_HOOK_INSN, self._portio.callback_out, 0, x86.UC_X86_INS_OUT)
        self._cpuid = Cpuid(engine, self._has_apic, leaf1)
        if self._control is not None:
            engine.hook(unicorn.UC_HOOK_BLOCK, self._control.block, self._control.address)
        if self._control is not None and internals is not None:
            engine.hook(unicorn.UC_HOOK_INTR, self._control.exception, self._control.address)
            engine.hook(unicorn.UC_HOOK_INSN_INVALID, self._control.invalid, self._control.address)
        else:
            engine.hook(unicorn.UC_HOOK_INTR, INTR_CALLBACK(self._raised))
            engine.hook(unicorn.UC_HOOK_INSN_INVALID, INVALID_CALLBACK(self._invalid))
        self._ram_address = engine.function(
            "qemu_ram_addr_from_host_x86_64", ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p
        )
        self._invalidate = engine.function(
            "tb_invalidate_phys_range_x86_64", None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64
        )
        self.reset(CpuState())

    @property
    def mode(self) -> str:
        """How it works here: ``native``, ``block`` or ``count``."""
        return self._mode

    # The contract.

    def reset(self, state: CpuState) -> None:
        """Load *state* over the state after power-on."""
        engine, cpu = self._engine, self._cpu
        self._pristine.restore()
        # Caches of the translation and of page tables belong to the old state.
        self._space.drop_translations()
        engine.set("cr0", state.cr0)
        engine.set("eflags", state.eflags)
        cpu.load()
        for i, name in enumerate(GENERAL):
            cpu.put(8 * i, state.regs.get(name, 0))
        cpu.put(cpu.layout.eip, state.eip)
        for name in SEGMENT_NAMES:
            cpu.load_segment(name, getattr(state, name))
        for name, (base, limit) in (("gdtr", state.gdt), ("idtr", state.idt)):
            cpu.set_segment(name, 0, base, limit, 0)
        # After RESET both hold a null selector with a usable cache (Intel SDM vol. 3, table 10-1).
        cpu.set_segment("ldtr", 0, 0, 0xFFFF, 0x8200)
        cpu.set_segment("tr", 0, 0, 0xFFFF, 0x8B00)
        cpu.forget_exception()
        cpu.set_hidden_sizes(state.cs.dpl if state.cr0 & 1 else 0)
        cpu.store()
        self._halted = False
        if self._control is not None:
            self._control.vector.value = -1

    def kick(self) -> None:
        """Set the word that every block looks at, and wake a halted guest."""
        control = self._control
        if control is not None:
            control.stop.value = 1
            control.attention.value = 1
        self._wake.set()

    def registers(self) -> dict[str, int]:
        """General, flags, segment and control registers."""
        cpu = self._cpu
        cpu.load()
        found = cpu.general()
        found |= {"eip": cpu.eip, "eflags": cpu.eflags}
        found |= {name: cpu.selector(name) for name in SEGMENT_NAMES}
        found |= {f"cr{n}": cpu.control(n) for n in (0, 2, 3, 4)}
        return found

    def close(self) -> None:
        """Free the engine."""
        self._cpu.close()
        self._pristine.close()
        self._kept.close()
        self._engine.close()

    def memory_changed(self) -> None:
        """The map is another; it is followed before the next block."""
        self._map_changed = True
        self.kick()
        if self._slice and self._thread == threading.get_ident():
            # In a handler, with the engine waiting for it: do not go on to the end of the slice.
            self._engine.stop()

    @property
    def looks_at_every_block(self) -> bool:
        """Requests to stop, and translations to drop, are seen before each block."""
        return self._control is not None

    def dma_written(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Drop translations of *ranges*.

        Where every block looks at the control page nothing need be waited for: the guest can learn of the new bytes
        only in a block that has begun by now, and before the next one begins the translations are gone.
        """
        with self._guard:
            self._dirty.extend(ranges)
            wait = self._running and self._control is None and self._thread != threading.get_ident()
        self.kick()
        if wait:
            with self._cleaned:
                self._cleaned.wait_for(lambda: not self._dirty or not self._running)

    def run(self) -> None:
        """Execute until the machine wants the thread back."""
        with self._guard:
            self._running = True
        self._thread = threading.get_ident()
        try:
            self._loop()
        except Exception as error:
            self._machine.internal_error(f"unicorn: {type(error).__name__}: {error} at {self._where()}")
        finally:
            self._thread = 0
            with self._guard:
                self._running = False
                self._cleaned.notify_all()

    # The loop.

    def _loop(self) -> None:
        machine, control, cpu, engine = self._machine, self._control, self._cpu, self._engine
        while True:
            # Take requests back first and look at what they are about afterwards: none is lost.
            if control is not None:
                control.clear()
            self._wake.clear()
            if machine.must_return():
                return
            if self._map_changed:
                self._follow_map()
            if self._dirty:
                self._clean()
            try:
                self._take_interrupt()
            except TripleFault:
                self._shut_down()
                continue
            if self._halted:
                if self._slice:
                    # Whether it was HLT is a guess; a guest that halts copes with being woken.
                    self._wake.wait(_UNSURE_HALT)
                    self._halted = False
                else:
                    self._wake.wait()
                    continue
            cpu.load()
            error = engine.start(cpu.eip, self._slice)
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise failure
            try:
                if error == unicorn.UC_ERR_WRITE_PROT:
                    # Not done yet. After a change of the map it may be RAM by now: then it is simply tried again.
                    if not self._map_changed:
                        self._step_over_rom_write()
                elif error:
                    machine.internal_error(f"unicorn: {engine.strerror(error)} at {self._where()}")
                    return
                elif self._exception >= 0:
                    self._deliver_exception()
                elif control is None or not control.left.value:
                    self._halt()
            except TripleFault:
                self._shut_down()

    def _halt(self) -> None:
        """The engine came back by itself: HLT, the end of a slice, or an exception that it could not deliver."""
        cpu = self._cpu
        cpu.load()
        if cpu.nested_exception() == DF:
            raise TripleFault
        if self._slice:
            linear = self._linear
            linear.cr0, linear.cr3, linear.cr4 = cpu.control(0), cpu.control(3), cpu.control(4)
            self._halted = linear.read(cpu.base("cs") + cpu.eip - 1, 1) == b"\xf4"
        else:
            self._halted = True

    def _shut_down(self) -> None:
        """A triple fault: nothing is executed until the machine has reset the vCPU."""
        self._machine.request_reset("triple fault")
        while not self._machine.must_return():
            self._wake.wait(0.1)

    def _where(self) -> str:
        registers = self.registers()
        words = " ".join(f"{name}={value:08x}" for name, value in registers.items())
        return f"CS:EIP {registers['cs']:04x}:{registers['eip']:08x} ({words})"

    # Interrupts and exceptions.

    def _take_interrupt(self) -> None:
        """Deliver a pending interrupt if the guest accepts it now, else arrange to come back when it does."""
        control, cpu, interrupts = self._control, self._cpu, self._interrupts
        native_mode = self._mode == "native"
        # Acknowledged earlier, and on its way.
        vector = control.vector.value if control is not None else -1
        taken = -1
        with self._machine.lock:
            pending = interrupts.pending()
            if pending and vector < 0:
                cpu.load()
                if cpu.accepts_interrupts():
                    taken = interrupts.acknowledge()
                    pending = interrupts.pending()
        if taken >= 0 or vector >= 0:
            self._halted = False
        if native_mode and control is not None:
            if taken >= 0:
                control.vector.value = taken
            # Come back for the next one when the handler of this one, or whatever runs, accepts interrupts again.
            control.window.value = pending
            if pending or taken >= 0 or vector >= 0:
                control.attention.value = 1
            return
        if taken >= 0:
            self._closed_windows = 0
            self._delivery.deliver(taken, None)
            cpu.store()
        if not pending:
            self._closed_windows = 0
        elif control is not None:
            self._look_again(control)

    def _look_again(self, control: native.Control) -> None:
        """Mode ``block``: leave after a block to see whether interrupts are accepted then; in time, less often."""
        if self._closed_windows < _PATIENCE:
            self._closed_windows += 1
            control.stop.value = 2
            control.attention.value = 1
        else:
            later = threading.Timer(_LOOK_AGAIN, self.kick)
            later.daemon = True
            later.start()

    def _raised(self, _engine: int, vector: int, _user: int) -> None:
        """An exception or INT, where Python delivers it: leave the engine first."""
        self._exception = vector
        self._engine.stop()

    def _invalid(self, _engine: int, _user: int) -> bool:
        self._exception = UD
        self._engine.stop()
        return True

    def _deliver_exception(self) -> None:
        vector, self._exception = self._exception, -1
        cpu = self._cpu
        cpu.load()
        software = cpu.is_software and vector != UD
        code = cpu.error_code if vector in WITH_CODE and not software else None
        cpu.forget_exception()
        self._delivery.deliver(vector, code, software=software)
        cpu.store()

    # Memory.

    def _has_apic(self) -> bool:
        found = self._machine.memory.find(_LOCAL_APIC)
        return found is not None and found.region.kind is RegionKind.MMIO

    def _follow_map(self) -> None:
        with self._machine.lock:
            self._map_changed = False
            # To map and unmap, the engine walks the guest's page tables and records the page faults it meets: in CR2,
            # which a handler that was just entered has still to read, and as an exception that the next one would
            # make a double fault.
            self._kept.save()
            self._space.apply()
            self._kept.restore()
            self._linear.refresh(self._machine.memory)

    def _mmio_read(self, _engine: int, offset: int, size: int, start: int) -> int:
        try:
            with self._machine.lock:
                handler, skip = self._space.handlers[start]
                return handler.read(offset + skip, size) & ((1 << (8 * size)) - 1)
        except BaseException as error:
            self._fail(error)
            return (1 << (8 * size)) - 1

    def _mmio_write(self, _engine: int, offset: int, size: int, value: int, start: int) -> None:
        try:
            with self._machine.lock:
                handler, skip = self._space.handlers[start]
                handler.write(offset + skip, size, value & ((1 << (8 * size)) - 1))
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Keep what a device's handler raised; the loop raises it again outside of the engine."""
        if self._failure is None:
            self._failure = error
        self.kick()

    def _step_over_rom_write(self) -> None:
        """Writes to ROM are dropped: do the instruction, with all its other effects, on a copy."""
        space, engine = self._space, self._engine
        roms = space.roms()
        self._kept.save()  # see _follow_map
        keep = space.make_writable_copies(roms)
        self._kept.restore()
        self._cpu.load()
        error = engine.start(self._cpu.eip, 1)
        self._kept.save()
        space.restore(roms)
        self._kept.restore()
        keep.clear()
        if self._exception >= 0:
            self._deliver_exception()
        elif error:
            self._machine.internal_error(f"unicorn: {engine.strerror(error)} at {self._where()}")

    def _stored(self, physical: int, length: int) -> None:
        """A string instruction stored these bytes: drop what was translated from them."""
        if self._ram_address is not None and self._invalidate is not None:
            self._drop(physical, length)
        else:
            self._dirty.append((physical, length))
            self.kick()

    def _clean(self) -> None:
        with self._guard:
            dirty, self._dirty = self._dirty, []
            if self._ram_address is not None and self._invalidate is not None:
                for physical, length in dirty:
                    self._drop(physical, length)
            else:
                # By linear address is all that the library offers: without paging that is the physical one.
                cr0 = self._engine.get("cr0")
                self._kept.save()
                self._engine.set("cr0", cr0 & 0x7FFFFFFF)
                for physical, length in dirty:
                    self._engine.uc.ctl_remove_cache(physical, physical + length)
                self._engine.set("cr0", cr0)
                self._kept.restore()
            self._cleaned.notify_all()

    def _drop(self, physical: int, length: int) -> None:
        """Drop translations of a physical range, by the engine's own numbering of RAM."""
        assert self._ram_address is not None
        assert self._invalidate is not None
        memory, handle = self._machine.memory, self._engine.handle
        while length > 0:
            found = memory.find(physical)
            if found is None:
                raise DmaError(f"address {physical:#x} is not RAM")
            n = min(length, found.start + found.size - physical)
            if found.region.kind is not RegionKind.MMIO:
                if found.start < 1 << 20 < physical + n and physical < 1 << 20:
                    n = (1 << 20) - physical  # the map is cut there
                place = found.region.backing + found.offset + physical - found.start
                at = self._ram_address(handle, self._space.host_address(place))
                if at != 0xFFFFFFFFFFFFFFFF:
                    self._invalidate(handle, at, at + n)
            physical += n
            length -= n


def _ask_cpuid(engine: Engine) -> tuple[int, int, int, int]:
    """The engine's own answer to CPUID leaf 1."""
    page = ctypes.create_string_buffer(2 * PAGE)
    place = -(-ctypes.addressof(page) // PAGE) * PAGE
    ctypes.memmove(place, bytes.fromhex("0fa2f4"), 3)  # cpuid; hlt
    engine.check(engine.lib.uc_mem_map_ptr(engine.handle, 0, PAGE, unicorn.UC_PROT_ALL, place), "map a page")
    engine.set("cr0", 0x10)
    for name in SEGMENT_NAMES:
        engine.set(name, 0)
    engine.set("eax", 1)
    engine.check(engine.start(0), "run CPUID")
    engine.check(engine.lib.uc_mem_unmap(engine.handle, 0, PAGE), "unmap a page")
    return engine.get("eax"), engine.get("ebx"), engine.get("ecx"), engine.get("edx")


def _choose(
    engine: Engine, layout: StateLayout, mode: str
) -> tuple[native.Control | None, native.Internals | None, str]:
    """What this host offers of the wanted *mode*. Raises UsageError for one that it does not."""
    control = internals = None
    code = native.machine_code()
    if mode != "count" and code is not None:
        try:
            control = native.Control(engine, code)
        except OSError:
            control = None
    if control is not None and mode != "block":
        internals = native.find_internals(engine)
        if internals is not None:
            control.connect(internals, layout)
    found = "count" if control is None else "block" if internals is None else "native"
    if mode not in ("auto", found):
        raise UsageError(f"-accel unicorn,mode={mode}: this host or build of unicorn offers {found}")
    return control, internals, found
