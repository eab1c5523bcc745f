"""On-disk structures, declared field by field with the offset that the specification gives.

    class Header(Record, order="big"):
        magic: int = u32(0, doc="QFI\\xfb")
        size: int = u64(24, doc="virtual disk size in bytes")

    header = Header.parse(data)      # fields past the end of data keep their defaults
    header.size = 1 << 30
    data = header.pack()
    where, piece = header.pack_fields("size")

Offsets must ascend; gaps are reserved bytes, zero when packed. ``Record.LENGTH`` is the end of the last field.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

R = TypeVar("R", bound="Record")


class Field(NamedTuple):
    """One field: *code* as in :mod:`struct`, at *offset* bytes."""

    name: str
    offset: int
    code: str
    default: Any
    doc: str

    @property
    def end(self) -> int:
        return self.offset + struct.calcsize("=" + self.code)


def u8(offset: int, *, default: int = 0, doc: str = "") -> Any:
    """An unsigned byte."""
    return Field("", offset, "B", default, doc)


def u16(offset: int, *, default: int = 0, doc: str = "") -> Any:
    """An unsigned 16-bit number."""
    return Field("", offset, "H", default, doc)


def u32(offset: int, *, default: int = 0, doc: str = "") -> Any:
    """An unsigned 32-bit number."""
    return Field("", offset, "I", default, doc)


def u64(offset: int, *, default: int = 0, doc: str = "") -> Any:
    """An unsigned 64-bit number."""
    return Field("", offset, "Q", default, doc)


def raw(offset: int, length: int, *, default: bytes = b"", doc: str = "") -> Any:
    """*length* bytes, padded with zeroes when packed."""
    return Field("", offset, f"{length}s", default.ljust(length, b"\0"), doc)


class Record:
    """Base of on-disk structures."""

    FIELDS: ClassVar[tuple[Field, ...]] = ()
    LENGTH: ClassVar[int] = 0
    _struct: ClassVar[struct.Struct]
    _prefix: ClassVar[str]

    def __init_subclass__(cls, *, order: Literal["big", "little"] = "big") -> None:
        fields = [value._replace(name=name) for name, value in vars(cls).items() if isinstance(value, Field)]
        cls._prefix = ">" if order == "big" else "<"
        position = 0
        code = cls._prefix
        for field in fields:
            if field.offset < position:
                raise TypeError(f"{cls.__name__}.{field.name} overlaps the field before it")
            code += f"{field.offset - position}x" * (field.offset > position) + field.code
            position = field.end
        cls.FIELDS = tuple(fields)
        cls.LENGTH = position
        cls._struct = struct.Struct(code)

    def __init__(self, **values: Any) -> None:
        for field in self.FIELDS:
            setattr(self, field.name, values.pop(field.name, field.default))
        if values:
            raise TypeError(f"{type(self).__name__} has no field {min(values)}")

    @classmethod
    def parse(cls: type[R], data: bytes | bytearray | memoryview, offset: int = 0) -> R:
        """Read from *data* at *offset*. Fields that do not lie wholly within *data* keep their defaults."""
        record = cls.__new__(cls)
        if offset + cls.LENGTH <= len(data):
            values = iter(cls._struct.unpack_from(data, offset))
            for field in cls.FIELDS:
                setattr(record, field.name, next(values))
            return record
        for field in cls.FIELDS:
            inside = offset + field.end <= len(data)
            value = struct.unpack_from(cls._prefix + field.code, data, offset + field.offset)[0] if inside else None
            setattr(record, field.name, value if inside else field.default)
        return record

    def pack(self) -> bytes:
        """All fields, :attr:`LENGTH` bytes."""
        return self._struct.pack(*[getattr(self, field.name) for field in self.FIELDS])

    @classmethod
    def field(cls, name: str) -> Field:
        """The declaration of the field *name*."""
        return next(field for field in cls.FIELDS if field.name == name)

    def pack_fields(self, first: str, last: str = "") -> tuple[int, bytes]:
        """Offset and bytes of the fields from *first* to *last* (None: that one), to update them alone on disk."""
        start = self.field(first).offset
        return start, self.pack()[start : self.field(last or first).end]

    def items(self) -> Iterator[tuple[str, Any]]:
        """Names and values, in order."""
        for field in self.FIELDS:
            yield field.name, getattr(self, field.name)

    def __repr__(self) -> str:
        inside = ", ".join(
            f"{name}={value:#x}" if type(value) is int else f"{name}={value!r}" for name, value in self.items()
        )
        return f"{type(self).__name__}({inside})"

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and list(self.items()) == list(other.items())

    __hash__ = None  # type: ignore[assignment]
