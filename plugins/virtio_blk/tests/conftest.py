"""A machine without CPU, firmware or threads that has one virtio block device in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vm_core.testing.backend import MemoryBackend
from vm_core.testing.machine import FakeMachine
from vm_core.testing.virtio import BlockDriver, Heap, LegacyPci, ModernPci, PciAccess
from vm_virtio_blk.pci import VirtioBlkPci

RAM = 16 << 20
SLOT = 4


class Board(FakeMachine):
    """A machine that also writes down the events it told."""

    def __init__(self) -> None:
        super().__init__(RAM)
        self.emitted: list[str] = []
        self.events.subscribe(lambda name, data: self.emitted.append(name))

    @property
    def irq(self) -> bool:
        """Any interrupt line is raised."""
        return any(self.recorder.level.values())


class Rig:
    """A device, its backend and a driver for it."""

    def __init__(self, size: int = 1 << 20, backend: MemoryBackend | None = None, **options: Any) -> None:
        self.board = Board()
        self.backend = backend or MemoryBackend(size)
        kind = options.pop("kind", VirtioBlkPci)
        given = {name.replace("_", "-") if name not in UNDERSCORED else name: v for name, v in options.items()}
        self.device = kind("disk0", given, self.backend)
        assert not given, f"options left over: {given}"
        self.board.attach_backend(self.backend)
        self.device.realize(self.board, self.board.pci, f"{SLOT:02x}.0")
        self.access = PciAccess(self.board, SLOT)
        self.heap = Heap(1 << 20, RAM)

    def poll(self) -> None:
        """Let the I/O thread and the backend work until nothing is left."""
        self.board.io.run_until_idle()
        while self.backend.run():
            self.board.io.run_until_idle()

    def modern(self, wanted: int = -1, **options: Any) -> BlockDriver:
        """A driver of the modern interface, started."""
        pci = ModernPci(self.access, self.heap)
        pci.start(wanted, **options)
        return BlockDriver(pci, self.poll)

    def legacy(self, wanted: int = -1, **options: Any) -> BlockDriver:
        """A driver of the legacy interface, started."""
        pci = LegacyPci(self.access, self.heap)
        pci.start(wanted, **options)
        return BlockDriver(pci, self.poll)


UNDERSCORED = {
    "event_idx",
    "indirect_desc",
    "any_layout",
    "notify_on_empty",
    "queue_reset",
    "logical_block_size",
    "physical_block_size",
    "min_io_size",
    "opt_io_size",
    "discard_granularity",
}


@pytest.fixture(scope="session")
def rig() -> Callable[..., Rig]:
    """Make a rig with device options as keyword arguments."""
    return Rig


@pytest.fixture(params=["modern", "legacy", "packed"])
def started(request: pytest.FixtureRequest) -> Callable[..., tuple[Rig, BlockDriver]]:
    """A rig and a started driver, over each interface and ring layout."""

    def make(wanted: int = -1, **options: Any) -> tuple[Rig, BlockDriver]:
        rig = Rig(packed="on" if request.param == "packed" else "off", **options)
        return rig, (rig.legacy(wanted) if request.param == "legacy" else rig.modern(wanted))

    return make
