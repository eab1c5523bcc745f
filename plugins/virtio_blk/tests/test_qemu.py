"""The same driver on QEMU's virtio-blk and on ours: equal registers, equal answers, differences named."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vm_core.testing import qtest
from vm_core.testing.backend import MemoryBackend
from vm_core.testing.virtio import BlockDriver, Heap, LegacyPci, ModernPci, PciAccess, VirtioPciDriver

pytestmark = pytest.mark.skipif(not qtest.available(), reason="qemu-system-x86_64 (package qemu-system-x86) is absent")

SIZE = 8 << 20


class Pair:
    """QEMU's function and ours, with the same options and the same bytes on the disk."""

    def __init__(self, rig: Callable[..., Any], folder: Path, **options: str) -> None:
        self.content = random.Random(7).randbytes(SIZE)
        image = folder / "disk.img"
        image.write_bytes(self.content)
        text = "".join(f",{name}={value}" for name, value in options.items())
        self.qemu = qtest.QtestMachine(
            ["-drive", f"if=none,id=d,format=raw,file={image}", "-device", f"virtio-blk-pci,drive=d,addr=4{text}"]
        )
        backend = MemoryBackend(SIZE)
        backend.data[:] = self.content
        self.rig = rig(backend=backend, **{name.replace("-", "_"): value for name, value in options.items()})
        self.accesses: tuple[PciAccess, PciAccess] = (qtest.QtestAccess(self.qemu, 4), self.rig.access)

    def drivers(self, kind: type[VirtioPciDriver]) -> tuple[VirtioPciDriver, VirtioPciDriver]:
        theirs, ours = (kind(access, Heap(1 << 20, 16 << 20)) for access in self.accesses)
        return theirs, ours


