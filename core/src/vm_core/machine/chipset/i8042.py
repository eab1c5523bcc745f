"""The 8042 keyboard controller with a PS/2 keyboard and mouse.

Theory of operation. Two ports: 0x60 data, 0x64 status and command. The controller holds one byte for the processor; a
keyboard and a mouse stand behind it with queues of answers and, for the keyboard, of keys. Whenever the output buffer
is empty the next byte goes in, keyboard first, and interrupts on line 1 or 12 where the command byte allows it.
Keyboards speak scan code set 2 on the wire; translation turns bytes into set 1, as all PC software expects.

The controller also drives two wires of the board: A20 (kept as state: every accelerator has all address lines) and the
processor's reset.

Sources: IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller"; "Keyboards";
Microsoft, "Key Support, Keyboard Scan Codes" for translation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

#: Status register: output full, self-test passed, last write was a command, not inhibited, output is from the mouse.
OUTPUT_FULL, SYSTEM, COMMAND, UNLOCKED, AUX_FULL = 0x01, 0x04, 0x08, 0x10, 0x20
#: Command byte: interrupts, system flag, ports disabled, translation.
CTR_KEYBOARD_IRQ, CTR_AUX_IRQ, CTR_SYSTEM = 0x01, 0x02, 0x04
CTR_KEYBOARD_OFF, CTR_AUX_OFF, CTR_TRANSLATE = 0x10, 0x20, 0x40

ACK, RESEND, SELF_TEST_PASSED = 0xFA, 0xFE, 0xAA

#: The set-2 code of each set-1 code from 0x00 to 0x7f.
_SET_2 = bytes.fromhex(
    "00 76 16 1e 26 25 2e 36 3d 3e 46 45 4e 55 66 0d "
    "15 1d 24 2d 2c 35 3c 43 44 4d 54 5b 5a 14 1c 1b "
    "23 2b 34 33 3b 42 4b 4c 52 0e 12 5d 1a 22 21 2a "
    "32 31 3a 41 49 4a 59 7c 11 29 58 05 06 04 0c 03 "
    "0b 02 0a 01 09 77 7e 6c 75 7d 7b 6b 73 74 79 69 "
    "72 7a 70 71 7f 60 61 78 07 0f 17 1f 27 2f 37 3f "
    "47 4f 56 5e 08 10 18 20 28 30 38 40 48 50 57 6f "
    "13 19 39 51 53 5c 5f 62 63 64 65 67 68 6a 6d 6e "
)
#: Set 2 to set 1. F7 (0x83) is the one key beyond 0x7f; 0x84 is Alt-SysRq; prefixes and answers pass unchanged.
_TRANSLATION = bytes(
    {0x83: 0x41, 0x84: 0x54}.get(code, _SET_2.find(code) if code < 0x80 else code) for code in range(256)
)


class Ps2Device:
    """The half of a keyboard or mouse that is the same: commands come in, answers queue up."""

    def __init__(self) -> None:
        self.queue: deque[int] = deque()
        #: The command that waits for its parameter.
        self._expecting: int | None = None
        self.reset()

    def reset(self) -> None:
        """Power-on state, without the self-test's answer."""
        self.queue.clear()
        self._expecting = None
        self.set_defaults()

    def set_defaults(self) -> None:
        """What command 0xf6 does."""
        raise NotImplementedError

    def answer(self, *data: int) -> None:
        """Queue bytes for the processor."""
        self.queue.extend(data)


class Keyboard(Ps2Device):
    """A PS/2 keyboard (MF II), scan code sets 1 to 3 selectable, keys given in set 2."""

    def set_defaults(self) -> None:
        self.scanning = True
        self.leds = 0
        self.code_set = 2

    def keys(self, codes: Iterable[int]) -> None:
        """Scan codes of keys pressed and released, in set 2. Lost while the guest has scanning off or is far behind."""
        data = list(codes)
        if self.scanning and len(self.queue) + len(data) <= 256:
            self.queue.extend(data)

    def command(self, value: int) -> None:
        """A byte from the controller."""
        expecting, self._expecting = self._expecting, None
        if expecting == 0xED:
            self.leds = value & 7
            self.answer(ACK)
        elif expecting == 0xF0:
            if value == 0:
                self.answer(ACK, self.code_set)
            elif value <= 3:
                self.code_set = value
                self.answer(ACK)
            else:
                self.answer(RESEND)
        elif expecting == 0xF3:
            self.answer(ACK)
        elif value in (0xED, 0xF0, 0xF3):
            self._expecting = value
            self.answer(ACK)
        elif value == 0xEE:
            self.answer(0xEE)
        elif value == 0xF2:
            self.answer(ACK, 0xAB, 0x83)
        elif value == 0xF4:
            self.queue.clear()
            self.scanning = True
            self.answer(ACK)
        elif value == 0xF5:
            self.queue.clear()
            self.set_defaults()
            self.scanning = False
            self.answer(ACK)
        elif value == 0xF6:
            self.queue.clear()
            self.set_defaults()
            self.answer(ACK)
        elif 0xF7 <= value <= 0xFA:  # typematic and make/break for all keys of set 3
            self.answer(ACK)
        elif value == 0xFF:
            self.reset()
            self.answer(ACK, SELF_TEST_PASSED)
        else:
            self.answer(RESEND)


