"""Generated operations: drives agree with a model, and nothing that a guest writes upsets them."""

from __future__ import annotations

import contextlib
import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vm_core.devices.ata.mmc import COMMANDS
from vm_core.devices.ata.registers import BSY, DRQ
from vm_core.testing.ata import AtaBench, AtaDriver, AtaError, descriptors

SECTORS = 700
TABLE_AT, DATA_AT = 0x10000, 0x20000
RAM = 2 << 20

#: Opcodes that do something come up more often than chance would have it.
OPCODES = [0x08, 0x20, 0x24, 0x25, 0x29, 0x30, 0x34, 0x35, 0x39, 0x90, 0xA0, 0xA1, 0xB0, 0xC4, 0xC5, 0xC6, 0xC8, 0xCA]
OPCODES += [0xE7, 0xE6, 0xEC, 0xEF, 0x06, 0x91]

pokes = st.lists(
    st.one_of(
        st.tuples(st.just("outb"), st.sampled_from(range(0x1F0, 0x1F7)), st.integers(0, 255)),
        st.tuples(st.just("outb"), st.just(0x1F7), st.sampled_from(OPCODES) | st.integers(0, 255)),
        st.tuples(st.just("outb"), st.just(0x3F6), st.integers(0, 255)),
        st.tuples(st.just("outb"), st.sampled_from(range(0xC000, 0xC008)), st.integers(0, 255)),
        st.tuples(st.just("outl"), st.just(0xC004), st.sampled_from([TABLE_AT, 0, RAM - 4, 0xFFFFFFFC])),
        st.tuples(st.just("outw"), st.sampled_from(range(0x1F0, 0x1F8)), st.integers(0, 65535)),
        st.tuples(st.just("outsw"), st.just(0x1F0), st.binary(min_size=12, max_size=12)),
        st.tuples(st.just("outsw"), st.just(0x1F0), st.just(bytes(512))),
        st.tuples(st.just("insw"), st.just(0x1F0), st.sampled_from([1, 6, 256, 5000])),
        st.tuples(st.just("inb"), st.sampled_from([*range(0x1F0, 0x1F8), 0x3F6, 0xC000, 0xC002]), st.none()),
        st.tuples(st.just("inl"), st.sampled_from([0x1F0, 0x1F2, 0xC000, 0xC004]), st.none()),
        st.tuples(st.just("poll"), st.none(), st.none()),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(pokes, st.booleans(), st.binary(max_size=64))
def test_random_register_accesses_never_raise_and_never_hang(
    script: list[tuple[str, int, object]], immediate: bool, table: bytes
) -> None:
    """Whatever is written, a software reset brings both drives back, and the disk can be read."""
    bench = AtaBench(ram=RAM, immediate=immediate)
    bench.add_disk(SECTORS * 512)
    bench.add_cdrom(40 * 2048, unit=1)
    bench.memory.ram.write(TABLE_AT, table)
    for name, port, value in script:
        if name == "poll":
            bench.poll()
        elif value is None:
            getattr(bench, name)(port)
        else:
            getattr(bench, name)(port, value)
    bench.outb(0x3F6, 0x04)
    bench.outb(0x3F6, 0x00)
    bench.poll()
    assert not bench.inb(0x3F6) & BSY
    driver = AtaDriver(bench)
    assert driver.read_sectors(3, 2) == bytes(bench.backends[0].data[3 * 512 : 5 * 512])
    assert driver.registers()["status"] == 0x50
    driver.device |= 0x10
    assert driver.pio_in(0xA1)[:2] == b"\xc0\x85"


@st.composite
def operations(draw: st.DrawFn) -> list[tuple[str, bool, int, int, int]]:
    """(kind, extended, lba, sectors, seed)."""
    found = []
    for _ in range(draw(st.integers(1, 12))):
        lba = draw(st.integers(0, SECTORS - 1))
        count = draw(st.integers(1, min(600, SECTORS - lba)))
        ext = count > 256 or draw(st.booleans())
        kind = draw(st.sampled_from(["pio", "multiple", "dma"])) + draw(st.sampled_from(["-read", "-write"]))
        found.append((kind, ext, lba, count, draw(st.integers(0, 255))))
    return found


def scatter(total: int, seed: int) -> list[tuple[int, int]]:
    """Even, scattered, non-overlapping runs of memory for *total* bytes."""
    runs: list[tuple[int, int]] = []
    address, left = DATA_AT, total
    sizes = [2 + 2 * (seed * 37 % 500), 4096, 65536, 512, 30000]
    while left:
        length = min(left, sizes[len(runs) % len(sizes)])
        runs.append((address, length))
        address += length + (seed % 3) * 64
        left -= length
    return runs


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations(), st.booleans(), st.sampled_from([1, 2, 8, 16]))
def test_reads_and_writes_agree_with_a_model(
    script: list[tuple[str, bool, int, int, int]], immediate: bool, multiple: int
) -> None:
    """Any mix of PIO, MULTIPLE and DMA reads and writes, 28 and 48 bits, is a bytearray that is read and written."""
    bench = AtaBench(ram=RAM, immediate=immediate)
    bench.add_disk(SECTORS * 512)
    model = bytearray(SECTORS * 512)
    driver = AtaDriver(bench)
    driver.non_data(0xC6, count=multiple)
    for kind, ext, lba, count, seed in script:
        span = slice(512 * lba, 512 * (lba + count))
        data = bytes((seed + i) & 0xFF for i in range(251)) * (2 * count * 512 // 251 // 2 + 1)
        data = data[: 512 * count]
        place = {"lba": lba, "count": count, "ext": ext}
        way, _, direction = kind.partition("-")
        writing = direction == "write"
        if writing:
            model[span] = data
        if way == "dma":
            runs = scatter(512 * count, seed)
            bench.memory.ram.write(TABLE_AT, descriptors(runs))
            opcode = (0x35 if ext else 0xCA) if writing else (0x25 if ext else 0xC8)
            if writing:
                at = 0
                for address, length in runs:
                    bench.memory.ram.write(address, data[at : at + length])
                    at += length
            driver.dma(opcode, TABLE_AT, to_memory=not writing, **place)
            if not writing:
                got = b"".join(bench.memory.ram.read(address, length) for address, length in runs)
                assert got == model[span]
            continue
        block = 512 * (multiple if way == "multiple" else 1)
        if writing:
            opcode = {"pio": (0x30, 0x34), "multiple": (0xC5, 0x39)}[way][ext]
            driver.pio_out(opcode, data, block=block, **place)
        else:
            opcode = {"pio": (0x20, 0x24), "multiple": (0xC4, 0x29)}[way][ext]
            assert driver.pio_in(opcode, 512 * count, block=block, **place) == model[span]
    assert bench.backends[0].data == model


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=12, max_size=12), st.integers(0, 0xFFFF), st.booleans(), st.booleans())
def test_random_packets_end(cdb: bytes, limit: int, dma: bool, opcode_known: bool) -> None:
    """Every packet ends: with data, or with a sense key; never with an exception, and the next one works."""
    if opcode_known:
        cdb = bytes((COMMANDS[cdb[0] % len(COMMANDS)].opcode,)) + cdb[1:]
    bench = AtaBench(ram=RAM, immediate=True)
    bench.add_cdrom(40 * 2048)
    driver = AtaDriver(bench)
    bench.memory.ram.write(TABLE_AT, descriptors([(DATA_AT, 65536), (DATA_AT + 0x10000, 65536)]))
    driver.packet(struct.pack(">BxxxB", 0x03, 18))
    with contextlib.suppress(AtaError):
        driver.packet(cdb, limit=limit, dma=dma, table=TABLE_AT, sense=False, out=bytes(65536))
    assert not bench.inb(0x3F6) & (BSY | DRQ)
    driver.reset()
    assert driver.packet(struct.pack(">BxxxB", 0x12, 36))[8:12] == b"TEST"
