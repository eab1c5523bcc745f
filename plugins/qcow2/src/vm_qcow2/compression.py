"""Compressed clusters (*Compressed Clusters Descriptor*): each cluster on its own, as raw deflate or a zstd frame.

The stored length reaches to the end of a 512-byte sector, so rubbish may follow the compressed data; decompression
stops when it has produced a cluster. Both decoders are bounded by the cluster size, whatever the data claims.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

from vm_core.errors import PluginError

#: ``compression_type`` in the header, and the create option's words.
TYPES = {0: "zlib", 1: "zstd"}

#: zstd data that needs a larger window is refused; compressors use at most the cluster size.
ZSTD_MAX_WINDOW = 8 << 20


class DecompressError(Exception):
    """The data is not what the decoder expects."""


def inflate(data: bytes, length: int) -> bytes:
    """Decompress raw deflate data with a window of at most 4 KiB into *length* bytes."""
    try:
        result = zlib.decompressobj(-12).decompress(data, length)
    except zlib.error as error:
        raise DecompressError(str(error)) from None
    if len(result) != length:
        raise DecompressError(f"{len(result)} bytes instead of {length}")
    return result


@cache
def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise PluginError(
            "clusters compressed with zstd need the package zstandard: run pip install 'vm-qcow2[zstd]'"
        ) from None
    return zstandard


def unzstd(data: bytes, length: int) -> bytes:
    """Decompress a zstd frame into *length* bytes."""
    zstandard = _zstandard()
    try:
        decoder = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
        with decoder.stream_reader(data, read_size=len(data)) as reader:
            parts = []
            missing = length
            while missing:
                part: bytes = reader.read(missing)
                if not part:
                    raise DecompressError(f"{length - missing} bytes instead of {length}")
                parts.append(part)
                missing -= len(part)
    except zstandard.ZstdError as error:
        raise DecompressError(str(error)) from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def decoder(compression_type: int) -> Callable[[bytes, int], bytes]:
    """What decompresses (data, length of the result). *compression_type* is one of :data:`TYPES`."""
    return inflate if compression_type == 0 else unzstd
