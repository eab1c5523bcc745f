"""Registers, negotiation, interrupts and resets of the PCI function."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.devices.virtio.features import VERSION_1
from vm_core.errors import UsageError
from vm_core.testing.backend import MemoryBackend
from vm_core.testing.virtio import BlockDriver, LegacyPci, ModernPci, PciAccess
from vm_virtio_blk.pci import ModernVirtioBlkPci, TransitionalVirtioBlkPci, VirtioBlkPci

MakeRig = Callable[..., Any]
Started = Callable[..., tuple[Any, BlockDriver]]


# Identity.


def identity(access: PciAccess) -> tuple[int, int, int, int]:
    return access.read(2, 2), access.read(0x2E, 2), access.read(8, 1), access.read(0, 2)


def test_identities(rig: MakeRig) -> None:
    """Transitional functions carry the old id and the type as subsystem, others 0x1040 plus the type (4.1.2.1)."""
    transitional = (0x1001, 2, 0, 0x1AF4)
    modern = (0x1042, 0x1100, 1, 0x1AF4)
    for options, expected in (
        ({}, transitional),
        ({"disable_legacy": "off"}, transitional),
        ({"disable_legacy": "auto"}, transitional),
        ({"disable_modern": "on"}, transitional),
        ({"disable_legacy": "on"}, modern),
        ({"kind": TransitionalVirtioBlkPci}, transitional),
        ({"kind": ModernVirtioBlkPci}, modern),
    ):
        made = rig(**options)
        assert identity(made.access) == expected
        assert made.access.read(9, 2) | made.access.read(11, 1) << 16 == 0x010000


def test_interfaces_follow_the_options(rig: MakeRig) -> None:
    """A function without an interface has neither its bar nor its capabilities."""
    both, legacy, modern = rig(), rig(disable_modern="on"), rig(disable_legacy="on")
    assert both.access.bar_size(0) == (128, 1)
    assert both.access.bar_size(4) == (0x4000, 12)
    assert legacy.access.bar_size(4) == (0, 0)
    assert [id for id, _ in legacy.access.capabilities()] == [0x11]
    assert modern.access.bar_size(0) == (0, 0)
    assert sorted(id for id, _ in modern.access.capabilities()) == [9, 9, 9, 9, 9, 0x11]
    assert not legacy.legacy().pci.features >> 32
    with pytest.raises(UsageError, match="no interface is left"):
        rig(disable_modern="on", disable_legacy="on")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"queue-size": "100"}, "queue-size=100 is not a power of two"),
        ({"queue-size": "2048"}, "power of two from 2 to 1024"),
        ({"num-queues": "0"}, "num-queues=0"),
        ({"logical_block_size": "1000"}, "power of two from 512"),
        ({"logical_block_size": "4k", "physical_block_size": "512"}, "below logical_block_size"),
        ({"logical_block_size": "4k", "min_io_size": "512"}, "multiples of logical_block_size"),
        ({"discard_granularity": "700"}, "no multiple"),
        ({"cyls": "10"}, "go together"),
        ({"packed": "maybe"}, "'on' or 'off'"),
        ({"vectors": "4000"}, "vectors=4000"),
        ({"max-discard-sectors": "0"}, "max-discard-sectors=0"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, str], words: str) -> None:
    """Each is refused in one line that names the option."""
    with pytest.raises(UsageError, match=re.escape(words)):
        VirtioBlkPci("x", dict(options), MemoryBackend(1 << 20))  # type: ignore[arg-type]


def test_every_described_option_is_understood(rig: MakeRig) -> None:
    """The descriptor's options, at their defaults, leave nothing over in the constructor."""
    from vm_virtio_blk.plugin import vm_device_frontends

    for descriptor in vm_device_frontends():
        options = {o.name: o.default for o in descriptor.options if o.default is not None}
        device = descriptor.load()("x", options, MemoryBackend(1 << 20))
        assert options == {}
        assert device.driver == descriptor.name


