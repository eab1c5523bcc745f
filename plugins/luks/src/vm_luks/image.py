"""The format ``luks``: a LUKS header, then the data, encrypted sector by sector.

The whole image is one run. What has never been written reads as what the key makes of zeroes, as with QEMU: which
sectors are in use is not for everybody to see, so nothing is discarded or known to be zero either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vm_core.block.format import Format, Progress
from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.node import Node
from vm_core.crypto import luks, secrets
from vm_core.crypto.ciphers import NoKey, SectorCipher, check_suite
from vm_core.crypto.storage import CryptNode
from vm_core.errors import ImageError, UsageError

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext

NO_KEY = "Parameter 'key-secret' is required for cipher"


class LuksImage(Format):
    """One open image. Without a key it can only be described."""

    encrypted = True

    def __init__(
        self, file: Node, header: luks.Luks, cipher: SectorCipher, key_secret: str | None, readonly: bool
    ) -> None:
        self.file = file
        self.readonly = readonly
        self._luks = header
        self._storage = CryptNode(file, cipher, offset=header.payload_offset)
        self._key_secret = key_secret
        self._payload = header.payload_offset
        # A write to the last sector makes a file that ends within it longer, but not the image.
        self._size = max(0, file.size - self._payload)

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> LuksImage:
        key_secret = options.pop("key-secret", None)
        name = context.filename
        if context.io and key_secret is None:
            raise UsageError(NO_KEY)
        passphrase = context.passphrase(key_secret) if context.io else b""
        header = luks.Luks.read(file, name)
        cipher = header.cipher(header.unlock(passphrase, name)) if context.io else NoKey(name)
        if -(-file.size // luks.SECTOR) * luks.SECTOR < header.payload_offset:
            raise ImageError(
                name,
                f"the payload begins at {header.payload_offset}, past the end of the file ({file.size} bytes)",
                peer="Could not refresh total sector count: Input/output error",
            )
        return cls(file, header, cipher, key_secret, context.readonly)

    @property
    def size(self) -> int:
        return self._size

    def map(self, offset: int, length: int) -> Iterator[Mapping]:
        yield Mapping(Kind.DATA, offset, length, self._storage, offset, not self.readonly)

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping]:
        return list(self.map(offset, length))

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        return [Allocation(offset, length, self._storage, offset, False)]

    def discard(self, offset: int, length: int) -> None:
        """Nothing."""

    def truncate(self, size: int) -> None:
        if size > luks.MAX_SIZE - self._payload:
            raise UsageError("The requested file size is too large")
        self.file.truncate(self._payload + size)
        self._size = size

    def reopen(self, *, readonly: bool) -> None:
        self.readonly = readonly

    def info(self) -> dict[str, Any]:
        return self._luks.info()

    def amend(self, options: dict[str, Any], *, force: bool = False, progress: Progress | None = None) -> None:
        with self.file.alone():
            luks.amend(
                self._luks,
                options,
                name=self.file.filename,
                key_secret=self._key_secret,
                secret=secrets.passphrase,
                force=force,
            )
        if progress is not None:
            progress(1, 1)

    @classmethod
    def measure(cls, size: int, data: Iterable[tuple[int, int]], options: dict[str, Any]) -> dict[str, int]:
        payload = luks.payload_offset(_take(options)[0].suite)
        return {"required": payload + size, "fully-allocated": payload + size}

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        preallocation = options.pop("preallocation", None) or "off"
        if preallocation not in ("off", "metadata", "falloc", "full"):
            raise UsageError(f"invalid parameter value: {preallocation}")
        chosen, passphrase = _take(options)
        check_suite(chosen.suite)
        payload = luks.payload_offset(chosen.suite)
        if size > luks.MAX_SIZE - payload:
            raise UsageError("The requested file size is too large")
        file.truncate(payload + size)
        if preallocation in ("falloc", "full"):
            file.reserve(0, payload + size, full=preallocation == "full")
        luks.create(file, chosen, passphrase)
        file.flush()


def _take(options: dict[str, Any]) -> tuple[luks.Settings, bytes]:
    """Settings and passphrase of a new image. Raises UsageError."""
    chosen = luks.settings(options)
    key_secret = options.pop("key-secret", None)
    if key_secret is None:
        raise UsageError(NO_KEY)
    return chosen, secrets.passphrase(key_secret)
