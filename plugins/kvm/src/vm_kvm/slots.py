"""Memory slots: the runs of RAM and ROM that the processor reaches without an exit.

Theory of operation. Every run of the flat map that is RAM, or ROM, becomes one slot, cut to whole pages; what is left
over at unaligned ends, and all the rest, exits as MMIO and is answered by :mod:`vm_kvm.mmio`. When the map changes,
slots that are no longer in it are deleted and new ones made; the others are not touched, so that switching a few pages
of PAM shadow does not take main memory away from other vCPUs. Runs are not joined for the same reason. (A slot's size
and KVM_MEM_READONLY cannot change, only go with it; 4.35.)

While a slot is being replaced, another vCPU that touches it exits as MMIO. The caller holds the device lock, and the
handler of that exit takes it: it sees the new map, and the access ends as it should.
"""

from __future__ import annotations

import ctypes
import errno
import heapq
from typing import NamedTuple

from vm_core.errors import VmError
from vm_core.machine.memory import PAGE, FlatRange, GuestMemory, RegionKind

from . import abi
from .syscall import ioctl


class Slot(NamedTuple):
    """What a slot maps: *size* bytes from guest-physical *address*, at *place* in the guest's memory buffer."""

    address: int
    size: int
    place: int
    readonly: bool


def slot_of(found: FlatRange) -> Slot | None:
    """The whole pages of *found*, None for MMIO and for runs without a whole page."""
    if found.region.kind is RegionKind.MMIO:
        return None
    place = found.region.backing + found.offset
    if (found.start - place) % PAGE:
        return None  # pages of the guest would straddle pages of the buffer
    skip = -found.start % PAGE
    size = (found.size - skip) // PAGE * PAGE
    if size <= 0:
        return None
    return Slot(found.start + skip, size, place + skip, found.region.kind is RegionKind.ROM)


class SlotMap:
    """The memory slots of VM *vm*."""

    def __init__(self, vm: int) -> None:
        self._vm = vm
        self._base = 0
        self._buffer: object = None
        self._used: dict[Slot, int] = {}
        self._free: list[int] = []
        self._next = 0

    def __len__(self) -> int:
        return len(self._used)

    def update(self, memory: GuestMemory) -> None:
        """Make the slots those of *memory*'s flat map. Called with the device lock held, or before vCPUs run."""
        if self._buffer is not memory.buffer:
            anchor = ctypes.c_char.from_buffer(memory.buffer)
            self._base = ctypes.addressof(anchor)
            self._buffer = memory.buffer
        wanted = [slot for slot in map(slot_of, memory.flat) if slot is not None]
        keep = set(wanted)
        for slot in [slot for slot in self._used if slot not in keep]:
            number = self._used.pop(slot)
            self._set(number, Slot(slot.address, 0, slot.place, False))
            heapq.heappush(self._free, number)
        for slot in wanted:
            if slot not in self._used:
                number = self._number()
                self._set(number, slot)
                self._used[slot] = number

    def _number(self) -> int:
        if self._free:
            return heapq.heappop(self._free)
        self._next += 1
        return self._next - 1

    def _set(self, number: int, slot: Slot) -> None:
        region = abi.UserMemoryRegion(
            slot=number,
            flags=abi.MEM_READONLY if slot.readonly else 0,
            guest_phys_addr=slot.address,
            memory_size=slot.size,
            userspace_addr=self._base + slot.place,
        )
        try:
            ioctl(self._vm, abi.SET_USER_MEMORY_REGION, region)
        except OSError as e:
            where = f"{slot.size:#x} bytes of memory at {slot.address:#x}"
            if e.errno == errno.EINVAL:
                raise VmError(f"KVM refuses {where} (slot {number})") from None
            raise VmError(f"KVM cannot map {where}: {e.strerror}") from None
