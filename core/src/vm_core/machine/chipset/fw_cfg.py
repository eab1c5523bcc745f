"""The fw_cfg device: items of data that firmware asks the board for.

Theory of operation. A 16-bit selector (port 0x510) chooses an item and rewinds it, each read of port 0x511 gives its
next byte. Items below 0x20 have fixed numbers; named files follow, listed by the directory item. Items are made when
they are selected, so that a boot order may change between resets. There is no DMA interface: firmware reads a few
kilobytes in all, which REP INSB moves in one step here.

Source: QEMU's docs/specs/fw_cfg (an interface description); numbers as SeaBIOS uses them (src/fw/paravirt.h).
"""

from __future__ import annotations

from collections.abc import Callable

import attrs

from ...errors import UsageError

# Items with fixed numbers.
SIGNATURE = 0x00
ID = 0x01
RAM_SIZE = 0x03
NB_CPUS = 0x05
NUMA = 0x0D
BOOT_MENU = 0x0E
MAX_CPUS = 0x0F
FILE_DIRECTORY = 0x19
FIRST_FILE = 0x20

#: The directory has 56 characters for a name, one of them for the zero byte.
MAX_NAME = 55

Content = bytes | Callable[[], bytes]


@attrs.frozen
class File:
    """A named item."""

    name: str
    key: int
    content: Content

    def data(self) -> bytes:
        """Its bytes as they are now."""
        return self.content if isinstance(self.content, bytes) else self.content()


class FwCfg:
    """The items, and the handler of ports 0x510 and 0x511."""

    def __init__(self) -> None:
        self._items: dict[int, Content] = {
            SIGNATURE: b"QEMU",  # what firmware looks for, whoever makes the board
            ID: (1).to_bytes(4, "little"),
            FILE_DIRECTORY: self._directory,
        }
        self.files: dict[str, File] = {}
        self.reset()

    def reset(self) -> None:
        """Nothing selected but the signature."""
        self._select(SIGNATURE)

    def set(self, key: int, content: Content) -> None:
        """Define the item with a fixed number."""
        self._items[key] = content

    def set_number(self, key: int, value: int, width: int) -> None:
        """Define an item that is a little-endian number of *width* bytes."""
        self._items[key] = value.to_bytes(width, "little")

    def add_file(self, name: str, content: Content) -> None:
        """Define the file *name*. A function is asked each time the guest selects it."""
        if len(name.encode()) > MAX_NAME:
            raise UsageError(f"fw_cfg: the name {name!r} is longer than {MAX_NAME} bytes")
        if name in self.files:
            raise UsageError(f"fw_cfg: there are two files {name!r}")
        found = File(name, FIRST_FILE + len(self.files), content)
        self.files[name] = found
        self._items[found.key] = content

    def _directory(self) -> bytes:
        """Count, then per file: size, key (big-endian), reserved, name. Empty files are left out, as if not there."""
        entries = [(len(f.data()), f) for f in sorted(self.files.values(), key=lambda f: f.name)]
        present = [
            size.to_bytes(4, "big") + f.key.to_bytes(2, "big") + bytes(2) + f.name.encode().ljust(MAX_NAME + 1, b"\0")
            for size, f in entries
            if size
        ]
        return len(present).to_bytes(4, "big") + b"".join(present)

    def _select(self, key: int) -> None:
        content = self._items.get(key, b"")
        self._data = content if isinstance(content, bytes) else content()
        self._at = 0

    # Ports: offset 0 is the selector, 1 the data.

    def read(self, offset: int, size: int) -> int:
        if offset == 0:
            return (1 << 8 * size) - 1
        at = self._at
        if at < len(self._data):
            self._at = at + 1
            return self._data[at]
        return 0

    def read_block(self, offset: int, size: int, count: int) -> bytes:
        """REP INSB; what lies behind the end reads as zeroes."""
        if offset == 0 or size != 1:
            return b"\xff" * (size * count)
        found = self._data[self._at : self._at + count]
        self._at += len(found)
        return found.ljust(count, b"\0")

    def write(self, offset: int, size: int, value: int) -> None:
        # Writing data was never of use to a guest and is ignored (as the interface says since version 2.4).
        if offset == 0:
            self._select(value & 0xFFFF)
