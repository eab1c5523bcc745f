"""Direct kernel boot: what is accepted, what is refused and how, and where things are put."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from vm_core.errors import UsageError
from vm_core.machine import linuxboot
from vm_core.machine.linuxboot import E820, LinuxBoot, LinuxKernel
from vm_core.machine.memory import GuestMemory, Region, RegionKind

MIB = 1 << 20


def kernel(protocol: int = 0x020F, *, loadflags: int = 1, code: bytes = b"\x90" * 4096, **fields: int) -> bytes:
    """A bzImage that says little: one setup sector's worth of header, two sectors of setup code."""
    image = bytearray(512 * 3)
    image[0x1F1] = 2
    image[0x1FE:0x200] = b"\x55\xaa"
    image[0x200:0x202] = b"\xeb\x66"
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, protocol)
    image[0x211] = loadflags
    struct.pack_into("<I", image, 0x22C, fields.get("initrd_max", 0x7FFFFFFF))
    struct.pack_into("<I", image, 0x238, fields.get("cmdline", 2047))
    struct.pack_into("<Q", image, 0x258, fields.get("preferred", 16 * MIB))
    struct.pack_into("<I", image, 0x260, fields.get("init_size", 8 * MIB))
    return bytes(image) + code


def boot(tmp_path: Path, image: bytes, initrd: bytes | None = None, text: str = "", ram: int = 64 * MIB) -> LinuxBoot:
    (tmp_path / "vmlinuz").write_bytes(image)
    if initrd is not None:
        (tmp_path / "initrd").write_bytes(initrd)
    return LinuxBoot(str(tmp_path / "vmlinuz"), str(tmp_path / "initrd") if initrd is not None else None, text, ram)


def ram(size: int = 64 * MIB) -> GuestMemory:
    memory = GuestMemory(size)
    memory.add(Region("ram", 0, size, RegionKind.RAM))
    return memory


def test_everything_is_where_the_header_says(tmp_path: Path) -> None:
    """Parameters, command line, code and RAM disk lie where the boot parameters and the registers point."""
    made = boot(tmp_path, kernel(code=b"code" * 5000), b"ramdisk" * 1000, "console=ttyS0")
    memory = ram()
    made.load(memory, [E820(0, 0x9FC00, 1), E820(MIB, 63 * MIB, 1)], 0xF0000)
    state = made.state()
    params = memory.read(state.regs["esi"], 4096)
    assert memory.read(state.eip, 20000) == b"code" * 5000
    pointer = struct.unpack_from("<I", params, 0x228)[0]
    assert memory.read(pointer, 14) == b"console=ttyS0\0"
    start, size = struct.unpack_from("<II", params, 0x218)
    assert memory.read(start, size) == b"ramdisk" * 1000
    assert start % 4096 == 0
    assert params[0x202:0x206] == b"HdrS"
    assert params[0x210] == 0xFF
    assert struct.unpack_from("<Q", params, 0x70)[0] == 0xF0000
    assert params[0x1E8] == 2
    assert struct.unpack_from("<QQI", params, 0x2D0 + 20) == (MIB, 63 * MIB, 1)
    # Behind the header the parameters are zero: none of the image's code is in them.
    assert not any(params[0x268:0x2D0])


def test_the_processor_starts_flat_with_interrupts_off(tmp_path: Path) -> None:
    """32-bit entry: protection on, paging off, selectors 0x10 and 0x18 in a table that describes them."""
    made = boot(tmp_path, kernel())
    memory = ram()
    made.load(memory, [], 0)
    state = made.state()
    assert state.cr0 & 0x80000001 == 1
    assert not state.eflags & 0x200
    base, limit = state.gdt
    table = memory.read(base, limit + 1)
    for segment, kind in ((state.cs, 0x9B), (state.ds, 0x93)):
        entry = table[segment.selector : segment.selector + 8]
        assert entry == bytes([0xFF, 0xFF, 0, 0, 0, kind, 0xCF, 0])


@pytest.mark.parametrize(("limit", "size"), [(0x7FFFFFFF, 64 * MIB), (40 * MIB - 1, 40 * MIB)])
def test_the_ram_disk_is_as_high_as_allowed(tmp_path: Path, limit: int, size: int) -> None:
    """It ends at the end of RAM or at initrd_addr_max, whichever is lower."""
    made = boot(tmp_path, kernel(initrd_max=limit), bytes(10_000))
    assert made.initrd_address == (size - 10_000) & -4096


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "not a Linux kernel image"),
        (b"\x7fELF" + bytes(5000), "an ELF file: the bzImage is needed"),
        (kernel()[:0x202] + b"nope" + kernel()[0x206:], "not a Linux kernel image, or one older"),
        (kernel(0x0105), "boot protocol 1.05; 2.00 or later"),
        (kernel(loadflags=0), "a zImage"),
        (kernel(code=b""), "truncated"),
    ],
)
def test_what_is_no_kernel_is_refused_by_name(tmp_path: Path, image: bytes, message: str) -> None:
    """The message names the file and says what it is."""
    (tmp_path / "vmlinuz").write_bytes(image)
    with pytest.raises(UsageError, match=message) as caught:
        LinuxBoot(str(tmp_path / "vmlinuz"), None, "", 64 * MIB)
    assert str(caught.value).startswith(f"-kernel {tmp_path / 'vmlinuz'}: ")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Too little RAM and too long a command line are told with what is needed."""
    with pytest.raises(UsageError, match="it needs 24 MiB of RAM, there are 16"):
        boot(tmp_path, kernel(), ram=16 * MIB)
    with pytest.raises(UsageError, match=r"-m 65 or more"):
        boot(tmp_path, kernel(), bytes(41 * MIB - 5000))
    with pytest.raises(UsageError, match="300 characters; this kernel takes 255"):
        boot(tmp_path, kernel(cmdline=255), text="x" * 300)
    (tmp_path / "vmlinuz").write_bytes(kernel())
    with pytest.raises(UsageError, match=r"-initrd .*absent: No such file"):
        LinuxBoot(str(tmp_path / "vmlinuz"), str(tmp_path / "absent"), "", 64 * MIB)


def test_old_protocols_get_what_they_know() -> None:
    """Before 2.03 the RAM disk's limit and before 2.06 the command line's are fixed by the protocol."""
    found = LinuxKernel.parse("k", kernel(0x0202))
    assert (found.initrd_max, found.command_line_max) == (0x37FFFFFF, 255)
    assert linuxboot.LOADED_HIGH
