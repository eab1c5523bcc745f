"""What needs no /dev/kvm: availability, CPUID topology, slots."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from kvm_guest import needs_kvm

from vm_core.machine.memory import FlatRange, Region, RegionKind
from vm_kvm import abi, probe, system
from vm_kvm.accelerator import KvmAccelerator
from vm_kvm.cpuid import cpuid_for
from vm_kvm.plugin import vm_accelerators
from vm_kvm.slots import Slot, slot_of
from vm_kvm.system import KvmUnavailableError, System


def test_a_missing_device_names_the_modules(tmp_path: Path) -> None:
    """Without /dev/kvm the message says what to turn on and to load."""
    with pytest.raises(KvmUnavailableError, match="kvm_intel or kvm_amd"):
        System(str(tmp_path / "kvm"))


def test_a_device_without_permission_names_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without permission the message names the group that has it, and how to join."""
    import grp

    path = tmp_path / "kvm"
    path.touch()
    group = next(entry for entry in grp.getgrall() if entry.gr_gid != 0)
    path.chmod(0o660)
    if os.geteuid() != 0:
        pytest.skip("only root can give a file to another group")
    os.chown(path, 0, group.gr_gid)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(system.os, "open", refuse)
    with pytest.raises(KvmUnavailableError, match=f"join the group {group.gr_name} .*usermod -aG {group.gr_name}"):
        System(str(path))
    path.chmod(0o600)
    with pytest.raises(KvmUnavailableError, match="its mode is 0600"):
        System(str(path))


def test_something_else_at_the_path_is_refused(tmp_path: Path) -> None:
    """A file that is not KVM's device is told apart."""
    path = tmp_path / "kvm"
    path.touch()
    with pytest.raises(KvmUnavailableError, match="is not KVM's device"):
        System(str(path))


def test_availability_never_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """availability() turns whatever goes wrong into a reason."""
    probe.measure.cache_clear()
    monkeypatch.setattr(probe, "System", lambda: System(str(tmp_path / "none")))
    found = KvmAccelerator.availability()
    assert not found.ok
    assert not found.hardware_speed
    assert "does not exist" in found.reason
    probe.measure.cache_clear()


@needs_kvm
def test_the_probe_is_right_about_the_speed_of_long_loops() -> None:
    """What the probe says of KVM's speed in milliseconds holds for a loop that is many times as long."""
    from kvm_guest import DONE, guest

    found = KvmAccelerator.availability()
    assert found.ok
    # mov ecx, 200000; 1: dec ecx; jnz 1 (real mode, 32-bit operands); mov al, 1; out DONE, al
    code = b"\x66\xb9\x40\x0d\x03\x00\x66\x49\x75\xfc" + bytes((0xB0, 0x01, 0xE6, DONE))
    with guest(code) as g:
        import time

        start = time.perf_counter()
        g.run(timeout=60)
        mips = 400_000 / (time.perf_counter() - start) / 1e6
    assert (mips > 20) == found.hardware_speed
    assert found.hardware_speed == (not found.reason)


def test_the_speed_threshold_lies_between_emulation_and_hardware() -> None:
    """Two million instructions a second are emulation, some hundred are hardware."""
    assert not probe.Speed(2.0).hardware
    assert probe.Speed(300.0).hardware


def leaf(function: int, index: int = 0, **registers: int) -> abi.CpuidEntry:
    return abi.CpuidEntry(function=function, index=index, **registers)


def shown(entries: list[abi.CpuidEntry], function: int, index: int = 0) -> abi.CpuidEntry:
    return next(entry for entry in entries if (entry.function, entry.index) == (function, index))


HOST = [
    leaf(0, eax=0x1F),
    leaf(1, ebx=0x07400800, ecx=1 << 5 | 1 << 3, edx=1 << 28 | 1 << 9),
    leaf(4, 0, eax=0xFC1C4121, ebx=7),
    leaf(4, 3, eax=0xFC1C4163, ebx=8),
    leaf(4, 4),
    leaf(0xB, 0, eax=1, ebx=2, ecx=0x100, edx=7),
    leaf(0x1F, 0, eax=1, ebx=2, ecx=0x100, edx=7),
    leaf(0x40000000, eax=0x40000001, ebx=0x4B4D564B),
    leaf(0x80000001, ecx=1 << 2 | 1 << 22 | 1),
    leaf(0x80000008, eax=0x3030, ecx=0x7017),
    leaf(0x8000001E, eax=7),
]


def test_cpuid_makes_one_package_of_as_many_cores_as_vcpus() -> None:
    """The host's topology and APIC IDs are replaced by the guest's in every leaf that shows them."""
    entries = cpuid_for(HOST, 2, 3, deadline_timer=True)
    one = shown(entries, 1)
    assert one.ebx == 2 << 24 | 4 << 16 | 0x0800
    assert one.edx >> 28 & 1 == 1
    assert shown(entries, 4, 0).eax >> 26 == 3
    assert shown(entries, 4, 0).eax >> 14 & 0xFFF == 0
    assert shown(entries, 4, 3).eax >> 14 & 0xFFF == 3
    assert shown(entries, 4, 4).eax == 0
    cores = shown(entries, 0xB, 1)
    assert (cores.eax, cores.ebx, cores.ecx, cores.edx) == (2, 3, 0x201, 2)
    assert shown(entries, 0x80000008).ecx == 0x2002
    assert {0x1F, 0x8000001E}.isdisjoint(entry.function for entry in entries)


def test_cpuid_hides_nested_virtualisation_and_shows_the_hypervisor() -> None:
    """VMX, SVM and the AMD topology extension are off, the hypervisor bit and KVM's own leaf are there."""
    entries = cpuid_for(HOST, 0, 1, deadline_timer=False)
    assert shown(entries, 1).ecx == 1 << 31 | 1 << 3
    assert shown(entries, 1).edx == 1 << 9
    assert shown(entries, 0x80000001).ecx == 1
    assert shown(entries, 0x40000000).ebx == 0x4B4D564B


def flat(start: int, size: int, kind: RegionKind, backing: int) -> FlatRange:
    return FlatRange(start, size, Region("r", start, size, kind, backing=backing), 0)


def test_slots_are_whole_pages() -> None:
    """A run gives the pages it covers entirely; none if the guest's pages and the buffer's do not line up."""
    assert slot_of(flat(0x1000, 0x3000, RegionKind.RAM, 0x5000)) == Slot(0x1000, 0x3000, 0x5000, False)
    assert slot_of(flat(0x1000, 0x3000, RegionKind.ROM, 0x5000)) == Slot(0x1000, 0x3000, 0x5000, True)
    assert slot_of(flat(0x1800, 0x3000, RegionKind.RAM, 0x5800)) == Slot(0x2000, 0x2000, 0x6000, False)
    assert slot_of(flat(0x1000, 0x800, RegionKind.RAM, 0x5000)) is None
    assert slot_of(flat(0x1000, 0x3000, RegionKind.RAM, 0x5800)) is None
    assert slot_of(flat(0x1000, 0x3000, RegionKind.MMIO, 0)) is None


def test_the_plugin_describes_itself_without_loading_kvm() -> None:
    """The descriptor names an implementation that loads."""
    (descriptor,) = vm_accelerators()
    assert descriptor.name == "kvm"
    assert descriptor.load() is KvmAccelerator
