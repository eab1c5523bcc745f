"""The kit's tests, with qemu-img as the oracle."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from vhd_images import build, footer

from vm_core.testing.conformance import Sample
from vm_core.testing.qemu import LONG, QemuConformance


class TestVpc(QemuConformance):
    """Dynamic and fixed images."""

    driver = "vpc"
    checks = False
    size = 5 * 1024 * 1024 + 512
    create_options = ({"force_size": True}, {"subformat": "fixed"})
    operations = 400 if LONG else 60
    rounds = 1000 if LONG else 30
    cuts = 300 if LONG else 12
    cut_size = 5 << 20
    metadata = 2048
    header = 512 + 64

    @pytest.mark.skip("a fixed image is never recognised, only named")
    def test_probe_knows_its_own(self, tmp_path: Path) -> None: ...


class TestVpcOfSmallBlocks(QemuConformance):
    """Blocks of other sizes, with bitmaps of one sector and of several."""

    driver = "vpc"
    checks = False
    rounds = 1000 if LONG else 30
    metadata = 4096
    header = 0
    create_options = ()

    def samples(self, directory: Path) -> list[Sample]:
        chance, found = random.Random(9), []
        for block in (512, 4096, 65536, 4 << 20):
            data = b"".join(chance.choice([bytes(512), chance.randbytes(512)]) for _ in range(600))
            path = directory / f"{block}.vhd"
            path.write_bytes(build(data, block, chance))
            found.append(Sample(path, data))
        return found

    def test_the_peer_reads_the_samples(self, tmp_path: Path) -> None:
        """The images built by the tests are images to the peer too."""
        for sample in self.samples(tmp_path)[1:]:  # it gives blocks below 4 KiB no bitmap at all
            assert self.oracle_read(sample.path) in (sample.data, None)

    @pytest.mark.skip("these are not made by the driver")
    def test_oracle_reads_the_same(self, tmp_path: Path) -> None: ...

    test_reads_what_the_oracle_wrote = test_oracle_reads_the_same
    test_writes_like_a_bytearray = test_oracle_reads_the_same
    test_survives_errors_of_the_storage = test_oracle_reads_the_same
    test_power_cuts_lose_nothing_flushed = test_oracle_reads_the_same


def test_fixed_images_stay_fixed(tmp_path: Path) -> None:
    """A guest that writes the headers of a dynamic image into its first sectors changes nothing but those."""
    from vm_core.block.open import open_node

    path = tmp_path / "disk.vhd"
    inner = build(b"secret" * 1000, 512)
    data = inner.ljust(1 << 20, b"\0")
    path.write_bytes(data + footer(len(data), 2))
    with open_node(str(path), format="vpc") as node:
        assert node.size == 1 << 20
        assert node.pread(0, node.size) == data
