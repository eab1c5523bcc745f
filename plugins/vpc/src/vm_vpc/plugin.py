"""What the VHD driver tells about itself."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.hookspecs import hookimpl

_OPTIONS = (
    Option(
        "force_size_calc",
        "str",
        "Force disk size calculation to use either CHS geometry, or use the disk current_size specified in the VHD "
        "footer. {chs, current_size}",
        defining=True,
    ),
)

_CREATE_OPTIONS = (
    Option("size", "size", "Virtual disk size"),
    Option(
        "subformat",
        "str",
        "Type of virtual hard disk format. Supported formats are {dynamic (default) | fixed} ",
    ),
    Option(
        "backing_file", "str", "File name of the parent, a VHD image: the new one is a differencing image", ours=True
    ),
    Option("backing_fmt", "enum", "Format of the parent: vpc", choices=("vpc",), ours=True),
    Option(
        "force_size",
        "bool",
        "Force disk size calculation to use the actual size specified, rather than using the nearest CHS-based "
        "calculation",
    ),
)


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The format ``vpc``, which everybody else calls VHD."""
    return [
        FormatDriver(
            name="vpc",
            aliases=("vhd",),
            summary="Virtual PC and Hyper-V disk image (VHD), fixed, dynamic and differencing",
            implementation="vm_vpc.image:Vpc",
            capabilities={"write", "create", "backing"},
            # A fixed image begins with the guest's first sector: it has to be named. Its footer tells nothing that the
            # guest of a raw image could not have written there.
            signatures=(Signature(0, b"conectix"),),
            extensions=(".vhd",),
            options=_OPTIONS,
            create_options=_CREATE_OPTIONS,
        )
    ]
