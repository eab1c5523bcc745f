"""Appliances in one file (OVA, DSP0243 section 5.3 "Distribution as a single file"): an OVF descriptor, disks and a
manifest in a tar archive.

Such a disk is a stream-optimized VMDK image that begins somewhere in the archive; everything about it is
``image.py``'s business, over a window of the file.

A new appliance has the descriptor, with blanks behind it to be overwritten, and the disk. It is written once: grains
are added to the disk, and when it is closed the sizes are entered, and the manifest with both files' checksums follows.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vm_core.block.node import Node
from vm_core.errors import ImageError, UsageError

from . import ovf, tar
from .create import make_sparse
from .descriptor import NO_PARENT, NewDescriptor
from .header import MAGIC, SECTOR
from .image import Vmdk, open_embedded
from .tar import BLOCK, Member
from .window import Window

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext

#: Bytes of a new descriptor with its blanks.
_DESCRIPTOR = 8 * 1024
#: Bytes that are read at a time for the manifest.
_STEP = 1 << 20

_ADAPTERS = ("lsilogic", "buslogic", "ide")
#: Virtual hardware of ESXi 6.5, the oldest in use.
_HARDWARE = "13"


class Ova(Vmdk):
    """A disk of an appliance."""

    #: The archive, its members, and which of them the disk is.
    archive: Node
    members: list[Member]
    disk: Member
    _appliance: bytes

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Ova:
        name = context.filename or file.filename
        wanted = options.pop("disk", None)
        if not tar.is_tar(file.pread(0, min(file.size, BLOCK))):
            raise ImageError(name, "not an OVA: no tar archive")
        members, damage = tar.members(file)
        text = _descriptor(file, members, name, damage)
        disk = _choose(ovf.read_disks(text, name), members, wanted, name, damage)
        if not context.readonly and not _unfinished(members, disk):
            if not context.auto_readonly:
                raise ImageError(name, "an OVA is written once, when it is made: open it read-only")
            context.readonly = True
        size = None if not context.readonly else disk.size
        window = Window(file, disk.offset, size)
        if window.pread(0, min(window.size, 4)) != MAGIC:
            raise ImageError(name, f"the disk '{disk.name}' is not a VMDK image with sparse extents")
        image = open_embedded(cls, window, name, context)
        image.archive = file
        image.members = members
        image.disk = disk
        image._appliance = text
        if not image.readonly:
            image.load_for_writing()
        return image

    def info(self) -> dict[str, Any]:
        found = super().info()
        for extent in found["extents"]:
            extent["filename"] = self.disk.name
        return found

    def flush(self) -> None:
        if self.readonly:
            return
        for extent in self.extents:
            extent.grow()
        # The disk is as long as what has been written of it; and it is, before its tables point there.
        size = self.file.size
        if size != self.disk.size:
            self.archive.flush()
            self.disk = self.disk._replace(size=size)
            self._write_sizes()
            self.archive.flush()
        super().flush()

    def _write_sizes(self) -> None:
        """Enter the disk's size into the archive and the descriptor."""
        archive, disk = self.archive, self.disk
        if archive.size < disk.end:
            archive.truncate(disk.end)
        text = self._appliance
        marker = b'ovf:size="'
        start = text.index(marker) + len(marker)
        end = text.index(b'"', start)
        changed = text[:start] + b"%d" % disk.size + text[end:]
        self._appliance = changed.rstrip().ljust(len(text), b"\n")
        archive.pwrite(self.members[0].offset, self._appliance)
        archive.pwrite(disk.offset - BLOCK, tar.pack_header(disk.name, disk.size))

    def close(self) -> None:
        if self.readonly or not self._touched:
            return
        import hashlib

        lines = []
        for member in (self.members[0], self.disk):
            digest = hashlib.sha256()
            for start in range(0, member.size, _STEP):
                digest.update(self.archive.pread(member.offset + start, min(_STEP, member.size - start)))
            lines.append(f"SHA256({member.name})= {digest.hexdigest()}\n")
        text = "".join(lines).encode("utf-8", "surrogateescape")
        stem = self.members[0].name.rpartition(".")[0]
        end = self.disk.end + BLOCK + -(-len(text) // BLOCK) * BLOCK + 2 * BLOCK
        data = tar.pack_header(f"{stem}.mf", len(text)) + text
        self.archive.pwrite(self.disk.end, data.ljust(end - self.disk.end, b"\0"))
        self.archive.flush()

    def reopen(self, *, readonly: bool) -> None:
        raise ImageError(self.name, "an OVA is written once, when it is made")

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        size = -(-size // SECTOR) * SECTOR
        adapter = options.pop("adapter_type", None) or "lsilogic"
        if adapter not in _ADAPTERS:
            raise UsageError(f"adapter_type={adapter}: one of {', '.join(_ADAPTERS)} is needed")
        version = str(options.pop("hwversion", None) or _HARDWARE)
        if not version.isdecimal():
            raise UsageError(f"hwversion={version}: a number is needed")
        stem = os.path.basename(file.filename).rpartition(".")[0] or os.path.basename(file.filename)
        name = options.pop("name", None) or stem
        cpus, memory = options.pop("cpus", 1), options.pop("memory", 1024)
        if not 1 <= cpus <= 1024 or not 1 <= memory <= 1 << 24:
            raise UsageError(f"cpus={cpus},memory={memory}: at least one processor and one MiB")
        href = f"{stem}-disk1.vmdk"
        start = 2 * BLOCK + _DESCRIPTOR
        file.truncate(start)
        window = Window(file, start)
        make_sparse(window, size, zeroed=False, stream=True)
        heads = 16 if adapter == "ide" else 255
        text = NewDescriptor(
            cid=int.from_bytes(os.urandom(4), "little"),
            parent_cid=NO_PARENT,
            create_type="streamOptimized",
            parent_hint="",
            extents=f'RW {size // SECTOR} SPARSE "{href}"\n',
            hardware_version=version,
            cylinders=size // SECTOR // (heads * 63),
            heads=heads,
            adapter_type=adapter,
            tools_version="2147483647",
        ).text()
        window.pwrite(SECTOR, text.encode("utf-8", "surrogateescape"))
        length = window.size
        file.truncate(start + length)
        appliance = ovf.Appliance(name, href, size, length, adapter, f"vmx-{int(version):02d}", cpus, memory)
        data = appliance.text().encode("utf-8", "surrogateescape")
        if len(data) > _DESCRIPTOR - 32:
            raise UsageError(f"name={name[:40]}…: too long for a descriptor of {_DESCRIPTOR} bytes")
        data = data.ljust(_DESCRIPTOR, b"\n")
        file.pwrite(0, tar.pack_header(f"{stem}.ovf", len(data)) + data + tar.pack_header(href, length))


def _descriptor(file: Node, members: list[Member], name: str, damage: str) -> bytes:
    """The text of the OVF descriptor, which is the first member."""
    first = next((member for member in members if member.name.lower().endswith(".ovf")), None)
    if first is None:
        raise ImageError(name, f"the archive has no OVF descriptor (.ovf){damage}")
    if first.size > ovf.MAX_LENGTH:
        raise ImageError(name, f"an OVF descriptor of {first.size} bytes is not read")
    return file.pread(first.offset, first.size)


def _choose(disks: list[ovf.Disk], members: list[Member], wanted: str | None, name: str, damage: str) -> Member:
    """The disk that is *wanted*, by number, identity or file name; the only one where nothing is."""
    if not disks:
        raise ImageError(name, "the OVF descriptor lists no disk with a file")
    names = ", ".join(f"{number} ({disk.href})" for number, disk in enumerate(disks))
    if wanted is None:
        if len(disks) > 1:
            raise ImageError(name, f"the appliance has several disks: choose one with disk=…: {names}")
        disk = disks[0]
    else:
        chosen = [disk for number, disk in enumerate(disks) if str(wanted) in (str(number), disk.identity, disk.href)]
        if not chosen:
            raise ImageError(name, f"there is no disk '{wanted}'; there is: {names}")
        disk = chosen[0]
    if disk.compression and disk.compression != "identity":
        raise ImageError(name, f"the disk '{disk.href}' is compressed with {disk.compression}, which is not supported")
    if disk.chunks:
        raise ImageError(name, f"the disk '{disk.href}' is cut into chunks, which is not supported")
    member = next((member for member in members if member.name.removeprefix("./") == disk.href), None)
    if member is None:
        raise ImageError(name, f"the disk '{disk.href}' is not in the archive{damage}")
    return member


def _unfinished(members: list[Member], disk: Member) -> bool:
    """Whether this is an appliance as :meth:`Ova.create` leaves it."""
    return len(members) == 2 and members[1] == disk and members[0].size == _DESCRIPTOR
