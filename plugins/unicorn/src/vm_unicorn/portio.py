"""IN and OUT, and REP INS and REP OUTS a page at a time.

The engine calls a hook for every item of a string instruction. Where the port's handler takes blocks, the hook for the
first item moves all the items that lie in the same page at once, and leaves ECX, EDI or ESI as if the loop had come
that far; the engine then finishes the last step itself. So a sector read by programmed I/O is one call or two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from vm_core.machine.accel import AccelMachine
from vm_core.machine.memory import PAGE

from .engine import IN_CALLBACK, OUT_CALLBACK, Engine, RegisterBatch
from .paging import LinearMemory, NotMapped
from .state import DF, HF_CS32, CpuRecord

_ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF}
_SEGMENT_PREFIXES = {0x26: "es", 0x2E: "cs", 0x36: "ss", 0x3E: "ds", 0x64: "fs", 0x65: "gs"}
_INS, _OUTS = (0x6C, 0x6D), (0x6E, 0x6F)


class _String(NamedTuple):
    """The items of a REP INS or OUTS that can be moved at once."""

    items: int
    #: Of the memory, in the guest's RAM buffer, and physical.
    place: int
    physical: int
    #: The registers' values when all but the last step are done.
    counter: int
    pointer: int


class PortIo:
    """The port hooks of one vCPU."""

    def __init__(
        self,
        engine: Engine,
        machine: AccelMachine,
        cpu: CpuRecord,
        linear: LinearMemory,
        written: Callable[[int, int], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """*written* is told physical ranges that were stored to; *failed* what a device's handler raised."""
        self._cpu = cpu
        self._linear = linear
        self._buffer = memoryview(machine.memory.buffer)
        self._written = written
        self._ports = ports = machine.ports
        self._in_step = RegisterBatch(engine, ("ecx", "edi"))
        self._out_step = RegisterBatch(engine, ("ecx", "esi"))
        lock, find = machine.lock, ports.find
        #: Whether the handlers of a type take blocks: (in, out).
        blocks: dict[type, tuple[bool, bool]] = {}

        def takes(kind: type) -> tuple[bool, bool]:
            known = blocks[kind] = (hasattr(kind, "read_block"), hasattr(kind, "write_block"))
            return known

        def port_in(_engine: int, port: int, size: int, _user: int) -> int:
            try:
                with lock:
                    found = find(port)
                    if found is None:
                        return _ONES[size]
                    handler = found.handler
                    kind = type(handler)
                    if (blocks.get(kind) or takes(kind))[0]:
                        return self._block_in(port, size)
                    return handler.read(port - found.start, size) & _ONES[size]
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
                    if (blocks.get(kind) or takes(kind))[1]:
                        self._block_out(port, size, value & _ONES[size])
                    else:
                        handler.write(port - found.start, size, value & _ONES[size])
            except BaseException as error:
                failed(error)

        self.callback_in = IN_CALLBACK(port_in)
        self.callback_out = OUT_CALLBACK(port_out)

    def _string(self, opcodes: tuple[int, int], step: RegisterBatch, size: int) -> _String | None:
        """Look at the instruction that does the access: is it a REP INS or OUTS with two items or more in this page?"""
        cpu, linear = self._cpu, self._linear
        cpu.load()
        if cpu.eflags & DF:
            return None
        linear.cr0, linear.cr3, linear.cr4 = cpu.control(0), cpu.control(3), cpu.control(4)
        at = (cpu.base("cs") + cpu.eip) & 0xFFFFFFFF
        try:
            # An instruction that goes on in the next page is left to the engine.
            code = linear.read(at, min(8, PAGE - at % PAGE))
            repeated, wide, segment = False, bool(cpu.hidden & HF_CS32), "ds"
            for byte in code:
                if byte in (0xF2, 0xF3):
                    repeated = True
                elif byte == 0x67:
                    wide = not wide
                elif byte in _SEGMENT_PREFIXES:
                    segment = _SEGMENT_PREFIXES[byte]
                elif byte != 0x66:
                    break
            if not repeated or byte not in opcodes:
                return None
            inward = opcodes is _INS
            mask = 0xFFFFFFFF if wide else 0xFFFF
            counter, pointer = step.read()
            offset = pointer & mask
            memory = (cpu.base("es" if inward else segment) + offset) & 0xFFFFFFFF
            count = min(counter & mask, (PAGE - memory % PAGE) // size, (mask + 1 - offset) // size)
            if count < 2:
                return None
            physical = linear.physical(memory, write=inward)
            place = linear.place(physical)
        except NotMapped:
            return None
        done = count - 1
        return _String(
            count,
            place,
            physical,
            counter & ~mask | (counter - done) & mask,
            pointer & ~mask | (pointer + done * size) & mask,
        )

    def _block_in(self, port: int, size: int) -> int:
        string = self._string(_INS, self._in_step, size)
        if string is None:
            return self._ports.read(port, size) & _ONES[size]
        data = self._ports.read_block(port, size, string.items)
        self._buffer[string.place : string.place + len(data)] = data
        self._written(string.physical, len(data))
        self._in_step.write(string.counter, string.pointer)
        # The engine stores this item where the instruction pointed before the hook: it is the first one.
        return int.from_bytes(data[:size], "little")

    def _block_out(self, port: int, size: int, value: int) -> None:
        string = self._string(_OUTS, self._out_step, size)
        if string is None:
            self._ports.write(port, size, value)
            return
        data = bytes(self._buffer[string.place : string.place + string.items * size])
        self._ports.write_block(port, size, data)
        self._out_step.write(string.counter, string.pointer)
