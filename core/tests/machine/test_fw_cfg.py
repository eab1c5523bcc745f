"""The fw_cfg device as firmware reads it, firmware images, and the boot order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vm_core.devices.pci import PciDevice
from vm_core.errors import UsageError
from vm_core.machine import firmware
from vm_core.machine.bootorder import BootOrder, cmos_order
from vm_core.machine.chipset.fw_cfg import FwCfg


class Reader:
    """Firmware's side."""

    def __init__(self, device: FwCfg) -> None:
        self.device = device

    def read(self, key: int, count: int) -> bytes:
        self.device.write(0, 2, key)
        return bytes(self.device.read(1, 1) for _ in range(count))

    def directory(self) -> dict[str, tuple[int, int]]:
        count = int.from_bytes(self.read(0x19, 4), "big")
        raw = self.read(0x19, 4 + 64 * count)[4:]
        found = {}
        for n in range(count):
            entry = raw[64 * n : 64 * n + 64]
            name = entry[8:].split(b"\0")[0].decode()
            found[name] = (int.from_bytes(entry[4:6], "big"), int.from_bytes(entry[:4], "big"))
        return found

    def file(self, name: str) -> bytes:
        key, size = self.directory()[name]
        return self.read(key, size)


def test_signature_and_files() -> None:
    """Firmware finds the signature and reads a file by the directory's key and size."""
    device = FwCfg()
    device.add_file("etc/one", b"first")
    device.add_file("etc/empty", b"")
    device.add_file("etc/two", lambda: b"second")
    reader = Reader(device)
    assert reader.read(0, 4) == b"QEMU"
    assert reader.read(1, 4) == bytes([1, 0, 0, 0])
    assert set(reader.directory()) == {"etc/one", "etc/two"}
    assert reader.file("etc/one") == b"first"
    assert reader.file("etc/two") == b"second"


def test_reading_on_gives_zeroes_and_selecting_rewinds() -> None:
    """Behind an item's end there are zeroes; blocks and bytes are the same stream."""
    device = FwCfg()
    device.set_number(5, 0x1234, 2)
    reader = Reader(device)
    assert reader.read(5, 4) == bytes([0x34, 0x12, 0, 0])
    device.write(0, 2, 5)
    assert device.read(1, 1) == 0x34
    assert device.read_block(1, 1, 3) == bytes([0x12, 0, 0])
    assert reader.read(0x77, 2) == bytes(2)


def test_names_are_checked() -> None:
    """A name that is too long or there already is refused."""
    device = FwCfg()
    device.add_file("a", b"1")
    with pytest.raises(UsageError, match="two files"):
        device.add_file("a", b"2")
    with pytest.raises(UsageError, match="longer than 55"):
        device.add_file("x" * 56, b"2")


def test_firmware_is_found_by_path_name_and_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is taken as it is; a bare name and the default are looked for, in VM_FIRMWARE_PATH first."""
    image = tmp_path / "bios-256k.bin"
    image.write_bytes(bytes(256 << 10))
    monkeypatch.setenv("VM_FIRMWARE_PATH", str(tmp_path))
    assert firmware.find() == str(image)
    assert firmware.find("bios-256k.bin") == str(image)
    assert firmware.find("/somewhere/x.bin") == "/somewhere/x.bin"
    assert len(firmware.load(firmware.find())) == 256 << 10


def test_absent_firmware_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install."""
    monkeypatch.setattr(firmware, "directories", lambda: iter([str(tmp_path)]))
    with pytest.raises(UsageError, match="apt install seabios"):
        firmware.find()
    with pytest.raises(UsageError, match=r"-bios other\.bin: there is no such file"):
        firmware.find("other.bin")


@pytest.mark.parametrize("size", [0, 1000, (64 << 10) + 1])
def test_what_cannot_be_firmware_is_refused(tmp_path: Path, size: int) -> None:
    """Sizes that are no multiple of 64 KiB."""
    file = tmp_path / "x.bin"
    file.write_bytes(bytes(size))
    with pytest.raises(UsageError, match=f"this has {size} bytes"):
        firmware.load(str(file))


class Bootable(PciDevice):
    def __init__(self, id: str, path: str | None) -> None:
        super().__init__(id, {})
        self.driver = "thing"
        self._path = path

    def boot_path(self) -> str | None:
        return self._path


def test_boot_order() -> None:
    """Devices by index, one path a line, a zero byte at the end; strict adds HALT; an index is given once."""
    order = BootOrder()
    assert order.file() == b""
    first, second = Bootable("a", "/a@0"), Bootable("b", "/b@1")
    order.add(second, 7)
    order.add(first, 3)
    order.add(Bootable("c", None), 1)
    assert order.file() == b"/a@0\n/b@1\0"
    order.strict = True
    assert order.file() == b"/a@0\n/b@1\nHALT\0"
    with pytest.raises(UsageError, match="bootindex=7 is that of b already"):
        order.add(first, 7)
    order.discard(second)
    assert order.devices[-1] is first


@pytest.mark.parametrize(("letters", "expected"), [("c", (0x02, 0)), ("dc", (0x23, 0)), ("cad", (0x12, 0x30))])
def test_boot_letters(letters: str, expected: tuple[int, int]) -> None:
    """First and second device in one CMOS byte, the third in another."""
    assert cmos_order(letters) == expected


@pytest.mark.parametrize("letters", ["x", "cc", "cadn"])
def test_boot_letters_that_are_wrong(letters: Any) -> None:
    """Unknown, doubled and too many letters are refused by name."""
    with pytest.raises(UsageError, match=f"-boot order={letters}"):
        cmos_order(letters)
