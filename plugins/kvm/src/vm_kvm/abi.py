"""The binary interface of /dev/kvm on x86-64: ioctl numbers, structures, exit reasons.

Source: the kernel's "The Definitive KVM (Kernel-based Virtual Machine) API Documentation"
(Documentation/virt/kvm/api.rst, https://docs.kernel.org/virt/kvm/api.html); the section is named beside each item. A
structure's fields are in the order of that document; ``tests/test_abi.py`` compares every number, size and offset here
with what a C compiler makes of <linux/kvm.h>.
"""

from __future__ import annotations

import ctypes
import struct
from ctypes import c_int32, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Final

#: The only version there will be (4.1: "refuse to run if KVM_GET_API_VERSION returns a value other than 12").
API_VERSION: Final = 12

# Structures.


class UserMemoryRegion(ctypes.Structure):
    """4.35: one memory slot. A size of 0 deletes it."""

    _fields_ = (
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    )


MEM_READONLY: Final = 1 << 1


class Regs(ctypes.Structure):
    """4.11: general registers."""

    _fields_ = (
        *((name, c_uint64) for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp")),
        *((f"r{number}", c_uint64) for number in range(8, 16)),
        *((name, c_uint64) for name in ("rip", "rflags")),
    )


class SegmentRegister(ctypes.Structure):
    """4.13: a segment register with its hidden part. *limit* counts bytes, whatever *g* says."""

    _fields_ = (
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    )


class TableRegister(ctypes.Structure):
    """4.13: GDTR or IDTR."""

    _fields_ = (("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3))


class Sregs(ctypes.Structure):
    """4.13: special registers."""

    _fields_ = (
        ("cs", SegmentRegister),
        ("ds", SegmentRegister),
        ("es", SegmentRegister),
        ("fs", SegmentRegister),
        ("gs", SegmentRegister),
        ("ss", SegmentRegister),
        ("tr", SegmentRegister),
        ("ldt", SegmentRegister),
        ("gdt", TableRegister),
        ("idt", TableRegister),
        ("cr0", c_uint64),
        ("cr2", c_uint64),
        ("cr3", c_uint64),
        ("cr4", c_uint64),
        ("cr8", c_uint64),
        ("efer", c_uint64),
        ("apic_base", c_uint64),
        ("interrupt_bitmap", c_uint64 * 4),
    )


class CpuidEntry(ctypes.Structure):
    """4.46: what one CPUID leaf answers."""

    _fields_ = (
        ("function", c_uint32),
        ("index", c_uint32),
        ("flags", c_uint32),
        ("eax", c_uint32),
        ("ebx", c_uint32),
        ("ecx", c_uint32),
        ("edx", c_uint32),
        ("padding", c_uint32 * 3),
    )


#: The leaf has subleaves: *index* is ECX.
CPUID_SIGNIFICANT_INDEX: Final = 1 << 0


class CpuidHeader(ctypes.Structure):
    """4.46: counts the entries that follow it."""

    _fields_ = (("nent", c_uint32), ("padding", c_uint32))


class MsrListHeader(ctypes.Structure):
    """4.3: counts the 32-bit MSR numbers that follow it."""

    _fields_ = (("nmsrs", c_uint32),)


class MsrsHeader(ctypes.Structure):
    """4.18: counts the entries that follow it."""

    _fields_ = (("nmsrs", c_uint32), ("pad", c_uint32))


class MsrEntry(ctypes.Structure):
    """4.18: one model-specific register."""

    _fields_ = (("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64))


class IrqLevel(ctypes.Structure):
    """4.25: drive a GSI to a level."""

    _fields_ = (("irq", c_uint32), ("level", c_uint32))


class Msi(ctypes.Structure):
    """4.70: a message-signalled interrupt."""

    _fields_ = (
        ("address_lo", c_uint32),
        ("address_hi", c_uint32),
        ("data", c_uint32),
        ("flags", c_uint32),
        ("devid", c_uint32),
        ("pad", c_uint8 * 12),
    )


class IrqRoutingHeader(ctypes.Structure):
    """4.52: counts the entries that follow it."""

    _fields_ = (("nr", c_uint32), ("flags", c_uint32))


class IrqRoutingEntry(ctypes.Structure):
    """4.52: where a GSI goes. *u* is (chip, pin) or (address low, address high, data)."""

    _fields_ = (
        ("gsi", c_uint32),
        ("type", c_uint32),
        ("flags", c_uint32),
        ("pad", c_uint32),
        ("u", c_uint32 * 8),
    )


ROUTING_IRQCHIP: Final = 1
ROUTING_MSI: Final = 2
CHIP_PIC_MASTER: Final = 0
CHIP_PIC_SLAVE: Final = 1
CHIP_IOAPIC: Final = 2


class Irqfd(ctypes.Structure):
    """4.75: an eventfd whose signals raise a GSI."""

    _fields_ = (
        ("fd", c_uint32),
        ("gsi", c_uint32),
        ("flags", c_uint32),
        ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    )


IRQFD_DEASSIGN: Final = 1 << 0


class Ioeventfd(ctypes.Structure):
    """4.59: an eventfd that guest writes signal."""

    _fields_ = (
        ("datamatch", c_uint64),
        ("addr", c_uint64),
        ("len", c_uint32),
        ("fd", c_int32),
        ("flags", c_uint32),
        ("pad", c_uint8 * 36),
    )


IOEVENTFD_DATAMATCH: Final = 1 << 0
IOEVENTFD_PIO: Final = 1 << 1
IOEVENTFD_DEASSIGN: Final = 1 << 2


class PitConfig(ctypes.Structure):
    """4.71: how to make the PIT."""

    _fields_ = (("flags", c_uint32), ("pad", c_uint32 * 15))


#: The kernel answers port 0x61 too: gate and output of counter 2, the refresh bit.
PIT_SPEAKER_DUMMY: Final = 1

# States that are only ever saved and put back, as sizes in bytes.

#: 4.24 struct kvm_irqchip: chip_id u32, padding, 512 bytes.
IRQCHIP_SIZE: Final = 520
#: 4.70 struct kvm_pit_state2.
PIT2_SIZE: Final = 112
#: 4.57 struct kvm_lapic_state.
LAPIC_SIZE: Final = 1024
#: 4.22 struct kvm_fpu.
FPU_SIZE: Final = 416
#: 4.43 struct kvm_xcrs.
XCRS_SIZE: Final = 392
#: 4.34 struct kvm_debugregs.
DEBUGREGS_SIZE: Final = 128
#: 4.31 struct kvm_vcpu_events.
VCPU_EVENTS_SIZE: Final = 64
#: 4.38 struct kvm_mp_state.
MP_STATE_SIZE: Final = 4

# ioctl numbers: direction, size, type and number as in asm-generic/ioctl.h.

_WRITE = 1
_READ = 2


def _ioc(direction: int, number: int, size: int) -> int:
    return direction << 30 | size << 16 | 0xAE << 8 | number


def _io(number: int) -> int:
    return _ioc(0, number, 0)


def _iow(number: int, argument: type[ctypes.Structure] | int) -> int:
    return _ioc(_WRITE, number, argument if isinstance(argument, int) else ctypes.sizeof(argument))


def _ior(number: int, argument: type[ctypes.Structure] | int) -> int:
    return _ioc(_READ, number, argument if isinstance(argument, int) else ctypes.sizeof(argument))


def _iowr(number: int, argument: type[ctypes.Structure] | int) -> int:
    return _ioc(_READ | _WRITE, number, argument if isinstance(argument, int) else ctypes.sizeof(argument))


# On /dev/kvm.
GET_API_VERSION: Final = _io(0x00)
CREATE_VM: Final = _io(0x01)
GET_MSR_INDEX_LIST: Final = _iowr(0x02, MsrListHeader)
CHECK_EXTENSION: Final = _io(0x03)
GET_VCPU_MMAP_SIZE: Final = _io(0x04)
GET_SUPPORTED_CPUID: Final = _iowr(0x05, CpuidHeader)

# On a VM.
CREATE_VCPU: Final = _io(0x41)
SET_USER_MEMORY_REGION: Final = _iow(0x46, UserMemoryRegion)
SET_TSS_ADDR: Final = _io(0x47)
SET_IDENTITY_MAP_ADDR: Final = _iow(0x48, 8)
CREATE_IRQCHIP: Final = _io(0x60)
IRQ_LINE: Final = _iow(0x61, IrqLevel)
GET_IRQCHIP: Final = _iowr(0x62, IRQCHIP_SIZE)
SET_IRQCHIP: Final = _ior(0x63, IRQCHIP_SIZE)
SET_GSI_ROUTING: Final = _iow(0x6A, IrqRoutingHeader)
IRQFD: Final = _iow(0x76, Irqfd)
CREATE_PIT2: Final = _iow(0x77, PitConfig)
IOEVENTFD: Final = _iow(0x79, Ioeventfd)
GET_PIT2: Final = _ior(0x9F, PIT2_SIZE)
SET_PIT2: Final = _iow(0xA0, PIT2_SIZE)
SIGNAL_MSI: Final = _iow(0xA5, Msi)

# On a vCPU.
RUN: Final = _io(0x80)
GET_REGS: Final = _ior(0x81, Regs)
SET_REGS: Final = _iow(0x82, Regs)
GET_SREGS: Final = _ior(0x83, Sregs)
SET_SREGS: Final = _iow(0x84, Sregs)
GET_MSRS: Final = _iowr(0x88, MsrsHeader)
SET_MSRS: Final = _iow(0x89, MsrsHeader)
GET_FPU: Final = _ior(0x8C, FPU_SIZE)
SET_FPU: Final = _iow(0x8D, FPU_SIZE)
GET_LAPIC: Final = _ior(0x8E, LAPIC_SIZE)
SET_LAPIC: Final = _iow(0x8F, LAPIC_SIZE)
SET_CPUID2: Final = _iow(0x90, CpuidHeader)
GET_MP_STATE: Final = _ior(0x98, MP_STATE_SIZE)
SET_MP_STATE: Final = _iow(0x99, MP_STATE_SIZE)
GET_VCPU_EVENTS: Final = _ior(0x9F, VCPU_EVENTS_SIZE)
SET_VCPU_EVENTS: Final = _iow(0xA0, VCPU_EVENTS_SIZE)
GET_DEBUGREGS: Final = _ior(0xA1, DEBUGREGS_SIZE)
SET_DEBUGREGS: Final = _iow(0xA2, DEBUGREGS_SIZE)
GET_XCRS: Final = _ior(0xA6, XCRS_SIZE)
SET_XCRS: Final = _iow(0xA7, XCRS_SIZE)
KVMCLOCK_CTRL: Final = _io(0xAD)

# Extensions (4.4): what this accelerator needs, by number and name, with the kernel that brought it.
CAP_TSC_DEADLINE_TIMER: Final = 72
CAP_IRQCHIP: Final = 0
REQUIRED_CAPS: Final[dict[int, tuple[str, str]]] = {
    CAP_IRQCHIP: ("KVM_CAP_IRQCHIP", "2.6.20"),
    3: ("KVM_CAP_USER_MEMORY", "2.6.25"),
    4: ("KVM_CAP_SET_TSS_ADDR", "2.6.25"),
    7: ("KVM_CAP_EXT_CPUID", "2.6.26"),
    25: ("KVM_CAP_IRQ_ROUTING", "2.6.30"),
    32: ("KVM_CAP_IRQFD", "2.6.32"),
    33: ("KVM_CAP_PIT2", "2.6.32"),
    36: ("KVM_CAP_IOEVENTFD", "2.6.32"),
    37: ("KVM_CAP_SET_IDENTITY_MAP_ADDR", "2.6.33"),
    77: ("KVM_CAP_SIGNAL_MSI", "3.5"),
    81: ("KVM_CAP_READONLY_MEM", "3.7"),
    136: ("KVM_CAP_IMMEDIATE_EXIT", "4.13"),
}

# struct kvm_run (5): offsets in bytes, and the parts of its union as packed structures at RUN_UNION.

RUN_IMMEDIATE_EXIT: Final = 1
RUN_EXIT_REASON: Final = 8
RUN_UNION: Final = 32

#: KVM_EXIT_IO: direction (1: out) u8, size u8, port u16, count u32, data_offset u64 (from the start of kvm_run).
RUN_IO: Final = struct.Struct("<BBHIQ")
#: KVM_EXIT_MMIO: phys_addr u64, data u8[8], len u32, is_write u8.
RUN_MMIO: Final = struct.Struct("<Q8sIB")
RUN_MMIO_DATA: Final = RUN_UNION + 8
#: KVM_EXIT_FAIL_ENTRY: hardware_entry_failure_reason u64, cpu u32.
RUN_FAIL_ENTRY: Final = struct.Struct("<QI")
#: KVM_EXIT_INTERNAL_ERROR: suberror u32, ndata u32, data u64[16].
RUN_INTERNAL: Final = struct.Struct("<II16Q")
#: … of suberror 1 with ndata >= 4: flags u64, insn_size u8, insn_bytes u8[15], after suberror and ndata.
RUN_EMULATION: Final = struct.Struct("<IIQB15s")
#: KVM_EXIT_SYSTEM_EVENT: type u32, ndata u32.
RUN_SYSTEM_EVENT: Final = struct.Struct("<II")

EXIT_IO: Final = 2
EXIT_HLT: Final = 5
EXIT_MMIO: Final = 6
EXIT_SHUTDOWN: Final = 8
EXIT_FAIL_ENTRY: Final = 9
EXIT_INTR: Final = 10
EXIT_INTERNAL_ERROR: Final = 17
EXIT_SYSTEM_EVENT: Final = 24

#: Names of the exits that are not handled, for messages.
EXIT_NAMES: Final[dict[int, str]] = {
    0: "UNKNOWN",
    1: "EXCEPTION",
    3: "HYPERCALL",
    4: "DEBUG",
    5: "HLT",
    7: "IRQ_WINDOW_OPEN",
    11: "SET_TPR",
    12: "TPR_ACCESS",
    16: "NMI",
    23: "EPR",
    26: "IOAPIC_EOI",
    27: "HYPERV",
    29: "X86_RDMSR",
    30: "X86_WRMSR",
    31: "DIRTY_RING_FULL",
    32: "AP_RESET_HOLD",
    33: "X86_BUS_LOCK",
    34: "XEN",
    37: "NOTIFY",
}

INTERNAL_ERROR_EMULATION: Final = 1
INTERNAL_ERROR_NAMES: Final[dict[int, str]] = {
    1: "an instruction that KVM cannot emulate",
    2: "simultaneous exceptions",
    3: "an exit while an event was being delivered",
    4: "an exit that KVM does not know",
}
EMULATION_HAS_BYTES: Final = 1 << 0

SYSTEM_EVENT_SHUTDOWN: Final = 1
SYSTEM_EVENT_RESET: Final = 2
SYSTEM_EVENT_CRASH: Final = 3
