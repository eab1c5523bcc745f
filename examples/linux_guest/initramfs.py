"""An initramfs of busybox, the kernel modules a disk needs and one init script."""

from __future__ import annotations

import gzip
import re
import stat
from collections.abc import Iterable
from pathlib import Path

#: Modules that bring a disk on each kind of controller to a mounted ext4.
DISK_MODULES = ("ata_piix", "sd_mod", "sr_mod", "isofs", "virtio_pci", "virtio_blk", "ext4", "crc32c_generic")


class Archive:
    """A cpio archive in the "newc" form that the kernel unpacks (Documentation/driver-api/early-userspace)."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        """Add an entry; *mode* includes the file type, *data* is a file's contents or a link's target."""
        self._inode += 1
        path = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(path), 0)
        head = b"070701" + b"".join(b"%08X" % f for f in fields)
        for part in (head + path, data):
            self._parts += [part, bytes(-len(part) % 4)]

    def directory(self, name: str) -> None:
        """Add a folder."""
        self.add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self.add(name, stat.S_IFREG | mode, data)

    def finish(self) -> bytes:
        """The archive with its trailer."""
        self.add("TRAILER!!!", 0)
        return b"".join(self._parts)


def modules_in_order(tree: Path, names: Iterable[str]) -> list[Path]:
    """The files of modules *names* below *tree* and of all they depend on, each after what it depends on."""
    known = {re.sub("-", "_", p.name.split(".ko")[0]): p for p in tree.rglob("*.ko")}
    order: list[Path] = []

    def visit(name: str) -> None:
        path = known.get(name)
        if path is None or path in order:  # absent: built into the kernel
            return
        depends = re.search(rb"\0depends=([^\0]*)\0", path.read_bytes())
        for other in depends[1].decode().split(",") if depends else ():
            visit(other.replace("-", "_"))
        order.append(path)

    for name in names:
        visit(name)
    return order


def build(
    busybox: Path, modules: Path, init: str, names: Iterable[str] = DISK_MODULES, extra: dict[str, bytes] | None = None
) -> bytes:
    """A gzip-compressed initramfs whose ``/init`` loads the modules *names* and goes on with the script *init*."""
    archive = Archive()
    for folder in ("bin", "dev", "proc", "sys", "mnt", "modules", "etc", "tmp"):
        archive.directory(folder)
    archive.add("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    archive.add("dev/null", stat.S_IFCHR | 0o666, device=(1, 3))
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    archive.add("bin/sh", stat.S_IFLNK | 0o777, b"busybox")
    order = modules_in_order(modules, names)
    for path in order:
        archive.file(f"modules/{path.name}", path.read_bytes())
    for name, data in (extra or {}).items():
        archive.file(name, data)
    load = "\n".join(f"insmod /modules/{p.name}" for p in order)
    archive.file("init", _INIT.format(load=load, script=init).encode(), 0o755)
    return gzip.compress(archive.finish(), 6, mtime=0)


_INIT = """#!/bin/sh
/bin/busybox --install -s /bin
export PATH=/bin HOME=/ TERM=linux
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
{load}
{script}
"""
