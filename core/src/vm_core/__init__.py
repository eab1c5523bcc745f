"""Disk images and the virtual machines on top of them, in Python.

    import vm_core

    with vm_core.open("disk.qcow2") as image:           # any installed format, probed; read-only
        boot_sector = image.read(512)
        for run in image.map():
            print(run.start, run.length, "data" if run.data else "hole")

    vm_core.create("new.qcow2", "10G", format="qcow2")
    with vm_core.open("new.qcow2", "r+") as image:      # locked against other writers, QEMU included
        image.seek(1 << 20)
        image.write(b"hello")
        image.flush()

    vm_core.convert("new.qcow2", "new.vmdk", format="vmdk")
    vm_core.compare("new.qcow2", "new.vmdk").difference is None

Everything here is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .block.cache import CacheMode
    from .block.gate import Gate
    from .block.jobs.job import Cancelled, Job
    from .block.jobs.manifest import Manifest
    from .errors import BlockError, GateError, ImageError, LockError, PluginError, UsageError, VmError
    from .image import Image, MapEntry, create, open
    from .jobs import commit, compact, compare, convert, manifest, measure, rebase, verify

__all__ = [
    "BlockError",
    "CacheMode",
    "Cancelled",
    "Gate",
    "GateError",
    "Image",
    "ImageError",
    "Job",
    "LockError",
    "Manifest",
    "MapEntry",
    "PluginError",
    "UsageError",
    "VmError",
    "commit",
    "compact",
    "compare",
    "convert",
    "create",
    "manifest",
    "measure",
    "open",
    "rebase",
    "verify",
]

_WHERE = {
    "CacheMode": "vm_core.block.cache",
    "Cancelled": "vm_core.block.jobs.job",
    "Gate": "vm_core.block.gate",
    "Image": "vm_core.image",
    "Job": "vm_core.block.jobs.job",
    "Manifest": "vm_core.block.jobs.manifest",
    "MapEntry": "vm_core.image",
    "commit": "vm_core.jobs",
    "compact": "vm_core.jobs",
    "compare": "vm_core.jobs",
    "convert": "vm_core.jobs",
    "create": "vm_core.image",
    "manifest": "vm_core.jobs",
    "measure": "vm_core.jobs",
    "open": "vm_core.image",
    "rebase": "vm_core.jobs",
    "verify": "vm_core.jobs",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'vm_core' has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(_WHERE.get(name, "vm_core.errors")), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
