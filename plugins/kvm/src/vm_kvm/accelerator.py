"""The accelerator ``kvm``: a virtual machine of the kernel's, and its parts."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Final

from vm_core.errors import UsageError, VmError
from vm_core.machine.accel import Accelerator, AccelMachine, Availability
from vm_core.machine.memory import GuestMemory

from . import abi, probe
from .irqchip import KvmIrqchip
from .slots import SlotMap
from .syscall import ioctl
from .system import KvmUnavailableError, System
from .vcpu import KvmVCpu

#: Four pages that Intel processors without "unrestricted guest" need below 4 GiB (4.37, 4.38): the identity page table,
#: then three of a task state segment. They lie between the local APIC and the firmware, where no PCI window goes.
_IDENTITY_MAP: Final = 0xFEFFC000
_TSS: Final = 0xFEFFD000


class KvmAccelerator(Accelerator):
    """One VM, for one machine. It has no options."""

    irqchip: KvmIrqchip

    @classmethod
    def availability(cls) -> Availability:
        """Whether /dev/kvm opens, and whether it runs guests on the processor or emulates them.

        Costs some microseconds on the former, about 15 ms on the latter, once in a process.
        """
        try:
            speed = probe.measure()
        except KvmUnavailableError as e:
            return Availability(False, str(e))
        except OSError as e:
            return Availability(False, f"KVM does not work here: {e}")
        if speed.hardware:
            return Availability(True, hardware_speed=True)
        return Availability(True, f"KVM emulates every instruction here ({speed.mips:.1f} million a second)")

    def __init__(self, machine: AccelMachine, options: dict[str, str]) -> None:
        """Make the VM, with its interrupt chips. Raises KvmUnavailableError. No *options* are popped: it has none."""
        self.machine = machine
        self.system = System()
        self.vm = -1
        self._vcpus: list[KvmVCpu] = []
        #: (address, size, fd, port, value) of every ioeventfd.
        self._kicks: set[tuple[int, int, int, bool, int | None]] = set()
        try:
            self.vm = self.system.create_vm()
            ioctl(self.vm, abi.SET_IDENTITY_MAP_ADDR, (ctypes.c_uint64 * 1)(_IDENTITY_MAP))
            ioctl(self.vm, abi.SET_TSS_ADDR, _TSS)
            self.irqchip = KvmIrqchip(self.vm)
            self.supported_cpuid = self.system.supported_cpuid()
            self.msr_indices = self.system.msr_indices()
            self.deadline_timer = bool(self.system.extension(abi.CAP_TSC_DEADLINE_TIMER))
        except OSError as e:
            self.close()
            raise KvmUnavailableError(f"KVM cannot make a virtual machine: {e.strerror}") from None
        except BaseException:
            self.close()
            raise
        self._slots = SlotMap(self.vm)

    @property
    def vcpu_count(self) -> int:
        """vCPUs made so far; all of them are, before the first is reset."""
        return len(self._vcpus)

    def create_vcpu(self, index: int) -> KvmVCpu:
        """Make vCPU *index* (0, 1, 2, … in turn)."""
        try:
            vcpu = KvmVCpu(self, index)
        except OSError as e:
            if e.errno == errno.EEXIST:
                raise UsageError(f"KVM: there are two vCPUs {index}") from None
            raise VmError(f"KVM cannot make vCPU {index}: {e.strerror}") from None
        self._vcpus.append(vcpu)
        return vcpu

    def memory_changed(self, memory: GuestMemory) -> None:
        """Bring the memory slots up to date."""
        self._slots.update(memory)

    # ioeventfd.

    def bind_kick(self, address: int, size: int, fd: int, *, port: bool, value: int | None = None) -> bool:
        """Guest writes of *size* bytes to *address* (of *value* only) signal eventfd *fd* without an exit.

        *size* 0 takes writes of any size. False where the kernel has no room for another one, or has one there.
        """
        try:
            self._ioeventfd(address, size, fd, port, value, 0)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EEXIST, errno.EINVAL):
                return False
            raise
        self._kicks.add((address, size, fd, port, value))
        return True

    def unbind_kick(self, address: int, size: int, fd: int, *, port: bool, value: int | None = None) -> None:
        """Undo :meth:`bind_kick`, with the same arguments; what was not bound is left alone."""
        key = (address, size, fd, port, value)
        if key in self._kicks:
            self._kicks.discard(key)
            self._ioeventfd(address, size, fd, port, value, abi.IOEVENTFD_DEASSIGN)

    def _ioeventfd(self, address: int, size: int, fd: int, port: bool, value: int | None, flags: int) -> None:
        if port:
            flags |= abi.IOEVENTFD_PIO
        if value is not None:
            flags |= abi.IOEVENTFD_DATAMATCH
        ioctl(
            self.vm,
            abi.IOEVENTFD,
            abi.Ioeventfd(datamatch=value or 0, addr=address, len=size, fd=fd, flags=flags),
        )

    # irqfd.

    def bind_msi(self, fd: int, address: int, data: int) -> bool:
        """Signals of eventfd *fd* become that interrupt, without a system call of ours. See the base class."""
        try:
            self.irqchip.bind_msi(fd, address, data)
        except VmError:  # the routing table is full
            return False
        return True

    def unbind_msi(self, fd: int) -> None:
        """Undo :meth:`bind_msi`."""
        self.irqchip.unbind_msi(fd)

    def close(self) -> None:
        """Release the VM."""
        for vcpu in self._vcpus:
            vcpu.close()
        if self.vm >= 0:
            os.close(self.vm)
            self.vm = -1
        self.system.close()
