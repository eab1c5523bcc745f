"""Requests of a virtio block device: parsing, without executing anything (virtio 1.2, 5.2.6).

A request is a header, data in one direction, and a status byte::

    le32 type   le32 reserved   le64 sector    device-readable, 16 bytes
    data                                       device-readable for OUT, DISCARD, WRITE_ZEROES; writable for IN, GET_ID
    u8 status                                  device-writable, the last byte

Where descriptors begin and end means nothing (2.7.4.1): the header is the first 16 readable bytes and the status the
last writable one, however they are cut. Legacy drivers cut at those borders, which is just one of the ways.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import attrs

from vm_core.block.request import Op, Request
from vm_core.devices.virtio.chain import Chain, RingError

from .config import SECTOR

HEADER = struct.Struct("<IIQ")
#: struct virtio_blk_discard_write_zeroes: sector, num_sectors, flags.
SEGMENT = struct.Struct("<QII")
SEGMENT_UNMAP = 1

#: Bytes that GET_ID answers with.
ID_LENGTH = 20
#: Bytes of one request; more than any driver asks for, less than what a signed 32-bit count of bytes can say.
MAX_TRANSFER = 0x7FFFFE00


class Type(IntEnum):
    """Types of requests (5.2.6); those of SCSI commands are refused like unknown ones."""

    IN = 0
    OUT = 1
    FLUSH = 4
    #: Legacy drivers were allowed to set the lowest bit for "out" here as well.
    FLUSH_OUT = 5
    GET_ID = 8
    DISCARD = 11
    WRITE_ZEROES = 13


class Status(IntEnum):
    """The status byte."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


# The same as plain integers: looking up a member of an enumeration costs as much as the comparison.
_IN, _OUT, _FLUSH, _FLUSH_OUT, _GET_ID, _DISCARD, _WRITE_ZEROES = map(int, Type)


@attrs.frozen
class Limits:
    """What requests are checked against. *size* and *block_size* are bytes, the others 512-byte sectors."""

    size: int
    block_size: int = SECTOR
    readonly: bool = False
    discard: bool = True
    write_zeroes: bool = True
    max_discard_sectors: int = 4194303
    max_write_zeroes_sectors: int = 4194303


class BlkRequest(Request):
    """A request of the driver: a backend's request that knows its chain.

    *answer* is None for a request that the backend is to execute; else the status that is given without it, after
    *buffers* of a GET_ID were filled. *written* is what the used entry tells: how many bytes from the start of the
    writable ones the device certainly wrote (2.7.8.2), which leaves the status byte out where it is not next to them.
    """

    __slots__ = ("answer", "chain", "status_byte", "type", "written")

    def __init__(self, chain: Chain, type: int, status_byte: memoryview, done: Callable[[Any], None] | None) -> None:
        self.chain = chain
        self.type = type
        self.status_byte = status_byte
        self.answer: Status | None = None
        self.written = 1 if chain.writable[0] is chain.writable[-1] and len(chain.writable[0]) == 1 else 0
        self.op = Op.READ
        self.offset = 0
        self.length = 0
        self.buffers = ()
        self.fua = False
        self.unmap = False
        self.guest = ()
        self.done = done
        self.status = 0
        self.opaque = None

    @classmethod
    def parse(cls, chain: Chain, limits: Limits, done: Callable[[Any], None] | None = None) -> BlkRequest:
        """Read the header once and check everything against *limits*.

        Raises RingError where header or status byte do not fit: without them there is no way to answer.
        """
        writable = chain.writable
        if not writable:
            raise RingError("a block request without a status byte")
        last = writable[-1]
        status_byte = last[-1:]
        readable = chain.readable
        if readable and len(readable[0]) == 16:
            type, _, sector = HEADER.unpack(readable[0])
            data_out = readable[1:]
        else:
            header, data_out = split_front(readable, 16)
            if len(header) < 16:
                raise RingError(f"a block request with a header of {len(header)} bytes")
            type, _, sector = HEADER.unpack(header)
        request = cls(chain, type, status_byte, done)
        if type == _IN:
            buffers = writable[:-1] if len(last) == 1 else [*writable[:-1], last[:-1]]
            address, length = chain.writable_at[-1]
            guest = chain.writable_at[:-1]
            if length > 1:
                guest.append((address, length - 1))
            request.guest = guest
            request._transfer(Op.READ, sector, buffers, limits)
            if request.answer is None:
                request.written = request.length + 1
        elif type == _OUT:
            if limits.readonly:
                request.answer = Status.IOERR
            else:
                request._transfer(Op.WRITE, sector, data_out, limits)
        elif type in (_FLUSH, _FLUSH_OUT):
            request.op = Op.FLUSH
        elif type == _GET_ID:
            request.answer = Status.OK
            request.buffers = writable[:-1] if len(last) == 1 else [*writable[:-1], last[:-1]]
            request.length = sum(map(len, request.buffers))
            # Bytes that the id does not fill stay as they were; the driver is told how much is the device's doing.
            request.written = min(request.length, ID_LENGTH) + (request.length <= ID_LENGTH)
        elif type == _DISCARD and limits.discard:
            request._range(Op.DISCARD, data_out, limits, limits.max_discard_sectors)
        elif type == _WRITE_ZEROES and limits.write_zeroes:
            request._range(Op.ZERO, data_out, limits, limits.max_write_zeroes_sectors)
        else:
            request.answer = Status.UNSUPP
        return request

    def _transfer(self, op: Op, sector: int, buffers: list[memoryview], limits: Limits) -> None:
        """An IN or OUT of whole blocks within the device."""
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        offset = sector * SECTOR
        self.op = op
        self.offset = offset
        self.length = length
        self.buffers = buffers
        if (offset | length) % limits.block_size or not 0 < length <= MAX_TRANSFER or offset + length > limits.size:
            self.answer = Status.IOERR

    def _range(self, op: Op, data: list[memoryview], limits: Limits, most: int) -> None:
        """A DISCARD or WRITE_ZEROES of one range (5.2.6.2: unknown flags, and unmap for a discard, are UNSUPP)."""
        self.op = op
        if sum(map(len, data)) != SEGMENT.size:
            self.answer = Status.UNSUPP
            return
        sector, sectors, flags = SEGMENT.unpack(b"".join(data))
        self.offset = sector * SECTOR
        self.length = sectors * SECTOR
        self.unmap = bool(flags & SEGMENT_UNMAP)
        if limits.readonly or (
            sectors > most or (self.offset | self.length) % limits.block_size or self.offset + self.length > limits.size
        ):
            self.answer = Status.IOERR
        elif flags & ~SEGMENT_UNMAP or (op is Op.DISCARD and flags):
            self.answer = Status.UNSUPP
        elif not sectors:
            self.answer = Status.OK

    def fill_id(self, serial: bytes) -> None:
        """The data of a GET_ID: *serial* and zeroes up to 20 bytes, cut where the buffers end."""
        left = serial[:ID_LENGTH].ljust(ID_LENGTH, b"\0")
        for buffer in self.buffers:
            n = min(len(buffer), len(left))
            buffer[:n] = left[:n]
            left = left[n:]


def split_front(views: list[memoryview], count: int) -> tuple[bytes, list[memoryview]]:
    """A copy of the first *count* bytes of *views* (or all there are), and views of the rest."""
    head = b""
    for i, view in enumerate(views):
        missing = count - len(head)
        head += view[:missing]
        if len(view) > missing:
            return head, [view[missing:], *views[i + 1 :]]
        if len(head) == count:
            return head, views[i + 1 :]
    return head, []
