"""Boards: from a configuration to a machine.

The one board is ``pc``: an i440FX host bridge and a PIIX3 with the devices of a PC, plus every installed device that
has a place of its own on it (the PIIX3's IDE controller, say).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, cast

from ..descriptors import DeviceFrontend
from ..devices.bus import Bus
from ..devices.pci import PciBus
from ..errors import UsageError
from . import acpi, firmware, pcisetup
from .accelerators import choose
from .bootorder import cmos_order
from .chipset import fw_cfg, rtc
from .chipset.acpi_pm import PowerManagement
from .chipset.apics import FW_CFG_IRQ0_OVERRIDE, ApicInterrupts
from .chipset.debug import DebugConsole, PostCode
from .chipset.dma8237 import IsaDma
from .chipset.fw_cfg import FwCfg
from .chipset.i440fx import FOUR_GIB, PAM0, PCI_HOLE, HostBridge
from .chipset.i8042 import I8042, CommandPort
from .chipset.pic import ElcrPorts, PicPair, PicPorts
from .chipset.piix3 import IsaBridge
from .chipset.pit import Pit, Port61
from .chipset.port92 import Port92
from .chipset.rtc import Rtc
from .config import DriveConfig, MachineConfig
from .console import Console
from .linuxboot import BASE_MEMORY_END, E820, E820_RAM, E820_RESERVED, LinuxBoot
from .machine import Machine
from .memory import PAGE, GuestMemory, Region
from .mptable import MP_ADDRESS, PciInterrupt, mp_table
from .phases import PhaseWatcher
from .serialport import PORTS, SerialPort, SharedLine

if TYPE_CHECKING:
    from ..devices.device import Device

__all__ = ["PcBoard", "build_machine"]

#: Pages that the accelerator kvm needs for itself (see vm_kvm); told to every guest, so that guests do not differ.
_RESERVED = E820(0xFEFF_C000, 0x4000, E820_RESERVED)
#: Where ACPI tables and the root pointer are put when no firmware places them.
_TABLES, _ROOT_POINTER = 0xE0000, 0xF0000


def build_machine(config: MachineConfig) -> Machine:
    """The machine that *config* describes, with all its devices, ready to start. Raises VmError."""
    board = _BOARDS.get(config.board)
    if board is None:
        if config.board == "q35":
            raise UsageError("-M q35: this board is not there yet; there is: pc")
        raise UsageError(f"-M {config.board}: no such board; there is: {', '.join(_BOARDS)}")
    built = board(config)
    try:
        built.assemble()
    except BaseException:
        built.machine.close()
        raise
    return built.machine


class PcBoard:
    """An i440FX/PIIX3 PC. After :meth:`assemble` its parts are attributes, for tests and monitors."""

    def __init__(self, config: MachineConfig) -> None:
        if config.ram % PAGE or config.ram < 1 << 20:
            raise UsageError(f"-m: RAM is a multiple of 4 KiB, at least 1 MiB; {config.ram} bytes were asked for")
        self.config = config
        self.low_ram = min(config.ram, PCI_HOLE)
        self.linux: LinuxBoot | None = None
        self.image = b""
        if config.kernel is not None:
            if config.bios is not None:
                raise UsageError("-kernel boots without firmware: leave -bios out")
            self.linux = LinuxBoot(config.kernel, config.initrd, config.append, self.low_ram)
        elif config.initrd is not None or config.append:
            raise UsageError("-initrd and -append are for a kernel: give -kernel FILE")
        else:
            self.image = firmware.load(firmware.find(config.bios))
        if config.boot.order:
            cmos_order(config.boot.order)
        if config.boot.once:
            cmos_order(config.boot.once)
        self._booted = False
        memory = GuestMemory(config.ram, rom_size=len(self.image))
        self.machine = machine = Machine(memory, name=config.name)
        machine.board = self
        machine.cpu_count = config.cpus
        machine.no_reboot = config.no_reboot
        machine.no_shutdown = config.no_shutdown
        machine.boot_order.strict = config.boot.strict
        self.phases = PhaseWatcher(machine.events)
        self.serial_ports: list[SerialPort] = []

    # Assembly, from the inside out.

    def assemble(self) -> None:
        """Put everything in."""
        machine = self.machine
        machine.use_accelerator(choose(machine, self.config.accelerators))
        self._add_interrupts()
        self._add_chipset()
        self._add_serial_ports()
        self._add_fw_cfg()
        self._add_builtin_devices()
        for drive in self.config.drives:
            self._add_drive(drive)
        for device in self.config.devices:
            machine.add_device(device.driver, device.options, device.backend)
        machine.after_reset.append(self._after_reset)

    def _add_interrupts(self) -> None:
        """Interrupt controllers and timer, unless the accelerator has them."""
        machine = self.machine
        assert machine.accel is not None
        irqchip = machine.accel.irqchip
        if irqchip is not None:
            reset = getattr(irqchip, "reset", None)
            if reset is not None:
                machine.on_reset.append(reset)
            return
        ports = machine.ports
        self.pic = pic = PicPair()
        self.apics = apics = ApicInterrupts(pic, machine.memory, machine.clock, lambda: machine.kick(0))
        machine.irqs = apics
        machine.connect_interrupts(0, apics.lapic)
        ports.add(0x20, 2, PicPorts(pic, pic.master))
        ports.add(0xA0, 2, PicPorts(pic, pic.slave))
        ports.add(0x4D0, 2, ElcrPorts(pic))
        self.pit = pit = Pit(machine.clock, lambda level: apics.set_irq(0, level))
        port61 = Port61(machine.clock, pit)
        ports.add(0x40, 4, pit)
        ports.add(0x61, 1, port61)
        machine.on_reset += [pic.reset, apics.reset, pit.reset, port61.reset]

    def _add_chipset(self) -> None:
        machine, config = self.machine, self.config
        ports, set_irq = machine.ports, machine.irqs.set_irq
        isa_rom: Region | None = firmware.place(machine.memory, self.image) if self.image else None
        self.pci = PciBus("pci.0")
        machine.add_bus(self.pci)
        self.host_bridge = HostBridge("host", {}, isa_rom)
        self.isa_bridge = IsaBridge("isa", {})
        self.power = PowerManagement("power", {})
        for device, address in ((self.host_bridge, "00.0"), (self.isa_bridge, "01.0"), (self.power, "01.3")):
            device.driver = f"{self.config.board}-{device.id}"
            device.realize(machine, self.pci, address)
            machine.on_reset.append(device.reset)
        machine.add_bus(Bus("isa", "isa.0", self.isa_bridge))

        self.rtc = Rtc(machine.clock, lambda level: set_irq(8, level), rtc.parse_base(config.rtc_base))
        ports.add(0x70, 2, self.rtc)
        self.i8042 = I8042(set_irq, machine.request_reset)
        ports.add(0x60, 1, self.i8042)
        ports.add(0x64, 1, CommandPort(self.i8042))
        port92 = Port92(machine.request_reset)
        ports.add(0x92, 1, port92)
        machine.dma = self.dma = IsaDma(machine.memory)
        ports.add(0x00, 16, self.dma.first)
        ports.add(0x81, 15, self.dma.pages)
        ports.add(0xC0, 32, self.dma.second)
        ports.add(0x80, 1, PostCode())
        self.debug = DebugConsole(self.phases.firmware_line)
        ports.add(0x402, 1, self.debug)
        machine.on_reset += [
            self._reset_cmos,
            self.rtc.reset,
            self.i8042.reset,
            port92.reset,
            self.dma.reset,
            self.debug.reset,
            self.phases.reset,
        ]

    def _reset_cmos(self) -> None:
        """What firmware finds in CMOS, fresh for each boot."""
        config, cmos = self.config, self.rtc.cmos
        rtc.set_memory_size(cmos, self.low_ram, config.ram - self.low_ram)
        cmos[0x0F] = 0  # shutdown status: a cold start
        cmos[0x14] = 0x06  # equipment: coprocessor, PS/2 mouse; no diskette drives
        cmos[0x5F] = config.cpus - 1
        # Disk geometry is translated in the way that fits any size (LBA assisted), for four IDE drives.
        cmos[0x39] = 0x55
        order = config.boot.once if config.boot.once and not self._booted else config.boot.order or "cad"
        cmos[0x3D], third = cmos_order(order)
        # Bit 0 accepts diskettes without a signature, as the peer does.
        cmos[0x38] = third | 1
        self._booted = True

    def _add_serial_ports(self) -> None:
        machine = self.machine
        chardevs = self.config.serials
        if len(chardevs) > len(PORTS):
            raise UsageError(f"-serial: a PC has {len(PORTS)} serial ports")
        lines = {irq: SharedLine(machine, irq) for _, irq in PORTS}
        for number, chardev in enumerate(chardevs):
            if chardev is None:
                continue
            watch = self.phases.serial if number == 0 else lambda data: None
            port = SerialPort(machine, number, lines[PORTS[number][1]], chardev, watch)
            self.serial_ports.append(port)
            if isinstance(chardev, Console):
                chardev.open(machine.iothread)  # the others are opened by who made them, when all are there
            machine.on_reset.append(port.reset)
            machine.on_close.append(port.close)

    def e820(self) -> list[E820]:
        """RAM as firmware should know it, without what firmware takes."""
        ranges = [E820(0, self.low_ram, E820_RAM)]
        if self.config.ram > self.low_ram:
            ranges.append(E820(FOUR_GIB, self.config.ram - self.low_ram, E820_RAM))
        return [*ranges, _RESERVED]

    def _add_fw_cfg(self) -> None:
        machine, config = self.machine, self.config
        self.fw_cfg = FwCfg()
        machine.ports.add(0x510, 2, self.fw_cfg)
        machine.on_reset.append(self.fw_cfg.reset)
        self.tables = acpi.build(
            ram=config.ram, cpus=config.cpus, serial_ports=[(port.base, port.irq) for port in self.serial_ports]
        )
        cfg, boot = self.fw_cfg, config.boot
        cfg.set_number(fw_cfg.RAM_SIZE, config.ram, 8)
        cfg.set_number(fw_cfg.NB_CPUS, config.cpus, 2)
        cfg.set_number(fw_cfg.MAX_CPUS, config.cpus, 2)
        cfg.set_number(fw_cfg.BOOT_MENU, boot.menu, 2)
        cfg.set_number(fw_cfg.NUMA, 0, 8 * (1 + config.cpus))
        cfg.set_number(FW_CFG_IRQ0_OVERRIDE, 1, 1)
        cfg.add_file("etc/e820", b"".join(entry.pack() for entry in self.e820()))
        cfg.add_file(acpi.TABLES_FILE, bytes(self.tables.blob))
        cfg.add_file(acpi.RSDP_FILE, self.tables.rsdp())
        cfg.add_file(acpi.LOADER_FILE, self.tables.loader_script())
        cfg.add_file("bootorder", machine.boot_order.file)
        cfg.add_file("etc/max-cpus", struct.pack("<H", config.cpus))
        cfg.add_file("etc/show-boot-menu", struct.pack("<H", boot.menu))
        if boot.splash_time is not None:
            cfg.add_file("etc/boot-menu-wait", struct.pack("<H", min(boot.splash_time, 0xFFFF)))
        # -1: stay at "No bootable device".
        fail_wait = 0xFFFFFFFF if boot.reboot_timeout is None or boot.reboot_timeout < 0 else boot.reboot_timeout
        cfg.add_file("etc/boot-fail-wait", struct.pack("<I", fail_wait))
        if self.serial_ports and self.serial_ports[0].base == PORTS[0][0]:
            cfg.add_file("etc/sercon-port", struct.pack("<H", PORTS[0][0]))

    # Devices of plugins.

    def _add_builtin_devices(self) -> None:
        """Every installed device that has a place on this board."""
        from ..plugins import registry

        for descriptor in registry().all("device"):
            address = cast(DeviceFrontend, descriptor).builtin.get(self.config.board)
            if address is not None:
                self.machine.add_device(descriptor.name, {"id": descriptor.name, "addr": address})

    def _add_drive(self, drive: DriveConfig) -> Device:
        """The frontend for an interface and a medium, at the place that the drive's index means."""
        descriptor = _frontend(drive.interface, drive.media)
        options = dict(drive.options)
        if drive.id and "id" not in options and drive.id not in self.machine.devices:
            options["id"] = drive.id
        buses = [bus for bus in self.machine.buses.values() if bus.type == descriptor.bus]
        if descriptor.bus != "pci":
            if not buses:
                raise UsageError(f"-drive if={drive.interface}: the machine has no {descriptor.bus} controller")
            units = _UNITS.get(descriptor.bus, 1 << 16)
            bus_number, unit = divmod(drive.index, units)
            if bus_number >= len(buses):
                raise UsageError(
                    f"-drive if={drive.interface},index={drive.index}: there are {len(buses) * units} places"
                )
            options["bus"] = buses[bus_number].name
            options["unit"] = unit
        return self.machine.add_device(descriptor.name, options, drive.backend)

    # Booting without firmware.

    def _after_reset(self) -> None:
        """With a kernel: do what firmware does, and put everything in place."""
        linux, machine = self.linux, self.machine
        if linux is None:
            return
        memory = machine.memory
        # All of 0xc0000-0xfffff is RAM; there is no ROM.
        self.host_bridge.write_config(PAM0, 1, 0x30)
        for register in range(PAM0 + 1, PAM0 + 7):
            self.host_bridge.write_config(register, 1, 0x33)
        pcisetup.set_up(self.pci, machine.ports, self.config.ram)
        blob, rsdp = self.tables.placed(_TABLES)
        memory.write(_TABLES, blob)
        memory.write(_ROOT_POINTER, rsdp)
        # For kernels told to do without ACPI.
        pins = [(function.slot, function.interrupt_pin - 1) for function in self.pci.functions if function is not None]
        wires = [PciInterrupt(slot, pin, acpi.pci_line(slot, pin)) for slot, pin in sorted(set(pins)) if pin >= 0]
        memory.write(MP_ADDRESS, mp_table(self.config.cpus, wires))
        e820 = [
            E820(0, BASE_MEMORY_END, E820_RAM),
            E820(BASE_MEMORY_END, 0xA0000 - BASE_MEMORY_END, E820_RESERVED),
            E820(_TABLES, 0x100000 - _TABLES, E820_RESERVED),
            E820(0x100000, self.low_ram - 0x100000, E820_RAM),
            *self.e820()[1:],
        ]
        linux.load(memory, e820, _ROOT_POINTER)
        machine.reset_state = lambda index: linux.state()
        self.phases.direct_kernel(linux.kernel.name)


