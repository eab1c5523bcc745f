"""Boot times and guest reads: vm under unicorn beside qemu-system-x86_64 under TCG, on the same media."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

from vmtest import media, program, run
from vmtest.guest import Guest
from vmtest.linux import APPEND, LinuxParts

#: Reads the whole disk in order, then 400 blocks of 4 KiB at random, and prints the seconds of each.
READS = """
echo SHELL
now() { cut -d' ' -f1 /proc/uptime; }
a=$(now); dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null; b=$(now); echo "SEQUENTIAL $a $b"
echo 3 > /proc/sys/vm/drop_caches
x=1; i=0; a=$(now)
while [ $i -lt 400 ]; do
  x=$(( (x * 1103515245 + 12345) & 0x7fffffff ))
  dd if=/dev/vda of=/dev/null bs=4096 count=1 skip=$((x % 16384)) 2>/dev/null; i=$((i+1))
done
b=$(now); echo "RANDOM $a $b"
poweroff -f
"""


def peer() -> list[str]:
    """The command that starts the peer with TCG."""
    return [program("qemu-system-x86_64", "qemu-system-x86"), "-accel", "tcg"]


def until(pattern: str, arguments: list[str], command: list[str] | None = None) -> float:
    """Seconds from the start of the program until *pattern* is on the serial console."""
    start = time.perf_counter()
    with Guest(*arguments, command=command) as guest:
        guest.expect(pattern, 300)
        return time.perf_counter() - start


def grub(work: Path, interface: str) -> dict[str, Callable[[], float]]:
    """GRUB's menu from the rescue USB image in a qcow2 file."""
    disk = work / "usb.qcow2"
    if not disk.exists():
        source = media("/usr/lib/grub-rescue/grub-rescue-usb.img", "grub-rescue-pc")
        run(program("qemu-img", "qemu-utils"), "convert", "-f", "raw", "-O", "qcow2", source, disk)
    drive = ["-m", "128", "-drive", f"file={disk},format=qcow2,if={interface},snapshot=on"]
    return {
        "qemu": lambda: until(r"highlighted entry", drive, peer()),
        "vm": lambda: until(r"highlighted entry", ["-accel", "unicorn", *drive]),
    }


def kernel(work: Path, linux: LinuxParts) -> dict[str, Callable[[], float]]:
    """The i386 kernel by direct boot to the first command of its shell."""
    initrd = work / "initrd-shell.img"
    initrd.write_bytes(linux.initrd("echo SHELL; poweroff -f"))
    boot = ["-m", "192", "-kernel", str(linux.kernel), "-initrd", str(initrd), "-append", APPEND]
    return {
        "qemu": lambda: until(r"SHELL", boot, peer()),
        "vm": lambda: until(r"SHELL", ["-accel", "unicorn", *boot]),
    }


def guest_reads(work: Path, linux: LinuxParts) -> tuple[dict[str, Callable[[], float]], dict[str, Callable[[], float]]]:
    """Sequential and random reads by the guest through virtio-blk: two sets of contestants over one run of each."""
    disk, initrd = work / "data.qcow2", work / "initrd-reads.img"
    if not disk.exists():
        raw = work / "data.raw"
        raw.write_bytes(bytes(range(256)) * (64 << 12))
        run(program("qemu-img", "qemu-utils"), "convert", "-f", "raw", "-O", "qcow2", raw, disk)
        raw.unlink()
    initrd.write_bytes(linux.initrd(READS))
    boot = ["-m", "192", "-kernel", str(linux.kernel), "-initrd", str(initrd), "-append", APPEND]
    boot += ["-drive", f"file={disk},format=qcow2,if=virtio,cache=writeback"]
    pending: dict[str, float] = {}

    def both(name: str, arguments: list[str], command: list[str] | None) -> float:
        with Guest(*arguments, command=command) as guest:
            sequential = _span(guest.expect(r"SEQUENTIAL ([\d.]+) ([\d.]+)\s", 400))
            pending[name] = _span(guest.expect(r"RANDOM ([\d.]+) ([\d.]+)\s", 400))
            return sequential

    first = {
        "qemu": lambda: both("qemu", boot, peer()),
        "vm": lambda: both("vm", ["-accel", "unicorn", *boot], None),
    }
    second = {"qemu": lambda: pending["qemu"], "vm": lambda: pending["vm"]}
    return first, second


def _span(found: re.Match[bytes]) -> float:
    return max(float(found[2]) - float(found[1]), 0.01)
