"""Debian's i386 kernel with a busybox initramfs, as a guest of the tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import attrs
import pytest

from . import ROOT, absent

sys.path.insert(0, str(ROOT / "examples/linux_guest"))

import initramfs
import packages

APPEND = "console=ttyS0 no_timer_check tsc=unstable mitigations=off random.trust_cpu=on quiet"


@attrs.frozen
class LinuxParts:
    """The pieces of the guest, unpacked."""

    kernel: Path
    modules: Path
    busybox: Path

    def initrd(self, script: str) -> bytes:
        """An initramfs whose init runs *script* once the disk's modules are loaded."""
        return initramfs.build(self.busybox, self.modules, script)


def linux_parts() -> LinuxParts:
    """Fetch Debian's packages once; kept in VM_TEST_CACHE (default: build/tests beside the sources)."""
    cache = Path(os.environ.get("VM_TEST_CACHE") or ROOT / "build/tests")
    cache.mkdir(parents=True, exist_ok=True)
    try:
        root = packages.fetch_i386(cache / "i386", ["linux-image-686", "busybox-static"])
    except packages.PackageError as error:
        absent(str(error))
        pytest.fail("unreachable")
    return LinuxParts(next((root / "boot").glob("vmlinuz-*")), root / "lib/modules", root / "bin/busybox")
