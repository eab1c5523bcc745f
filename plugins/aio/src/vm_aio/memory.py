"""Addresses of buffers, and vectors of them as the kernel wants them (``struct iovec``).

Whoever has an address holds what keeps the memory where it is: a ctypes object on top of writable memory, or a buffer
view taken through the C API of that which is only read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from struct import Struct

Buffer = memoryview

#: ``struct iovec``: address, length.
VECTOR = Struct("@PN")
#: Vectors that one request of the kernel's takes.
VECTORS_MAX = 1024

_char_over = ctypes.c_char.from_buffer
_address_of = ctypes.addressof


class _View(ctypes.Structure):
    """``Py_buffer`` of CPython's stable C API."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int]
_release = ctypes.pythonapi.PyBuffer_Release
_release.argtypes = [ctypes.c_void_p]
_release.restype = None


class _Pin:
    """Keeps memory that may only be read where it is."""

    __slots__ = ("_view", "address")

    def __init__(self, buffer: Buffer) -> None:
        self._view = view = _View()
        _get_buffer(buffer, _address_of(view), 0)
        self.address: int = view.buf or 0

    def __del__(self) -> None:
        _release(_address_of(self._view))


def locate(buffer: Buffer) -> tuple[int, object]:
    """The address of *buffer*'s first byte, and what to hold as long as it is needed."""
    if buffer.readonly or not buffer.nbytes:  # ctypes puts nothing over no memory
        pin = _Pin(buffer)
        return pin.address, pin
    over = _char_over(buffer)
    return _address_of(over), over


class Vectors:
    """Room for one vector for each of *slots* requests, at fixed places."""

    def __init__(self, slots: int) -> None:
        self._memory = ctypes.create_string_buffer(VECTOR.size * slots)
        self._base = _address_of(self._memory)

    def one(self, slot: int, buffer: Buffer) -> tuple[int, object]:
        """Fill *slot*'s vector with *buffer*. The vector's address, and what to hold while it is used."""
        start = slot * VECTOR.size
        if buffer.readonly:
            pin = _Pin(buffer)
            VECTOR.pack_into(self._memory, start, pin.address, buffer.nbytes)
            return self._base + start, pin
        over = _char_over(buffer)
        VECTOR.pack_into(self._memory, start, _address_of(over), buffer.nbytes)
        return self._base + start, over


def many(buffers: Sequence[Buffer]) -> tuple[int, object]:
    """Vectors of all *buffers*: their address, and what to hold while they are used."""
    memory = ctypes.create_string_buffer(VECTOR.size * len(buffers))
    held: list[object] = [memory]
    place = 0
    for buffer in buffers:
        address, keeper = locate(buffer)
        VECTOR.pack_into(memory, place, address, buffer.nbytes)
        held.append(keeper)
        place += VECTOR.size
    return _address_of(memory), held
