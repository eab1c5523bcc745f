"""Both ring layouts against a driver model that shares nothing with them but the specification."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.devices.virtio.chain import Chain, Ring, RingError, RingLayout
from vm_core.devices.virtio.packed import PackedRing
from vm_core.devices.virtio.ram import GuestRam
from vm_core.devices.virtio.split import SplitRing
from vm_core.machine.memory import GuestMemory, Region, RegionKind
from vm_core.testing.virtio import (
    DriverRing,
    Heap,
    PackedDriver,
    Part,
    SplitDriver,
    packed_layout,
    split_layout,
)

RAM = 1 << 20


class Pair:
    """A ring with both of its sides, in RAM with a hole and a ROM in it."""

    def __init__(self, packed: bool, size: int, **options: bool) -> None:
        self.memory = GuestMemory(RAM, rom_size=4096)
        self.memory.add(Region("ram", 0, RAM // 2, RegionKind.RAM))
        self.memory.add(Region("high", RAM, RAM // 2, RegionKind.RAM, backing=RAM // 2))
        self.memory.add(Region("rom", 0xF0000, 4096, RegionKind.ROM, backing=self.memory.rom_space(4096)))
        self.heap = Heap(4096, RAM // 2)
        self.ram = GuestRam.of(self.memory)
        layout = (packed_layout if packed else split_layout)(size, self.heap, **options)
        self.layout = layout
        self.driver: DriverRing = (PackedDriver if packed else SplitDriver)(layout, self.memory, self.heap)
        self.device: Ring = (PackedRing if packed else SplitRing)(layout, self.ram)


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def make(request: pytest.FixtureRequest) -> Callable[..., Pair]:
    def build(size: int = 8, **options: bool) -> Pair:
        return Pair(request.param, size, **options)

    return build


def describe(chain: Chain) -> tuple[bytes, int]:
    return b"".join(chain.readable), sum(map(len, chain.writable))


def test_a_chain_arrives_as_it_was_laid_out(make: Callable[..., Pair]) -> None:
    """Readable and writable descriptors of a chain are views of the memory that the driver named."""
    pair = make()
    pair.memory.write(0x10000, b"head")
    pair.memory.write(0x20000, b"data!")
    pair.driver.add([Part(0x10000, 4), Part(0x20000, 5), Part(0x30000, 6, True), Part(0x40000, 1, True)])
    pair.driver.publish()
    (chain,) = pair.device.pop()
    assert [bytes(v) for v in chain.readable] == [b"head", b"data!"]
    assert chain.writable_at == [(0x30000, 6), (0x40000, 1)]
    chain.writable[0][:] = b"answer"
    assert pair.memory.read(0x30000, 6) == b"answer"
    assert pair.device.pop() == []


def test_used_chains_come_back_in_any_order(make: Callable[..., Pair]) -> None:
    """Chains may be given back in another order than they came, with the length that was written."""
    pair = make(16)
    ids = [pair.driver.add([Part(0x10000 + 64 * i, 8), Part(0x20000, 8, True)]) for i in range(5)]
    pair.driver.publish()
    chains = pair.device.pop()
    pair.device.push([(chains[3], 7), (chains[0], 0)])
    pair.device.push([(chains[4], 1), (chains[1], 2), (chains[2], 3)])
    used = pair.driver.collect()
    assert used == [(ids[3], 7), (ids[0], 0), (ids[4], 1), (ids[1], 2), (ids[2], 3)]
    assert pair.driver.room == 16
    assert pair.device.inflight == 0


def test_a_ring_is_used_many_times_around(make: Callable[..., Pair]) -> None:
    """Indices and wrap counters stay right over 70,000 chains, past 65,536 and many laps."""
    pair = make(4, event_idx=True)
    for n in range(35_000):
        for _ in range(2):
            pair.driver.add([Part(0x10000, 8), Part(0x20000, 8, True)])
        pair.driver.publish()
        chains = pair.device.pop()
        assert len(chains) == 2, n
        pair.device.push([(c, 5) for c in chains])
        assert len(pair.driver.collect()) == 2


def test_indirect_chains(make: Callable[..., Pair]) -> None:
    """A table elsewhere in memory is one descriptor of the ring."""
    pair = make(4, indirect=True)
    pair.memory.write(0x10000, b"abcdefgh")
    for _ in range(4):
        pair.driver.add([Part(0x10000 + i, 1) for i in range(8)] + [Part(0x20000, 9, True)], indirect=True)
    pair.driver.publish()
    chains = pair.device.pop()
    assert [describe(c) for c in chains] == [(b"abcdefgh", 9)] * 4


def test_direct_descriptors_may_lead_to_an_indirect_one() -> None:
    """In a split queue a chain of direct descriptors may end in an indirect one (2.7.5.3.2)."""
    pair = Pair(False, 8, indirect=True)
    pair.memory.write(0x10000, b"abcdef")
    pair.driver.add([Part(0x10000 + i, 1) for i in range(6)] + [Part(0x20000, 2, True)], indirect=True, direct=2)
    pair.driver.publish()
    (chain,) = pair.device.pop()
    assert describe(chain) == (b"abcdef", 2)


def test_buffers_may_cross_regions_and_read_rom(make: Callable[..., Pair]) -> None:
    """A buffer that spans two kinds of memory is two views; ROM can be read and not written."""
    pair = make(8)
    pair.memory.add(Region("low rom", 0x50000, 4096, RegionKind.ROM, backing=RAM))
    pair.driver.add([Part(0x50000 - 4, 8)])
    pair.driver.publish()
    (chain,) = pair.device.pop()
    assert [len(v) for v in chain.readable] == [4, 4]
    pair.driver.add([Part(0x50000 - 4, 8, True)])
    pair.driver.publish()
    with pytest.raises(RingError, match="cannot be written"):
        pair.device.pop()


def test_buffers_of_no_bytes_are_nothing(make: Callable[..., Pair]) -> None:
    """A descriptor of length 0 is no error and no view, wherever it points."""
    pair = make(8)
    pair.driver.add([Part(0xDEAD0000, 0), Part(0x10000, 2), Part(0xDEAD0000, 0, True), Part(0x20000, 1, True)])
    pair.driver.publish()
    (chain,) = pair.device.pop()
    assert len(chain.readable) == len(chain.writable) == len(chain.writable_at) == 1


# Broken drivers.


def broken_chain(pair: Pair, parts: list[Part], match: str, **options: object) -> None:
    pair.driver.add([Part(0x10000, 1)])
    pair.driver.add(parts, **options)  # type: ignore[arg-type]
    pair.driver.publish()
    assert len(pair.device.pop()) == 1, "the good chain ahead is served"
    with pytest.raises(RingError, match=match):
        pair.device.pop()


def test_writable_before_readable_is_refused(make: Callable[..., Pair]) -> None:
    """A readable descriptor behind a writable one breaks the ring (2.7.4.2)."""
    broken_chain(make(), [Part(0x10000, 1, True), Part(0x10000, 1)], "follows a device-writable")


def test_memory_that_is_not_there_is_refused(make: Callable[..., Pair]) -> None:
    """Buffers in holes, past the end, or wrapping around 2**64 break the ring."""
    for address, length in ((RAM - 4, 8), (RAM + RAM // 2 - 1, 2), (1 << 40, 1), ((1 << 64) - 1, 2), (0, 0xFFFFFFFF)):
        broken_chain(make(), [Part(address, length)], "is not RAM")


def test_indirect_without_negotiation_is_refused(make: Callable[..., Pair]) -> None:
    """An indirect descriptor needs VIRTIO_F_INDIRECT_DESC."""
    broken_chain(make(indirect=False), [Part(0x10000, 1)], "without VIRTIO_F_INDIRECT_DESC", indirect=True)


def test_bad_indirect_tables_are_refused(make: Callable[..., Pair]) -> None:
    """Tables of no, odd or huge length, outside RAM, or beside NEXT break the ring."""
    for address, length, flags, match in (
        (0x10000, 0, 4, "table of 0 bytes"),
        (0x10000, 24, 4, "table of 24 bytes"),
        (0x10000, 16 * 5000, 4, "5000 descriptors"),
        (RAM - 64, 128, 4, "is not RAM"),
        (0x10000, 16, 4 | 1, "indirect descriptor that"),
    ):
        pair = make(indirect=True)
        pair.driver.add([Part(address, length)])
        pair.driver.publish()
        at = pair.layout.desc + (16 * 7 if isinstance(pair.device, SplitRing) else 0)
        if isinstance(pair.device, SplitRing):
            pair.memory.write(at + 12, struct.pack("<H", flags))
        else:
            pair.memory.write(at + 14, struct.pack("<H", flags | 1 << 7))
        with pytest.raises(RingError, match=match):
            pair.device.pop()


def test_loops_and_wild_indices_of_a_split_ring() -> None:
    """Chains that loop, directly or in a table, and indices past the end break the ring and do not hang."""
    for table, indirect, match in (
        ([(0x10000, 1, 1, 0)], False, "is a loop"),
        ([(0x10000, 1, 1, 1), (0x10000, 1, 1, 0)], False, "is a loop"),
        ([(0x10000, 1, 1, 8)], False, "descriptor 8 of a queue of 8"),
        ([(0x10000, 1, 1, 0)], True, "loop"),
        ([(0x10000, 1, 1, 9), (0x10000, 1, 0, 0)], True, "descriptor 9 of an indirect table of 2"),
        ([(0x10000, 16, 4, 0)], True, "indirect descriptor in an indirect table"),
    ):
        pair = Pair(False, 8, indirect=True)
        data = b"".join(struct.pack("<QIHH", *row) for row in table)
        if indirect:
            pair.memory.write(0x60000, data)
            data = struct.pack("<QIHH", 0x60000, len(data), 4, 0)
        pair.memory.write(pair.layout.desc, data)
        pair.memory.write(pair.layout.driver, struct.pack("<HHH", 0, 1, 0))
        with pytest.raises(RingError, match=match):
            pair.device.pop()


def test_an_available_index_from_nowhere() -> None:
    """More new entries than the queue has descriptors break the ring."""
    pair = Pair(False, 8)
    pair.memory.write(pair.layout.driver, struct.pack("<HH", 0, 9))
    with pytest.raises(RingError, match="more than the queue's 8"):
        pair.device.pop()


def test_more_buffers_in_flight_than_descriptors(make: Callable[..., Pair]) -> None:
    """A driver that makes descriptors available again before they were used breaks the ring."""
    pair = make(2)
    for _ in range(2):
        pair.driver.add([Part(0x10000, 1)])
    pair.driver.publish()
    assert len(pair.device.pop()) == 2
    if isinstance(pair.device, SplitRing):
        pair.memory.write(pair.layout.driver, struct.pack("<HH", 0, 3))
    else:
        pair.memory.write(pair.layout.desc + 14, struct.pack("<H", 1 << 15))
    with pytest.raises(RingError, match="more"):
        pair.device.pop()


def test_places_that_cannot_hold_a_ring(make: Callable[..., Pair]) -> None:
    """Sizes, alignments and addresses of the rings themselves are checked."""
    pair = make()
    kind = type(pair.device)
    good = pair.layout
    for bad in (
        good._replace(size=0),
        good._replace(size=65536),
        good._replace(desc=good.desc + 8),
        good._replace(desc=RAM),
        good._replace(driver=good.driver + 1),
        good._replace(driver=1 << 60),
        good._replace(device=good.device + 2),
        good._replace(device=RAM // 2 - 2),
    ):
        if bad.desc == RAM:
            bad = bad._replace(desc=RAM - 4096)
        with pytest.raises(RingError):
            kind(bad, pair.ram)
    if kind is SplitRing:
        with pytest.raises(RingError, match="power of two"):
            kind(good._replace(size=6), pair.ram)
    else:
        kind(good._replace(size=6), pair.ram)


@settings(max_examples=150, deadline=None)
@given(
    packed=st.booleans(),
    size=st.sampled_from([2, 4, 8, 16]),
    options=st.fixed_dictionaries({"event_idx": st.booleans(), "indirect": st.booleans()}),
    seed=st.integers(0, 2**32),
)
def test_garbage_never_raises_anything_else(packed: bool, size: int, options: dict[str, bool], seed: int) -> None:
    """Random bytes in rings and tables end in RingError or in chains within RAM, soon, whatever they say."""
    pair = Pair(packed, size, **options)
    rng = random.Random(seed)
    for _ in range(20):
        for address, length in (
            (pair.layout.desc, 16 * size),
            (pair.layout.driver, 4 if packed else 6 + 2 * size),
            (0x10000, 256),
        ):
            pair.memory.write(address, rng.randbytes(length))
        # Likelier bytes: small lengths, addresses in RAM, indices in range, available flags.
        for i in range(size):
            flags = rng.choice([0, 1, 2, 3, 4, 5, 6]) | (rng.choice([1 << 7, 1 << 15]) if packed else 0)
            entry = struct.pack("<QI", rng.choice([0x10000, 0x20000, RAM - 8]), rng.choice([0, 1, 16, 64, 1 << 31]))
            tail = (rng.randrange(size), flags) if packed else (flags, rng.randrange(size + 1))
            if rng.random() < 0.9:
                pair.memory.write(pair.layout.desc + 16 * i, entry + struct.pack("<HH", *tail))
        if not packed:
            index = (pair.device.position()[0] + rng.randrange(size + 2)) & 0xFFFF
            pair.memory.write(pair.layout.driver + 2, struct.pack("<H", index))
            if rng.random() < 0.9:
                heads = [rng.randrange(size) for _ in range(size)]
                pair.memory.write(pair.layout.driver + 4, struct.pack(f"<{size}H", *heads))
        try:
            chains = pair.device.pop()
            assert pair.device.inflight <= size
            assert all(len(v) <= RAM for c in chains for v in c.readable + c.writable)
            pair.device.push([(c, rng.randrange(2**32)) for c in chains])
            pair.device.enable_kicks()
        except RingError:
            pair = Pair(packed, size, **options)


# Suppression.


@settings(max_examples=200, deadline=None)
@given(
    packed=st.booleans(),
    event_idx=st.booleans(),
    size=st.sampled_from([2, 4, 8]),
    seed=st.integers(0, 2**32),
)
def test_no_wakeup_is_ever_lost(packed: bool, event_idx: bool, size: int, seed: int) -> None:
    """Whatever the interleaving, a side that went to sleep is woken if there is work for it.

    The device sleeps after enable_kicks() said that nothing is there, the driver after enable_interrupts() did; a kick
    or an interrupt that is due wakes the other. Work without wakeup would be a hang. Some hundred steps go many times
    around the ring.
    """
    pair = Pair(packed, size, event_idx=event_idx, indirect=True)
    driver, device = pair.driver, pair.device
    rng = random.Random(seed)
    taken: list[Chain] = []
    device_awake = driver_awake = True
    waiting = 0

    for _ in range(300):
        step = rng.randrange(6)
        if step == 0:
            added = 0
            while added < rng.randrange(1, 4) and driver.room >= 2:
                driver.add([Part(0x10000, 1), Part(0x20000, 1, True)], indirect=rng.random() < 0.5)
                added += 1
            if added:
                waiting += added
                if driver.publish():
                    device_awake = True
        elif step == 1 and device_awake:
            device.disable_kicks()
            chains = device.pop()
            waiting -= len(chains)
            taken += chains
        elif step == 2 and taken:
            rng.shuffle(taken)
            n = rng.randrange(1, len(taken) + 1)
            batch, taken = taken[:n], taken[n:]
            if device.push([(c, 1) for c in batch]):
                driver_awake = True
        elif step == 3 and device_awake:
            device_awake = device.enable_kicks()
        elif step == 4 and driver_awake:
            driver.disable_interrupts()
            driver.collect()
        elif step == 5 and driver_awake:
            driver_awake = driver.enable_interrupts()
        assert device_awake or not waiting, "the device sleeps beside available chains"
        assert driver_awake or not driver.has_used(), "the driver sleeps beside used chains"


def test_event_indices_suppress(make: Callable[..., Pair]) -> None:
    """With event indices a batch costs one kick and one interrupt, and a busy side gets none."""
    pair = make(16, event_idx=True)
    add = lambda: pair.driver.add([Part(0x10000, 1)])  # noqa: E731
    add()
    assert pair.driver.publish(), "the first kick"
    chains = pair.device.pop()
    add()
    if isinstance(pair.device, PackedRing):
        # A fresh event structure says "always"; it says otherwise once the device has gone to sleep.
        pair.device.enable_kicks()
        pair.driver.publish()
    else:
        assert not pair.driver.publish(), "the device has not asked again"
    chains += pair.device.pop()
    assert not pair.device.enable_kicks()
    for _ in range(3):
        add()
    assert pair.driver.publish()
    chains += pair.device.pop()
    pair.driver.enable_interrupts()
    assert pair.device.push([(c, 0) for c in chains[:2]])
    assert not pair.device.push([(c, 0) for c in chains[2:]]), "the driver has not asked again"


def test_flags_suppress_without_event_indices(make: Callable[..., Pair]) -> None:
    """Without event indices the flags fields turn kicks and interrupts off and on."""
    pair = make(8)
    pair.device.disable_kicks()
    pair.driver.add([Part(0x10000, 1)])
    assert not pair.driver.publish()
    assert pair.device.enable_kicks(), "it has come meanwhile"
    pair.driver.add([Part(0x10000, 1)])
    assert pair.driver.publish()
    first, second = pair.device.pop()
    pair.driver.disable_interrupts()
    assert not pair.device.push([(first, 0)])
    assert pair.driver.enable_interrupts(), "it has come meanwhile"
    assert pair.device.push([(second, 0)])


def test_legacy_notify_on_empty() -> None:
    """VIRTIO_F_NOTIFY_ON_EMPTY interrupts when the last buffer is used, though the driver wanted none (6.3)."""
    pair = Pair(False, 8, notify_on_empty=True)
    for _ in range(2):
        pair.driver.add([Part(0x10000, 1)])
    pair.driver.publish()
    pair.driver.disable_interrupts()
    first, second = pair.device.pop()
    assert not pair.device.push([(first, 0)])
    assert pair.device.push([(second, 0)])


@pytest.mark.parametrize("slot", [3, 4, 5])
def test_the_driver_event_of_a_packed_ring_in_the_middle_of_a_chain(slot: int) -> None:
    """An event offset that falls on a chain or its skipped descriptors counts when that chain is used (2.8.10)."""
    pair = Pair(True, 8, event_idx=True)
    for _ in range(2):
        pair.driver.add([Part(0x10000, 1), Part(0x10000, 1), Part(0x20000, 1, True)])
    pair.driver.publish()
    first, second = pair.device.pop()
    pair.memory.write(pair.layout.driver, struct.pack("<HH", slot | 0x8000, 2))
    assert not pair.device.push([(first, 1)])
    assert pair.device.push([(second, 1)])


def test_specification_example_layout() -> None:
    """The memory of a split queue of 4, byte for byte, after one request went through (2.7.5, 2.7.6, 2.7.8)."""
    memory = GuestMemory(0x10000)
    memory.add(Region("ram", 0, 0x10000, RegionKind.RAM))
    memory.write(0x1000, bytes.fromhex("0020000000000000 10000000 0100 0200"))
    memory.write(0x1020, bytes.fromhex("0030000000000000 01000000 0200 0000"))
    memory.write(0x1040, bytes.fromhex("0000 0100 0000"))
    device = SplitRing(RingLayout(4, 0x1000, 0x1040, 0x1080), GuestRam.of(memory))
    (chain,) = device.pop()
    assert (chain.id, describe(chain)) == (0, (bytes(16), 1))
    assert device.push([(chain, 1)])
    assert memory.read(0x1080, 12) == bytes.fromhex("0000 0100 00000000 01000000")


def test_specification_example_layout_packed() -> None:
    """The memory of a packed queue of 4, byte for byte, after one request went through (2.8.1, 2.8.13)."""
    memory = GuestMemory(0x10000)
    memory.add(Region("ram", 0, 0x10000, RegionKind.RAM))
    memory.write(0x1010, bytes.fromhex("0030000000000000 01000000 2a00 8200"))
    memory.write(0x1000, bytes.fromhex("0020000000000000 10000000 0000 8100"))
    device = PackedRing(RingLayout(4, 0x1000, 0x1040, 0x1044), GuestRam.of(memory))
    (chain,) = device.pop()
    assert (chain.id, chain.slots, describe(chain)) == (0x2A, 2, (bytes(16), 1))
    device.push([(chain, 1)])
    assert memory.read(0x1008, 8) == bytes.fromhex("01000000 2a00 8280")
    assert not device.enable_kicks()
