"""Booting a Linux kernel directly: the 32-bit boot protocol, without firmware.

Theory of operation. The kernel image (bzImage) carries a header that says what it wants. Its protected-mode part goes
to 1 MiB, command line and boot parameters below, the initial RAM disk as high as the header allows, and the processor
starts at 1 MiB in flat 32-bit mode with ESI pointing to the boot parameters. What firmware would have done on the way
(PCI windows, interrupt routing, ACPI tables) is done by the board; see :mod:`.pcisetup` and :mod:`.acpi`.

Source: Linux, Documentation/arch/x86/boot.rst ("The Linux/x86 Boot Protocol") and zero-page.rst.
"""

from __future__ import annotations

import os
import struct

import attrs

from ..errors import UsageError
from .accel import CpuState, Segment
from .memory import PAGE, GuestMemory

# Where things go below 640 KiB.
GDT = 0x6000
BOOT_PARAMS = 0x7000
COMMAND_LINE = 0x8000
#: Where bzImage's protected-mode part is loaded and entered.
KERNEL = 0x100000
#: Base memory ends here; the last KiB is the extended BIOS data area's by custom, and holds the MP table.
BASE_MEMORY_END = 0x9FC00

#: Protected-mode selectors that the protocol prescribes.
BOOT_CS, BOOT_DS = 0x10, 0x18

# Offsets in the image and, copied, in the boot parameters ("zero page").
SETUP_SECTS, BOOT_FLAG, HEADER, VERSION = 0x1F1, 0x1FE, 0x202, 0x206
TYPE_OF_LOADER, LOADFLAGS, RAMDISK_IMAGE, RAMDISK_SIZE = 0x210, 0x211, 0x218, 0x21C
HEAP_END_PTR, CMD_LINE_PTR, INITRD_ADDR_MAX = 0x224, 0x228, 0x22C
XLOADFLAGS, CMDLINE_SIZE, PREF_ADDRESS, INIT_SIZE = 0x236, 0x238, 0x258, 0x260
ACPI_RSDP_ADDR, E820_ENTRIES, E820_TABLE = 0x070, 0x1E8, 0x2D0

LOADED_HIGH, CAN_USE_HEAP = 0x01, 0x80

#: Kinds of memory in the map that BIOS call e820 gives.
E820_RAM, E820_RESERVED, E820_ACPI = 1, 2, 3


@attrs.frozen
class E820:
    """A range of physical memory: bytes from *start*."""

    start: int
    length: int
    kind: int

    def pack(self) -> bytes:
        """20 bytes."""
        return struct.pack("<QQI", self.start, self.length, self.kind)


@attrs.frozen
class LinuxKernel:
    """A checked bzImage."""

    name: str
    image: bytes
    #: Boot protocol: major in the high byte.
    protocol: int
    setup_size: int
    initrd_max: int
    command_line_max: int
    #: Bytes that the kernel uses from where it is decompressed.
    init_size: int
    preferred: int

    @classmethod
    def parse(cls, name: str, image: bytes) -> LinuxKernel:
        """Look at the setup header. Raises UsageError, which begins with *name*, for anything but a bzImage."""
        if len(image) < 0x260 or image[BOOT_FLAG : BOOT_FLAG + 2] != b"\x55\xaa":
            what = "an ELF file: the bzImage is needed (arch/x86/boot/bzImage)" if image[:4] == b"\x7fELF" else ""
            raise UsageError(f"-kernel {name}: not a Linux kernel image{': it is ' + what if what else ''}")
        if image[HEADER : HEADER + 4] != b"HdrS":
            raise UsageError(f"-kernel {name}: not a Linux kernel image, or one older than 1.3.73")
        protocol = int.from_bytes(image[VERSION : VERSION + 2], "little")
        if protocol < 0x0200:
            raise UsageError(f"-kernel {name}: boot protocol {_version(protocol)}; 2.00 or later is supported")
        if not image[LOADFLAGS] & LOADED_HIGH:
            raise UsageError(f"-kernel {name}: a zImage, loaded below 640 KiB; a bzImage is supported")
        setup_size = 512 * ((image[SETUP_SECTS] or 4) + 1)
        if len(image) <= setup_size:
            raise UsageError(f"-kernel {name}: truncated: the setup code alone is {setup_size} bytes")

        def field(offset: int, size: int, since: int, otherwise: int) -> int:
            return int.from_bytes(image[offset : offset + size], "little") if protocol >= since else otherwise

        return cls(
            name,
            image,
            protocol,
            setup_size,
            field(INITRD_ADDR_MAX, 4, 0x0203, 0x37FFFFFF),
            field(CMDLINE_SIZE, 4, 0x0206, 255),
            # Before 2.10 nobody says; what is decompressed took at most three times the file.
            field(INIT_SIZE, 4, 0x020A, 3 * len(image)),
            field(PREF_ADDRESS, 8, 0x020A, KERNEL),
        )

    @property
    def code(self) -> bytes:
        """The protected-mode part."""
        return self.image[self.setup_size :]


