"""What this distribution brings: the accelerator ``kvm``."""

from __future__ import annotations

from collections.abc import Iterable

from vm_core.descriptors import AcceleratorDriver
from vm_core.hookspecs import hookimpl


@hookimpl
def vm_accelerators() -> Iterable[AcceleratorDriver]:
    """The processor's own virtualisation, on Linux."""
    return [
        AcceleratorDriver(
            name="kvm",
            summary="Linux's hypervisor: guest code runs on the host's processor",
            implementation="vm_kvm.accelerator:KvmAccelerator",
            capabilities=frozenset({"irqchip", "ioeventfd", "irqfd", "smp"}),
        )
    ]
