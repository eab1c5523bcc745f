"""What the drivers tell about themselves."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, ProtocolDriver
from vm_core.hookspecs import hookimpl


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    capabilities = frozenset({"write", "filter"})
    return [
        FormatDriver(
            name="copy-on-read",
            summary="an image takes what is read from its backing images",
            implementation="vm_filters.copyonread:CopyOnRead",
            capabilities=capabilities,
            options=(Option("bottom", "str", "name of the lowest node whose data is copied", defining=True),),
        ),
        FormatDriver(
            name="compress",
            summary="everything is written in compressed form",
            implementation="vm_filters.compress:Compress",
            capabilities=capabilities,
        ),
        FormatDriver(
            name="preallocate",
            summary="a file that grows gets host space in large pieces ahead of it",
            implementation="vm_filters.preallocate:Preallocate",
            capabilities=capabilities,
            options=(
                Option("prealloc-align", "size", "round the file's length up to this", default="1M", defining=True),
                Option("prealloc-size", "size", "how much to set aside at once", default="128M", defining=True),
            ),
        ),
        FormatDriver(
            name="throttle",
            summary="requests wait until the limits of a throttle group allow them",
            implementation="vm_filters.throttle:Throttle",
            capabilities=capabilities,
            options=(
                Option("throttle-group", "str", "the group: --object throttle-group,id=NAME,x-…=N", defining=True),
            ),
        ),
    ]


@hookimpl
def vm_protocol_drivers() -> list[ProtocolDriver]:
    return [
        ProtocolDriver(
            name="quorum",
            summary="several equal images; what most of them say is read",
            implementation="vm_filters.quorum:Quorum",
            capabilities=frozenset({"write"}),
            options=(
                Option("children", "str", "the images: children.N", defining=True),
                Option("vote-threshold", "str", "how many have to agree", defining=True),
                Option("blkverify", "str", "say which bytes differ (two images, threshold 2)", defining=True),
                Option("rewrite-corrupted", "str", "write what most say to those that differ", defining=True),
                Option("read-pattern", "str", "quorum (vote) or fifo (the first that can be read)", defining=True),
            ),
        ),
        ProtocolDriver(
            name="blkverify",
            summary="a raw image and one under test that must read the same",
            implementation="vm_filters.blkverify:Blkverify",
            prefixes=("blkverify",),
            capabilities=frozenset({"write"}),
            options=(
                Option("raw", "node", "the image that is right", required=True),
                Option("test", "node", "the image under test", required=True),
            ),
        ),
    ]
