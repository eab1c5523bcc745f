"""The PIIX4's power management function: power-off, power button, the ACPI timer and the APM ports.

Theory of operation. Firmware gives the function an I/O base; there lie the PM1 event, enable and control registers and
a 24-bit timer at 3.579545 MHz. An event whose enable bit is set raises the system control interrupt (line 9). Writing
SLP_EN with SLP_TYP 0 switches the power off; that is what ACPI's ``\\_S5`` asks for here. Writing to the APM command
port would be a system management interrupt on the real chip, for firmware to switch ACPI on and off; the effect is had
here without one, and the chip's "SMI already set up" bit keeps firmware from looking for it.

A guest without ACPI switches off through SeaBIOS' APM 1.2 interface, which ends in the same register.

Sources: Intel 82371AB (PIIX4) data sheet (290562-001), chapter 7; ACPI 6.4, 4.8.3.
"""

from __future__ import annotations

from typing import Any

from ...devices.bus import Bus
from ...devices.pci import PciDevice
from ...devices.registers import Register, load, writable_mask
from ..clock import NANOSECONDS
from ..machine import Machine
from ..ports import PortRange

#: Hz.
TIMER_FREQUENCY = 3_579_545
#: Where firmware puts the registers, and where they are put without firmware.
DEFAULT_BASE = 0x600
#: The system control interrupt.
SCI = 9

PMBASE, PMREGMISC, DEVACTB = 0x40, 0x80, 0x58

#: PM1 status and enable: the timer's top bit changed, global lock released, power button, alarm of the clock. Nothing
#: here sets the second and the last, but systems enable them and check that they are.
TMR, GBL, PWRBTN, RTC = 0x0001, 0x0020, 0x0100, 0x0400
ENABLES = TMR | GBL | PWRBTN | RTC
#: PM1 control: ACPI mode, sleep type, sleep now.
SCI_EN, SLP_TYP_SHIFT, SLP_EN = 0x0001, 10, 0x2000
#: SLP_TYP of soft off.
SLP_S5 = 0

#: APM commands that the board's ACPI tables name.
ACPI_ENABLE, ACPI_DISABLE = 0xF1, 0xF0
APM_CONTROL_PORT = 0xB2

REGISTERS = (
    Register("pmba", 0x40, 4, reset=0x0001, help="base address of the power management registers", writable=0xFFC0),
    Register("devactb", 0x58, 4, reset=0x0200_0000, help="device activity B; bit 25: APM writes cause SMIs"),
    Register("pmregmisc", 0x80, help="bit 0: the registers are decoded", writable=0x01),
)

PM_REGISTERS = (
    Register("pm1_status", 0, 2, help="events, cleared by writing ones"),
    Register("pm1_enable", 2, 2, help="which events raise the interrupt", writable=ENABLES),
    Register("pm1_control", 4, 2, help="SCI_EN, SLP_TYP, SLP_EN"),
    Register("pm_timer", 8, 4, access="ro", help="24 bits at 3.579545 MHz"),
)