#: Places on one bus, where ``index`` is cut into bus and unit.
_UNITS = {"ide": 2}

_BOARDS = {"pc": PcBoard}


def _frontend(interface: str, media: str) -> DeviceFrontend:
    """The installed frontend for ``if=`` and ``media=``. Raises PluginError or UsageError."""
    from ..plugins import registry

    frontends = [cast(DeviceFrontend, each) for each in registry().all("device")]
    serving = [each for each in frontends if interface in each.interfaces]
    for each in serving:
        if media in each.media:
            return each
    if serving:
        kinds = ", ".join(sorted({kind for each in serving for kind in each.media}))
        raise UsageError(f"-drive if={interface}: it takes no media={media}; it takes: {kinds}")
    known = sorted({word for each in frontends for word in each.interfaces})
    driver = _DRIVERS.get((interface, media))
    if driver is not None:
        # Not installed, or not healthy: the registry says what mends that.
        return cast(DeviceFrontend, registry().find("device", driver))
    raise UsageError(f"-drive if={interface}: no such interface; there is: {', '.join([*known, 'none'])}")


#: Drivers of interfaces whose plugin may be missing.
_DRIVERS = {
    ("ide", "disk"): "ide-hd",
    ("ide", "cdrom"): "ide-cd",
    ("virtio", "disk"): "virtio-blk-pci",
    ("floppy", "disk"): "floppy",
    ("scsi", "disk"): "scsi-hd",
    ("scsi", "cdrom"): "scsi-cd",
}
