"""Stores are fast, and the wrapper that makes them so refuses what it does not know."""

from __future__ import annotations

import ctypes
import time

import pytest
from unicorn_guest import FakeMachine

from vm_core.errors import UsageError
from vm_unicorn import fills, native
from vm_unicorn.engine import Engine

END = "e6f4 ebfe"


@pytest.fixture
def fast() -> FakeMachine:
    """A machine in the mode that has the wrapper."""
    try:
        machine = FakeMachine("native")
    except UsageError as error:
        pytest.skip(str(error))
    if machine.cpu._space._stores is None:
        pytest.skip("no wrapper for this host or build")
    machine.flat_tables()
    return machine


def store_loop(machine: FakeMachine, turns: int) -> float:
    """Seconds for *turns* of four stores to a data page."""
    code = "890500000200 890510000200 890520000200 890530000200 49 75e5"
    began = time.perf_counter()
    machine.run32(code + END, regs={"ecx": turns}, seconds=30)
    return time.perf_counter() - began


def test_faster_than_without(fast: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores to a page without code are several times as fast as without the wrapper."""
    with_wrapper = min(store_loop(fast, 200_000) for _ in range(3))
    monkeypatch.setattr(fills, "install", lambda *arguments: None)
    plain = FakeMachine("native")
    plain.flat_tables()
    assert min(store_loop(plain, 200_000) for _ in range(3)) > 3 * with_wrapper
    plain.cpu.close()


def test_other_table_is_refused(fast: FakeMachine, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the TLB does not look as expected the engine is left as it is, and works."""
    monkeypatch.setattr(fills, "_TABLE_BEFORE_ENV", 0x40)
    monkeypatch.setattr(fills, "_MASK_BEFORE_ENV", 0x38)
    machine = FakeMachine("native")
    machine.flat_tables()
    assert machine.cpu._space._stores is None
    assert machine.run32("b807000000" + END)["eax"] == 7
    machine.cpu.close()


def test_slot_not_found(fast: FakeMachine) -> None:
    """A pointer that is nowhere in the class record is not found, and nothing is read that is not there."""
    engine = Engine()
    internals = native.find_internals(engine)
    assert internals is not None
    assert fills._find_slot(internals, 0x1234_5678_9ABC_DEF0) == 0
    slot = fills._find_slot(internals, engine.address_of("x86_cpu_tlb_fill_x86_64"))
    assert ctypes.c_uint64.from_address(slot).value == engine.address_of("x86_cpu_tlb_fill_x86_64")
