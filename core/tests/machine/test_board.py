"""The board pc: what is built from a configuration, what is refused, and firmware that runs on it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from vm_core.descriptors import DeviceFrontend, Option
from vm_core.devices.pci import PciDevice
from vm_core.errors import PluginError, UsageError, VmError
from vm_core.hookspecs import hookimpl
from vm_core.machine import firmware
from vm_core.machine.board import build_machine
from vm_core.machine.config import AccelConfig, BootConfig, DeviceConfig, DriveConfig, MachineConfig
from vm_core.machine.console import Console, ConsoleTimeoutError
from vm_core.machine.machine import ExitReason, Machine
from vm_core.plugins import registry

NONE = [AccelConfig("none")]


@pytest.fixture
def bios(tmp_path: Path) -> str:
    """A firmware image that nobody executes."""
    image = tmp_path / "test.bin"
    image.write_bytes(bytes(128 << 10))
    return str(image)


def build(bios: str, **values: Any) -> Machine:
    return build_machine(MachineConfig(bios=bios, accelerators=values.pop("accelerators", NONE), **values))


def inb(machine: Machine, port: int) -> int:
    with machine.lock:
        return machine.ports.read(port, 1)


def outb(machine: Machine, port: int, value: int) -> None:
    with machine.lock:
        machine.ports.write(port, 1, value)


class Widget(PciDevice):
    """A device for the tests below."""

    vendor_id, device_id, class_code = 0x1B36, 0x0077, 0xFF0000

    def __init__(self, id: str, options: dict[str, Any], backend: Any = None) -> None:
        super().__init__(id, options, backend)
        self.size = options.pop("size", 7)


class WidgetPlugin:
    @hookimpl
    def vm_device_frontends(self) -> list[DeviceFrontend]:
        return [
            DeviceFrontend(
                name="widget",
                summary="a widget",
                implementation=f"{__name__}:Widget",
                interfaces=("widget",),
                options=(Option("size", "size", "how big"), Option("color", "str", "not understood")),
            )
        ]


@pytest.fixture
def widgets(monkeypatch: pytest.MonkeyPatch) -> Any:
    plugin = WidgetPlugin()
    # The test module is not importable by name under importlib mode.
    monkeypatch.setattr(DeviceFrontend, "load", lambda self: Widget, raising=False)
    registry().register(plugin, "test-widgets")
    yield
    registry().unregister(plugin)


def test_the_chipset_answers(bios: str) -> None:
    """CMOS has the sizes, fw_cfg its signature, the serial port its reset values, the bridges their identities."""
    with build(bios, ram=64 << 20, serials=[Console()], cpus=2) as machine:
        machine.start(paused=True)
        outb(machine, 0x70, 0x35)
        assert inb(machine, 0x71) == (48 << 20 >> 16) >> 8
        outb(machine, 0x70, 0x5F)
        assert inb(machine, 0x71) == 1
        with machine.lock:
            machine.ports.write(0x510, 2, 0)
        assert bytes(inb(machine, 0x511) for _ in range(4)) == b"QEMU"
        assert inb(machine, 0x3FD) == 0x60
        assert inb(machine, 0x2FD) == 0xFF
        assert inb(machine, 0x402) == 0xE9
        assert machine.board.pci.read(0, 0, 4) == 0x12378086


def test_boot_order_once(bios: str) -> None:
    """once= holds for the first boot, order= afterwards."""
    with build(bios, boot=BootConfig(order="c", once="d")) as machine:
        orders = []
        machine.start(paused=True)
        for _ in range(2):
            outb(machine, 0x70, 0x3D)
            orders.append(inb(machine, 0x71))
            machine.system_reset()
        assert orders == [3, 2]


def test_a_serial_port_in_both_directions(bios: str) -> None:
    """What the guest sends reaches the character device; what is typed waits for the guest to take it."""
    console = Console()
    with build(bios, serials=[console]) as machine:
        machine.start()
        for byte in b"hello\n":
            outb(machine, 0x3F8, byte)
        assert console.wait_for("hello", timeout=10)
        console.send("abc")
        got = bytearray()
        while len(got) < 3:
            if inb(machine, 0x3FD) & 1:
                got.append(inb(machine, 0x3F8))
        assert got == b"abc"
        with pytest.raises(ConsoleTimeoutError, match="hello"):
            console.wait_for("never", timeout=0.01)


def test_phases_are_told(bios: str) -> None:
    """Lines of the firmware's debug port and of the serial console become PHASE events."""
    console = Console()
    with build(bios, serials=[console]) as machine:
        phases: list[tuple[str, str]] = []
        machine.events.subscribe(
            lambda name, data: phases.append((data["phase"], data["text"])) if name == "PHASE" else None
        )
        machine.start()
        for byte in b"SeaBIOS (version 9)\nBooting from Hard Disk...\n":
            outb(machine, 0x402, byte)
        for byte in b"[    0.000000] Linux version 6.1.0-50-686 (gcc)\n":
            outb(machine, 0x3F8, byte)
        console.wait_for("gcc", timeout=10)
        machine.iothread.call(lambda: None)
        assert phases == [
            ("firmware", "SeaBIOS (version 9)"),
            ("boot-device", "Hard Disk"),
            ("kernel", "Linux version 6.1.0-50-686"),
        ]


