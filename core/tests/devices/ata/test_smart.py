"""SMART: data with their checksums, the logs, and the refusals."""

from __future__ import annotations

import struct

import pytest

from vm_core.devices.ata.registers import ABRT
from vm_core.devices.ata.smart import ATTRIBUTES
from vm_core.testing.ata import AtaBench, AtaDriver, AtaError

KEY = 0xC24F00
SMART = 0xB0


def read(driver: AtaDriver, features: int, log: int = 0) -> bytes:
    data = driver.pio_in(SMART, features=features, count=1, lba=KEY | log)
    assert log in (0, 0x80) or sum(data) & 0xFF == 0
    return data


def aborts(driver: AtaDriver, **registers: int) -> bool:
    with pytest.raises(AtaError) as caught:
        driver.non_data(SMART, **registers)
    return caught.value.error == ABRT


def test_data_and_thresholds(bench: AtaBench, driver: AtaDriver) -> None:
    """Both structures add up to zero and list the same attributes; hours and cycles are counted."""
    bench.time = 3 * 3600 * 10**9
    data, thresholds = read(driver, 0xD0), read(driver, 0xD1)
    assert sum(data) & 0xFF == sum(thresholds) & 0xFF == 0
    found = {data[at]: int.from_bytes(data[at + 5 : at + 11], "little") for at in range(2, 362, 12) if data[at]}
    assert set(found) == {a.id for a in ATTRIBUTES} == {thresholds[at] for at in range(2, 362, 12)} - {0}
    assert (found[9], found[12], found[187]) == (3, 1, 0)
    for i, attribute in enumerate(ATTRIBUTES):
        assert data[2 + 12 * i + 3] > thresholds[2 + 12 * i + 1] == attribute.threshold


def test_status(driver: AtaDriver) -> None:
    """RETURN STATUS keeps 0xC24F: no threshold is exceeded."""
    driver.non_data(SMART, features=0xDA, lba=KEY)
    assert driver.lba() & 0xFFFF00 == KEY


def test_enable_and_disable(driver: AtaDriver) -> None:
    """Disabled, everything but ENABLE aborts, and word 85 says so."""
    driver.non_data(SMART, features=0xD9, lba=KEY)
    assert not driver.identify()[85] & 1
    assert driver.identify()[82] & 1
    for features in (0xD0, 0xD1, 0xD5, 0xDA, 0xD9, 0xD2):
        assert aborts(driver, features=features, count=1, lba=KEY)
    driver.non_data(SMART, features=0xD8, lba=KEY)
    assert driver.identify()[85] & 1
    read(driver, 0xD0)


def test_refusals(driver: AtaDriver) -> None:
    """A wrong key, unknown subcommands, logs that do not exist and odd counts abort."""
    assert aborts(driver, features=0xD0, lba=0)
    assert aborts(driver, features=0xD0, lba=0xC24E00)
    for features in (0x00, 0xCF, 0xD6, 0xDC, 0xFF):
        assert aborts(driver, features=features, lba=KEY)
    assert aborts(driver, features=0xD5, count=1, lba=KEY | 0x55)
    assert aborts(driver, features=0xD5, count=2, lba=KEY | 0x01)
    assert aborts(driver, features=0xD2, count=5, lba=KEY)
    assert aborts(driver, features=0xDB, count=5, lba=KEY)
    assert aborts(driver, features=0xD4, lba=KEY | 0x55)


def test_autosave_and_auto_offline(driver: AtaDriver) -> None:
    """Both switches are accepted; automatic off-line collection shows in the data."""
    for count in (0xF1, 0x00):
        driver.non_data(SMART, features=0xD2, count=count, lba=KEY)
    driver.non_data(SMART, features=0xD3, lba=KEY)
    driver.non_data(SMART, features=0xDB, count=0xF8, lba=KEY)
    assert read(driver, 0xD0)[362] & 0x80
    driver.non_data(SMART, features=0xDB, count=0, lba=KEY)
    assert not read(driver, 0xD0)[362] & 0x80


def test_self_tests_are_logged(bench: AtaBench, driver: AtaDriver) -> None:
    """Short and extended tests, captive or not, appear in the log in their order, the oldest giving way."""
    driver.non_data(SMART, features=0xD4, lba=KEY | 0x00)
    assert read(driver, 0xD0)[362] == 0x02
    for i in range(23):
        bench.time = i * 3600 * 10**9
        driver.non_data(SMART, features=0xD4, lba=KEY | (0x01, 0x02, 0x81, 0x82)[i % 4])
    log = read(driver, 0xD5, 0x06)
    assert log[508] == 21
    entries = [struct.unpack_from("<BBH", log, 2 + 24 * i) for i in range(21)]
    assert entries == [((0x01, 0x02, 0x81, 0x82)[i % 4], 0, i) for i in range(2, 23)]


def test_errors_are_logged(bench: AtaBench, driver: AtaDriver) -> None:
    """A command that failed on the medium is counted and kept with its registers; the directory lists the log."""
    bench.backends[0].bad = range(7 * 512, 8 * 512)
    bench.time = 2 * 3600 * 10**9
    with pytest.raises(AtaError):
        driver.read_sectors(7, 1)
    directory = read(driver, 0xD5, 0x00)
    assert (directory[0], directory[2], directory[12]) == (1, 1, 1)
    log = read(driver, 0xD5, 0x01)
    assert (log[1], int.from_bytes(log[452:454], "little")) == (1, 1)
    command, error = log[2 + 48 : 2 + 60], log[2 + 60 : 2 + 90]
    assert (command[2], command[3], command[7]) == (1, 7, 0x20)
    assert int.from_bytes(command[8:12], "little") == 2 * 3600 * 1000
    assert (error[1], error[3], error[7]) == (0x40, 7, 0x51)
    assert int.from_bytes(error[28:30], "little") == 2
    data = read(driver, 0xD0)
    raw = {data[at]: data[at + 5] for at in range(2, 362, 12)}
    assert raw[187] == 1