class PowerManagement(PciDevice):
    """Function 01.3. The register block is the handler of its 64 ports."""

    vendor_id = 0x8086
    device_id = 0x7113
    class_code = 0x068000
    revision = 3
    interrupt_pin = 1

    def __init__(self, id: str, options: dict[str, Any]) -> None:
        super().__init__(id, options)
        self._ports: PortRange | None = None
        self.status = 0
        self.enable = 0
        self.control = 0

    def realize(self, machine: Machine, bus: Bus, address: str | None) -> None:
        super().realize(machine, bus, address)
        load(REGISTERS, self.config)
        writable_mask(REGISTERS, self.config_writable)
        self._timer = machine.clock.timer(self._timer_changed)
        machine.ports.add(APM_CONTROL_PORT, 2, ApmPorts(self))
        machine.on_powerdown = self.press_power_button

    def reset(self) -> None:
        super().reset()
        load(REGISTERS, self.config)
        self.status = self.enable = self.control = 0
        self._timer.cancel()
        self._map()
        self._update_sci()

    def write_config(self, offset: int, size: int, value: int) -> None:
        super().write_config(offset, size, value)
        self._map()

    @property
    def base(self) -> int | None:
        """The first port of the registers, None while they are not decoded."""
        if not self.config[PMREGMISC] & 1:
            return None
        return int.from_bytes(self.config[PMBASE : PMBASE + 2], "little") & 0xFFC0

    def _map(self) -> None:
        base = self.base
        if (self._ports.start if self._ports else None) == (base or None):
            return
        ports = self.machine.ports
        if self._ports is not None:
            ports.remove(self._ports)
            self._ports = None
        if base:
            try:
                self._ports = ports.add(base, 64, self)
            except ValueError:
                self._ports = None  # in conflict with another device, which keeps its ports

    def boot_path(self) -> str | None:
        return None

    # The register block.

    def read(self, offset: int, size: int) -> int:
        aligned = offset & ~1
        if 8 <= offset < 12:
            value, aligned = self.timer_value(), 8
        elif aligned == 0:
            value = self.status
        elif aligned == 2:
            value = self.enable
        elif aligned == 4:
            value = self.control
        else:
            return 0
        if aligned == 0 and size == 4:
            value |= self.enable << 16
        return value >> 8 * (offset - aligned) & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        if size == 4:
            self.write(offset, 2, value & 0xFFFF)
            self.write(offset + 2, 2, value >> 16)
            return
        aligned = offset & ~1
        shift = 8 * (offset - aligned)
        value = (value & ((1 << 8 * size) - 1)) << shift
        untouched = 0 if size == 2 else 0xFF00 >> shift
        if aligned == 0:
            self.status &= ~value
            self._update_sci()
        elif aligned == 2:
            self.enable = (self.enable & untouched | value) & ENABLES
            self._arm_timer()
            self._update_sci()
        elif aligned == 4:
            self._write_control(self.control & untouched | value, bool(value & SLP_EN))

    def _write_control(self, value: int, sleep: bool) -> None:
        # SCI_EN belongs to the firmware (4.8.3.2.1), here: to the APM commands.
        self.control = value & ~(SLP_EN | SCI_EN) | self.control & SCI_EN
        if sleep and value >> SLP_TYP_SHIFT & 7 == SLP_S5:
            self.machine.request_shutdown()

    def set_acpi_mode(self, on: bool) -> None:
        """Events cause the system control interrupt (or, on the real chip, an SMI)."""
        self.control = self.control | SCI_EN if on else self.control & ~SCI_EN
        self._update_sci()

    def press_power_button(self) -> None:
        """The operator presses the button for a moment."""
        self.status |= PWRBTN
        self._update_sci()

    def _update_sci(self) -> None:
        level = bool(self.status & self.enable) and bool(self.control & SCI_EN)
        self.machine.irqs.set_irq(SCI, level)

    # The timer.

    def timer_value(self) -> int:
        """The 24-bit counter."""
        return self.machine.clock.now_ns() * TIMER_FREQUENCY // NANOSECONDS & 0xFFFFFF

    def _arm_timer(self) -> None:
        """Its top bit changes every 2.3 s; a timer runs only while somebody wants to know."""
        if not self.enable & TMR:
            self._timer.cancel()
            return
        ticks = self.machine.clock.now_ns() * TIMER_FREQUENCY // NANOSECONDS
        following = (ticks >> 23) + 1 << 23
        self._timer.arm(-(-following * NANOSECONDS // TIMER_FREQUENCY))

    def _timer_changed(self) -> None:
        self.status |= TMR
        self._update_sci()
        self._arm_timer()


class ApmPorts:
    """Ports 0xb2 (command) and 0xb3 (status, plain storage)."""

    def __init__(self, power: PowerManagement) -> None:
        self._power = power
        self._values = [0, 0]

    def read(self, offset: int, size: int) -> int:
        return self._values[offset] if size == 1 else self._values[0] | self._values[1] << 8

    def write(self, offset: int, size: int, value: int) -> None:
        self._values[offset] = value & 0xFF
        if offset == 0 and value & 0xFF in (ACPI_ENABLE, ACPI_DISABLE):
            self._power.set_acpi_mode(value & 0xFF == ACPI_ENABLE)