def _version(protocol: int) -> str:
    return f"{protocol >> 8}.{protocol & 0xFF:02}"


def read_file(option: str, path: str) -> bytes:
    """The file's bytes. Raises UsageError that begins with *option* and *path*."""
    try:
        if os.path.isdir(path):
            raise UsageError(f"{option} {path}: it is a directory")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from None


class LinuxBoot:
    """A kernel with its command line and RAM disk, ready to be put into memory as often as the machine is reset."""

    def __init__(self, kernel: str, initrd: str | None, command_line: str, low_ram: int) -> None:
        """*low_ram*: bytes of RAM below 4 GiB. Raises UsageError where it does not fit."""
        self.kernel = found = LinuxKernel.parse(kernel, read_file("-kernel", kernel))
        self.initrd = read_file("-initrd", initrd) if initrd is not None else b""
        self.command_line = command_line.encode()
        if len(self.command_line) > found.command_line_max:
            raise UsageError(
                f"-append: {len(self.command_line)} characters; this kernel takes {found.command_line_max}"
            )
        if COMMAND_LINE + len(self.command_line) >= BASE_MEMORY_END:
            raise UsageError(f"-append: {len(self.command_line)} characters are too many")
        end = KERNEL + max(len(found.code), found.init_size)
        # It decompresses itself to its preferred address where that is higher.
        if found.protocol >= 0x020A:
            end = max(end, found.preferred + found.init_size)
        if end > low_ram:
            raise UsageError(f"-kernel {kernel}: it needs {_mib(end)} MiB of RAM, there are {low_ram >> 20}: give -m")
        top = min(low_ram, found.initrd_max + 1)
        self.initrd_address = (top - len(self.initrd)) & -PAGE
        if self.initrd and self.initrd_address < end:
            needed = _mib(end + len(self.initrd) + PAGE)
            raise UsageError(
                f"-initrd {initrd}: with the kernel it needs {needed} MiB of RAM: give -m {needed} or more"
            )

    def load(self, memory: GuestMemory, e820: list[E820], rsdp: int) -> None:
        """Put everything into *memory*. *rsdp* is the address of ACPI's root pointer."""
        kernel = self.kernel
        # The setup header goes from 0x1f1 to where the jump at 0x200 leads.
        header_end = 0x202 + kernel.image[0x201]
        params = bytearray(PAGE)
        params[SETUP_SECTS:header_end] = kernel.image[SETUP_SECTS:header_end]
        params[TYPE_OF_LOADER] = 0xFF  # no number was given to this loader
        if kernel.protocol >= 0x0201:
            params[LOADFLAGS] |= CAN_USE_HEAP
            struct.pack_into("<H", params, HEAP_END_PTR, 0xFE00)
        struct.pack_into("<I", params, CMD_LINE_PTR, COMMAND_LINE)
        if kernel.protocol < 0x0202:
            # The old way: a magic number and an offset from the parameters' segment.
            struct.pack_into("<HH", params, 0x20, 0xA33F, COMMAND_LINE - BOOT_PARAMS)
        if self.initrd:
            struct.pack_into("<II", params, RAMDISK_IMAGE, self.initrd_address, len(self.initrd))
            memory.write(self.initrd_address, self.initrd)
        struct.pack_into("<Q", params, ACPI_RSDP_ADDR, rsdp)
        params[E820_ENTRIES] = len(e820)
        table = b"".join(entry.pack() for entry in e820)
        params[E820_TABLE : E820_TABLE + len(table)] = table
        memory.write(BOOT_PARAMS, params)
        memory.write(COMMAND_LINE, self.command_line + b"\0")
        memory.write(KERNEL, kernel.code)
        # Null, unused, 32-bit code, 32-bit data: base 0, limit 4 GiB.
        memory.write(GDT, struct.pack("<QQQQ", 0, 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF))

    def state(self) -> CpuState:
        """The processor at the 32-bit entry point: paging off, flat segments, interrupts off."""
        data = Segment(BOOT_DS, 0, 0xFFFFFFFF, type=3, db=1, g=1)
        return CpuState(
            eip=KERNEL,
            regs={"esi": BOOT_PARAMS, "ebp": 0, "edi": 0, "ebx": 0, "esp": GDT},
            cr0=0x11,
            cs=Segment(BOOT_CS, 0, 0xFFFFFFFF, type=0xB, db=1, g=1),
            ds=data,
            es=data,
            fs=data,
            gs=data,
            ss=data,
            gdt=(GDT, 4 * 8 - 1),
            idt=(0, 0),
        )


def _mib(size: int) -> int:
    return -(-size >> 20)
