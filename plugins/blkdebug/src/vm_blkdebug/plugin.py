"""What the driver tells about itself."""

from __future__ import annotations

from vm_core.descriptors import Option, ProtocolDriver
from vm_core.hookspecs import hookimpl

_OPTIONS = (
    Option("image", "node", "the node below: an image file, or any other node", required=True),
    Option("config", "str", "file with rules", defining=True),
    Option("inject-error", "str", "rules: inject-error.N.event, .errno, .sector, .state, .once", defining=True),
    Option("set-state", "str", "rules: set-state.N.event, .state, .new_state", defining=True),
    Option("align", "size", "required alignment of requests, a power of two", 0, defining=True),
    Option("max-transfer", "size", "longest read or write, a multiple of the alignment", 0, defining=True),
    Option("opt-write-zero", "size", "preferred alignment of writes of zeroes", 0, defining=True),
    Option("max-write-zero", "size", "longest write of zeroes", 0, defining=True),
    Option("opt-discard", "size", "preferred alignment of discards", 0, defining=True),
    Option("max-discard", "size", "longest discard", 0, defining=True),
    Option("take-child-perms", "str", "permissions to take on the node below: take-child-perms.N", defining=True),
    Option("unshare-child-perms", "str", "permissions that nobody else may have: unshare-child-perms.N", defining=True),
)


@hookimpl
def vm_protocol_drivers() -> list[ProtocolDriver]:
    return [
        ProtocolDriver(
            name="blkdebug",
            summary="errors and breakpoints at events of the node above",
            implementation="vm_blkdebug.node:Blkdebug",
            prefixes=("blkdebug",),
            capabilities=frozenset({"write", "filter"}),
            options=_OPTIONS,
        )
    ]
