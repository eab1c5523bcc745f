"""Finding zeroes in data that was read, as runs of whole blocks.

A look at the first and last byte of every block (two strided slices of the buffer) settles nearly all of them; what is
left is compared in place with ``startswith``, which is one memcmp. No byte is copied.
"""

from __future__ import annotations

from ..vectors import ZEROES

#: Larger blocks are compared in steps of this many bytes.
_STEP = len(ZEROES)


def all_zero(buffer: bytearray, start: int, end: int) -> bool:
    """Whether the bytes from *start* to *end* are zero."""
    if start >= end:
        return True
    if buffer[start] or buffer[end - 1]:
        return False
    while end - start >= _STEP:
        if not buffer.startswith(ZEROES, start):
            return False
        start += _STEP
    return start == end or buffer.startswith(ZEROES[: end - start], start)


def zero_blocks(buffer: bytearray, length: int, grain: int) -> list[int]:
    """Numbers of the blocks of *grain* bytes that are zero; the last block may be shorter."""
    whole = length - length % grain
    found = []
    if whole:
        heads, tails = buffer[0:whole:grain], buffer[grain - 1 : whole : grain]
        block = heads.find(0)
        while block >= 0:
            if not tails[block] and all_zero(buffer, block * grain, block * grain + grain):
                found.append(block)
            block = heads.find(0, block + 1)
    if whole < length and all_zero(buffer, whole, length):
        found.append(whole // grain)
    return found


def data_runs(buffer: bytearray, length: int, grain: int, least: int = 0, start: int = 0) -> list[tuple[int, int]]:
    """(start, end) of the runs in the first *length* bytes that are not zero, as whole blocks of *grain* bytes.

    *start* is where the buffer lies in its image: blocks are aligned there. Zeroes shorter than *least* bytes count as
    data, unless they reach the beginning or end of the buffer.
    """
    skew = start % grain
    first = min(grain - skew, length) if skew else 0
    if first:  # up to the first boundary by itself
        rest = data_runs(buffer[first:length], length - first, grain, least) if first < length else []
        runs = [(begin + first, end + first) for begin, end in rest]
        if not all_zero(buffer, 0, first):
            if runs and runs[0][0] == first:
                runs[0] = (0, runs[0][1])
            else:
                runs.insert(0, (0, first))
        return _join(runs, least)
    zero = zero_blocks(buffer, length, grain)
    if not zero:
        return [(0, length)] if length else []
    runs = []
    position = 0
    for block in zero:
        begin = block * grain
        if begin > position:
            runs.append((position, begin))
        position = min(begin + grain, length)
    if position < length:
        runs.append((position, length))
    return _join(runs, least)


def _join(runs: list[tuple[int, int]], least: int) -> list[tuple[int, int]]:
    """Runs with gaps of fewer than *least* bytes between them made one."""
    if len(runs) < 2 or not least:
        return runs
    joined = [runs[0]]
    for begin, end in runs[1:]:
        if begin - joined[-1][1] < least:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((begin, end))
    return joined
