"""Compressed clusters (*Compressed Clusters Descriptor*): each cluster on its own, as raw deflate or a zstd frame.

The stored length reaches to the end of a 512-byte sector, so rubbish may follow the compressed data; decompression
stops when it has produced a cluster. Both decoders are bounded by the cluster size, whatever the data claims.

Python's own zlib does it all. Where they are installed (``vm-qcow2[fast]``), zlib-ng compresses in a third of the time
and ISA-L decompresses in half; all of them speak the same format and let other threads run meanwhile.
"""

from __future__ import annotations

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


#: *Compressed Clusters Descriptor*: raw deflate (no header) with a window of 4 KiB.
WINDOW_BITS = -12
#: zlib's usual compromise of time and size; zlib-ng's of the same number is 3 % larger and three times as fast.
ZLIB_LEVEL = 6
ZLIB_MEMORY = 9
#: zstd's own default.
ZSTD_LEVEL = 3


@cache
def _inflater() -> Any:
    """What makes decompressors: the fastest there is, and its exception."""
    try:
        from isal import isal_zlib

        return isal_zlib.decompressobj, isal_zlib.error
    except ImportError:
        import zlib

        return zlib.decompressobj, zlib.error


@cache
def _deflater() -> Any:
    """What makes compressors."""
    try:
        from zlib_ng import zlib_ng

        return zlib_ng.compressobj
    except ImportError:
        import zlib

        return zlib.compressobj


def inflate(data: bytes | memoryview, length: int) -> bytes:
    """Decompress raw deflate data with a window of at most 4 KiB into *length* bytes."""
    make, error_type = _inflater()
    try:
        result: bytes = make(WINDOW_BITS).decompress(data, length)
    except error_type as error:
        raise DecompressError(str(error)) from None
    if len(result) != length:
        raise DecompressError(f"{len(result)} bytes instead of {length}")
    return result


def deflate(data: bytes | memoryview) -> bytes | None:
    """Compress one cluster; None where that makes it no smaller."""
    compressor = _deflater()(ZLIB_LEVEL, 8, WINDOW_BITS, ZLIB_MEMORY)
    result: bytes = compressor.compress(data) + compressor.flush()
    return result if len(result) < len(data) else None


@cache
def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise PluginError(
            "clusters compressed with zstd need the package zstandard: run pip install 'vm-qcow2[zstd]'"
        ) from None
    return zstandard


def unzstd(data: bytes | memoryview, length: int) -> bytes:
    """Decompress a zstd frame into *length* bytes."""
    zstandard = _zstandard()
    try:
        # What the frame says of its size decides over memory, so it has to be right. Most frames say it.
        if zstandard.frame_content_size(data) == length:
            whole: bytes = _zstd_contexts().decompressor.decompress(data, max_output_size=length)
            if len(whole) == length:
                return whole
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


@cache
def _zstd_contexts() -> Any:
    """A compressor and a decompressor for each thread: they cannot be shared."""
    import threading

    zstandard = _zstandard()

    class Contexts(threading.local):
        def __init__(self) -> None:
            self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
            self.decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)

    return Contexts()


def zstd(data: bytes | memoryview) -> bytes | None:
    """Compress one cluster; None where that makes it no smaller."""
    result: bytes = _zstd_contexts().compressor.compress(data)
    return result if len(result) < len(data) else None


def decoder(compression_type: int) -> Callable[[bytes | memoryview, int], bytes]:
    """What decompresses (data, length of the result). *compression_type* is one of :data:`TYPES`."""
    return inflate if compression_type == 0 else unzstd


def encoder(compression_type: int) -> Callable[[bytes | memoryview], bytes | None]:
    """What compresses one cluster. *compression_type* is one of :data:`TYPES`."""
    return deflate if compression_type == 0 else zstd
