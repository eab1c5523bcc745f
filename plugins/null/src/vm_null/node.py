"""The node."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from time import sleep
from typing import TYPE_CHECKING, Any

from vm_core.block import waiting
from vm_core.block.mapping import Kind, Mapping
from vm_core.block.node import Buffer, Protocol
from vm_core.block.vectors import fill
from vm_core.errors import BlockError, ImageError

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext

DEFAULT_SIZE = 1 << 30


class NullCo(Protocol):
    """*size* bytes that nobody keeps; each request takes *latency* seconds."""

    driver = "null-co"

    def __init__(
        self, size: int = DEFAULT_SIZE, *, latency: float = 0.0, zeroes: bool = False, readonly: bool = False
    ) -> None:
        self._size = size
        self._latency = latency
        self._zeroes = zeroes
        self.readonly = readonly
        self.filename = f"{self.driver}://"

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        if filename != f"{cls.driver}://":
            raise ImageError("", f"The only allowed filename for this driver is '{cls.driver}://'")
        return {}

    @classmethod
    def open(cls, options: dict[str, Any], context: OpenContext) -> NullCo:
        filename = options.pop("filename", None)
        if filename is not None:
            cls.parse_filename(filename)
        if options:
            from vm_core.block import names

            given: dict[str, Any] = {"driver": cls.driver, **options}
            shown = names.json_name(given)
        else:
            given, shown = {"driver": cls.driver}, f"{cls.driver}://"
        latency = options.pop("latency-ns", 0)
        if latency < 0:
            raise ImageError("", "latency-ns is invalid")
        node = cls(
            options.pop("size", DEFAULT_SIZE),
            latency=latency / 1e9,
            zeroes=options.pop("read-zeroes", False),
            readonly=context.readonly,
        )
        node.filename, node.full_options = shown, given
        return node

    def _wait(self) -> None:
        if self._latency:
            waiting.announce()
            sleep(self._latency)

    @property
    def size(self) -> int:
        return self._size

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        self._wait()
        if self._zeroes:
            fill(buffers)

    def write(self, offset: int, buffers: Sequence[Buffer], *, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        self._wait()

    def flush(self) -> None:
        self._wait()

    def zero(self, offset: int, length: int, *, unmap: bool = False, fua: bool = False) -> None:
        if self.readonly:
            raise self.read_only_error()
        self._wait()

    def zero_fast(self, offset: int, length: int, *, unmap: bool = False) -> bool:
        self.zero(offset, length)
        return True

    def discard(self, offset: int, length: int) -> None:
        if self.readonly:
            raise self.read_only_error()

    def truncate(self, size: int) -> None:
        raise ImageError("", "Image format driver does not support resize")

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        """There is nothing to set aside."""

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        inside = max(0, min(length, self._size - offset))
        if inside:
            if self._zeroes:
                yield Mapping(Kind.ZERO, offset, inside, self, offset)
            else:  # nobody ever wrote it
                yield Mapping(Kind.UNALLOCATED, offset, inside)
        if inside < length:
            yield Mapping(Kind.EOF, offset + inside, length - inside)

    def info(self) -> dict[str, Any]:
        """There is none, which is not the same as knowing nothing more."""
        raise BlockError.of(errno.ENOTSUP)

    def reopen(self, *, readonly: bool) -> None:
        self.readonly = readonly

    def close(self) -> None:
        """There is nothing to release."""


class NullAio(NullCo):
    """The same under QEMU's other name."""

    driver = "null-aio"
