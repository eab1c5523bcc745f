"""Apple Data Compression: literals and two lengths of back references, without entropy coding.

Source: the description of ADC in "Universal Disk Image Format" (de.wikipedia.org) and libfmos' documentation.
"""

from __future__ import annotations


def decompress(data: bytes, length: int) -> bytes:
    """*length* bytes from ADC *data*. Raises ValueError where it is malformed."""
    out = bytearray()
    position, end = 0, len(data)
    while position < end and len(out) < length:
        code = data[position]
        if code & 0x80:  # 1nnnnnnn: n + 1 literal bytes
            count = (code & 0x7F) + 1
            out += data[position + 1 : position + 1 + count]
            position += 1 + count
            continue
        if code & 0x40:  # 01nnnnnn and 16 bits of distance: n + 4 bytes
            if position + 2 >= end:
                break
            count, distance = (code & 0x3F) + 4, data[position + 1] << 8 | data[position + 2]
            position += 3
        else:  # 00nnnndd and 8 bits of distance: n + 3 bytes
            if position + 1 >= end:
                break
            count, distance = (code >> 2) + 3, (code & 3) << 8 | data[position + 1]
            position += 2
        start = len(out) - distance - 1
        if start < 0:
            raise ValueError(f"a back reference of {distance + 1} bytes reaches before the start")
        for index in range(start, start + count):
            out.append(out[index])
    if len(out) < length:
        raise ValueError(f"{len(out)} bytes instead of {length}")
    return bytes(out[:length])