# Negotiation.


def bits(*numbers: int) -> int:
    return sum(1 << n for n in numbers)


def test_features_offered(rig: MakeRig) -> None:
    """The default features are those of the documentation, on either interface."""
    made = rig()
    common = bits(2, 4, 6, 9, 10, 11, 13, 14, 28, 29)
    assert ModernPci(made.access, made.heap).offered() == common | bits(32, 40)
    assert LegacyPci(made.access, made.heap).offered() == common | bits(24, 27)
    made = rig(packed="on", num_queues=4, event_idx="off", indirect_desc="off", config_wce="off", queue_reset="off")
    assert ModernPci(made.access, made.heap).offered() == bits(2, 4, 6, 9, 10, 12, 13, 14, 32, 34)


def test_bad_features_are_refused_at_features_ok(rig: MakeRig) -> None:
    """Bits that were not offered, or no VERSION_1, and FEATURES_OK does not stay (2.2.2, 6.1)."""
    made = rig()
    pci = ModernPci(made.access, made.heap)
    offered = pci.offered()
    for features in (offered & ~VERSION_1.mask, offered | 1 << 35, offered | 1 << 63, offered | 1 << 24, 0):
        pci.status = 0
        pci.status = 3
        pci.accept(features)
        pci.status = 3 | 8
        assert pci.status == 3, hex(features)
        pci.status = 3 | 4
        assert pci.status == 3, "and DRIVER_OK does not follow"
    pci.accept(offered)
    pci.status = 3 | 8
    assert pci.status == 11
    pci.accept(VERSION_1.mask)
    pci.set_common(8, 4, 0)
    assert pci.common(12, 4) == offered & 0xFFFFFFFF, "agreed features stay"


def test_status_bits_cannot_be_cleared_one_by_one(rig: MakeRig) -> None:
    """Only a reset clears status bits, and the driver cannot set DEVICE_NEEDS_RESET."""
    pci = rig().modern().pci
    assert pci.status == 15
    pci.status = 1
    assert pci.status == 15
    pci.status = 15 | 64
    assert pci.status == 15


def test_nothing_is_consumed_before_driver_ok(rig: MakeRig) -> None:
    """Buffers made available early are left alone, and served once DRIVER_OK is there (2.1.2, 3.1.2)."""
    made = rig()
    pci = ModernPci(made.access, made.heap)
    pci.status = 3
    pci.accept(pci.offered())
    pci.features = pci.offered()
    pci.status = 11
    pci.rings = [pci.set_up_queue(0)]
    disk = BlockDriver(pci, made.poll)
    sent = disk.send(disk.IN, 0, length=512)
    pci.kick(0)
    made.poll()
    assert made.backend.log == []
    pci.status = 15
    assert disk.wait(sent)[0] == 0


def test_a_legacy_driver_may_start_early(rig: MakeRig) -> None:
    """Legacy drivers used queues ahead of DRIVER_OK (3.1.2)."""
    made = rig()
    pci = LegacyPci(made.access, made.heap)
    pci.status = 3
    pci.features = 0
    pci.rings = [pci.set_up_queue(0)]
    assert BlockDriver(pci, made.poll).read(0, 1) == bytes(512)


def test_nothing_moves_without_bus_mastering(started: Started) -> None:
    """A kick waits until the guest lets the function master the bus."""
    rig, disk = started()
    rig.access.enable(master=False)
    sent = disk.send(disk.IN, 0, length=512)
    rig.poll()
    assert rig.backend.log == []
    rig.access.enable()
    assert disk.wait(sent)[0] == 0


def test_nothing_is_taken_while_the_machine_stops(started: Started) -> None:
    """A kick on a halted machine is served when it resumes, so that stopping always comes to an end."""
    rig, disk = started()
    rig.board.halted = True
    sent = disk.send(disk.IN, 0, length=512)
    rig.poll()
    assert rig.backend.log == []
    rig.board.halted = False
    rig.board.events.emit("RESUME")
    assert disk.wait(sent)[0] == 0


