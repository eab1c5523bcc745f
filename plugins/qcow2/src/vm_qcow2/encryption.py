"""Encrypted images (*Header*: crypt_method; *Full disk encryption header pointer*).

Two methods. LUKS: a header extension says where a LUKS header is, in clusters of its own; sectors are numbered by
their place in the file that holds guest data. AES, the old one: AES-128 in CBC mode with the passphrase itself as its
key, sectors numbered by guest offset; images of it are still read, written and made.

Only guest data in clusters of its own is encrypted: neither tables, nor compressed clusters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vm_core.block.structs import Record, u64
from vm_core.crypto import luks, secrets
from vm_core.crypto.ciphers import NoKey, SectorCipher
from vm_core.crypto.legacy import NO_KEY, chosen_method
from vm_core.crypto.legacy import cipher as legacy_cipher
from vm_core.crypto.storage import CryptNode
from vm_core.errors import ImageError, UsageError

from .extensions import ENCRYPTION_HEADER, Extension, find

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vm_core.block.format import Progress
    from vm_core.block.node import Node
    from vm_core.block.open import OpenContext

    from .header import Header
    from .image import Qcow2

#: ``crypt_method`` by the words of ``encrypt.format``.
METHODS = {"aes": 1, "luks": 2}
NAMES = {number: word for word, number in METHODS.items()}

_SECTOR = 512


class HeaderPointer(Record, order="big"):
    """The extension that says where the LUKS header is."""

    offset: int = u64(0, doc="where it is; cluster-aligned")
    length: int = u64(8, doc="its bytes")


class HeaderArea:
    """The clusters of the LUKS header: reads and writes are checked against their length."""

    def __init__(self, file: Node, pointer: HeaderPointer, name: str) -> None:
        self._file = file
        self._pointer = pointer
        self._name = name

    def _check(self, offset: int, length: int) -> int:
        if offset + length > self._pointer.length:
            raise ImageError(self._name, "Request for data outside of extension header")
        place = int(self._pointer.offset) + offset
        if place + length >= 1 << 63:
            raise ImageError(
                self._name,
                f"the encryption header at {self._pointer.offset:#x} lies outside the file",
                peer="Could not read encryption header: Input/output error",
            )
        return place

    def pread(self, offset: int, length: int) -> bytes:
        return self._file.pread(self._check(offset, length), length)

    def pwrite(self, offset: int, data: bytes) -> None:
        self._file.pwrite(self._check(offset, len(data)), data)

    def flush(self) -> None:
        self._file.flush()


class Encryption:
    """How the guest data of one open image is encrypted."""

    def __init__(self, method: str, cipher: SectorCipher, header: luks.Luks | None, key_secret: str | None) -> None:
        self.method = method
        self.luks = header
        self.key_secret = key_secret
        self._cipher = cipher
        self._node: CryptNode | None = None

    def put_over(self, data: Node) -> None:
        """Guest data is in *data*."""
        self._node = CryptNode(data, self._cipher)

    def storage(self, guest: int, host: int) -> Node:
        """What encrypts the sectors of the guest at *guest* that lie at *host*."""
        assert self._node is not None
        return self._node if self.method == "luks" else self._node.view((guest - host) // _SECTOR)

    def info(self) -> dict[str, Any]:
        """QEMU's ImageInfoSpecificQCow2Encryption."""
        return {"format": self.method, **(self.luks.info() if self.luks is not None else {})}


def check_extension(header: Header, found: Sequence[Extension], name: str) -> HeaderPointer | None:
    """Where the encryption header is. Raises ImageError where it cannot be."""
    data = find(found, ENCRYPTION_HEADER)
    if data is None:
        return None
    pointer = HeaderPointer.parse(data)
    cluster_size = 1 << header.cluster_bits
    if pointer.offset % cluster_size:
        raise ImageError(
            name,
            f"Encryption header offset '{pointer.offset}' is not a multiple of cluster size '{cluster_size}'",
        )
    return pointer


