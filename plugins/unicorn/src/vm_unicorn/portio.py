"""IN and OUT, and REP INS and REP OUTS a page at a time.

The engine calls a hook for every item of a string instruction. Where the port's handler takes blocks, the hook for the
first item moves all the items that lie in the same page at once, and leaves ECX, EDI or ESI as if the loop had come
that far; the engine then finishes the last step itself. So a sector read by programmed I/O is one call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vm_core.machine.memory import PAGE, DmaError, GuestMemory

from .engine import IN_CALLBACK, OUT_CALLBACK, Engine, RegisterBatch
from .paging import PageWalker
from .state import HF_CS32, CpuMemory

_ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF}
_DIRECTION = 0x400
_SEGMENT_PREFIXES = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}


class PortIo:
    """The port hooks of one vCPU."""

    def __init__(
        self,
        engine: Engine,
        machine: Any,
        cpu: CpuMemory,
        walker: PageWalker,
        dirty: Callable[[int, int], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """*dirty* is told physical ranges that were written; *failed* what a device's handler raised."""
        self._machine = machine
        self._cpu = cpu
        self._walker = walker
        self._memory: GuestMemory = machine.memory
        self._dirty = dirty
        self._tables = RegisterBatch(engine, ("cr0", "cr3", "cr4", "eflags"))
        self._in_step = RegisterBatch(engine, ("ecx", "edi"))
        self._out_step = RegisterBatch(engine, ("ecx", "esi"))
        ports, lock = machine.ports, machine.lock
        find = ports.find
        #: Whether handlers of a type take blocks.
        takes: dict[type, tuple[bool, bool]] = {}

        def port_in(_engine: int, port: int, size: int, _user: int) -> int:
            try:
                with lock:
                    found = find(port)
                    if found is None:
                        return _ONES[size]
                    handler = found.handler
                    kind = type(handler)
                    blocks = takes.get(kind)
                    if blocks is None:
                        blocks = takes[kind] = (hasattr(handler, "read_block"), hasattr(handler, "write_block"))
                    if blocks[0]:
                        return self._block_in(port, size)
                    return int(handler.read(port - found.start, size)) & _ONES[size]
            except BaseException as error:
                failed(error)
                return _ONES[size]

        def port_out(_engine: int, port: int, size: int, value: int, _user: int) -> None:
            try:
                with lock:
                    found = find(port)
                    if found is None:
                        return
                    handler = found.handler
                    kind = type(handler)
                    blocks = takes.get(kind)
                    if blocks is None:
                        blocks = takes[kind] = (hasattr(handler, "read_block"), hasattr(handler, "write_block"))
                    if blocks[1]:
                        self._block_out(port, size, value & _ONES[size])
                    else:
                        handler.write(port - found.start, size, value & _ONES[size])
            except BaseException as error:
                failed(error)

        self.callbacks = (IN_CALLBACK(port_in), OUT_CALLBACK(port_out))

    # String instructions.

    def _decode(self, opcodes: tuple[int, int]) -> tuple[int, str] | None:
        """At a REP INS or OUTS (one of *opcodes*): its address mask and source segment. None for anything else."""
        cr0, cr3, cr4, flags = self._tables.read()
        if flags & _DIRECTION:
            return None
        _, base = self._cpu.segment("cs")
        linear = (base + self._cpu.eip()) & 0xFFFFFFFF
        found = self._walker.walk(linear, cr0, cr3, cr4)
        if found is None:
            return None
        try:
            # An instruction that goes on in the next page is left to the engine.
            code = bytes(self._memory.view(found.physical, min(15, PAGE - (linear & (PAGE - 1)))))
        except DmaError:
            code = self._rom_bytes(found.physical)
        wide = bool(self._cpu.hidden_flags() & HF_CS32)
        repeated, segment = False, "ds"
        for byte in code:
            if byte in (0xF2, 0xF3):
                repeated = True
            elif byte == 0x67:
                wide = not wide
            elif byte in _SEGMENT_PREFIXES:
                segment = _SEGMENT_PREFIXES[byte]
            elif byte in (0x66, 0xF0):
                pass
            elif byte in opcodes and repeated:
                return (0xFFFFFFFF if wide else 0xFFFF), segment
            else:
                return None
        return None

    def _rom_bytes(self, physical: int) -> bytes:
        """Code bytes outside RAM."""
        found = self._memory.find(physical)
        if found is None or found.region.handler is not None:
            return b""
        at = found.region.backing + found.offset + physical - found.start
        return bytes(self._memory.buffer[at : at + min(15, found.start + found.size - physical)])

    def _span(self, segment: str, pointer: int, counter: int, size: int, mask: int, write: bool) -> tuple[int, int]:
        """The physical address of the current item, and how many items from there lie in the same page."""
        cr0, cr3, cr4, _ = self._tables.read()
        offset = pointer & mask
        _, base = self._cpu.segment(segment)
        linear = (base + offset) & 0xFFFFFFFF
        count = min(counter & mask, (PAGE - (linear & (PAGE - 1))) // size, (mask + 1 - offset) // size)
        if count < 2:
            return 0, 0
        found = self._walker.walk(linear, cr0, cr3, cr4, access=True, write=write)
        return (found.physical, count) if found is not None else (0, 0)

    def _block_in(self, port: int, size: int) -> int:
        ports = self._machine.ports
        string = self._decode((0x6C, 0x6D))
        if string is None:
            return int(ports.read(port, size)) & _ONES[size]
        mask, _ = string
        counter, pointer = self._in_step.read()
        physical, count = self._span("es", pointer, counter, size, mask, True)
        if count < 2:
            return int(ports.read(port, size)) & _ONES[size]
        try:
            view = self._memory.view(physical, count * size)
        except DmaError:
            return int(ports.read(port, size)) & _ONES[size]
        view[:] = ports.read_block(port, size, count)
        self._dirty(physical, count * size)
        self._in_step.write(
            *((counter & ~mask) | ((counter - count + 1) & mask), (pointer & ~mask) | ((pointer + (count - 1) * size) & mask))
        )
        # The engine stores this item at the address it had computed before the hook: the first one's.
        return int.from_bytes(view[:size], "little")

    def _block_out(self, port: int, size: int, value: int) -> None:
        ports = self._machine.ports
        string = self._decode((0x6E, 0x6F))
        if string is None:
            ports.write(port, size, value)
            return
        mask, segment = string
        counter, pointer = self._out_step.read()
        physical, count = self._span(segment, pointer, counter, size, mask, False)
        try:
            view = self._memory.view(physical, count * size) if count >= 2 else None
        except DmaError:
            view = None
        if view is None:
            ports.write(port, size, value)
            return
        ports.write_block(port, size, bytes(view))
        self._out_step.write(
            *((counter & ~mask) | ((counter - count + 1) & mask), (pointer & ~mask) | ((pointer + (count - 1) * size) & mask))
        )