# Registers.


def test_queue_registers(rig: MakeRig) -> None:
    """Sizes can be lowered, not raised; an enabled queue's registers are fixed; absent queues read as size 0."""
    made = rig(num_queues=2, queue_size=64)
    pci = ModernPci(made.access, made.heap)
    assert pci.queue_count() == 2
    assert pci.common(24, 2) == 64
    for value, kept in ((128, 64), (0, 64), (16, 16)):
        pci.set_common(24, 2, value)
        assert pci.common(24, 2) == kept
    pci.set_common(32, 4, 0x1234000)
    pci.set_common(36, 4, 0xABCD)
    assert (pci.common(32, 4), pci.common(36, 4)) == (0x1234000, 0xABCD)
    assert pci.common(32, 8) == 0xABCD01234000
    pci.set_common(28, 2, 1)
    assert pci.common(28, 2) == 1
    pci.set_common(28, 2, 0)
    pci.set_common(32, 4, 0)
    pci.set_common(24, 2, 8)
    assert (pci.common(28, 2), pci.common(32, 4), pci.common(24, 2)) == (1, 0x1234000, 16)
    pci.set_common(22, 2, 1)
    assert (pci.common(28, 2), pci.common(30, 2)) == (0, 1)
    pci.set_common(22, 2, 2)
    assert (pci.common(24, 2), pci.common(26, 2)) == (0, 0xFFFF)
    pci.set_common(28, 2, 1)
    pci.status = 0
    pci.set_common(22, 2, 0)
    assert (pci.common(28, 2), pci.common(24, 2), pci.common(32, 8)) == (0, 64, 0)


def test_the_configuration_window(rig: MakeRig) -> None:
    """pci_cfg_data reads and writes the bars through configuration space, before they are even mapped (4.1.4.9)."""
    made = rig()
    access = made.access
    window = next(at for id, at in access.capabilities() if id == 9 and access.read(at + 3, 1) == 5)

    def point(offset: int, size: int) -> None:
        access.write(window + 4, 4, 1)
        access.write(window + 8, offset)
        access.write(window + 12, size)

    point(0x2000, 4)
    assert access.read(window + 16) == (1 << 20) // 512
    point(20, 1)
    access.write(window + 16, 3, 1)
    assert access.read(window + 16) == 3
    point(18, 2)
    assert access.read(window + 16, 2) == 1
    for offset, size in ((0x10000, 4), (1, 2), (0, 3), (0, 8), (0x3FFE, 4)):
        point(offset, size)
        access.read(window + 16)
        access.write(window + 16, 0xFF, 1)
    access.write(window + 4, 3, 1)
    access.read(window + 16)


def test_device_configuration(rig: MakeRig) -> None:
    """Fields are where 5.2.4 puts them, over both interfaces, readable in any width."""
    made = rig(
        2 << 20,
        logical_block_size="4k",
        physical_block_size="16k",
        min_io_size="8k",
        opt_io_size="64k",
        num_queues=3,
        queue_size=128,
        discard_granularity="64k",
    )
    for pci in (ModernPci(made.access, made.heap), LegacyPci(made.access, made.heap)):
        fields = {
            (0, 4): 4096, (4, 4): 0, (8, 4): 0, (12, 4): 126, (16, 2): 4, (18, 1): 16, (19, 1): 56, (20, 4): 4096,
            (24, 1): 2, (25, 1): 0, (26, 2): 2, (28, 4): 16, (32, 1): 1, (34, 2): 3, (36, 4): 4194303, (40, 4): 1,
            (44, 4): 128, (48, 4): 4194303, (52, 4): 1, (56, 1): 1, (1, 1): 16, (57, 1): 0, (60, 4): 0,
        }  # fmt: skip
        for (offset, size), value in fields.items():
            assert pci.config(offset, size) == value, offset


