"""New images.

An empty image of no size is written first: header, refcount table, one refcount block. It is opened, and grown to its
size like any image; so everything lies where the allocator puts it, which is where qemu-img has it.
"""

from __future__ import annotations

from typing import Any

from vm_core.block.node import Node
from vm_core.errors import UsageError

from . import extensions, features
from .compression import TYPES
from .extensions import Extension
from .geometry import MAX_CLUSTER_BITS, MAX_L1_BYTES, MIN_CLUSTER_BITS
from .header import MAX_BACKING_NAME, NEW_V3_LENGTH, V2_LENGTH, Header
from .image import Qcow2
from .preallocation import preallocate
from .refcounts import encode
from .resize import resize
from .told import told

_VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
#: Smaller header clusters have no room to spare for the feature name table.
_FEATURE_TABLE_FROM = 8 << 10
_SECTOR = 512
#: Subclusters of 512 bytes are the smallest.
MIN_EXTENDED_CLUSTER = 16384


def create(file: Node, size: int, options: dict[str, Any]) -> None:
    """Write an empty image of *size* bytes, rounded up to 512, popping *options*. Raises UsageError."""
    size = -(-size // 512) * 512
    preallocation = options.pop("preallocation", None) or "off"
    data_name = options.get("data_file")
    encryption = None
    if options.get("encryption") is not None or any(option.startswith("encrypt.") for option in options):
        from .encryption import plan as plan_encryption

        encryption = plan_encryption(options)
    header, found, name = plan(size, options, preallocation)
    cluster_size = 1 << header.cluster_bits
    area = extensions.pack_extensions(found)
    start = header.header_length
    if name:
        header.backing_file_offset, header.backing_file_size = start + len(area), len(name)
        if start + len(area) + len(name) > cluster_size:
            raise UsageError(f"the backing file's name does not fit into a cluster of {cluster_size} bytes").put(
                _not_assigned(name, found, "No space left on device")
            )
    head = bytearray(cluster_size)
    fields = header.pack()[: V2_LENGTH if header.version == 2 else None]
    head[: len(fields)] = fields
    head[start : start + len(area) + len(name)] = area + name
    block = _first_block(header)
    table = (2 * cluster_size).to_bytes(8, "big").ljust(cluster_size, b"\0")
    data = _create_data_file(data_name) if data_name is not None else None
    try:
        # The header's sector last: before it is there, this is no image at all.
        with told("Could not write qcow2 header"):
            file.pwrite(_SECTOR, head[_SECTOR:])
        with told("Could not write refcount table"):
            file.pwrite(cluster_size, table + block)
        with told("Could not write qcow2 header"):
            file.pwrite(0, head[:_SECTOR])
        image = Qcow2(
            file,
            file.filename,
            readonly=False,
            options={"lazy-refcounts": False},
            open_data=None if data is None else lambda _name: data,
        )
        if image.raw_data and preallocation == "off":
            # What the data file says is what the guest reads, from the start.
            preallocation = "metadata"
        if size:
            with told("Could not resize image", nested=True):
                resize(image, size, preallocation=preallocation)
        elif data is None:
            preallocate(image, 0, 0, preallocation)
        if encryption is not None:
            from .encryption import set_up

            set_up(image, encryption)
        image.close()
    finally:
        if data is not None:
            data.close()


def _create_data_file(name: str) -> Node:
    from vm_core.block.open import create_storage

    if name.startswith("json:"):
        raise UsageError("data_file names a file, not a json: definition").put("Unknown protocol 'json'")
    return create_storage(name)


def _not_assigned(name: bytes, found: list[Extension], why: str) -> str:
    """QEMU's words for a backing file's name that cannot be put into the header."""
    format = extensions.find(found, extensions.BACKING_FORMAT)
    shown = name.decode("utf-8", "surrogateescape")
    return f"Could not assign backing file '{shown}' with format '{(format or b'').decode()}': {why}"


def plan(size: int, options: dict[str, Any], preallocation: str) -> tuple[Header, list[Extension], bytes]:
    """The header that the *options* ask for, the extensions, and the backing file's name."""
    compat = str(options.pop("compat", None) or "1.1")
    if compat not in _VERSIONS:
        raise UsageError(f"compat={compat}: one of {', '.join(_VERSIONS)} is needed").put(
            f"Parameter 'version' does not accept value '{compat}'"
        )
    version = _VERSIONS[compat]
    cluster_size = options.pop("cluster_size", None)
    cluster_size = 65536 if cluster_size is None else cluster_size
    bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << max(bits, 0) or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        raise UsageError("Cluster size must be a power of two between 512 and 2048k")
    later = "with compatibility level 1.1 and above (use version=v3 or greater)"
    extended = bool(options.pop("extended_l2", None))
    if extended:
        if cluster_size < MIN_EXTENDED_CLUSTER:
            raise UsageError(
                f"Extended L2 entries are only supported with cluster sizes of at least {MIN_EXTENDED_CLUSTER} bytes"
            )
        if version == 2:
            raise UsageError(f"Extended L2 entries are only supported {later}")
    backing = options.pop("backing_file", None) or ""
    backing_format = options.pop("backing_fmt", None) or ""
    if backing and preallocation != "off" and not extended:
        raise UsageError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
    lazy = bool(options.pop("lazy_refcounts", None))
    if version == 2 and lazy:
        raise UsageError(f"Lazy refcounts only supported {later}")
    refcount_bits = options.pop("refcount_bits", None)
    refcount_bits = 16 if refcount_bits is None else refcount_bits
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
        raise UsageError("Refcount width must be a power of two and may not exceed 64 bits")
    if version == 2 and refcount_bits != 16:
        raise UsageError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above "
            "(use version=v3 or greater)"
        )
    data_file = options.pop("data_file", None)
    raw = bool(options.pop("data_file_raw", None))
    if raw and data_file is None:
        raise UsageError("data-file-raw requires data-file")
    if raw and backing:
        raise UsageError("Backing file and data-file-raw cannot be used at the same time")
    if data_file is not None and version == 2:
        raise UsageError(f"External data files are only supported {later}")
    compression = options.pop("compression_type", None) or "zlib"
    number = next((number for number, word in TYPES.items() if word == compression), None)
    if number is None:
        raise UsageError(f"compression_type={compression}: one of {', '.join(TYPES.values())} is needed").put(
            f"Parameter 'compression-type' does not accept value '{compression}'"
        )
    if version == 2 and number:
        raise UsageError(f"Non-zlib compression type is only supported {later}")
    incompatible = (
        (features.COMPRESSION_TYPE if number else 0)
        | (features.DATA_FILE if data_file is not None else 0)
        | (features.EXTENDED_L2 if extended else 0)
    )
    header = Header(
        version=version,
        cluster_bits=bits,
        refcount_table_offset=cluster_size,
        refcount_table_clusters=1,
        header_length=V2_LENGTH if version == 2 else NEW_V3_LENGTH,
        refcount_order=refcount_bits.bit_length() - 1,
        compatible_features=features.LAZY_REFCOUNTS if lazy else 0,
        incompatible_features=incompatible,
        autoclear_features=features.RAW_DATA_FILE if raw else 0,
        compression_type=number,
    )
    words = MAX_L1_BYTES // 8
    if -(-size >> bits + bits - 3 - extended) > words:
        raise UsageError("The image size is too large for file format 'qcow2' (try using a larger cluster size)")
    found = []
    if backing and backing_format:
        found.append(Extension(extensions.BACKING_FORMAT, backing_format.encode()))
    if data_file is not None:
        found.append(Extension(extensions.DATA_FILE_NAME, data_file.encode("utf-8", "surrogateescape")))
    name = backing.encode("utf-8", "surrogateescape")
    if len(name) > MAX_BACKING_NAME:
        raise UsageError(f"Backing file name too long: {len(name)} bytes, {MAX_BACKING_NAME} is the longest").put(
            _not_assigned(name, found, "Invalid argument")
        )
    if version == 3 and cluster_size >= _FEATURE_TABLE_FROM:
        found.append(Extension(extensions.FEATURE_NAME_TABLE, extensions.pack_feature_names(features.FEATURE_NAMES)))
    return header, found, name


def _first_block(header: Header) -> bytes:
    """A refcount block that counts the header, the refcount table and itself."""
    from array import array

    bits = 1 << header.refcount_order
    code = {8: "B", 16: "H", 32: "I", 64: "Q"}.get(bits, "B")
    counts = array(code, (1, 1, 1)) + array(code, (0,)) * (64 - 3)
    return encode(counts, bits).ljust(1 << header.cluster_bits, b"\0")
