"""Requests a second through a virtqueue, the block device, its backend and a raw file, without a CPU.

    python -m bench.virtio_requests [--image FILE] [--seconds S] [--cache MODE]

Random 4 KiB reads at several depths over split and packed rings. A driver in Python fills the ring, kicks once, and
lets the device work until everything has come back; only the device's share of the time is counted. One processor.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import struct
import tempfile
import time

from vm_core.block.backend import BlockBackend
from vm_core.block.cache import CacheMode
from vm_core.block.open import open_node
from vm_core.testing.machine import FakeMachine
from vm_core.testing.virtio import Heap, ModernPci, Part, PciAccess
from vm_virtio_blk.pci import VirtioBlkPci

RAM = 64 << 20
BLOCK = 4096


class Load:
    """A driver that keeps *depth* random reads under way, a batch at a time."""

    def __init__(self, path: str, depth: int, packed: bool, cache: str, sequential: bool = False) -> None:
        self.depth = depth
        self.sequential = sequential
        mode = CacheMode.parse(cache)
        self.backend = BlockBackend(open_node(path, readonly=True, cache=mode, format="raw"), cache=mode)
        self.machine = FakeMachine(RAM)
        device = VirtioBlkPci("disk", {"packed": packed}, self.backend)
        self.machine.attach_backend(self.backend)
        device.realize(self.machine, self.machine.pci, "4.0")
        self.pci = ModernPci(PciAccess(self.machine, 4), Heap(1 << 20, RAM))
        self.pci.start()
        self.ring = self.pci.rings[0]
        heap = self.pci.heap
        self.places = [(heap.alloc(16), heap.alloc(BLOCK, BLOCK), heap.alloc(1)) for _ in range(depth)]
        self.headers = [self.machine.memory.view(header, 16) for header, _, _ in self.places]
        self.blocks = self.backend.size // BLOCK
        self.random = random.Random(depth)
        self.next = 0

    def round(self, seconds: float) -> float:
        """Requests for each second that the device worked, measured for about *seconds*."""
        clock = time.perf_counter
        spent, count, end = 0.0, 0, clock() + seconds
        while clock() < end:
            for (header, data, status), view in zip(self.places, self.headers, strict=True):
                if self.sequential:
                    block, self.next = self.next, (self.next + 1) % self.blocks
                else:
                    block = self.random.randrange(self.blocks)
                struct.pack_into("<IIQ", view, 0, 0, 0, block * BLOCK // 512)
                self.ring.add((Part(header, 16), Part(data, BLOCK, True), Part(status, 1, True)))
            self.ring.publish()
            begin = clock()
            self.pci.kick(0)
            self.machine.io.run_until_idle()
            if self.backend.inflight:
                self.machine.settle()
            spent += clock() - begin
            done = len(self.ring.collect())
            assert done == self.depth, "every request was answered"
            count += done
            self.ring.enable_interrupts()
            self.pci.isr()
        return count / spent

    def close(self) -> None:
        self.backend.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--image", help="raw file to read (default: 64 MiB of random bytes)")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each round (default: 0.4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, interleaved (default: 5)")
    parser.add_argument("--cache", default="writeback", help="cache mode (default: writeback)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.image or os.path.join(folder, "random.img")
        if not arguments.image:
            with open(path, "wb") as file:
                for _ in range(64):
                    file.write(os.urandom(1 << 20))
        cases = [(depth, packed, sequential) for sequential in (False, True) for packed in (False, True)
                 for depth in (1, 16, 64)]  # fmt: skip
        loads = {case: Load(path, case[0], case[1], arguments.cache, case[2]) for case in cases}
        figures: dict[tuple[int, bool, bool], list[float]] = {case: [] for case in cases}
        for _ in range(arguments.rounds):
            for case in cases:
                figures[case].append(loads[case].round(arguments.seconds))
        for case in cases:
            depth, packed, sequential = case
            pattern = "sequential" if sequential else "random"
            ring = "packed" if packed else "split"
            low, middle, high = min(figures[case]), statistics.median(figures[case]), max(figures[case])
            print(
                f"{pattern:10} {ring:6} depth {depth:3}: {middle / 1000:6.1f} thousand/s"
                f"  ({low / 1000:.1f}–{high / 1000:.1f})"
            )
            loads[case].close()


if __name__ == "__main__":
    main()
