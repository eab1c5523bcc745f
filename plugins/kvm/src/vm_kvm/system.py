"""/dev/kvm itself: opening it, and saying what is wrong where it does not open or is too old."""

from __future__ import annotations

import ctypes
import errno
import grp
import os
import platform
import stat
import sys

from vm_core.errors import VmError

from . import abi
from .syscall import ioctl

DEVICE = "/dev/kvm"


class KvmUnavailableError(VmError):
    """KVM cannot be used here; the message says why, and what would change that."""


class System:
    """The system handle: capabilities, and VMs."""

    def __init__(self, path: str = DEVICE) -> None:
        """Open *path* and check that the kernel has all that this accelerator uses. Raises KvmUnavailableError."""
        if not sys.platform.startswith("linux"):
            raise KvmUnavailableError(f"KVM is part of Linux, and this is {sys.platform}")
        if platform.machine() != "x86_64":
            raise KvmUnavailableError(
                f"KVM runs guests of the host's kind, and this host is {platform.machine()}, not x86_64"
            )
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise KvmUnavailableError(_open_failure(path, e)) from None
        try:
            self._check(path)
        except BaseException:
            self.close()
            raise

    def _check(self, path: str) -> None:
        try:
            version = ioctl(self.fd, abi.GET_API_VERSION)
        except OSError:
            raise KvmUnavailableError(f"{path} is not KVM's device") from None
        if version != abi.API_VERSION:
            raise KvmUnavailableError(f"{path} speaks API version {version}, not {abi.API_VERSION}")
        for number, (name, kernel) in abi.REQUIRED_CAPS.items():
            if not self.extension(number):
                raise KvmUnavailableError(f"{path} lacks {name}, which Linux has since {kernel}")

    def extension(self, capability: int) -> int:
        """What the kernel says to a KVM_CAP number: 0 for absent."""
        return ioctl(self.fd, abi.CHECK_EXTENSION, capability)

    def create_vm(self) -> int:
        """A new VM's file descriptor."""
        try:
            return ioctl(self.fd, abi.CREATE_VM, 0)
        except OSError as e:
            if e.errno == errno.EBUSY:
                raise KvmUnavailableError("another hypervisor holds the processor's virtualisation") from None
            raise KvmUnavailableError(f"KVM cannot make a virtual machine: {e.strerror}") from None

    def run_size(self) -> int:
        """Bytes to map of a vCPU (4.5)."""
        return ioctl(self.fd, abi.GET_VCPU_MMAP_SIZE)

    def supported_cpuid(self) -> list[abi.CpuidEntry]:
        """4.46: the CPUID leaves that this processor and kernel can give to a guest."""
        count = 128
        while True:
            buffer = ctypes.create_string_buffer(ctypes.sizeof(abi.CpuidHeader) + count * ctypes.sizeof(abi.CpuidEntry))
            header = abi.CpuidHeader.from_buffer(buffer)
            header.nent = count
            try:
                ioctl(self.fd, abi.GET_SUPPORTED_CPUID, buffer)
            except OSError as e:
                if e.errno != errno.E2BIG or count > 4096:
                    raise
                count *= 2
                continue
            entries = (abi.CpuidEntry * header.nent).from_buffer(buffer, ctypes.sizeof(abi.CpuidHeader))
            return [abi.CpuidEntry.from_buffer_copy(entry) for entry in entries]

    def msr_indices(self) -> list[int]:
        """4.3: the MSRs that make up a vCPU's state."""
        probe = abi.MsrListHeader(nmsrs=0)
        try:
            ioctl(self.fd, abi.GET_MSR_INDEX_LIST, probe)
        except OSError as e:
            if e.errno != errno.E2BIG:
                raise
        buffer = (ctypes.c_uint32 * (1 + probe.nmsrs))(probe.nmsrs)
        ioctl(self.fd, abi.GET_MSR_INDEX_LIST, buffer)
        return list(buffer[1 : 1 + buffer[0]])

    def close(self) -> None:
        """Close the handle; VMs live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _open_failure(path: str, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return (
            f"{path} does not exist: turn on virtualisation (VT-x, AMD-V) in the host's firmware "
            "and load the module kvm_intel or kvm_amd"
        )
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return f"{path} has no driver: load the module kvm_intel or kvm_amd"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission to open {path}: {_permission_remedy(path)}"
    return f"{path} does not open: {error.strerror}"


def _permission_remedy(path: str) -> str:
    info = os.stat(path)
    needed = stat.S_IRGRP | stat.S_IWGRP
    if info.st_mode & needed == needed:
        try:
            group = grp.getgrgid(info.st_gid).gr_name
        except KeyError:
            group = str(info.st_gid)
        if group != "root":
            return f"join the group {group} (sudo usermod -aG {group} $USER) and log in again"
    mode = stat.S_IMODE(info.st_mode)
    return (
        f"its mode is {mode:04o}; give it to the group kvm (sudo chgrp kvm {path}; sudo chmod 660 {path}) and join that"
    )
