"""``python examples/linux_guest FOLDER``: make a Linux guest there — kernel, initramfs and a bootable qcow2 disk."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import disk
import initramfs
import packages

#: Nothing that a translated CPU spends seconds on for no use.
APPEND = "console=ttyS0 no_timer_check tsc=unstable mitigations=off random.trust_cpu=on"

WELCOME = """
for d in vda1 sda1; do [ -b /dev/$d ] && mount -t ext4 /dev/$d /mnt && break; done
echo
echo "  Linux $(uname -r) booted from $(awk '$2=="/mnt"{print $1}' /proc/mounts): firmware, GRUB, kernel, init."
echo "  The disk is mounted at /mnt. Type poweroff -f to leave, or Ctrl-a x."
echo
[ -n "$(grep -o autotest /proc/cmdline)" ] || setsid cttyhack sh
umount /mnt
poweroff -f
"""


def main() -> int:
    """Build what is not there yet; print the paths."""
    parser = argparse.ArgumentParser(prog="linux_guest", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--append", default=APPEND, help="the kernel's command line")
    options = parser.parse_args()
    work: Path = options.folder
    target = work / "disk.qcow2"
    if target.exists():
        return 0
    work.mkdir(parents=True, exist_ok=True)
    try:
        print("Fetching Debian's i386 kernel and busybox …", file=sys.stderr)
        root = packages.fetch_i386(work / "packages", ["linux-image-686", "busybox-static"])
        kernel = next((root / "boot").glob("vmlinuz-*"))
        ramdisk = initramfs.build(root / "bin/busybox", root / "lib/modules", WELCOME)
        (work / "vmlinuz").write_bytes(kernel.read_bytes())
        (work / "initrd.img").write_bytes(ramdisk)
        print("Making the disk …", file=sys.stderr)
        raw = work / "disk.raw"
        disk.build_bootable(work, kernel, ramdisk, raw, size=64 << 20, append=options.append)
        to_qcow2(raw, target)
        raw.unlink()
    except (packages.PackageError, disk.DiskError) as error:
        print(f"linux_guest: {error}", file=sys.stderr)
        return 1
    return 0


def to_qcow2(source: Path, target: Path) -> None:
    """Copy a raw image into a new qcow2 image, holes left out."""
    import vm_core

    partial = target.with_suffix(".partial")
    with vm_core.open(source, format="raw") as old:
        vm_core.create(partial, old.size, format="qcow2")
        with vm_core.open(partial, "r+", format="qcow2") as new:
            for run in old.map():
                at, end = run.start, run.start + run.length
                while run.data and at < end:
                    n = min(1 << 20, end - at)
                    new.seek(at)
                    new.write(old.pread(at, n))
                    at += n
    partial.rename(target)


if __name__ == "__main__":
    sys.exit(main())
