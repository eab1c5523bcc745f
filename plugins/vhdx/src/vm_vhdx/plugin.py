"""What the VHDX driver tells about itself."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.hookspecs import hookimpl

_CREATE_OPTIONS = (
    Option("size", "size", "Virtual disk size; max of 64TB."),
    Option(
        "backing_file", "str", "File name of the parent, a VHDX image: the new one is a differencing image", ours=True
    ),
    Option("backing_fmt", "enum", "Format of the parent: vhdx", choices=("vhdx",), ours=True),
    Option("log_size", "size", "Log size; min 1MB.", default=1 << 20),
    Option(
        "block_size",
        "size",
        "Block Size; min 1MB, max 256MB. 0 means auto-calculate based on image size.",
        default=0,
    ),
    Option("subformat", "str", "VHDX format type, can be either 'dynamic' or 'fixed'. Default is 'dynamic'."),
    Option(
        "block_state_zero",
        "bool",
        "Force use of payload blocks of type 'ZERO'. Non-standard, but default.  Do not set to 'off' when using "
        "'qemu-img convert' with subformat=dynamic.",
    ),
)


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``vhdx``."""
    return [
        FormatDriver(
            name="vhdx",
            summary="Hyper-V disk image (VHDX), dynamic, fixed and differencing",
            implementation="vm_vhdx.image:Vhdx",
            capabilities={"write", "create", "backing", "check"},
            signatures=(Signature(0, b"vhdxfile"),),
            extensions=(".vhdx",),
            create_options=_CREATE_OPTIONS,
        )
    ]
