"""A real QEMU as the other side of differential tests: its devices, driven without a CPU.

Theory of operation. ``qemu-system-x86_64 -qtest stdio`` takes port, memory and configuration accesses as lines of text
on its standard input (``outl 0xcf8 0x80002000`` → ``OK``, ``inl 0xcfc`` → ``OK 0x10011af4``). Debian builds it without
the accelerator ``qtest``, so the CPU is kept quiet by a ROM that holds nothing but a halt with interrupts off.
Its RAM is a file that this process maps as well, so drivers that keep rings in guest memory run on it unchanged:
:class:`QtestAccess` is a :class:`~vm_core.testing.virtio.PciAccess` for a function of that machine.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from ..machine.memory import GuestMemory
from .virtio import PciAccess

QEMU = "qemu-system-x86_64"


def available() -> bool:
    """QEMU is installed."""
    return shutil.which(QEMU) is not None


class SharedMemory(GuestMemory):
    """Guest RAM in a file that another process maps too, at guest-physical 0."""

    def __init__(self, path: str, size: int) -> None:
        super().__init__(4096)
        with open(path, "r+b") as file:
            self.shared = mmap.mmap(file.fileno(), size)
        self._shared_view = memoryview(self.shared)

    def view(self, address: int, length: int) -> memoryview:
        return self._shared_view[address : address + length]

    def views(self, address: int, length: int) -> list[memoryview]:
        return [self.view(address, length)]


class QtestMachine:
    """QEMU's ``pc`` board with *size* bytes of RAM and whatever *arguments* add."""

    def __init__(self, arguments: Sequence[str], *, size: int = 64 << 20) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="qtest-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None
        )
        ram = os.path.join(self._folder.name, "ram")
        with open(ram, "wb") as file:
            file.truncate(size)
        rom = os.path.join(self._folder.name, "halt.rom")
        with open(rom, "wb") as file:
            # At the reset vector, 16 bytes from the end: cli; hlt; jmp back to the hlt.
            file.write(bytes(0xFFF0) + bytes.fromhex("fa f4 eb fd").ljust(16, b"\0"))
        command = [
            QEMU,
            "-M",
            "pc,memory-backend=ram",
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
            "-bios",
            rom,
        ]
        command += ["-object", f"memory-backend-file,id=ram,size={size},mem-path={ram},share=on", "-m", f"{size}b"]
        command += ["-qtest", "stdio", "-qtest-log", "none", *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.memory = SharedMemory(ram, size)

    def command(self, line: str) -> int:
        """Send one command; returns its value (0 where it has none). Raises RuntimeError with QEMU's words."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        while answer := self.process.stdout.readline():
            words = answer.split()
            if words[:1] == ["OK"]:
                return int(words[1], 16) if len(words) > 1 else 0
            if words[:1] != ["IRQ"]:
                raise RuntimeError(f"{line}: {answer.strip()}")
        assert self.process.stderr is not None
        raise RuntimeError(f"QEMU ended: {self.process.stderr.read().strip()}")

    def close(self) -> None:
        """End QEMU."""
        self.process.kill()
        self.process.communicate()
        self._folder.cleanup()

    def __enter__(self) -> QtestMachine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


_LETTER = {1: "b", 2: "w", 4: "l", 8: "q"}


class QtestAccess(PciAccess):
    """A function of a :class:`QtestMachine`, on bus 0."""

    def __init__(self, machine: QtestMachine, slot: int, function: int = 0) -> None:
        self.machine: Any = machine
        self.devfn = slot << 3 | function

    def read(self, offset: int, size: int = 4) -> int:
        self._select(offset)
        return int(self.machine.command(f"in{_LETTER[size]} {0xCFC + (offset & 3):#x}"))

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self._select(offset)
        self.machine.command(f"out{_LETTER[size]} {0xCFC + (offset & 3):#x} {value:#x}")

    def _select(self, offset: int) -> None:
        self.machine.command(f"outl 0xcf8 {0x80000000 | self.devfn << 8 | offset & 0xFC:#x}")

    def load(self, address: int, size: int) -> int:
        return int(self.machine.command(f"read{_LETTER[size]} {address:#x}"))

    def store(self, address: int, size: int, value: int) -> None:
        self.machine.command(f"write{_LETTER[size]} {address:#x} {value:#x}")

    def port_in(self, port: int, size: int) -> int:
        return int(self.machine.command(f"in{_LETTER[size]} {port:#x}"))

    def port_out(self, port: int, size: int, value: int) -> None:
        self.machine.command(f"out{_LETTER[size]} {port:#x} {value:#x}")