class Mouse(Ps2Device):
    """A PS/2 mouse that lies still."""

    def set_defaults(self) -> None:
        self.reporting = False
        self.remote = False
        self.wrap = False
        self.double_scale = False
        self.resolution = 2
        self.rate = 100

    def command(self, value: int) -> None:
        """A byte from the controller."""
        expecting, self._expecting = self._expecting, None
        if self.wrap and value not in (0xEC, 0xFF):
            self.answer(value)
        elif expecting == 0xE8:
            self.resolution = value & 3
            self.answer(ACK)
        elif expecting == 0xF3:
            self.rate = value
            self.answer(ACK)
        elif value in (0xE8, 0xF3):
            self._expecting = value
            self.answer(ACK)
        elif value in (0xE6, 0xE7):
            self.double_scale = value == 0xE7
            self.answer(ACK)
        elif value == 0xE9:
            status = self.remote << 6 | self.reporting << 5 | self.double_scale << 4
            self.answer(ACK, status, self.resolution, self.rate)
        elif value in (0xEA, 0xF0):
            self.remote = value == 0xF0
            self.answer(ACK)
        elif value == 0xEB:
            self.answer(ACK, 0x08, 0, 0)
        elif value in (0xEC, 0xEE):
            self.wrap = value == 0xEE
            self.answer(ACK)
        elif value == 0xF2:
            self.answer(ACK, 0)
        elif value in (0xF4, 0xF5):
            self.reporting = value == 0xF4
            self.answer(ACK)
        elif value == 0xF6:
            self.set_defaults()
            self.answer(ACK)
        elif value == 0xFF:
            self.reset()
            self.answer(ACK, SELF_TEST_PASSED, 0)
        else:
            self.answer(RESEND)