def test_devices_are_made_from_descriptors(bios: str, widgets: None) -> None:
    """Options become typed values; places, ids and boot indices are the machine's."""
    devices = [
        DeviceConfig("widget", {"id": "a", "addr": "7", "size": "4k", "bootindex": "1"}),
        DeviceConfig("widget", {}),
    ]
    with build(bios, devices=devices) as machine:
        first, second = machine.devices["a"], machine.devices["widget.0"]
        assert isinstance(first, Widget)
        assert (first.slot, first.size) == (7, 4096)
        assert isinstance(second, Widget)
        assert second.size == 7
        assert machine.boot_order.file() == b"/pci@i0cf8/pci@7\0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colour": "red"}, "no option 'colour'; did you mean 'color'"),
        ({"color": "red"}, "no option 'color'"),
        ({"size": "big"}, "a size is needed"),
        ({"addr": "0"}, "is taken by host"),
        ({"addr": "zz"}, "a PCI address is SLOT"),
        ({"bus": "usb.0"}, "there is no such bus; there is: .*pci.0"),
        ({"bus": "isa.0"}, "it is of type isa, a bus of type pci is needed"),
        ({"bootindex": "first"}, "bootindex=first: a whole number"),
    ],
)
def test_wrong_device_options_are_refused(bios: str, widgets: None, options: dict[str, str], message: str) -> None:
    """One line says which option and what is accepted."""
    with pytest.raises(UsageError, match=message):
        build(bios, devices=[DeviceConfig("widget", options)])


def test_two_devices_of_one_id(bios: str, widgets: None) -> None:
    """The second one is refused by name."""
    devices = [DeviceConfig("widget", {"id": "x"}), DeviceConfig("widget", {"id": "x"})]
    with pytest.raises(UsageError, match="a device with id=x already"):
        build(bios, devices=devices)


def test_absent_drivers_and_interfaces(bios: str) -> None:
    """What is not installed is named with what brings it; what does not exist, with what there is."""
    drive: Any = None
    with pytest.raises(PluginError, match="vm-floppy"):
        build(bios, drives=[DriveConfig(drive, "floppy")])
    with pytest.raises(UsageError, match="if=bogus: no such interface"):
        build(bios, drives=[DriveConfig(drive, "bogus")])
    with pytest.raises(PluginError, match="nvme"):
        build(bios, devices=[DeviceConfig("nvme")])


def test_boards_and_sizes(bios: str) -> None:
    """Unknown boards, impossible sizes and contradictions are refused."""
    with pytest.raises(UsageError, match="-M q35: this board is not there yet; there is: pc"):
        build(bios, board="q35")
    with pytest.raises(UsageError, match="-M xt: no such board"):
        build(bios, board="xt")
    with pytest.raises(UsageError, match="at least 1 MiB"):
        build(bios, ram=4096)
    with pytest.raises(UsageError, match="leave -bios out"):
        build(bios, kernel="vmlinuz")
    with pytest.raises(UsageError, match="give -kernel FILE"):
        build(bios, append="quiet")


def test_accelerators_in_order(bios: str) -> None:
    """The first that works is used; if none does, each one's reason is told; a wrong option is an error at once."""
    with build(bios, accelerators=[AccelConfig("absent-one"), AccelConfig("none")]) as machine:
        assert type(machine.accel).__name__ == "NoAccelerator"
    with pytest.raises(VmError, match=r"no accelerator works here: .*absent-one.*; .*absent-two"):
        build(bios, accelerators=[AccelConfig("absent-one"), AccelConfig("absent-two")])
    with pytest.raises(UsageError, match="-accel none: no option 'speed'"):
        build(bios, accelerators=[AccelConfig("none", {"speed": "9"})])


def test_the_power_button_reaches_the_guest(bios: str) -> None:
    """system_powerdown sets the button's status bit for the guest to see."""
    with build(bios) as machine:
        machine.start(paused=True)
        with machine.lock:
            bus = machine.board.pci
            bus.write(0x0B, 0x40, 4, 0x601)
            bus.write(0x0B, 0x80, 1, 1)
        machine.system_powerdown()
        with machine.lock:
            assert machine.ports.read(0x600, 2) == 0x0100


