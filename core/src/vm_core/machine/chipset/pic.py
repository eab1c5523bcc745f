"""Two 8259A interrupt controllers, the second on input 2 of the first, with the PIIX3's edge/level registers.

Theory of operation. Each chip latches requests in IRR, remembers the ones being served in ISR, and shows its INT output
while a request that is not masked has a higher priority than everything in service. :class:`PicPair` connects the two,
the lines of the ISA bus and the processor. An input is edge-triggered unless its ELCR bit makes it level-triggered; a
request whose line drops before the processor acknowledges is *spurious* in level mode: the acknowledge cycle then finds
nothing and answers with input 7, without touching ISR.

Sources: Intel 8259A data sheet (231468-003), 82371SB (PIIX3) data sheet 2.5.5 for ELCR.
"""

from __future__ import annotations

from collections.abc import Callable


class Pic:
    """One 8259A. *level_mask* are the ELCR bits that exist. *changed* is called after :attr:`output` may have moved."""

    def __init__(self, *, master: bool, elcr_mask: int) -> None:
        self.master = master
        self.elcr_mask = elcr_mask
        #: The inputs as they are now.
        self.lines = 0
        self.elcr = 0
        self.reset()

    def reset(self) -> None:
        """Power-on: nothing requested, nothing masked, base vector 0; waiting for ICW1 in practice."""
        self.irr = 0
        self.isr = 0
        self.imr = 0
        self.base = 0
        self.elcr = 0
        #: The next initialisation word expected (2, 3, 4), 0 when done.
        self.init_step = 0
        self.init_icw4 = False
        self.init_single = False
        self.read_isr = False
        self.polled = False
        self.special_mask = False
        self.auto_eoi = False
        self.rotate_on_auto_eoi = False
        self.special_fully_nested = False
        #: The input with the highest priority.
        self.first = 0
        # Level-triggered inputs keep asking.
        self.irr = self.lines & self.elcr

    def set_line(self, line: int, level: bool) -> None:
        """An input changes."""
        bit = 1 << line
        if level:
            if self.elcr & bit or not self.lines & bit:
                self.irr |= bit
            self.lines |= bit
        else:
            self.lines &= ~bit
            if self.elcr & bit:
                self.irr &= ~bit

    def _rank(self, bits: int) -> int:
        """Priority of the foremost of *bits*: 0 is highest, 8 means none."""
        if not bits:
            return 8
        turned = (bits >> self.first | bits << (8 - self.first)) & 0xFF
        return (turned & -turned).bit_length() - 1

    def request(self) -> int:
        """The input that INT is shown for, -1 for none."""
        asking = self._rank(self.irr & ~self.imr)
        if asking == 8:
            return -1
        serving = self.isr
        if self.special_mask:
            serving &= ~self.imr
        if self.special_fully_nested and self.master:
            # The slave may interrupt itself with something more urgent.
            serving &= ~4
        return (asking + self.first) & 7 if asking < self._rank(serving) else -1

    def acknowledge(self, line: int) -> None:
        """The processor takes *line*."""
        bit = 1 << line
        if not self.elcr & bit:
            self.irr &= ~bit
        if not self.auto_eoi:
            self.isr |= bit
        elif self.rotate_on_auto_eoi:
            self.first = (line + 1) & 7

    # Registers: A0 = 0 is the command port, A0 = 1 the data port.

    def read_command(self) -> int:
        """IRR or ISR as OCW3 chose, or the answer to a poll."""
        if self.polled:
            return self._poll()
        return self.isr if self.read_isr else self.irr

    def read_data(self) -> int:
        """IMR, or the answer to a poll."""
        return self._poll() if self.polled else self.imr

    def _poll(self) -> int:
        """Poll mode: the read is the acknowledge. Bit 7 says that there was something, bits 0–2 what."""
        self.polled = False
        line = self.request()
        if line < 0:
            return 7
        self.acknowledge(line)
        return 0x80 | line

    def write_command(self, value: int) -> None:
        """ICW1, OCW2 or OCW3, told apart by bits 4 and 3."""
        if value & 0x10:
            # ICW1 forgets everything but the lines and ELCR.
            elcr = self.elcr
            self.reset()
            self.elcr = elcr
            self.irr = self.lines & elcr
            self.init_step = 2
            self.init_single = bool(value & 2)
            self.init_icw4 = bool(value & 1)
        elif value & 0x08:
            if value & 0x04:
                self.polled = True
            if value & 0x02:
                self.read_isr = bool(value & 1)
            if value & 0x40:
                self.special_mask = bool(value & 0x20)
        else:
            self._ocw2(value >> 5, value & 7)

    def _ocw2(self, command: int, line: int) -> None:
        """End of interrupt and rotation: bit 0 EOI, bit 1 specific, bit 2 rotate."""
        if command == 0:
            self.rotate_on_auto_eoi = False
        elif command == 4:
            self.rotate_on_auto_eoi = True
        elif command == 6:
            self.first = (line + 1) & 7
        elif command & 1:
            if not command & 2:
                # In special mask mode a masked level is not ended by a non-specific EOI.
                serving = self.isr & ~self.imr if self.special_mask else self.isr
                rank = self._rank(serving)
                if rank == 8:
                    return
                line = (rank + self.first) & 7
            self.isr &= ~(1 << line)
            if command & 4:
                self.first = (line + 1) & 7

    def write_data(self, value: int) -> None:
        """IMR, or the initialisation word that is due."""
        step = self.init_step
        if step == 0:
            self.imr = value
        elif step == 2:
            self.base = value & 0xF8
            self.init_step = 3 if not self.init_single else 4 if self.init_icw4 else 0
        elif step == 3:
            # ICW3 tells how the chips are connected; here that is soldered.
            self.init_step = 4 if self.init_icw4 else 0
        else:
            self.special_fully_nested = bool(value & 0x10)
            self.auto_eoi = bool(value & 0x02)
            self.init_step = 0