def test_a_resize_interrupts_and_changes_the_generation(started: Started) -> None:
    """A new capacity is told by a configuration interrupt, and requests reach it."""
    rig, disk = started()
    assert disk.request(disk.IN, 4000, length=512)[0] == 1
    disk.pci.isr()
    modern = isinstance(disk.pci, ModernPci)
    before = disk.pci.common(21, 1) if isinstance(disk.pci, ModernPci) else None
    rig.backend.resize(2 << 20)
    rig.board.io.run_until_idle()
    assert rig.board.irq
    assert disk.pci.isr() == 2
    assert disk.pci.config(0, 4) == 4096
    if modern:
        assert disk.pci.common(21, 1) != before
    assert disk.read(4000, 1) == bytes(512)


# Interrupts.


def test_msix_vectors(rig: MakeRig) -> None:
    """With MSI-X each queue sends its own message, configuration changes another, and no INTx is raised."""
    made = rig(num_queues=2)
    pci = ModernPci(made.access, made.heap)
    made.access.set_bar(1, 0xD0000000)
    _, vectors = made.access.msix(0xD0000000)
    assert vectors == 3
    pci.start()
    disk = BlockDriver(pci, made.poll)
    disk.request(disk.IN, 0, length=512)
    assert made.board.recorder.messages == [], "no vector, no message (4.1.5.1.2)"
    for offset, value in ((16, 0),):
        pci.set_common(offset, 2, value)
    for queue in (0, 1):
        pci.set_common(22, 2, queue)
        pci.set_common(26, 2, 1 + queue)
        assert pci.common(26, 2) == 1 + queue
        disk.request(disk.IN, 0, length=512, queue=queue)
    made.device.virtio.resized()
    assert made.board.recorder.messages == [(0xFEE00000, 0x4001), (0xFEE00000, 0x4002), (0xFEE00000, 0x4000)]
    assert not made.board.irq
    pci.set_common(26, 2, 3)
    assert pci.common(26, 2) == 0xFFFF, "a vector that does not exist"
    pci.set_common(16, 2, 9)
    assert pci.common(16, 2) == 0xFFFF


def test_legacy_vectors_move_the_configuration(rig: MakeRig) -> None:
    """While MSI-X is on, the legacy interface has vector registers at 20 and its configuration at 24."""
    made = rig()
    pci = LegacyPci(made.access, made.heap)
    made.access.set_bar(1, 0xD0000000)
    assert pci.get(20, 4) == 2048
    made.access.msix(0xD0000000)
    assert pci.get(20, 4) == 0xFFFFFFFF
    assert pci.get(24, 4) == 2048
    pci.msix = True
    pci.start()
    pci.set(14, 2, 0)
    pci.set(22, 2, 1)
    pci.set(20, 2, 0)
    disk = BlockDriver(pci, made.poll)
    assert disk.read(3, 1) == bytes(512)
    assert made.board.recorder.messages == [(0xFEE00000, 0x4001)]
    made.device.virtio.resized()
    assert made.board.recorder.messages[1:] == [(0xFEE00000, 0x4000)]


def test_intx_disable(started: Started) -> None:
    """With INTx disabled in the command register the status bits are there and the line stays low."""
    rig, disk = started()
    rig.access.enable(intx=False)
    disk.read(0, 1)
    assert not rig.board.irq
    assert rig.access.read(6, 2) & 8
    assert disk.pci.isr() == 1
    assert not rig.access.read(6, 2) & 8


def test_interrupts_are_suppressed(started: Started) -> None:
    """A driver that turned interrupts off gets none, over rings with and without event indices."""
    for wanted in (-1, ~(1 << 29)):
        rig, disk = started(wanted & ~(1 << 24))
        disk.interrupts = False
        disk.pci.rings[0].disable_interrupts()
        if wanted == -1:
            disk.read(0, 1)
            disk.pci.isr()
        disk.read(0, 1)
        assert not rig.board.irq


# Resets.


