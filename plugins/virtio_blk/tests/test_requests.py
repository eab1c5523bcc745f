"""The block device through its PCI function, driven by a driver model over every interface and ring layout."""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.block.request import Op
from vm_core.testing.backend import MemoryBackend
from vm_core.testing.virtio import BlockDriver, Part

OK, IOERR, UNSUPP = 0, 1, 2
Started = Callable[..., tuple[Any, BlockDriver]]


def test_written_sectors_are_read_back(started: Started) -> None:
    """OUT and IN move sectors between guest memory and the backend."""
    rig, disk = started()
    data = random.Random(1).randbytes(4096)
    disk.write(8, data)
    assert rig.backend.data[4096:8192] == data
    assert disk.read(8, 8) == data
    assert disk.written == 4097
    assert disk.read(0, 8) == bytes(4096)


def test_requests_of_one_kick_are_one_batch_and_one_interrupt(started: Started) -> None:
    """Everything available at a kick reaches the backend in one call and comes back with one interrupt."""
    rig, disk = started()
    sent = [disk.send(disk.OUT, i, data=bytes([i]) * 512, kick=False) for i in range(0, 40, 2)]
    assert disk.pci.rings[0].publish()
    disk.pci.kick(0)
    rig.board.io.run_until_idle()
    assert rig.backend.batches == [20]
    assert not rig.board.irq
    rig.poll()
    assert rig.board.irq
    assert disk.pci.isr() == 1
    assert not rig.board.irq
    assert [disk.wait(p)[0] for p in sent] == [OK] * 20
    assert rig.backend.data[38 * 512] == 38