class PicPair:
    """The board's interrupt controller: 16 ISA lines in, one INTR line to the processor out.

    *notify* is called when INTR goes up. It is both what devices use (``InterruptController``) and what a vCPU asks
    (``CpuInterrupts``).
    """

    def __init__(self, notify: Callable[[], object] = lambda: None) -> None:
        self.notify = notify
        self.master = Pic(master=True, elcr_mask=0xF8)
        self.slave = Pic(master=False, elcr_mask=0xDE)
        #: INTR.
        self.output = False

    def reset(self) -> None:
        """Power-on; the lines stay as devices drive them."""
        self.slave.reset()
        self.master.reset()
        self._update()

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive ISA line *irq*. There is nothing behind line 2, and no inputs above 15."""
        if irq < 8:
            if irq == 2:
                return
            self.master.set_line(irq, level)
        elif irq < 16:
            self.slave.set_line(irq - 8, level)
        else:
            return
        self._update()

    def send_msi(self, address: int, data: int) -> None:
        """Without a local APIC a message is a write to nowhere."""

    def _update(self) -> None:
        slave_asks = self.slave.request() >= 0
        # The cascade input follows the slave's output: it never latches a request that the slave took back.
        master = self.master
        if slave_asks:
            master.irr |= 4
        else:
            master.irr &= ~4
        output = master.request() >= 0
        if output != self.output:
            self.output = output
            if output:
                self.notify()

    def pending(self) -> bool:
        """INTR is up."""
        return self.output

    def acknowledge(self) -> int:
        """The INTA cycle: the vector."""
        master = self.master
        line = master.request()
        if line < 0:
            return master.base + 7
        master.acknowledge(line)
        if line != 2:
            self._update()
            return master.base + line
        slave = self.slave
        line = slave.request()
        if line < 0:
            line = 7
        else:
            slave.acknowledge(line)
        self._update()
        return slave.base + line


class PicPorts:
    """One chip's two ports. 0x20 and 0xa0."""

    def __init__(self, pair: PicPair, pic: Pic) -> None:
        self._pair = pair
        self._pic = pic

    def read(self, offset: int, size: int) -> int:
        pic = self._pic
        if pic.polled:
            value = pic.read_data() if offset else pic.read_command()
            self._pair._update()
            return value
        return pic.imr if offset else pic.isr if pic.read_isr else pic.irr

    def write(self, offset: int, size: int, value: int) -> None:
        if offset:
            self._pic.write_data(value & 0xFF)
        else:
            self._pic.write_command(value & 0xFF)
        self._pair._update()


class ElcrPorts:
    """Ports 0x4d0 and 0x4d1: which inputs are level-triggered. Lines 0, 1, 2, 8 and 13 are always edge-triggered."""

    def __init__(self, pair: PicPair) -> None:
        self._pair = pair

    def read(self, offset: int, size: int) -> int:
        value = self._pair.master.elcr | self._pair.slave.elcr << 8
        return value >> 8 * offset & ((1 << 8 * size) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        for pic in (self._pair.master, self._pair.slave)[offset : offset + size]:
            pic.elcr = value & pic.elcr_mask
            # A line that became level-triggered asks for as long as it is up.
            pic.irr = (pic.irr & ~pic.elcr) | (pic.lines & pic.elcr)
            value >>= 8
        self._pair._update()
