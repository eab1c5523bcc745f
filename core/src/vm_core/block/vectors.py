"""Arithmetic on lists of buffers: cut, fill, copy, test for zeroes. Buffers are flat byte views (format "B")."""

from __future__ import annotations

from collections.abc import Sequence

from .node import Buffer

#: The unit in which zeroes are written and compared; small enough to stay in a processor's cache.
PIECE = 256 * 1024
ZEROES = bytes(PIECE)
_ZEROES_VIEW = memoryview(ZEROES)


def total(buffers: Sequence[Buffer]) -> int:
    """Bytes in all *buffers*."""
    if len(buffers) == 1:
        return buffers[0].nbytes
    return sum([buffer.nbytes for buffer in buffers])


def cut(buffers: Sequence[Buffer], start: int, length: int) -> list[Buffer]:
    """Views of *length* bytes from byte *start* of the concatenated *buffers* on."""
    if len(buffers) == 1:
        buffer = buffers[0]
        return [buffer] if not start and length == buffer.nbytes else [buffer[start : start + length]]
    result: list[Buffer] = []
    for buffer in buffers:
        size = buffer.nbytes
        if start >= size:
            start -= size
            continue
        if length <= 0:
            break
        piece = buffer if not start and length >= size else buffer[start : start + length]
        result.append(piece)
        length -= piece.nbytes
        start = 0
    return result


def fill(buffers: Sequence[Buffer]) -> None:
    """Overwrite *buffers* with zeroes."""
    for buffer in buffers:
        size = buffer.nbytes
        if size <= PIECE:
            buffer[:] = _ZEROES_VIEW[:size]
        else:
            for start in range(0, size, PIECE):
                piece = buffer[start : start + PIECE]
                piece[:] = _ZEROES_VIEW[: piece.nbytes]


def scatter(data: bytes | bytearray | memoryview, buffers: Sequence[Buffer]) -> None:
    """Copy *data* into *buffers*; both have the same length."""
    view = memoryview(data)
    start = 0
    for buffer in buffers:
        size = buffer.nbytes
        buffer[:] = view[start : start + size]
        start += size


def gather(buffers: Sequence[Buffer]) -> bytes:
    """The bytes of *buffers*, joined."""
    return b"".join(buffers)


def zero_views(length: int) -> list[Buffer]:
    """Read-only views of *length* zero bytes that share one small block of memory."""
    views = [_ZEROES_VIEW] * (length // PIECE)
    if length % PIECE:
        views.append(_ZEROES_VIEW[: length % PIECE])
    return views


def is_zero(buffers: Sequence[Buffer]) -> bool:
    """Whether *buffers* hold nothing but zero bytes.

    Looks at a byte here and there first, which settles nearly all data, then compares whole pieces of bytes objects:
    comparing memoryviews goes element by element and is twenty times slower.
    """
    for buffer in buffers:
        size = buffer.nbytes
        if size and (buffer[0] or buffer[size - 1] or buffer[size // 2]):
            return False
    for buffer in buffers:
        for start in range(0, buffer.nbytes, PIECE):
            piece = bytes(buffer[start : start + PIECE])
            if piece != (ZEROES if len(piece) == PIECE else ZEROES[: len(piece)]):
                return False
    return True
