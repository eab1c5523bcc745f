"""The kit's tests, with qemu-img as the oracle."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterable
from pathlib import Path

from vm_core.testing.conformance import Sample
from vm_core.testing.qemu import LONG, Qemu, QemuConformance


class TestVmdk(QemuConformance):
    """Images in one file, which is what the kit has room for; the others are in ``test_interop.py``."""

    driver = "vmdk"
    size = 1024 * 1024 + 512
    create_options = ({}, {"zeroed_grain": True, "adapter_type": "lsilogic"})
    operations = 100
    rounds = 1000 if LONG else 40
    cuts = 1000 if LONG else 60
    metadata = 1 << 16

    def samples(self, directory: Path) -> Iterable[Sample]:
        if not shutil.which("qemu-img"):
            return
        chance = random.Random(3)
        data = b"".join(chance.choice([bytes(65536), chance.randbytes(512) * 128]) for _ in range(24))
        raw = directory / "sample.raw"
        raw.write_bytes(data)
        path = directory / "stream.vmdk"
        Qemu("vmdk").img("convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized", raw, path)
        yield Sample(path, data)
