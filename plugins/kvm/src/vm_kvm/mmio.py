"""Guest accesses that left the guest: registers, holes, writes to ROM, and the odd ends of RAM.

An access of KVM_EXIT_MMIO has 1 to 8 bytes in one page. Handlers want 1, 2, 4 or 8 bytes of one region, so an access is
cut where it is neither, in the way the bus would do it: into the largest pieces that fit.
"""

from __future__ import annotations

from vm_core.machine.memory import FlatRange, GuestMemory, RegionKind

_MASK = {size: (1 << 8 * size) - 1 for size in (1, 2, 4, 8)}


def read(memory: GuestMemory, address: int, length: int) -> bytes:
    """Bytes that the guest reads at *address*. Holes read as ones. Called with the device lock held."""
    found = memory.find(address)
    if length in _MASK and found is not None and address + length <= found.start + found.size:
        return _read_piece(memory, found, address, length)
    data = bytearray()
    while len(data) < length:
        at = address + len(data)
        found = memory.find(at)
        size = _piece(found, at, length - len(data))
        data += b"\xff" * size if found is None else _read_piece(memory, found, at, size)
    return bytes(data)


def write(memory: GuestMemory, address: int, data: bytes) -> None:
    """Bytes that the guest writes at *address*. Holes and ROM drop them. Called with the device lock held."""
    done = 0
    while done < len(data):
        at = address + done
        found = memory.find(at)
        size = _piece(found, at, len(data) - done)
        if found is not None:
            _write_piece(memory, found, at, data[done : done + size])
        done += size


def _piece(found: FlatRange | None, address: int, length: int) -> int:
    if found is None:
        return 1
    length = min(length, found.start + found.size - address)
    return 1 << (length.bit_length() - 1)


def _read_piece(memory: GuestMemory, found: FlatRange, address: int, size: int) -> bytes:
    region = found.region
    offset = found.offset + address - found.start
    if region.kind is not RegionKind.MMIO:
        return memory.buffer[region.backing + offset : region.backing + offset + size]
    if region.handler is None:
        return b"\xff" * size
    return (region.handler.read(offset, size) & _MASK[size]).to_bytes(size, "little")


def _write_piece(memory: GuestMemory, found: FlatRange, address: int, data: bytes) -> None:
    region = found.region
    offset = found.offset + address - found.start
    if region.kind is RegionKind.RAM:
        memory.buffer[region.backing + offset : region.backing + offset + len(data)] = data
    elif region.kind is RegionKind.MMIO and region.handler is not None:
        region.handler.write(offset, len(data), int.from_bytes(data, "little"))
