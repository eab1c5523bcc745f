"""Which devices firmware tries, in order: ``bootindex`` as the ``bootorder`` file, ``-boot order=`` as CMOS bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError

if TYPE_CHECKING:
    from ..devices.device import Device

#: Letters of ``-boot order=`` and SeaBIOS' numbers for them (CMOS 0x3d and 0x38).
_LETTERS = {"a": 1, "b": 1, "c": 2, "d": 3, "n": 4}


class BootOrder:
    """Devices by boot index."""

    def __init__(self) -> None:
        self._devices: dict[int, Device] = {}
        #: End the list with ``HALT``: whatever is not on it is not tried.
        self.strict = False

    def add(self, device: Device, index: int) -> None:
        """Try *device* at place *index* (0 is first)."""
        if index < 0:
            raise UsageError(f"{device.driver}: bootindex={index}: places count from 0")
        other = self._devices.setdefault(index, device)
        if other is not device:
            raise UsageError(f"{device.driver}: bootindex={index} is that of {other.id} already")

    def discard(self, device: Device) -> None:
        """*device* is gone."""
        self._devices = {index: d for index, d in self._devices.items() if d is not device}

    @property
    def devices(self) -> list[Device]:
        """Those with a boot index, in order."""
        return [device for _, device in sorted(self._devices.items())]

    def file(self) -> bytes:
        """The ``bootorder`` file: an OpenFirmware path a line, with a zero byte at the end; empty without entries."""
        lines = [path for device in self.devices if (path := device.boot_path()) is not None]
        if self.strict:
            lines.append("HALT")
        return "\n".join(lines).encode() + b"\0" if lines else b""


def cmos_order(letters: str) -> tuple[int, int]:
    """*letters* as the bytes of CMOS 0x3d (first and second device) and 0x38 (third, in the high half)."""
    if len(letters) > 3:
        raise UsageError(f"-boot order={letters}: firmware takes at most three drives")
    numbers = []
    for letter in letters:
        if letter not in _LETTERS:
            raise UsageError(
                f"-boot order={letters}: {letter!r} is not one of a (floppy), c (disk), d (CD-ROM), n (net)"
            )
        if letters.count(letter) > 1:
            raise UsageError(f"-boot order={letters}: {letter!r} is given twice")
        numbers.append(_LETTERS[letter])
    numbers += [0] * (3 - len(numbers))
    return numbers[1] << 4 | numbers[0], numbers[2] << 4