def unlock(
    file: Node,
    header: Header,
    found: Sequence[Extension],
    options: dict[str, Any],
    name: str,
    context: OpenContext | None,
) -> Encryption | None:
    """What decrypts the image, None where it is not encrypted; takes ``encrypt.format`` and ``encrypt.key-secret``.

    Without *context* the image is only opened to be described. Raises ImageError, UsageError.
    """
    wanted, key_secret = options.pop("encrypt.format", None), options.pop("encrypt.key-secret", None)
    pointer = check_extension(header, found, name)
    method = NAMES.get(header.crypt_method)
    if method is None:
        if wanted is not None:
            raise ImageError(name, f"No encryption in image header, but options specified format '{wanted}'")
        return None
    if wanted is not None and wanted != method:
        raise ImageError(name, f"Header reported '{method}' encryption format but options specify '{wanted}'")
    described = context is None or not context.io
    if not described and key_secret is None:
        raise UsageError(NO_KEY)
    passphrase = b"" if context is None or described else context.passphrase(key_secret)
    if method == "aes":
        return Encryption(method, NoKey(name) if described else legacy_cipher(passphrase), None, key_secret)
    if pointer is None:
        raise ImageError(name, "Missing CRYPTO header for crypt method 2")
    found_luks = luks.Luks.read(HeaderArea(file, pointer, name), name)
    cipher = NoKey(name) if described else found_luks.cipher(found_luks.unlock(passphrase, name))
    return Encryption(method, cipher, found_luks, key_secret)


# New images


class Plan:
    """How a new image is to be encrypted."""

    def __init__(self, method: str, chosen: luks.Settings | None, passphrase: bytes, key_secret: str) -> None:
        self.method = method
        self.chosen = chosen
        self.passphrase = passphrase
        self.key_secret = key_secret

    @property
    def header_length(self) -> int:
        """Bytes of the LUKS header."""
        return luks.payload_offset(self.chosen.suite) if self.chosen is not None else 0


def plan(options: dict[str, Any]) -> Plan | None:
    """Take ``encryption`` and ``encrypt.*`` out of the create *options*; None: no encryption. Raises UsageError."""
    method = chosen_method(options)
    given = {name: options.pop(name) for name in sorted(options) if name.startswith("encrypt.")}
    given = {name: value for name, value in given.items() if value is not None}
    if method is None:
        if given:
            raise UsageError(f"Parameter 'encrypt.format' is missing: one of {', '.join(METHODS)}").put(
                "Parameter 'encrypt.format' is missing"
            )
        return None
    if method not in METHODS:
        raise UsageError(f"Parameter 'format' does not accept value '{method}'")
    key_secret = given.pop("encrypt.key-secret", None)
    chosen = luks.settings(given, "encrypt.") if method == "luks" else None
    if given:
        raise UsageError(f"Parameter '{min(given)}' is unexpected")
    if key_secret is None:
        raise UsageError(NO_KEY)
    if chosen is not None:
        luks.payload_offset(chosen.suite)
    return Plan(method, chosen, secrets.passphrase(key_secret), key_secret)


def set_up(image: Qcow2, chosen: Plan) -> None:
    """Encrypt *image*, which is new and empty."""
    header, store = image.header, image.store
    header.crypt_method = METHODS[chosen.method]
    if chosen.chosen is None:
        store.write_header("crypt_method")
        store.barrier()
        return
    length = chosen.header_length
    bits = image.geometry.cluster_bits
    count = -(-length >> bits)
    first = image.allocator.allocate(count)
    image.order.write_back()
    # Not all of the header is filled with something: only one key slot of eight is.
    image.file.zero(first << bits, count << bits)
    pointer = HeaderPointer(offset=first << bits, length=length)
    luks.create(HeaderArea(image.file, pointer, store.name), chosen.chosen, chosen.passphrase)
    image.file.flush()
    add_pointer(image, pointer)


def add_pointer(image: Qcow2, pointer: HeaderPointer) -> None:
    """Write the header with the extension that points at the encryption header, in QEMU's order of extensions."""
    from .extensions import BACKING_FORMAT, DATA_FILE_NAME
    from .headerarea import write_area

    others = [one for one in image.extensions if one.type != ENCRYPTION_HEADER]
    before = [one for one in others if one.type in (BACKING_FORMAT, DATA_FILE_NAME)]
    after = [one for one in others if one.type not in (BACKING_FORMAT, DATA_FILE_NAME)]
    write_area(image, [*before, Extension(ENCRYPTION_HEADER, pointer.pack()), *after])


# Changing keys


def amend(image: Qcow2, options: dict[str, Any], *, force: bool, progress: Progress | None = None) -> None:
    """Change key slots: *options* are those of ``encrypt.*`` without that prefix. Raises UsageError, ImageError."""
    found: Encryption | None = image.encryption
    if found is None:
        raise UsageError("Can't amend encryption options - encryption not present")
    if found.luks is None:
        raise UsageError("Only LUKS encryption options can be amended for qcow2 with compat level >= 1.1")
    luks.amend(
        found.luks,
        options,
        name=image.store.name,
        key_secret=found.key_secret,
        secret=secrets.passphrase,
        force=force,
    )
