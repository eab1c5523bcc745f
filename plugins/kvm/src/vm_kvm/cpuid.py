"""What a guest's CPUID answers: the leaves KVM supports, made into one package of as many cores as the machine has.

Sources: Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; Linux, Documentation/virt/kvm/x86/cpuid.rst for the leaves
from 0x40000000, which KVM_GET_SUPPORTED_CPUID brings and which are passed on as they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from . import abi

# Leaf 1, ECX.
_VMX = 1 << 5
_TSC_DEADLINE = 1 << 24
_HYPERVISOR = 1 << 31
# Leaf 1, EDX.
_HTT = 1 << 28
# Leaf 0x80000001, ECX.
_CMP_LEGACY = 1 << 1
_SVM = 1 << 2
_TOPOEXT = 1 << 22

#: Leaves that describe the host's own topology in ways that a simpler leaf, filled in below, describes for the guest.
_DROPPED = frozenset({0x1F, 0x8000001D, 0x8000001E})


def _topology_leaf(level: int, shift: int, processors: int, kind: int, apic_id: int) -> abi.CpuidEntry:
    """One level of leaf 0xB: *kind* 1 is threads of a core, 2 is cores of a package, 0 ends the list."""
    return abi.CpuidEntry(
        function=0xB,
        index=level,
        flags=abi.CPUID_SIGNIFICANT_INDEX,
        eax=shift,
        ebx=processors,
        ecx=kind << 8 | level,
        edx=apic_id,
    )


def cpuid_for(
    supported: Iterable[abi.CpuidEntry], apic_id: int, processors: int, *, deadline_timer: bool
) -> list[abi.CpuidEntry]:
    """The leaves of the vCPU with *apic_id* among *processors*.

    *deadline_timer*: the kernel's local APIC has the TSC deadline mode, which KVM_GET_SUPPORTED_CPUID never says
    (4.46). Nested virtualisation is not offered: resets do not restore its state.
    """
    shift = (processors - 1).bit_length()
    many = processors > 1
    result = []
    for original in supported:
        if original.function in _DROPPED or original.function == 0xB:
            continue
        entry = abi.CpuidEntry.from_buffer_copy(original)
        if entry.function == 1:
            entry.ebx = entry.ebx & 0xFFFF | (1 << shift) << 16 | apic_id << 24
            entry.ecx = entry.ecx & ~(_VMX | _TSC_DEADLINE) | _HYPERVISOR
            if deadline_timer:
                entry.ecx |= _TSC_DEADLINE
            entry.edx = entry.edx & ~_HTT | (_HTT if many else 0)
        elif entry.function == 4 and entry.eax & 0x1F:
            # Cores of the package (minus one) from bit 26; sharers of this cache from bit 14: levels 1 and 2 are
            # private, the others are everybody's.
            sharers = 0 if entry.eax >> 5 & 7 < 3 else (1 << shift) - 1
            entry.eax = entry.eax & 0x3FFF | sharers << 14 | ((1 << shift) - 1) << 26
        elif entry.function == 0x80000001:
            entry.ecx = entry.ecx & ~(_SVM | _TOPOEXT | _CMP_LEGACY) | (_CMP_LEGACY if many else 0)
        elif entry.function == 0x80000008:
            # ApicIdCoreIdSize and NC. Intel keeps ECX 0.
            entry.ecx = entry.ecx & ~0xFFFF | (shift << 12 | processors - 1 if entry.ecx else 0)
        elif entry.function == 0x8000000A:
            entry.eax = entry.ebx = entry.ecx = entry.edx = 0
        result.append(entry)
    highest = max((entry.eax for entry in result if entry.function == 0), default=0)
    if highest >= 0xB:
        result.append(_topology_leaf(0, 0, 1, 1, apic_id))
        result.append(_topology_leaf(1, shift, processors, 2, apic_id))
        result.append(_topology_leaf(2, 0, 0, 0, apic_id))
    return result


def load(vcpu: int, entries: list[abi.CpuidEntry], set_cpuid: int = abi.SET_CPUID2) -> None:
    """Give vCPU *vcpu* its leaves, before it first runs."""
    from .syscall import ioctl

    data = bytes(abi.CpuidHeader(nent=len(entries))) + b"".join(map(bytes, entries))
    ioctl(vcpu, set_cpuid, ctypes.create_string_buffer(data, len(data)))