def test_reset_waits_for_requests_in_flight(rig: MakeRig) -> None:
    """On the modern interface the status reads 0 only once no request can touch memory any more (4.1.4.3.1)."""
    made = rig()
    disk = made.modern()
    sent = disk.send(disk.IN, 0, length=512)
    made.board.io.run_until_idle()
    disk.pci.status = 0
    assert disk.pci.status == 15
    made.board.io.run_until_idle()
    assert disk.pci.status == 15
    disk.send(disk.IN, 0, length=512)
    disk.pci.kick(0)
    made.poll()
    assert disk.pci.status == 0
    assert made.backend.batches == [1], "nothing new was taken meanwhile"
    assert made.board.memory.read(sent.status, 1)[0] == disk.UNANSWERED
    disk.pci.start()
    assert disk.read(0, 1) == bytes(512)


def test_impatient_drivers_make_the_device_wait(started: Started) -> None:
    """A driver that goes on without waiting finds the device reset, and old requests never answered."""
    rig, disk = started()
    rig.backend.data[:512] = b"z" * 512
    sent = disk.send(disk.IN, 0, length=512)
    rig.board.io.run_until_idle()
    disk.pci.status = 0
    disk.pci.status = 1
    assert disk.pci.status == 1
    assert rig.backend.pending == []
    rig.poll()
    assert rig.board.memory.read(sent.status, 1)[0] == disk.UNANSWERED
    assert not rig.board.irq
    disk.pci.start()
    assert disk.read(0, 1) == b"z" * 512


def test_one_queue_is_reset(rig: MakeRig) -> None:
    """RING_RESET stops one queue when its requests are back, and it can be set up anew (2.6.1)."""
    made = rig(num_queues=2)
    disk = made.modern()
    pci = disk.pci
    disk.send(disk.IN, 0, length=512, queue=1)
    made.board.io.run_until_idle()
    pci.set_common(22, 2, 1)
    pci.set_common(58, 2, 1)
    assert (pci.common(58, 2), pci.common(28, 2)) == (1, 1)
    assert disk.request(disk.IN, 0, length=512, queue=0)[0] == 0
    made.poll()
    pci.set_common(22, 2, 1)
    assert (pci.common(58, 2), pci.common(28, 2)) == (0, 0)
    pci.rings[1] = pci.set_up_queue(1, 16)
    assert disk.request(disk.IN, 0, length=512, queue=1)[0] == 0
    assert disk.request(disk.IN, 0, length=512, queue=0)[0] == 0


def test_queues_are_not_reset_without_negotiation(rig: MakeRig) -> None:
    """Without RING_RESET the register does nothing."""
    disk = rig().modern(~(1 << 40))
    disk.pci.set_common(22, 2, 0)
    disk.pci.set_common(58, 2, 1)
    assert disk.pci.common(28, 2) == 1
    assert disk.read(0, 1) == bytes(512)


def test_the_machine_resets(started: Started) -> None:
    """A system reset brings the function back to power-on: bars, MSI-X, status, queues, write cache."""
    rig, disk = started()
    disk.pci.set_config(32, 1, 0)
    disk.read(0, 1)
    with rig.board.lock:
        rig.device.reset()
    assert rig.access.read(4, 2) == 0
    assert rig.backend.write_cache
    assert not rig.board.irq
    rig.access.enable()
    again = rig.modern() if isinstance(disk.pci, ModernPci) else rig.legacy()
    assert again.read(0, 1) == bytes(512)


def test_many_queues(rig: MakeRig) -> None:
    """num-queues gives as many queues, each with requests of its own in flight."""
    made = rig(num_queues=8)
    disk = made.modern()
    assert disk.pci.config(34, 2) == 8
    sent = [disk.send(disk.OUT, i, data=bytes([i]) * 512, queue=i % 8) for i in range(32)]
    assert [disk.wait(p)[0] for p in sent] == [0] * 32
    assert disk.read(31, 1, queue=5) == bytes([31]) * 512


