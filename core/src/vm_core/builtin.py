"""The drivers that core itself brings, registered through the same hooks as everybody else's."""

from __future__ import annotations

from collections.abc import Iterable

from .descriptors import AcceleratorDriver, BlockEngine, FormatDriver, Option, ProtocolDriver
from .hookspecs import hookimpl

_FILENAME = Option("filename", "str", "path of the file or device", required=True, defining=True)
_LOCKING = Option(
    "locking", "enum", "locks that other processes respect, QEMU among them", "auto", choices=("auto", "on", "off")
)
_AIO = Option("aio", "str", "host-I/O engine that a backend on top should use", "threads")


@hookimpl
def vm_format_drivers() -> Iterable[FormatDriver]:
    return [
        FormatDriver(
            name="raw",
            summary="the bytes themselves, or a window of them",
            implementation="vm_core.block.raw:RawNode",
            extensions=("raw", "img", "iso", "bin", "dd"),
            capabilities=frozenset({"write", "create", "resize", "measure"}),
            options=(
                Option("offset", "size", "where in the file the image begins", 0, defining=True),
                Option("size", "size", "length of the image; to the end of the file if not given", defining=True),
            ),
            create_options=(Option("size", "size", "Virtual disk size"),),
        )
    ]


@hookimpl
def vm_protocol_drivers() -> Iterable[ProtocolDriver]:
    return [
        ProtocolDriver(
            name="file",
            summary="a regular file on this host",
            implementation="vm_core.block.file:FileProtocol",
            prefixes=("file",),
            capabilities=frozenset({"local", "write", "create", "resize"}),
            options=(_FILENAME, _LOCKING, _AIO),
            create_options=(
                Option("size", "size", "Virtual disk size"),
                Option("nocow", "bool", "Turn off copy-on-write (valid only on btrfs)"),
                Option(
                    "preallocation",
                    "enum",
                    "Preallocation mode (allowed values: off, falloc, full)",
                    choices=("off", "falloc", "full"),
                ),
                Option("extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"),
            ),
        ),
        ProtocolDriver(
            name="host_device",
            summary="a disk, partition or other block device of this host",
            implementation="vm_core.block.host_device:HostDeviceProtocol",
            prefixes=("host_device",),
            capabilities=frozenset({"local", "write", "create"}),
            options=(_FILENAME, _LOCKING, _AIO),
        ),
        ProtocolDriver(
            name="host_cdrom",
            summary="a CD or DVD drive of this host, with a disc in it or without",
            implementation="vm_core.block.host_cdrom:HostCdromProtocol",
            prefixes=("host_cdrom",),
            capabilities=frozenset({"local", "write", "create"}),
            options=(_FILENAME, _LOCKING, _AIO),
        ),
    ]


@hookimpl
def vm_block_engines() -> Iterable[BlockEngine]:
    return [
        BlockEngine(
            name="threads",
            summary="worker threads that take batches of requests",
            implementation="vm_core.block.engines.threads:ThreadsEngine",
            options=(Option("workers", "int", "threads at most", 8),),
        )
    ]


@hookimpl
def vm_accelerators() -> Iterable[AcceleratorDriver]:
    return [
        AcceleratorDriver(
            name="none",
            summary="no processor at all: to look at a machine, or to drive its devices from outside",
            implementation="vm_core.machine.noaccel:NoAccelerator",
        )
    ]
