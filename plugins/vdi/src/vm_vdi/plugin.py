"""What the VDI driver tells about itself."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.hookspecs import hookimpl

_CREATE_OPTIONS = (
    Option("size", "size", "Virtual disk size"),
    Option(
        "backing_file", "str", "File name of the parent, a VDI image: the new one is a differencing image", ours=True
    ),
    Option("backing_fmt", "enum", "Format of the parent: vdi", choices=("vdi",), ours=True),
    Option("static", "bool", "VDI static (pre-allocated) image", default=False),
)


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``vdi``."""
    return [
        FormatDriver(
            name="vdi",
            summary="VirtualBox disk image, dynamic, static and differencing",
            implementation="vm_vdi.image:Vdi",
            capabilities={"write", "create", "backing", "check"},
            signatures=(Signature(64, b"\x7f\x10\xda\xbe"),),
            extensions=(".vdi",),
            create_options=_CREATE_OPTIONS,
        )
    ]
