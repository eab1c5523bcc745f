"""What the drivers tell about themselves."""

from __future__ import annotations

from vm_core.descriptors import Option, ProtocolDriver
from vm_core.hookspecs import hookimpl

_OPTIONS = (
    Option("filename", "str", "the prefix alone, null-co:// or null-aio://"),
    Option("size", "size", "size of the disk", 1 << 30, defining=True),
    Option("latency-ns", "int", "nanoseconds that a request takes", 0, defining=True),
    Option("read-zeroes", "bool", "reads give zeroes; off: they leave memory as it is", False, defining=True),
)


@hookimpl
def vm_protocol_drivers() -> list[ProtocolDriver]:
    return [
        ProtocolDriver(
            name=name,
            summary=f"a disk that forgets everything at once{more}",
            implementation=f"vm_null.node:{implementation}",
            prefixes=(name,),
            capabilities=frozenset({"write"}),
            options=_OPTIONS,
        )
        for name, implementation, more in (("null-co", "NullCo", ""), ("null-aio", "NullAio", " (another name of it)"))
    ]
