"""Debian's GRUB rescue media boot from every disk interface, to GRUB's prompt on the serial console."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmtest import media, program, run
from vmtest.guest import Guest

ISO = "/usr/lib/grub-rescue/grub-rescue-cdrom.iso"
USB = "/usr/lib/grub-rescue/grub-rescue-usb.img"
UNICORN = ("-accel", "unicorn", "-m", "128")


@pytest.fixture(scope="module")
def usb_qcow2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rescue USB image, converted to qcow2 by qemu-img."""
    target = tmp_path_factory.mktemp("grub") / "usb.qcow2"
    source = media(USB, "grub-rescue-pc")
    run(program("qemu-img", "qemu-utils"), "convert", "-f", "raw", "-O", "qcow2", source, target)
    return target


def prompt_and_list(guest: Guest, device: str, expected: str) -> None:
    """Reach GRUB's prompt, list the boot device and see *expected* there."""
    guest.expect(r"highlighted entry", 90)
    for attempt in range(3):
        # The menu is drawn before GRUB looks at its keys; one that comes too early is lost.
        guest.send("c")
        try:
            guest.expect(r"grub>", 20)
            break
        except pytest.fail.Exception:
            if attempt == 2:
                raise
    # The first key may have come through late: Control-U takes away what stands at the prompt.
    guest.send(f"\x15ls {device}\r")
    guest.expect(expected, 30)
    guest.expect(r"grub>", 30)


def test_iso_boots_from_an_ide_cdrom() -> None:
    """The rescue ISO boots through SeaBIOS's ATAPI driver, and GRUB lists the ISO's files."""
    with Guest(*UNICORN, "-cdrom", str(media(ISO, "grub-rescue-pc")), "-boot", "d") as guest:
        prompt_and_list(guest, "(cd)/", r"boot/")


def test_qcow2_boots_from_ide(usb_qcow2: Path) -> None:
    """The rescue USB image in a qcow2 file boots from an IDE disk, and GRUB lists its files."""
    with Guest(*UNICORN, "-drive", f"file={usb_qcow2},format=qcow2,if=ide") as guest:
        prompt_and_list(guest, "(hd0)/", r"boot/")


@pytest.mark.parametrize("mode", ["transitional", "modern"])
def test_qcow2_boots_from_virtio_blk(usb_qcow2: Path, mode: str) -> None:
    """The rescue USB image in a qcow2 file boots from virtio-blk with either PCI interface."""
    device = "virtio-blk-pci,drive=d" + (",disable-legacy=on" if mode == "modern" else "")
    with Guest(*UNICORN, "-drive", f"file={usb_qcow2},format=qcow2,if=none,id=d", "-device", device) as guest:
        prompt_and_list(guest, "(hd0)/", r"boot/")


@pytest.mark.parametrize("format", ["qed", "vmdk", "vpc", "vhdx", "vdi", "parallels", "qcow"])
def test_every_format_boots(tmp_path: Path, format: str) -> None:
    """The rescue USB image, converted by qemu-img to another format, boots from virtio-blk."""
    target = tmp_path / f"usb.{format}"
    source = media(USB, "grub-rescue-pc")
    run(program("qemu-img", "qemu-utils"), "convert", "-f", "raw", "-O", format, source, target)
    with Guest(*UNICORN, "-drive", f"file={target},format={format},if=virtio") as guest:
        prompt_and_list(guest, "(hd0)/", r"boot/")
