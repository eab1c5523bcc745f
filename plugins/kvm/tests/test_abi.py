"""The binary interface against the kernel's own header, as a C compiler reads it."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from vm_kvm import abi

COMPILER = shutil.which("cc") or shutil.which("gcc")
HEADER = Path("/usr/include/linux/kvm.h")

pytestmark = pytest.mark.skipif(
    COMPILER is None or not HEADER.exists(), reason="needs a C compiler and <linux/kvm.h> (gcc, linux-libc-dev)"
)

IOCTLS = [
    "GET_API_VERSION",
    "CREATE_VM",
    "GET_MSR_INDEX_LIST",
    "CHECK_EXTENSION",
    "GET_VCPU_MMAP_SIZE",
    "GET_SUPPORTED_CPUID",
    "CREATE_VCPU",
    "SET_USER_MEMORY_REGION",
    "SET_TSS_ADDR",
    "SET_IDENTITY_MAP_ADDR",
    "CREATE_IRQCHIP",
    "IRQ_LINE",
    "GET_IRQCHIP",
    "SET_IRQCHIP",
    "SET_GSI_ROUTING",
    "IRQFD",
    "CREATE_PIT2",
    "IOEVENTFD",
    "GET_PIT2",
    "SET_PIT2",
    "SIGNAL_MSI",
    "RUN",
    "GET_REGS",
    "SET_REGS",
    "GET_SREGS",
    "SET_SREGS",
    "GET_MSRS",
    "SET_MSRS",
    "GET_FPU",
    "SET_FPU",
    "GET_LAPIC",
    "SET_LAPIC",
    "SET_CPUID2",
    "GET_MP_STATE",
    "SET_MP_STATE",
    "GET_VCPU_EVENTS",
    "SET_VCPU_EVENTS",
    "GET_DEBUGREGS",
    "SET_DEBUGREGS",
    "GET_XCRS",
    "SET_XCRS",
    "KVMCLOCK_CTRL",
]

CONSTANTS = {
    "KVM_API_VERSION": abi.API_VERSION,
    "KVM_MEM_READONLY": abi.MEM_READONLY,
    "KVM_CPUID_FLAG_SIGNIFCANT_INDEX": abi.CPUID_SIGNIFICANT_INDEX,
    "KVM_IRQ_ROUTING_IRQCHIP": abi.ROUTING_IRQCHIP,
    "KVM_IRQ_ROUTING_MSI": abi.ROUTING_MSI,
    "KVM_IRQCHIP_PIC_MASTER": abi.CHIP_PIC_MASTER,
    "KVM_IRQCHIP_PIC_SLAVE": abi.CHIP_PIC_SLAVE,
    "KVM_IRQCHIP_IOAPIC": abi.CHIP_IOAPIC,
    "KVM_IRQFD_FLAG_DEASSIGN": abi.IRQFD_DEASSIGN,
    "KVM_IOEVENTFD_FLAG_DATAMATCH": abi.IOEVENTFD_DATAMATCH,
    "KVM_IOEVENTFD_FLAG_PIO": abi.IOEVENTFD_PIO,
    "KVM_IOEVENTFD_FLAG_DEASSIGN": abi.IOEVENTFD_DEASSIGN,
    "KVM_PIT_SPEAKER_DUMMY": abi.PIT_SPEAKER_DUMMY,
    "KVM_CAP_TSC_DEADLINE_TIMER": abi.CAP_TSC_DEADLINE_TIMER,
    "KVM_EXIT_IO": abi.EXIT_IO,
    "KVM_EXIT_IO_OUT": 1,
    "KVM_EXIT_HLT": abi.EXIT_HLT,
    "KVM_EXIT_MMIO": abi.EXIT_MMIO,
    "KVM_EXIT_SHUTDOWN": abi.EXIT_SHUTDOWN,
    "KVM_EXIT_FAIL_ENTRY": abi.EXIT_FAIL_ENTRY,
    "KVM_EXIT_INTR": abi.EXIT_INTR,
    "KVM_EXIT_INTERNAL_ERROR": abi.EXIT_INTERNAL_ERROR,
    "KVM_EXIT_SYSTEM_EVENT": abi.EXIT_SYSTEM_EVENT,
    "KVM_INTERNAL_ERROR_EMULATION": abi.INTERNAL_ERROR_EMULATION,
    "KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES": abi.EMULATION_HAS_BYTES,
    "KVM_SYSTEM_EVENT_SHUTDOWN": abi.SYSTEM_EVENT_SHUTDOWN,
    "KVM_SYSTEM_EVENT_RESET": abi.SYSTEM_EVENT_RESET,
    "KVM_SYSTEM_EVENT_CRASH": abi.SYSTEM_EVENT_CRASH,
    "sizeof(struct kvm_irqchip)": abi.IRQCHIP_SIZE,
    "sizeof(struct kvm_pit_state2)": abi.PIT2_SIZE,
    "sizeof(struct kvm_lapic_state)": abi.LAPIC_SIZE,
    "sizeof(struct kvm_fpu)": abi.FPU_SIZE,
    "sizeof(struct kvm_xcrs)": abi.XCRS_SIZE,
    "sizeof(struct kvm_debugregs)": abi.DEBUGREGS_SIZE,
    "sizeof(struct kvm_vcpu_events)": abi.VCPU_EVENTS_SIZE,
    "sizeof(struct kvm_mp_state)": abi.MP_STATE_SIZE,
    "offsetof(struct kvm_run, immediate_exit)": abi.RUN_IMMEDIATE_EXIT,
    "offsetof(struct kvm_run, exit_reason)": abi.RUN_EXIT_REASON,
    "offsetof(struct kvm_run, io)": abi.RUN_UNION,
    "offsetof(struct kvm_run, io.size)": abi.RUN_UNION + 1,
    "offsetof(struct kvm_run, io.port)": abi.RUN_UNION + 2,
    "offsetof(struct kvm_run, io.count)": abi.RUN_UNION + 4,
    "offsetof(struct kvm_run, io.data_offset)": abi.RUN_UNION + 8,
    "offsetof(struct kvm_run, mmio.data)": abi.RUN_MMIO_DATA,
    "offsetof(struct kvm_run, mmio.len)": abi.RUN_UNION + 16,
    "offsetof(struct kvm_run, mmio.is_write)": abi.RUN_UNION + 20,
    "offsetof(struct kvm_run, fail_entry.cpu)": abi.RUN_UNION + 8,
    "offsetof(struct kvm_run, internal.ndata)": abi.RUN_UNION + 4,
    "offsetof(struct kvm_run, internal.data)": abi.RUN_UNION + 8,
    "offsetof(struct kvm_run, emulation_failure.flags)": abi.RUN_UNION + 8,
    "offsetof(struct kvm_run, emulation_failure.insn_size)": abi.RUN_UNION + 16,
    "offsetof(struct kvm_run, emulation_failure.insn_bytes)": abi.RUN_UNION + 17,
    "offsetof(struct kvm_run, system_event.ndata)": abi.RUN_UNION + 4,
}

STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "kvm_userspace_memory_region": abi.UserMemoryRegion,
    "kvm_regs": abi.Regs,
    "kvm_segment": abi.SegmentRegister,
    "kvm_dtable": abi.TableRegister,
    "kvm_sregs": abi.Sregs,
    "kvm_cpuid_entry2": abi.CpuidEntry,
    "kvm_cpuid2": abi.CpuidHeader,
    "kvm_msr_list": abi.MsrListHeader,
    "kvm_msrs": abi.MsrsHeader,
    "kvm_msr_entry": abi.MsrEntry,
    "kvm_irq_level": abi.IrqLevel,
    "kvm_msi": abi.Msi,
    "kvm_irq_routing": abi.IrqRoutingHeader,
    "kvm_irq_routing_entry": abi.IrqRoutingEntry,
    "kvm_irqfd": abi.Irqfd,
    "kvm_ioeventfd": abi.Ioeventfd,
    "kvm_pit_config": abi.PitConfig,
}


def test_numbers_and_layouts_are_those_of_the_kernels_header(tmp_path: Path) -> None:
    """Every ioctl number, constant, structure size and field offset equals what the compiler makes of <linux/kvm.h>."""
    expected = {f"KVM_{name}": getattr(abi, name) for name in IOCTLS} | CONSTANTS
    expected |= {name: number for number, (name, _) in abi.REQUIRED_CAPS.items()}
    expected |= {f"KVM_EXIT_{name}": number for number, name in abi.EXIT_NAMES.items()}
    for name, structure in STRUCTURES.items():
        expected[f"sizeof(struct {name})"] = ctypes.sizeof(structure)
        for field, *_ in structure._fields_:
            if field not in ("padding", "pad"):
                expected[f"offsetof(struct {name}, {field})"] = getattr(structure, field).offset
    lines = [f'printf("%llu\\n", (unsigned long long)({expression}));' for expression in expected]
    source = tmp_path / "abi.c"
    source.write_text(
        "\n".join(
            ("#include <stddef.h>", "#include <stdio.h>", "#include <linux/kvm.h>", "int main(void) {", *lines, "}", "")
        )
    )
    program = tmp_path / "abi"
    assert COMPILER is not None
    subprocess.run([COMPILER, "-o", program, source], check=True)
    printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    found = dict(zip(expected, map(int, printed.split()), strict=True))
    assert found == expected
