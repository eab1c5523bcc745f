"""The I/O port space of a PC: 65,536 byte addresses, dispatched to register handlers."""

from __future__ import annotations

from typing import NamedTuple

from .memory import MmioHandler


class PortRange(NamedTuple):
    """Ports ``[start, start + length)`` that belong to *handler*, which sees offsets from *start*."""

    start: int
    length: int
    handler: MmioHandler


class PortSpace:
    """Dispatch of IN and OUT. An access belongs to the handler of its first port; unclaimed ports read as ones."""

    def __init__(self) -> None:
        self._table: list[PortRange | None] = [None] * 65536

    def add(self, start: int, length: int, handler: MmioHandler) -> PortRange:
        """Claim ports; raises ValueError if one is claimed already."""
        taken = next((r for r in self._table[start : start + length] if r is not None), None)
        if taken is not None:
            raise ValueError(f"ports {start:#x}+{length} overlap {taken.start:#x}+{taken.length}")
        found = PortRange(start, length, handler)
        self._table[start : start + length] = [found] * length
        return found

    def remove(self, ports: PortRange) -> None:
        """Give ports back."""
        for port in range(ports.start, ports.start + ports.length):
            if self._table[port] is ports:
                self._table[port] = None

    def find(self, port: int) -> PortRange | None:
        """Whose *port* is."""
        return self._table[port]

    def read(self, port: int, size: int) -> int:
        """IN of *size* bytes (1, 2, 4). Called with the device lock held."""
        found = self._table[port]
        if found is None:
            return (1 << (8 * size)) - 1
        return found.handler.read(port - found.start, size)

    def write(self, port: int, size: int, value: int) -> None:
        """OUT of *size* bytes (1, 2, 4). Called with the device lock held."""
        found = self._table[port]
        if found is not None:
            found.handler.write(port - found.start, size, value)

    def read_block(self, port: int, size: int, count: int) -> bytes:
        """REP INS: *count* items. A handler with ``read_block(offset, size, count)`` gives them at once."""
        found = self._table[port]
        fast = getattr(found.handler, "read_block", None) if found is not None else None
        if found is not None and fast is not None:
            data: bytes = fast(port - found.start, size, count)
            return data
        return b"".join(self.read(port, size).to_bytes(size, "little") for _ in range(count))

    def write_block(self, port: int, size: int, data: bytes) -> None:
        """REP OUTS of the items in *data*."""
        found = self._table[port]
        fast = getattr(found.handler, "write_block", None) if found is not None else None
        if found is not None and fast is not None:
            fast(port - found.start, size, data)
            return
        for i in range(0, len(data), size):
            self.write(port, size, int.from_bytes(data[i : i + size], "little"))