def test_neighbours_of_a_batch_become_one_host_request(started: Started) -> None:
    """Reads or writes that follow each other are joined, in order, and only those."""
    rig, disk = started()
    rig.backend.data[:] = random.Random(3).randbytes(1 << 20)
    plan = [(0, 8), (8, 8), (16, 1), (18, 2), (20, 1), (4, 1), (5, 2)]
    sent = [disk.send(disk.IN, sector, length=512 * count, kick=False) for sector, count in plan]
    sent.append(disk.send(disk.OUT, 7, data=b"w" * 512, kick=False))
    sent.append(disk.send(disk.OUT, 8, data=b"v" * 512, kick=False))
    sent += [disk.send(disk.FLUSH, kick=False), disk.send(disk.FLUSH, kick=False)]
    disk.pci.rings[0].publish()
    disk.pci.kick(0)
    before = bytes(rig.backend.data)
    answers = [disk.wait(p) for p in sent]
    assert [status for status, _ in answers] == [OK] * 11
    assert [data for _, data in answers[:7]] == [before[512 * s : 512 * (s + n)] for s, n in plan]
    assert rig.backend.data[3584:4608] == b"w" * 512 + b"v" * 512
    assert [(op, offset // 512, length // 512) for op, offset, length, _ in rig.backend.log] == [
        (Op.READ, 0, 17),
        (Op.READ, 18, 3),
        (Op.READ, 4, 3),
        (Op.WRITE, 7, 2),
        (Op.FLUSH, 0, 0),
        (Op.FLUSH, 0, 0),
    ]


def test_a_failed_run_is_tried_part_by_part(started: Started) -> None:
    """Of joined requests only those fail that fail alone."""
    rig, disk = started()
    rig.backend.bad = range(1536, 2048)
    sent = [disk.send(disk.OUT, i, data=bytes([i]) * 512, kick=False) for i in range(6)]
    disk.pci.rings[0].publish()
    disk.pci.kick(0)
    assert [disk.wait(p)[0] for p in sent] == [OK, OK, OK, IOERR, OK, OK]
    assert rig.backend.batches == [1, 6]


def test_merging_can_be_turned_off(started: Started) -> None:
    """request-merging=off leaves requests as they come."""
    rig, disk = started(request_merging="off")
    sent = [disk.send(disk.IN, i, length=512, kick=False) for i in range(6)]
    disk.pci.rings[0].publish()
    disk.pci.kick(0)
    assert [disk.wait(p)[0] for p in sent] == [OK] * 6
    assert rig.backend.batches == [6]


def test_a_kick_does_no_work_on_the_cpu(started: Started) -> None:
    """The register write only posts to the I/O thread."""
    rig, disk = started()
    disk.send(disk.IN, 0, length=512)
    assert rig.backend.batches == []
    rig.board.io.run_until_idle()
    assert rig.backend.batches == [1]


def test_a_kick_can_be_served_where_it_is_made(started: Started) -> None:
    """With ioeventfd=off the register write pops, submits, and answers what the backend answers at once."""
    rig, disk = started(ioeventfd="off")
    rig.backend.data[:512] = b"s" * 512
    rig.backend.immediate = True
    sent = [disk.send(disk.IN, 0, length=512), disk.send(disk.GET_ID, length=20)]
    assert rig.board.irq
    disk.poll = lambda: None
    assert disk.wait(sent[0]) == (OK, b"s" * 512)
    assert disk.wait(sent[1])[0] == OK
    rig.backend.immediate = False
    late = disk.send(disk.IN, 0, length=512)
    assert rig.backend.pending, "what takes time does not hold the register write up"
    disk.poll = rig.poll
    assert disk.wait(late)[0] == OK


def test_flush_makes_writes_stable(started: Started) -> None:
    """With the write cache on, a write is stable after FLUSH and not before."""
    rig, disk = started()
    disk.write(0, b"x" * 512)
    assert rig.backend.stable[:512] == bytes(512)
    assert disk.request(disk.FLUSH)[0] == OK
    assert rig.backend.stable[:512] == b"x" * 512


def test_a_driver_without_flush_writes_through(started: Started) -> None:
    """A driver that negotiated neither FLUSH nor CONFIG_WCE gets every write stable at once (5.2.6.2)."""
    rig, disk = started(~(1 << 9 | 1 << 11))
    disk.write(0, b"x" * 512)
    assert rig.backend.stable[:512] == b"x" * 512
    disk.pci.status = 0
    assert rig.backend.write_cache, "a reset brings back what the user chose"


def test_config_wce_switches_the_write_cache(started: Started) -> None:
    """The writeback field shows the cache and changes it."""
    rig, disk = started()
    assert disk.pci.config(32, 1) == 1
    disk.pci.set_config(32, 1, 0)
    assert disk.pci.config(32, 1) == 0
    assert not rig.backend.write_cache
    disk.pci.set_config(32, 1, 1)
    assert rig.backend.write_cache


def test_config_wce_needs_negotiation(started: Started) -> None:
    """Without CONFIG_WCE the field is read-only."""
    rig, disk = started(~(1 << 11))
    disk.pci.set_config(32, 1, 0)
    assert rig.backend.write_cache


def test_config_wce_without_flush_starts_at_writethrough(rig: Callable[..., Any]) -> None:
    """With CONFIG_WCE and without FLUSH writeback is 0 from FEATURES_OK on (5.2.5.2)."""
    made = rig()
    disk = made.modern(~(1 << 9))
    assert disk.pci.config(32, 1) == 0
    assert not made.backend.write_cache


def test_the_serial_number(started: Started) -> None:
    """GET_ID gives 20 bytes, padded with zeroes or cut; a smaller buffer gets as much as it holds."""
    for serial, answer in (("disk-1", b"disk-1"), ("x" * 30, b"x" * 20), ("", b"")):
        _, disk = started(serial=serial)
        assert disk.request(disk.GET_ID, length=20) == (OK, answer.ljust(20, b"\0"))
        assert disk.written == 21
        assert disk.request(disk.GET_ID, length=4) == (OK, answer.ljust(20, b"\0")[:4])
        assert disk.request(disk.GET_ID, length=64)[1][:20] == answer.ljust(20, b"\0")
        assert disk.written == 20


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


def test_discard_and_write_zeroes(started: Started) -> None:
    """DISCARD and WRITE_ZEROES pass their range on; the unmap flag of the latter comes along."""
    rig, disk = started()
    disk.write(0, b"y" * 4096)
    assert disk.request(disk.DISCARD, data=segment(0, 8))[0] == OK
    assert disk.request(disk.WRITE_ZEROES, data=segment(2, 3))[0] == OK
    assert disk.request(disk.WRITE_ZEROES, data=segment(6, 1, 1))[0] == OK
    assert rig.backend.log[1:] == [
        (Op.DISCARD, 0, 4096, False),
        (Op.ZERO, 1024, 1536, False),
        (Op.ZERO, 3072, 512, True),
    ]
    zeroes = bytes(512)
    assert disk.read(0, 8) == b"y" * 1024 + zeroes * 3 + b"y" * 512 + zeroes + b"y" * 512


def test_bad_ranges(started: Started) -> None:
    """Unknown flags, unmap on a discard and several ranges are UNSUPP; ranges past the end or too long are IOERR."""
    rig, disk = started(max_discard_sectors=16, max_write_zeroes_sectors=16)
    for kind, data, status in (
        (disk.DISCARD, segment(0, 8, 1), UNSUPP),
        (disk.DISCARD, segment(0, 8, 2), UNSUPP),
        (disk.WRITE_ZEROES, segment(0, 8, 3), UNSUPP),
        (disk.DISCARD, segment(0, 8) * 2, UNSUPP),
        (disk.DISCARD, segment(0, 8)[:15], UNSUPP),
        (disk.WRITE_ZEROES, b"", UNSUPP),
        (disk.DISCARD, segment(2047, 2), IOERR),
        (disk.WRITE_ZEROES, segment(1 << 62, 8), IOERR),
        (disk.DISCARD, segment(0, 17), IOERR),
        (disk.WRITE_ZEROES, segment(0, 17), IOERR),
        (disk.WRITE_ZEROES, segment(0, 0), OK),
    ):
        assert disk.request(kind, data=data)[0] == status, (kind, data)
    assert rig.backend.log == []


def test_commands_that_are_turned_off(started: Started) -> None:
    """With discard=off and write-zeroes=off the features are gone and the commands are UNSUPP."""
    _, disk = started(discard="off", write_zeroes="off")
    assert not disk.pci.features & (1 << 13 | 1 << 14)
    assert disk.request(disk.DISCARD, data=segment(0, 8))[0] == UNSUPP
    assert disk.request(disk.WRITE_ZEROES, data=segment(0, 8))[0] == UNSUPP


def test_unknown_types_are_unsupported(started: Started) -> None:
    """SCSI commands and types from the future are answered, with UNSUPP."""
    _, disk = started()
    for kind in (2, 3, 6, 10, 14, 15, 0x80000000, 0xFFFFFFFF):
        assert disk.request(kind, length=512)[0] == UNSUPP


def test_requests_out_of_bounds_or_out_of_step(started: Started) -> None:
    """Parts of blocks, empty transfers and sectors that do not exist are IOERR and never reach the backend."""
    rig, disk = started(logical_block_size=4096)
    last = len(rig.backend.data) // 512
    for sector, length in ((0, 0), (0, 512), (1, 4096), (0, 4097), (last, 4096), (last - 8, 8192), (1 << 63, 4096)):
        assert disk.request(disk.IN, sector, length=length)[0] == IOERR, (sector, length)
        assert disk.request(disk.OUT, sector, data=bytes(length))[0] == IOERR, (sector, length)
    assert rig.backend.log == []
    assert disk.read(last - 8, 8) == bytes(4096)


def test_a_read_only_disk(started: Started) -> None:
    """RO is offered; writes, discards and zeroes are IOERR or UNSUPP; nothing changes."""
    rig, disk = started(backend=MemoryBackend(1 << 20, readonly=True))
    assert disk.pci.features & 1 << 5
    assert not disk.pci.features & (1 << 13 | 1 << 14)
    assert disk.request(disk.OUT, 0, data=bytes(512))[0] == IOERR
    assert disk.request(disk.DISCARD, data=segment(0, 8))[0] == IOERR
    assert disk.request(disk.WRITE_ZEROES, data=segment(0, 8))[0] == IOERR
    assert rig.backend.log == []
    assert disk.read(0, 1) == bytes(512)
    assert disk.request(disk.FLUSH)[0] == OK


def test_host_errors_become_statuses(started: Started) -> None:
    """A failed request is IOERR, one the host cannot do is UNSUPP, and data that was not read is not claimed."""
    rig, disk = started()
    rig.backend.fail = errno.ENOSPC
    assert disk.request(disk.OUT, 0, data=bytes(512))[0] == IOERR
    assert disk.request(disk.IN, 0, length=512)[0] == IOERR
    assert disk.written == 0
    assert disk.request(disk.FLUSH)[0] == IOERR
    rig.backend.fail = errno.ENOTSUP
    assert disk.request(disk.DISCARD, data=segment(0, 8))[0] == UNSUPP


def test_requests_without_header_or_status_stop_the_device(started: Started) -> None:
    """There is no way to answer them: the device asks for a reset, and works again after it."""
    for parts in ([], [Part(0x10000, 15)], [Part(0x10000, 16)]):
        rig, disk = started()
        ring = disk.pci.rings[0]
        ring.add(parts + ([Part(0x20000, 1, True)] if not parts or parts[0].length == 15 else []))
        ring.publish()
        disk.pci.kick(0)
        rig.poll()
        disk.collect()
        assert disk._used == {}
        modern = bool(disk.pci.features >> 32 & 1)
        assert bool(disk.pci.status & disk.pci.NEEDS_RESET) == modern
        assert bool(disk.pci.isr() & 2) == modern
        assert rig.board.emitted == ["DEVICE_FAILED"]
        disk.pci.start()
        assert disk.read(0, 1) == bytes(512)


def test_segments_in_the_middle_of_everything(started: Started) -> None:
    """Header, data and status may be cut at any byte, also of DISCARD and GET_ID."""
    rig, disk = started(serial="abcdefghij")
    disk.write(1, b"q" * 512, cuts=(1, 2, 7, 15, 17, 100))
    assert disk.read(1, 1, cuts=(1, 511)) == b"q" * 512
    assert disk.read(1, 1, cuts=(511, 4)) == b"q" * 512, "data and status in one descriptor"
    assert disk.request(disk.GET_ID, length=20, cuts=(3, 9))[1] == b"abcdefghij".ljust(20, b"\0")
    assert disk.request(disk.DISCARD, data=segment(1, 1), cuts=(3, 20, 31))[0] == OK
    assert rig.backend.log[-1] == (Op.DISCARD, 512, 512, False)


@settings(max_examples=60, deadline=None)
@given(
    interface=st.sampled_from(["modern", "legacy", "packed"]),
    options=st.fixed_dictionaries(
        {"event_idx": st.sampled_from(["on", "off"]), "indirect_desc": st.sampled_from(["on", "off"])}
    ),
    seed=st.integers(0, 2**32),
)
def test_any_layout_matches_a_bytearray(
    rig: Callable[..., Any], interface: str, options: dict[str, str], seed: int
) -> None:
    """Random requests, cut at random bytes, in random batches and answered in any order, act like a bytearray."""
    rng = random.Random(seed)
    packed = "on" if interface == "packed" else "off"
    made = rig(64 << 10, packed=packed, queue_size=32, ioeventfd=rng.choice(["on", "off"]), **options)
    made.backend.immediate = rng.random() < 0.3
    disk = made.legacy() if interface == "legacy" else made.modern()
    model = bytearray(64 << 10)
    can_indirect = options["indirect_desc"] == "on"
    for _ in range(8):
        expected = []
        taken: set[int] = set()
        for _ in range(rng.randrange(1, 5)):
            count = rng.randrange(1, 9)
            sector = rng.randrange(128 - count)
            if taken & set(range(sector, sector + count)):
                continue
            taken |= set(range(sector, sector + count))
            cuts = [rng.randrange(1, 17 + 512 * count) for _ in range(rng.randrange(3))]
            common: dict[str, Any] = {"cuts": cuts, "indirect": can_indirect and rng.random() < 0.5, "kick": False}
            at = slice(512 * sector, 512 * (sector + count))
            kind = rng.choice(["read", "write", "zero", "id"])
            if kind == "read":
                expected.append((disk.send(0, sector, length=512 * count, **common), bytes(model[at])))
            elif kind == "write":
                model[at] = rng.randbytes(512 * count)
                expected.append((disk.send(1, sector, data=bytes(model[at]), **common), b""))
            elif kind == "zero":
                model[at] = bytes(512 * count)
                expected.append((disk.send(13, data=segment(sector, count, rng.randrange(2)), **common), b""))
            else:
                expected.append((disk.send(8, length=20, **common), bytes(20)))
        if disk.pci.rings[0].publish():
            disk.pci.kick(0)
        made.board.io.run_until_idle()
        made.backend.run(backwards=rng.random() < 0.5)
        for sent, data in expected:
            assert disk.wait(sent, 1) == (OK, data)
    assert made.backend.data == model
