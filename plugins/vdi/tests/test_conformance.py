"""The kit's tests, with qemu-img as the oracle."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest
from vdi_images import build

from vm_core.testing.conformance import Sample
from vm_core.testing.qemu import LONG, Qemu, QemuConformance


class TestVdi(QemuConformance):
    """Dynamic and static images."""

    driver = "vdi"
    size = 3 * 1024 * 1024 + 512
    create_options = ({}, {"static": True})
    operations = 400 if LONG else 60
    rounds = 1000 if LONG else 40
    cuts = 300 if LONG else 12
    cut_size = 3 << 20
    metadata = 2048
    header = 456

    def oracle_check(self, path: Path) -> None:
        """A power cut may leave blocks that nobody uses, which the peer counts as an error of one kind."""
        if not shutil.which("qemu-img"):
            return
        found = Qemu("vdi").check(path)
        unused = re.fullmatch(r"ERROR: allocated blocks mismatch, is (\d+), should be (\d+)\n", found["text"])
        if unused and int(unused[1]) < int(unused[2]):
            assert found["corruptions"] == 1
        else:
            assert found["code"] == 0, found


class TestVdiOfSmallBlocks(QemuConformance):
    """Images with blocks that only we read; made by the tests from the description of the format."""

    driver = "vdi"
    rounds = 1000 if LONG else 40
    metadata = 4096
    header = 0
    create_options = ()

    def samples(self, directory: Path) -> list[Sample]:
        chance, found = random.Random(9), []
        for block in (512, 4096, 65536):
            data = b"".join(chance.choice([bytes(512), chance.randbytes(512)]) for _ in range(600))
            path = directory / f"{block}.vdi"
            path.write_bytes(build(data, block, chance))
            found.append(Sample(path, data))
        return found

    @pytest.mark.skip("there is no other program that reads these")
    def test_oracle_reads_the_same(self, tmp_path: Path) -> None: ...

    test_reads_what_the_oracle_wrote = test_oracle_reads_the_same
    test_writes_like_a_bytearray = test_oracle_reads_the_same
    test_survives_errors_of_the_storage = test_oracle_reads_the_same
    test_power_cuts_lose_nothing_flushed = test_oracle_reads_the_same