def test_kicks_can_be_eventfds(rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accelerator with ioeventfds gets every notification address, again when a bar moves, and signals work."""
    import os

    made = rig(num_queues=2)
    bound: dict[tuple[int, bool, int | None], int] = {}

    def bind(address: int, size: int, fd: int, *, port: bool, value: int | None = None) -> bool:
        assert size == 2
        bound[address, port, value] = fd
        return True

    def unbind(address: int, size: int, fd: int, *, port: bool, value: int | None = None) -> None:
        assert bound.pop((address, port, value)) == fd

    made.board.accel = SimpleNamespace(
        bind_kick=bind, unbind_kick=unbind, dma_written=lambda ranges: None, serve_kicks=False
    )
    disk = made.modern()
    made.access.set_bar(0, 0xC000)
    made.board.io.run_until_idle()
    assert set(bound) == {
        (0xE0003000, False, None),
        (0xE0003004, False, None),
        (0xC010, True, 0),
        (0xC010, True, 1),
    }
    monkeypatch.setattr(disk.pci, "kick", lambda queue: os.eventfd_write(bound[0xE0003000 + 4 * queue, False, None], 1))
    sent = disk.send(disk.IN, 0, length=512, queue=1)
    fd = bound[0xE0003004, False, None]
    made.board.io.readers[fd]()
    made.board.io.readers[fd]()
    assert disk.wait(sent)[0] == 0
    made.access.set_bar(4, 0xF0000000)
    made.board.io.run_until_idle()
    assert {a for a, port, _ in bound if not port} == {0xF0003000, 0xF0003004}
    with made.board.lock:
        made.device.unrealize()
    made.board.io.run_until_idle()
    assert bound == {}
    assert made.board.io.readers == {}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), packed=st.booleans())
def test_random_accesses_never_break_the_machine(rig: MakeRig, seed: int, packed: bool) -> None:
    """Whatever is written to registers and rings, nothing raises, and after a reset the device works."""
    rng = random.Random(seed)
    ioeventfd = rng.choice(["on", "off"])
    made = rig(64 << 10, packed="on" if packed else "off", num_queues=2, queue_size=16, ioeventfd=ioeventfd)
    made.backend.immediate = rng.random() < 0.5
    _ = made.modern() if rng.random() < 0.5 else made.legacy()
    device, memory = made.device, made.board.memory
    offsets = {0: range(64), 1: range(0x900), 4: [*range(64), 0x1000, *range(0x2000, 0x2040), 0x3000, 0x3004, 0x3FFC]}
    for _ in range(300):
        act = rng.random()
        size = rng.choice([1, 2, 4, 8])
        value = rng.choice([0, 1, 2, 3, 7, 8, 15, 0xFF, 0x1000, 0x100000, rng.getrandbits(64)]) & (1 << 8 * size) - 1
        if act < 0.7:
            index = rng.choice([0, 4, 4, 4, 1])
            offset = rng.choice(offsets[index])
            with made.board.lock:
                if rng.random() < 0.3:
                    got = device.bars[index].handler.read(offset, size)
                    assert 0 <= got < 1 << 8 * size, (index, offset, size)
                else:
                    device.bars[index].handler.write(offset, size, value)
        elif act < 0.8:
            size = min(size, 4)
            offset = rng.choice([4, 0x3C, *range(0x40, 0xFC)]) & -size
            with made.board.lock:
                assert device.read_config(offset, size) >= 0
                device.write_config(offset, size, value & (1 << 8 * size) - 1)
        elif act < 0.9:
            at = rng.choice([0x1000, 0x100000, 0x101000, 0x102000])
            memory.write(at, rng.randbytes(256))
        else:
            made.board.io.run_until_idle()
            if rng.random() < 0.7:
                made.poll()
    with made.board.lock:
        device.reset()
    made.poll()
    made.access.enable()
    made.heap.next = 2 << 20
    for start in (made.modern, made.legacy):
        again = start()
        again.write(3, b"a" * 512)
        assert again.read(3, 1) == b"a" * 512
