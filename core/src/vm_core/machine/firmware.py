"""Firmware: finding an image, and putting it where the processor starts.

The image ends at 4 GiB, and its last 128 KiB appear once more below 1 MiB, until the host bridge's PAM registers put
RAM there (see :mod:`.chipset.i440fx`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from ..errors import UsageError
from .memory import PAGE, GuestMemory, Region, RegionKind

#: SeaBIOS with all drivers, 256 KiB.
NAME = "bios-256k.bin"
#: What lies below 1 MiB at most.
ISA_WINDOW = 128 << 10
#: The image must leave the APICs' pages and KVM's reserved ones alone.
MAX_SIZE = 16 << 20


def directories() -> Iterator[str]:
    """Where firmware may be: ``$VM_FIRMWARE_PATH`` first, then the places of distributions and installers."""
    yield from filter(None, os.environ.get("VM_FIRMWARE_PATH", "").split(os.pathsep))
    if sys.platform == "win32":
        for variable in ("ProgramFiles", "ProgramW6432", "LOCALAPPDATA"):
            if base := os.environ.get(variable):
                yield os.path.join(base, "qemu", "share")
                yield os.path.join(base, "qemu")
        return
    for prefix in ("/usr", "/usr/local", "/opt/homebrew", "/opt/local"):
        yield f"{prefix}/share/seabios"
        yield f"{prefix}/share/qemu"
        yield f"{prefix}/share/qemu/firmware"
    yield "/usr/lib/ipxe/qemu"


def find(bios: str | None = None) -> str:
    """The path of the image: *bios* (a path or a name to look for), else SeaBIOS. Raises UsageError with the remedy."""
    if bios is not None and (os.path.exists(bios) or os.path.basename(bios) != bios):
        return bios
    name = bios or NAME
    for directory in directories():
        path = os.path.join(directory, name)
        if os.path.isfile(path):
            return path
    if bios is not None:
        raise UsageError(f"-bios {bios}: there is no such file, here or where firmware is kept")
    raise UsageError(
        f"no firmware: {NAME} is not installed: apt install seabios (Fedora: seabios-bin, macOS: brew install qemu),"
        " or give -bios FILE, or set VM_FIRMWARE_PATH"
    )


def load(path: str) -> bytes:
    """The image's bytes. Raises UsageError for what cannot be firmware."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise UsageError(f"-bios {path}: {error.strerror}") from None
    if not data or len(data) % (64 << 10) or len(data) > MAX_SIZE:
        raise UsageError(f"-bios {path}: firmware is a multiple of 64 KiB, up to 16 MiB; this has {len(data)} bytes")
    return data


def place(memory: GuestMemory, image: bytes) -> Region:
    """Map *image*; returns the region below 1 MiB. *memory* has room for it in its ROM backing."""
    size = len(image)
    assert size % PAGE == 0
    backing = memory.rom_space(size)
    memory.buffer[backing : backing + size] = image
    memory.add(Region("firmware", (1 << 32) - size, size, RegionKind.ROM, backing=backing, priority=2))
    window = min(size, ISA_WINDOW)
    return memory.add(
        Region("firmware below 1 MiB", 0x100000 - window, window, RegionKind.ROM, backing=backing + size - window)
    )
