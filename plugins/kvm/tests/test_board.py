"""The board under KVM: SeaBIOS, its processors, and a boot sector from each kind of disk that is installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kvm_guest import needs_kvm

from vm_core.block.backend import BlockBackend
from vm_core.block.open import open_node
from vm_core.errors import UsageError
from vm_core.machine import firmware
from vm_core.machine.board import build_machine
from vm_core.machine.config import AccelConfig, DriveConfig, MachineConfig
from vm_core.machine.machine import Machine


def _firmware_missing() -> str:
    try:
        firmware.find()
    except UsageError as e:
        return str(e)
    return ""


_missing = _firmware_missing()
pytestmark = [needs_kvm, pytest.mark.skipif(bool(_missing), reason=_missing or "firmware is here")]

#: Seconds for firmware under a KVM that emulates every instruction, on a busy machine. Hardware needs a tenth of one.
PATIENCE = 120

MESSAGE = b"BOOT SECTOR RUNS\n\0"
BOOT_SECTOR = (
    b"\x31\xc0\x8e\xd8\xfc\xbe\x40\x7c"  # xor ax, ax; mov ds, ax; cld; mov si, 0x7c40
    b"\xba\x02\x04"  # mov dx, 0x402
    b"\xac\x84\xc0\x74\x03\xee\xeb\xf8"  # 1: lodsb; test al, al; jz 2; out dx, al; jmp 1
    b"\xb0\x06\xba\xf9\x0c\xee\xf4"  # 2: mov al, 6; mov dx, 0xcf9; out dx, al (reset); hlt
).ljust(0x40, b"\0") + MESSAGE


def wait_for(machine: Machine, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        said = machine.board.debug.log.decode("latin-1")
        assert not machine.error, machine.error
        assert time.monotonic() < deadline, f"nothing happens any more; the firmware said:\n{said}"
        time.sleep(0.01)


@pytest.mark.parametrize(("interface", "plugin"), [("ide", "vm_ide"), ("virtio", "vm_virtio_blk")])
def test_seabios_starts_a_boot_sector(tmp_path: Path, interface: str, plugin: str) -> None:
    """SeaBIOS finds a raw disk and starts its boot sector, which prints and resets; the second boot does the same."""
    if importlib.util.find_spec(plugin) is None:
        pytest.skip(f"{plugin} is not installed")
    image = tmp_path / "disk.raw"
    image.write_bytes(BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa" + bytes((1 << 20) - 512))
    backend = BlockBackend(open_node(str(image), format="raw", readonly=False))
    config = MachineConfig(
        ram=32 << 20,
        accelerators=[AccelConfig("kvm")],
        drives=[DriveConfig(backend, interface=interface)],
    )
    with build_machine(config) as machine:
        resets: list[object] = []
        machine.events.subscribe(lambda name, data: resets.append(data) if name == "RESET" else None)
        machine.start()
        wait_for(machine, lambda: len(resets) == 2)
        assert machine.board.debug.log.count(MESSAGE[:-1]) == 2
        assert b"Running on KVM" in machine.board.debug.log
    backend.close()


def test_seabios_starts_the_other_processors() -> None:
    """With two vCPUs the firmware's start-up messages reach the second one, and it counts two."""
    with build_machine(MachineConfig(ram=32 << 20, accelerators=[AccelConfig("kvm")], cpus=2)) as machine:
        machine.start()
        wait_for(machine, lambda: b"Found 2 cpu(s)" in machine.board.debug.log)


def test_a_running_firmware_can_be_paused_reset_and_continued() -> None:
    """Stop, go on, reset and quit work while the guest runs, each at once."""
    with build_machine(MachineConfig(ram=32 << 20, accelerators=[AccelConfig("kvm")])) as machine:
        machine.start()
        log = machine.board.debug.log
        wait_for(machine, lambda: b"BUILD:" in log)
        for _ in range(5):
            machine.stop()
            length = len(log)
            time.sleep(0.02)
            assert len(log) == length
            machine.cont()
        before = log.count(b"BUILD:")
        machine.system_reset()
        wait_for(machine, lambda: log.count(b"BUILD:") == before + 1)