@pytest.fixture
def pair(rig: Callable[..., Any], tmp_path: Path) -> Iterator[Callable[..., Pair]]:
    made: list[Pair] = []

    def make(**options: str) -> Pair:
        made.append(Pair(rig, tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.qemu.close()


#: QEMU offers bit 30 to legacy drivers, to catch those that accept everything (VIRTIO_F_BAD_FEATURE, 6.3): we do not.
BAD_FEATURE = 1 << 30
#: A device without the modern interface offers SCSI commands in QEMU and then promises no layout; ours is the other
#: way round.
SCSI = 1 << 7
ANY_LAYOUT = 1 << 27

VARIANTS: list[dict[str, str]] = [
    {},
    {"disable-legacy": "on"},
    {"disable-modern": "on"},
    {"num-queues": "3", "queue-size": "128", "packed": "on"},
    {
        "logical_block_size": "4096",
        "physical_block_size": "8192",
        "min_io_size": "8192",
        "opt_io_size": "65536",
        "discard_granularity": "65536",
        "config-wce": "off",
        "event_idx": "off",
    },
    {"discard": "off", "write-zeroes": "off", "indirect_desc": "off", "queue_reset": "off", "serial": "abc"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "defaults")
def test_the_same_registers(pair: Callable[..., Pair], options: dict[str, str]) -> None:
    """Identity, bars, capabilities, features, queue registers and device configuration are QEMU's."""
    both = pair(**options)
    theirs, ours = both.accesses
    for name, offset, size in (
        ("vendor", 0, 2),
        ("device", 2, 2),
        ("revision", 8, 1),
        ("class", 9, 1),
        ("subclass", 10, 2),
        ("header", 14, 1),
        ("subsystem", 0x2C, 4),
        ("pin", 0x3D, 1),
    ):
        assert ours.read(offset, size) == theirs.read(offset, size), name
    for bar in (0, 1, 4):
        assert ours.bar_size(bar) == theirs.bar_size(bar), f"bar {bar}"

    def capabilities(access: PciAccess) -> set[tuple[int, ...]]:
        found = set()
        for id, at in access.capabilities():
            length = access.read(at + 2, 1) if id == 9 else 12
            body = tuple(access.read(at + i, 1) for i in range(2, length))
            found.add((id, *body))
        return found

    assert capabilities(ours) == capabilities(theirs)
    if options.get("disable-modern") != "on":
        pairs = both.drivers(ModernPci)
        offered = [p.offered() for p in pairs]
        assert offered[1] == offered[0], f"{offered[1] ^ offered[0]:#x}"
        for offset, size in ((16, 2), (18, 2), (20, 1), (22, 2), (24, 2), (26, 2), (28, 2), (30, 2), (32, 4), (58, 2)):
            for queue in (0, 1, 3):
                values = []
                for p in pairs:
                    p.set_common(22, 2, queue)  # type: ignore[attr-defined]
                    values.append(p.common(offset, size))  # type: ignore[attr-defined]
                    p.set_common(22, 2, 0)  # type: ignore[attr-defined]
                if (offset, queue) == (30, 3) or (offset == 30 and queue >= pairs[0].queue_count()):
                    continue  # notify_off of a queue that does not exist: QEMU gives its number, we give 0
                assert values[0] == values[1], f"register {offset}, queue {queue}"
        compare_config(*pairs)
    if options.get("disable-legacy") != "on":
        pairs = both.drivers(LegacyPci)
        offered = [p.offered() for p in pairs]
        expected = offered[0] & ~BAD_FEATURE
        if options.get("disable-modern") == "on":
            expected = expected & ~SCSI | ANY_LAYOUT
        assert offered[1] == expected, f"{offered[1] ^ expected:#x}"
        for offset, size in ((8, 4), (12, 2), (14, 2), (18, 1), (19, 1)):
            values = [p.get(offset, size) for p in pairs]  # type: ignore[attr-defined]
            assert values[0] == values[1], f"legacy register {offset}"
        compare_config(*pairs)


def compare_config(theirs: VirtioPciDriver, ours: VirtioPciDriver) -> None:
    # Past its last field QEMU reads as ones, we as zeroes.
    for offset in range(57 if ours.offered() & 1 << 13 else 36):
        assert ours.config(offset, 1) == theirs.config(offset, 1), f"device configuration byte {offset}"
    for offset in (0, 8, 12, 20, 28):
        assert ours.config(offset, 4) == theirs.config(offset, 4)


@pytest.mark.parametrize("kind", ["modern", "packed", "legacy"])
@pytest.mark.parametrize("event_idx", [True, False])
def test_the_same_answers(pair: Callable[..., Pair], kind: str, event_idx: bool) -> None:
    """A random conversation through real rings gives the same statuses, data and used lengths on both."""
    both = pair(packed="on" if kind == "packed" else "off", serial="serial-1")
    disks = []
    for driver, poll in zip(
        both.drivers(LegacyPci if kind == "legacy" else ModernPci), (lambda: None, both.rig.poll), strict=True
    ):
        driver.start(~BAD_FEATURE if event_idx else ~(BAD_FEATURE | 1 << 29))
        disks.append(BlockDriver(driver, poll))
    rng = random.Random(5)
    last = SIZE // 512
    for step in range(150):
        count = rng.choice([1, 1, 2, 8, 64])
        sector = rng.choice([rng.randrange(last), last - count, last - count + 1, 1 << 55])
        cuts = [rng.randrange(1, 100) for _ in range(rng.randrange(4))]
        common: dict[str, Any] = {"cuts": cuts, "indirect": rng.random() < 0.4}
        choice = rng.choice(["in", "in", "out", "out", "flush", "id", "discard", "zero", "unknown", "odd"])
        request: tuple[int, int, dict[str, Any]] = {
            "in": (0, sector, {"length": 512 * count}),
            "out": (1, sector, {"data": rng.randbytes(512 * count)}),
            "flush": (4, 0, {}),
            "id": (8, 0, {"length": 20}),
            "discard": (11, 0, {"data": struct.pack("<QII", sector, count, rng.choice([0, 0, 1, 2]))}),
            "zero": (13, 0, {"data": struct.pack("<QII", sector, count, rng.choice([0, 1, 2]))}),
            "unknown": (rng.choice([10, 12, 14, 99]), 0, {"length": 512}),
            "odd": (0, sector, {"length": 513}),
        }[choice]
        answers = [disk.request(request[0], request[1], **request[2], **common) for disk in disks]
        what = f"step {step}: {choice} sector {sector} count {count}"
        assert answers[0][0] == answers[1][0], what
        if not answers[0][0]:
            assert answers[0][1] == answers[1][1], what
            if choice in ("in", "id") and not common["indirect"]:
                assert disks[0].written == disks[1].written, what
    everything = [b"".join(disk.read(sector, 128) for sector in range(0, last, 128)) for disk in disks]
    assert everything[0] == everything[1]
    assert everything[1] == both.rig.backend.data
