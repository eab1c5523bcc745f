"""A bootable disk: MBR, GRUB's core image behind it, one ext4 partition with kernel and initramfs."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

SECTOR = 512
#: The partition begins at 1 MiB, which leaves 2047 sectors for GRUB's core image.
PARTITION_START = 2048

GRUB_MODULES = (
    "biosdisk",
    "part_msdos",
    "ext2",
    "linux",
    "normal",
    "serial",
    "terminal",
    "echo",
    "ls",
    "cat",
    "configfile",
    "reboot",
    "halt",
    "test",
    "search",
)

GRUB_CFG = """\
serial --unit=0 --speed=115200
terminal_input serial console
terminal_output serial console
set timeout=1
menuentry "Linux" {{
    linux /boot/vmlinuz {append}
    initrd /boot/initrd.img
}}
"""


class DiskError(Exception):
    """The disk cannot be made; the message says what to do."""


def tool(name: str, package: str) -> str:
    """The path of a program, or an error that names the package that brings it."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        raise DiskError(f"{name} is not here: apt-get install {package}")
    return path


def build_ext4(tree: Path, target: Path, size: int, *, label: str = "guest") -> None:
    """Write an ext4 file system of *size* bytes with the files below *tree* to the file *target*."""
    target.unlink(missing_ok=True)
    with target.open("wb") as f:
        f.truncate(size)
    subprocess.run(
        [tool("mkfs.ext4", "e2fsprogs"), "-q", "-F", "-L", label, "-O", "^metadata_csum_seed,^orphan_file",
         "-E", "root_owner=0:0,lazy_itable_init=0,lazy_journal_init=0", "-d", str(tree), str(target)],
        check=True, capture_output=True,
    )  # fmt: skip


def build_bootable(
    work: Path, kernel: Path, initrd: bytes, target: Path, *, size: int, append: str, files: Path | None = None
) -> None:
    """Write a raw disk of *size* bytes to *target* that a PC's BIOS boots: GRUB, then Linux, from one ext4 partition.

    *files* is a folder whose contents go into the partition beside ``/boot``.
    """
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "boot/grub").mkdir(parents=True)
    if files is not None:
        shutil.copytree(files, tree, dirs_exist_ok=True)
    shutil.copy(kernel, tree / "boot/vmlinuz")
    (tree / "boot/initrd.img").write_bytes(initrd)
    (tree / "boot/grub/grub.cfg").write_text(GRUB_CFG.format(append=append))
    partition = work / "partition.img"
    build_ext4(tree, partition, size - PARTITION_START * SECTOR)

    modules = Path("/usr/lib/grub/i386-pc")
    if not (modules / "boot.img").exists():
        raise DiskError(f"{modules}/boot.img is not here: apt-get install grub-pc-bin")
    core = work / "core.img"
    subprocess.run(
        [tool("grub-mkimage", "grub-common"), "-O", "i386-pc", "-o", str(core),
         "-p", "(hd0,msdos1)/boot/grub", *GRUB_MODULES],
        check=True, capture_output=True,
    )  # fmt: skip
    boot = bytearray((modules / "boot.img").read_bytes()[:SECTOR])
    sectors = (size - PARTITION_START * SECTOR) // SECTOR
    entry = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", PARTITION_START, sectors)
    boot[440:512] = struct.pack("<IH", 0x766D6775, 0) + entry + bytes(48) + b"\x55\xaa"
    # boot.img jumps over its check of a bogus drive number; grub-setup makes that jump two NOPs on hard disks.
    boot[0x66:0x68] = b"\x90\x90"
    if core.stat().st_size > (PARTITION_START - 1) * SECTOR:
        raise DiskError("GRUB's core image does not fit before the partition")
    with target.open("wb") as f:
        f.truncate(size)
        f.write(boot)
        f.write(core.read_bytes())
        f.seek(PARTITION_START * SECTOR)
        with partition.open("rb") as source:
            at = PARTITION_START * SECTOR
            while block := source.read(1 << 20):
                if block.count(0) != len(block):
                    f.seek(at)
                    f.write(block)
                at += len(block)
    partition.unlink()
