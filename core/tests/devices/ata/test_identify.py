"""IDENTIFY DEVICE, word by word."""

from __future__ import annotations

import shutil
import subprocess
from types import SimpleNamespace

import pytest

from vm_core.devices.ata import Identity
from vm_core.testing.ata import AtaBench, AtaDriver


def words(size: int, **facts: object) -> tuple[int, ...]:
    bench = AtaBench()
    disk = bench.add_disk(0, identity=Identity(**facts))  # type: ignore[arg-type]

    disk.storage = SimpleNamespace(size=size, write_cache=True)  # more than memory holds
    return AtaDriver(bench).identify()


def string(values: tuple[int, ...]) -> str:
    return b"".join(value.to_bytes(2, "big") for value in values).decode()


def number(values: tuple[int, ...]) -> int:
    return sum(value << 16 * i for i, value in enumerate(values))


@pytest.mark.parametrize(
    ("sectors", "cylinders", "lba28"),
    [
        (131072, 130, 131072),
        (16514064, 16383, 16514064),
        (0x0FFFFFFF, 16383, 0x0FFFFFFF),
        (0x10000000, 16383, 0x0FFFFFFF),
        (1 << 40, 16383, 0x0FFFFFFF),
        (100, 2, 100),
    ],
)
def test_sizes(sectors: int, cylinders: int, lba28: int) -> None:
    """CHS, 28-bit and 48-bit capacities of small, large and very large disks."""
    w = words(sectors * 512)
    assert (w[1], w[3], w[6]) == (cylinders, 16, 63)
    assert number(w[60:62]) == lba28
    assert number(w[100:104]) == sectors
    assert number(w[57:59]) == w[54] * w[55] * w[56]


def test_strings_are_padded_and_swapped() -> None:
    """Serial, firmware and model are space-padded, with the first character in the high byte of a word."""
    w = words(1 << 20, serial="SER 9", firmware="1.2", model="A disk")
    assert string(w[10:20]) == "SER 9".ljust(20)
    assert string(w[23:27]) == "1.2".ljust(8)
    assert string(w[27:47]) == "A disk".ljust(40)


def test_checksum_and_signature() -> None:
    """Word 255 has the signature 0xA5, and all 512 bytes add up to zero."""
    w = words(1 << 20)
    assert w[255] & 0xFF == 0xA5
    assert sum(byte for word in w for byte in word.to_bytes(2, "little")) & 0xFF == 0


def test_options_show() -> None:
    """World wide name, block sizes, rotation rate and TRIM are reported in their words."""
    w = words(1 << 20, wwn=0x5000C50012345678, physical_block=4096, rotation_rate=1)
    assert w[108:112] == (0x5000, 0xC500, 0x1234, 0x5678)
    assert w[84] & 0x100
    assert w[87] & 0x100
    assert w[106] == 0x6003
    assert w[217] == 1
    assert (w[169], w[105]) == (1, 8)
    plain = words(1 << 20, trim=False)
    assert (plain[84] & 0x100, plain[106], plain[217], plain[169]) == (0, 0x4000, 0, 0)


@pytest.mark.skipif(shutil.which("hdparm") is None, reason="hdparm is not installed")
def test_hdparm_reads_it() -> None:
    """hdparm decodes the data, finds the checksum correct and the features we mean."""
    w = words(64 << 20, serial="QM00001", model="QEMU HARDDISK", firmware="2.5+", physical_block=4096)
    given = "\n".join(" ".join(f"{word:04x}" for word in w[i : i + 8]) for i in range(0, 256, 8)) + "\n"
    shown = subprocess.run(["hdparm", "--Istdin"], input=given, capture_output=True, text=True, check=True).stdout
    for expected in (
        "Model Number:       QEMU HARDDISK",
        "LBA48  user addressable sectors:      131072",
        "Logical  Sector size:                   512 bytes",
        "Physical Sector size:                  4096 bytes",
        "udma5",
        "Mandatory FLUSH_CACHE",
        "FLUSH_CACHE_EXT",
        "SMART feature set",
        "Data Set Management TRIM supported (limit 8 blocks)",
        "WRITE_{DMA|MULTIPLE}_FUA_EXT",
        "Checksum: correct",
    ):
        assert expected in shown, shown
