"""A vCPU: KVM_RUN in a loop, and what its exits ask for.

Theory of operation. KVM_RUN returns 0 with an exit reason when the guest needs something (a port, a register), and -1
with EINTR when it was kicked. The effect of an ``in`` or of an MMIO read reaches the guest's registers at the *next*
KVM_RUN, so the loop never ends on such an exit: it goes back into KVM_RUN, which completes the instruction before it
looks at ``immediate_exit`` (5, "the pending operations are completed … before performing any other"). A vCPU that has
returned from :meth:`KvmVCpu.run` is therefore always between two instructions.

HLT, interrupts, INIT and start-up IPIs never come here: the kernel's interrupt chip keeps the thread inside KVM_RUN.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import threading
from typing import TYPE_CHECKING

from vm_core.machine.accel import CpuState, VCpu

from . import abi, kick, mmio, state
from .cpuid import cpuid_for, load
from .syscall import ioctl, raw_ioctl

if TYPE_CHECKING:
    from .accelerator import KvmAccelerator

_MASKS = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF}


class KvmVCpu(VCpu):
    """vCPU *index* of *accelerator*'s VM. Its APIC ID is its index."""

    def __init__(self, accelerator: KvmAccelerator, index: int) -> None:
        self._accelerator = accelerator
        self._machine = accelerator.machine
        self.index = index
        self._fd = ioctl(accelerator.vm, abi.CREATE_VCPU, index)
        self._page = mmap.mmap(self._fd, accelerator.system.run_size())
        self._fresh = True
        self._new_state: state.SavedState | None = None
        #: Held while a signal is sent, and while the thread that would receive it comes or goes.
        self._kicking = threading.Lock()
        self._thread: int | None = None
        kick.install_handler()

    # Running.

    def run(self) -> None:
        """Execute until the machine wants the thread back. See :class:`~vm_core.machine.accel.VCpu`."""
        kick.accept_in_this_thread()
        with self._kicking:
            self._thread = threading.get_ident()
        try:
            self._fresh = False
            self._page[abi.RUN_IMMEDIATE_EXIT] = 0
            if not self._machine.must_return():
                self._tell_of_pause()
                self._loop()
        finally:
            with self._kicking:
                self._thread = None

    def _loop(self) -> None:
        fd, page, machine = self._fd, self._page, self._machine
        while True:
            if raw_ioctl(fd, abi.RUN, None) == -1:
                code = ctypes.get_errno()
                # EAGAIN: a vCPU that waited for its start-up IPI has got something to look at.
                if code not in (errno.EINTR, errno.EAGAIN):
                    machine.internal_error(f"KVM: vCPU {self.index} cannot run: {os.strerror(code)}{self._where()}")
                    return
                page[abi.RUN_IMMEDIATE_EXIT] = 0
                if machine.must_return():
                    return
                continue
            reason = page[abi.RUN_EXIT_REASON]  # the low byte of 32 bits: there are not 256 reasons
            if reason == abi.EXIT_IO:
                self._port()
            elif reason == abi.EXIT_MMIO:
                self._mmio()
            elif reason != abi.EXIT_INTR and not self._other(reason):
                return

    def _port(self) -> None:
        """IN, OUT, INS, OUTS."""
        page, machine = self._page, self._machine
        out, size, port, count, at = abi.RUN_IO.unpack_from(page, abi.RUN_UNION)
        end = at + size * count
        if out:
            data = page[at:end]
            with machine.lock:
                if count == 1:
                    machine.ports.write(port, size, int.from_bytes(data, "little"))
                else:
                    machine.ports.write_block(port, size, data)
        else:
            with machine.lock:
                if count == 1:
                    data = (machine.ports.read(port, size) & _MASKS[size]).to_bytes(size, "little")
                else:
                    data = machine.ports.read_block(port, size, count)
            page[at:end] = data

    def _mmio(self) -> None:
        page, machine = self._page, self._machine
        address, data, length, write = abi.RUN_MMIO.unpack_from(page, abi.RUN_UNION)
        with machine.lock:
            if write:
                mmio.write(machine.memory, address, data[:length])
                return
            data = mmio.read(machine.memory, address, length)
        page[abi.RUN_MMIO_DATA : abi.RUN_MMIO_DATA + length] = data

    def _other(self, reason: int) -> bool:
        """The exits that end something; True: go on."""
        page, machine = self._page, self._machine
        if reason == abi.EXIT_SHUTDOWN:
            machine.request_reset("triple fault")
        elif reason == abi.EXIT_SYSTEM_EVENT:
            kind, _ = abi.RUN_SYSTEM_EVENT.unpack_from(page, abi.RUN_UNION)
            if kind == abi.SYSTEM_EVENT_RESET:
                machine.request_reset("reset by the guest")
            else:
                names = {abi.SYSTEM_EVENT_SHUTDOWN: "shutdown", abi.SYSTEM_EVENT_CRASH: "crash"}
                machine.internal_error(f"KVM: system event {kind} ({names.get(kind, 'unknown')}){self._where()}")
        elif reason == abi.EXIT_FAIL_ENTRY:
            why, cpu = abi.RUN_FAIL_ENTRY.unpack_from(page, abi.RUN_UNION)
            machine.internal_error(
                f"KVM: the processor refuses to enter the guest, reason {why:#x} on host CPU {cpu}{self._where()}"
            )
        elif reason == abi.EXIT_INTERNAL_ERROR:
            machine.internal_error(f"KVM: internal error, {self._internal()}{self._where()}")
        else:
            name = abi.EXIT_NAMES.get(reason, "unknown")
            machine.internal_error(f"KVM: unexpected exit {reason} ({name}){self._where()}")
        return False

    def _internal(self) -> str:
        suberror, count, *data = abi.RUN_INTERNAL.unpack_from(self._page, abi.RUN_UNION)
        text = abi.INTERNAL_ERROR_NAMES.get(suberror, f"suberror {suberror}")
        if suberror == abi.INTERNAL_ERROR_EMULATION and count >= 4:
            _, _, flags, size, code = abi.RUN_EMULATION.unpack_from(self._page, abi.RUN_UNION)
            if flags & abi.EMULATION_HAS_BYTES:
                text += f" ({code[:size].hex(' ')})"
        elif count:
            text += " (" + " ".join(f"{word:#x}" for word in data[: min(count, 16)]) + ")"
        return text

    def _where(self) -> str:
        try:
            shown = state.registers(self._fd)
        except OSError:
            return ""
        return "\n" + " ".join(f"{name}={value:x}" for name, value in shown.items())

    def _tell_of_pause(self) -> None:
        """Let the guest's watchdogs know that it may have been held (4.62). No guest without kvm-clock minds."""
        try:
            ioctl(self._fd, abi.KVMCLOCK_CTRL)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise

    # From outside.

    def kick(self) -> None:
        """Get the thread out of KVM_RUN. See :mod:`vm_kvm.kick` for why none is lost."""
        with self._kicking:
            if self._page.closed:
                return
            self._page[abi.RUN_IMMEDIATE_EXIT] = 1
            if self._thread is not None and self._thread != threading.get_ident():
                signal.pthread_kill(self._thread, kick.KICK_SIGNAL)

    def reset(self, start: CpuState) -> None:
        """Everything to its state after RESET; vCPU 0 then gets the registers of *start*.

        The other vCPUs wait for the start-up IPI that gives them theirs. The first reset is the time at which the
        number of vCPUs is known, and with it what CPUID answers. The local APIC is reset here, the other chips by
        ``irqchip.reset()``.
        """
        if self._new_state is None:
            accelerator = self._accelerator
            load(
                self._fd,
                cpuid_for(
                    accelerator.supported_cpuid,
                    self.index,
                    accelerator.vcpu_count,
                    deadline_timer=accelerator.deadline_timer,
                ),
            )
            self._new_state = state.SavedState(self._fd, accelerator.msr_indices)
        elif not self._fresh:
            self._new_state.restore(self._fd)
            self._fresh = True
        if self.index == 0:
            state.load_cpu_state(self._fd, start)

    def registers(self) -> dict[str, int]:
        """General, segment and control registers."""
        return state.registers(self._fd)

    def close(self) -> None:
        """Release the vCPU."""
        with self._kicking:
            if not self._page.closed:
                self._page.close()
                os.close(self._fd)
