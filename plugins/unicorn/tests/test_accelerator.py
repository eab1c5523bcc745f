"""The descriptor, the options, and what is refused."""

from __future__ import annotations

import pytest
from unicorn_guest import FakeMachine

from vm_core.errors import UsageError
from vm_unicorn import native
from vm_unicorn.accelerator import UnicornAccelerator
from vm_unicorn.engine import Engine
from vm_unicorn.plugin import UNICORN
from vm_unicorn.state import find_layout


def test_descriptor() -> None:
    """The descriptor names an implementation that loads, is available, and lists the modes that it takes."""
    assert UNICORN.load() is UnicornAccelerator
    found = UnicornAccelerator.availability()
    assert found.ok
    assert not found.hardware_speed
    for choice in UNICORN.options[0].choices:
        UnicornAccelerator(None, {"mode": choice})  # type: ignore[arg-type]


def test_import_is_light() -> None:
    """Listing plugins does not import the engine."""
    import subprocess
    import sys

    code = "import sys, vm_unicorn.plugin; sys.exit('unicorn' in sys.modules or 'asyncio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_mode() -> None:
    """A mode that does not exist is refused with those that do."""
    with pytest.raises(UsageError, match=r"mode=fast: one of auto, native, block, count"):
        UnicornAccelerator(None, {"mode": "fast"})  # type: ignore[arg-type]


def test_one_vcpu(machine: FakeMachine) -> None:
    """A second vCPU is refused by name."""
    options = {"mode": machine.cpu.mode}
    accelerator = UnicornAccelerator(machine, options)
    assert not options
    cpu = accelerator.create_vcpu(0)
    with pytest.raises(UsageError, match="-smp"):
        accelerator.create_vcpu(1)
    cpu.close()


def test_best_mode_is_chosen() -> None:
    """Without a wish the best mode that the host offers is taken."""
    machine = FakeMachine("auto")
    engine = Engine()
    try:
        expected = "count"
        if native.machine_code() is not None:
            expected = "native" if native.find_internals(engine) else "block"
        assert machine.cpu.mode == expected
    finally:
        machine.cpu.close()


def test_no_machine_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host without machine code the engine is run in slices, and the other modes are refused."""
    monkeypatch.setattr(native, "machine_code", lambda: None)
    machine = FakeMachine("auto")
    assert machine.cpu.mode == "count"
    machine.cpu.close()
    with pytest.raises(UsageError, match="mode=native: this host or build of unicorn offers count"):
        FakeMachine("native")


def test_no_internals(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a build of the engine that hides its functions, machine code stops the guest and Python delivers."""
    monkeypatch.setattr(native, "find_internals", lambda engine: None)
    machine = FakeMachine("auto")
    assert machine.cpu.mode == "block"
    machine.cpu.close()


def test_no_executable_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host forbids executable memory the engine is run in slices."""

    def refuse(engine: Engine, code: native.MachineCode) -> native.Control:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(native, "Control", refuse)
    machine = FakeMachine("auto")
    assert machine.cpu.mode == "count"
    machine.cpu.close()


def test_layout_is_found() -> None:
    """Every field of the CPU's record is found, and no two are the same."""
    layout = find_layout(Engine())
    assert layout is not None
    places = [layout.eip, layout.eflags, layout.hflags, layout.cr0, layout.old_exception, layout.error_code]
    places += [layout.is_software, *layout.segments.values()]
    assert len(set(places)) == len(places)