def _seabios() -> bool:
    try:
        firmware.find()
    except UsageError:
        return False
    return True


@pytest.mark.skipif(not _seabios(), reason="SeaBIOS is not installed: apt install seabios")
@pytest.mark.skipif(importlib.util.find_spec("vm_unicorn") is None, reason="the accelerator unicorn is not installed")
def test_seabios_runs_to_the_end_of_its_search() -> None:
    """Real firmware finds the board, its tables and its console, tries to boot, and after a reset does so again."""
    console = Console()
    config = MachineConfig(accelerators=[AccelConfig("unicorn")], serials=[console], ram=32 << 20)
    with build_machine(config) as machine:
        machine.start()
        console.wait_for("SeaBIOS .version", timeout=60)
        console.wait_for("No bootable device", timeout=60)
        machine.system_reset()
        console.wait_for("No bootable device", timeout=60)
        log = bytes(machine.board.debug.log)
        for expected in (b"Running on QEMU (i440fx)", b"Found QEMU fw_cfg", b"via rsdt", b"PS2 keyboard initialized"):
            assert expected in log, log.decode()


def _boot_sector(code: str) -> bytes:
    return bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xaa"


@pytest.mark.skipif(not _seabios(), reason="SeaBIOS is not installed: apt install seabios")
@pytest.mark.skipif(importlib.util.find_spec("vm_unicorn") is None, reason="the accelerator unicorn is not installed")
@pytest.mark.skipif(importlib.util.find_spec("vm_ide") is None, reason="the IDE controller is not installed")
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        # INT 15h: connect to APM (5301h), say that we know 1.2 (530Eh), all devices off (5307h).
        (
            "b8 01 53 31 db cd 15  b8 0e 53 31 db b9 02 01 cd 15  b8 07 53 bb 01 00 b9 03 00 cd 15  f4",
            ExitReason.GUEST_SHUTDOWN,
        ),
        # Port 0xcf9.
        ("ba f9 0c b0 06 ee  f4", ExitReason.GUEST_RESET),
        # The keyboard controller's reset line.
        ("b0 fe e6 64  f4", ExitReason.GUEST_RESET),
        # Port 0x92.
        ("b0 03 e6 92  f4", ExitReason.GUEST_RESET),
        # A triple fault: an interrupt without an interrupt table, in protected mode without a descriptor table.
        ("0f 01 1e 20 7c  0f 01 16 20 7c  0f 20 c0 0c 01 0f 22 c0  cd 03", ExitReason.GUEST_RESET),
    ],
    ids=["apm", "cf9", "i8042", "port92", "triple-fault"],
)
def test_a_boot_sector_ends_the_machine(tmp_path: Path, code: str, reason: ExitReason) -> None:
    """From a disk that real firmware boots: power-off by its APM interface, and every way to reset a PC."""
    from vm_core.block.backend import BlockBackend
    from vm_core.block.open import open_node

    disk = tmp_path / "disk.img"
    disk.write_bytes(_boot_sector(code).ljust(1 << 20, b"\0"))
    backend = BlockBackend(
        open_node({"driver": "raw", "file": {"driver": "file", "filename": str(disk)}}, readonly=False)
    )
    config = MachineConfig(
        accelerators=[AccelConfig("unicorn")], ram=32 << 20, drives=[DriveConfig(backend)], no_reboot=True
    )
    with build_machine(config) as machine:
        machine.start()
        assert machine.wait(60) is reason, bytes(machine.board.debug.log).decode()
    backend.close()


@pytest.mark.skipif("VM_TEST_KERNEL" not in os.environ, reason="VM_TEST_KERNEL names no i386 bzImage")
@pytest.mark.skipif(importlib.util.find_spec("vm_unicorn") is None, reason="the accelerator unicorn is not installed")
@pytest.mark.slow
def test_a_kernel_is_entered_directly() -> None:
    """A real kernel reads the boot parameters, the memory map and the ACPI tables that it is given."""
    console = Console()
    config = MachineConfig(
        accelerators=[AccelConfig("unicorn")],
        serials=[console],
        ram=128 << 20,
        kernel=os.environ["VM_TEST_KERNEL"],
        append="console=ttyS0 panic=-1 marker=found-it",
        no_reboot=True,
    )
    with build_machine(config) as machine:
        machine.start()
        for pattern in ("Linux version", "ACPI: RSDP 0x", "IOAPIC.0.: apic_id 0", "marker=found-it", "PCI Root Bridge"):
            console.wait_for(pattern, timeout=120)
        # Without a root file system it panics, and panic=-1 reboots at once.
        console.wait_for("Kernel panic", timeout=240)
        assert machine.wait(60) is not None
