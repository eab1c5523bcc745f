"""Benches with one drive."""

from __future__ import annotations

import pytest

from vm_core.testing.ata import AtaBench, AtaDriver

#: Sectors of the disk on the bench.
SECTORS = 5000


@pytest.fixture
def bench() -> AtaBench:
    """A channel with a disk of 5000 sectors as device 0; each sector begins with its number."""
    bench = AtaBench()
    bench.add_disk(SECTORS * 512)
    data = bench.backends[0].data
    for sector in range(SECTORS):
        data[512 * sector : 512 * sector + 4] = sector.to_bytes(4, "little")
        data[512 * sector + 511] = sector & 0xFF
    return bench


@pytest.fixture
def driver(bench: AtaBench) -> AtaDriver:
    return AtaDriver(bench)


@pytest.fixture
def cd() -> AtaBench:
    """A channel with a CD-ROM drive as device 0; the disc has 300 blocks, each beginning with its number."""
    bench = AtaBench()
    bench.add_cdrom(300 * 2048)
    data = bench.backends[0].data
    for block in range(300):
        data[2048 * block : 2048 * block + 4] = block.to_bytes(4, "big")
    return bench


@pytest.fixture
def cd_driver(cd: AtaBench) -> AtaDriver:
    """Its driver; the unit attention of power-on is gone."""
    driver = AtaDriver(cd)
    with pytest.raises(Exception, match="sense 6/29/00"):
        driver.packet(b"\x00")
    return driver