class I8042:
    """Ports 0x60 (offset 0) and 0x64 (offset 4, of its own claim). *set_irq(line, level)* drives lines 1 and 12."""

    def __init__(self, set_irq: Callable[[int, bool], object], reset_processor: Callable[[str], object]) -> None:
        self._set_irq = set_irq
        self._reset_processor = reset_processor
        self.keyboard = Keyboard()
        self.mouse = Mouse()
        #: Bytes of the controller itself, which go before those of the devices: (byte, from the mouse's side).
        self._own: deque[tuple[int, bool]] = deque()
        self.reset()

    def reset(self) -> None:
        """Power-on state."""
        self.keyboard.reset()
        self.mouse.reset()
        self._own.clear()
        self.status = SYSTEM | UNLOCKED
        self.ctr = CTR_KEYBOARD_IRQ | CTR_AUX_IRQ | CTR_SYSTEM | CTR_TRANSLATE
        self.a20 = True
        self._data = 0
        self._parameter_of: int | None = None
        self._break = False
        self._set_irq(1, False)
        self._set_irq(12, False)

    def keys(self, codes: Iterable[int]) -> None:
        """Keys were pressed or released (set 2)."""
        self.keyboard.keys(codes)
        self._fill()

    # The output buffer.

    def _fill(self) -> None:
        """Put the next byte into an empty output buffer."""
        if self.status & OUTPUT_FULL:
            return
        if self._own:
            byte, aux = self._own.popleft()
        elif self.keyboard.queue and not self.ctr & CTR_KEYBOARD_OFF:
            aux = False
            translated = self._translate(self.keyboard.queue)
            if translated is None:
                return
            byte = translated
        elif self.mouse.queue and not self.ctr & CTR_AUX_OFF:
            byte, aux = self.mouse.queue.popleft(), True
        else:
            return
        self._data = byte
        self.status |= OUTPUT_FULL | (AUX_FULL if aux else 0)
        self._update_irqs()

    def _translate(self, queue: deque[int]) -> int | None:
        """The next byte of the keyboard in the set the processor wants; 0xf0 (break) merges into what follows."""
        while queue:
            byte = queue.popleft()
            if not self.ctr & CTR_TRANSLATE:
                return byte
            if byte == 0xF0:
                self._break = True
                continue
            released, self._break = self._break, False
            code = _TRANSLATION[byte]
            return code | 0x80 if released else code
        return None

    def _update_irqs(self) -> None:
        full, aux = self.status & OUTPUT_FULL, self.status & AUX_FULL
        self._set_irq(1, bool(full and not aux and self.ctr & CTR_KEYBOARD_IRQ))
        self._set_irq(12, bool(full and aux and self.ctr & CTR_AUX_IRQ))

    def _answer(self, byte: int, *, aux: bool = False) -> None:
        self._own.append((byte, aux))
        self._fill()

    # Ports.

    def read(self, offset: int, size: int) -> int:
        """The data port."""
        if self.status & OUTPUT_FULL:
            self.status &= ~(OUTPUT_FULL | AUX_FULL)
            self._update_irqs()
            data = self._data
            self._fill()
            return data
        return self._data

    def write(self, offset: int, size: int, value: int) -> None:
        """The data port: a parameter of the controller's command, or a byte for the keyboard."""
        value &= 0xFF
        self.status &= ~COMMAND
        command, self._parameter_of = self._parameter_of, None
        if command is None:
            # A byte for the keyboard also enables its port.
            self.ctr &= ~CTR_KEYBOARD_OFF
            self.keyboard.command(value)
        elif command == 0x60:
            self.ctr = value
            self.status = self.status & ~SYSTEM | value & SYSTEM
            self._update_irqs()
        elif command == 0xD1:
            self._write_output_port(value)
        elif command == 0xD2:
            self._answer(value)
        elif command == 0xD3:
            self._answer(value, aux=True)
        else:  # 0xd4
            self.ctr &= ~CTR_AUX_OFF
            self.mouse.command(value)
        self._fill()

    def write_command(self, value: int) -> None:
        """The command port."""
        self.status |= COMMAND
        self._parameter_of = None
        if 0x20 <= value <= 0x3F:
            # Only byte 0 of the controller's memory exists in every implementation.
            self._answer(self.ctr if value == 0x20 else 0)
        elif value in (0x60, 0xD1, 0xD2, 0xD3, 0xD4):
            self._parameter_of = value
        elif value == 0xA7:
            self.ctr |= CTR_AUX_OFF
        elif value == 0xA8:
            self.ctr &= ~CTR_AUX_OFF
        elif value in (0xA9, 0xAB):
            self._answer(0x00)  # interface test: no error
        elif value == 0xAA:
            self.status |= SYSTEM
            self._answer(0x55)
        elif value == 0xAD:
            self.ctr |= CTR_KEYBOARD_OFF
        elif value == 0xAE:
            self.ctr &= ~CTR_KEYBOARD_OFF
        elif value == 0xC0:
            self._answer(0x80)  # input port: keyboard not locked
        elif value == 0xD0:
            self._answer(self._output_port())
        elif value in (0xDD, 0xDF):
            self.a20 = value == 0xDF
        elif value >= 0xF0 and not value & 1:
            # Pulse output port bits that are zero in the low nibble: bit 0 is the processor's reset.
            self._reset_processor("keyboard controller")
        self._fill()

    def _output_port(self) -> int:
        full = self.status & OUTPUT_FULL
        aux = self.status & AUX_FULL
        return 0x01 | self.a20 << 1 | bool(full and not aux) << 4 | bool(full and aux) << 5 | 0xC0

    def _write_output_port(self, value: int) -> None:
        self.a20 = bool(value & 2)
        if not value & 1:
            self._reset_processor("keyboard controller")


class CommandPort:
    """Port 0x64."""

    def __init__(self, controller: I8042) -> None:
        self._controller = controller

    def read(self, offset: int, size: int) -> int:
        return self._controller.status

    def write(self, offset: int, size: int, value: int) -> None:
        self._controller.write_command(value & 0xFF)
