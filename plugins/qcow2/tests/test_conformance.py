"""The kit's tests, with qemu-img as the oracle."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vm_core.testing.conformance import FormatConformance, Sample
from vm_core.testing.qemu import LONG


class TestQcow2(FormatConformance):
    """QCOW2 in the variants that differ most."""

    driver = "qcow2"
    size = 1024 * 1024 + 512
    create_options = (
        {},
        {"cluster_size": 512, "refcount_bits": 64},
        {"cluster_size": 1024, "compat": "0.10"},
        {"cluster_size": 16384, "extended_l2": "on"},
        *([{"cluster_size": 4096, "refcount_bits": 1}, {"cluster_size": 2 << 20, "refcount_bits": 8}] if LONG else []),
    )
    operations = 100
    rounds = 1000 if LONG else 20
    cuts = 1000 if LONG else 30
    metadata = 6 << 16

    def samples(self, directory: Path) -> Iterable[Sample]:
        if not shutil.which("qemu-img"):
            return
        chance = random.Random(3)
        data = b"".join(chance.choice([bytes(4096), chance.randbytes(512) * 8]) for _ in range(256))
        raw = directory / "sample.raw"
        raw.write_bytes(data)
        for number, options in enumerate((["-c"], ["-c", "-o", "compression_type=zstd"], ["-o", "cluster_size=4k"])):
            path = directory / f"sample{number}.qcow2"
            subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, path], check=True)
            yield Sample(path, data)

    def oracle_read(self, path: Path) -> bytes | None:
        if not shutil.which("qemu-img"):
            return None
        raw = path.with_suffix(".oracle")
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw], check=True)
        return raw.read_bytes()

    def oracle_check(self, path: Path) -> None:
        if shutil.which("qemu-img"):
            done = subprocess.run(["qemu-img", "check", "-f", "qcow2", path], capture_output=True, text=True)
            assert done.returncode in (0, 3), done.stdout + done.stderr

    def oracle_make(self, path: Path, data: bytes, options: dict[str, Any]) -> bool:
        if not shutil.which("qemu-img"):
            return False
        raw = path.with_suffix(".source")
        raw.write_bytes(data)
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *words, raw, path], check=True)
        return True
