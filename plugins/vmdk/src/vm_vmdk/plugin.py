"""What the VMDK and OVA drivers tell about themselves."""

from __future__ import annotations

from vm_core.descriptors import FormatDriver, Option, Signature
from vm_core.hookspecs import hookimpl

#: In the order in which qemu-img lists them; help texts are its own.
_CREATE_OPTIONS = (
    Option("size", "size", "Virtual disk size"),
    Option("adapter_type", "str", "Virtual adapter type, can be one of ide (default), lsilogic, buslogic or legacyESX"),
    Option("backing_file", "str", "File name of a base image"),
    Option("backing_fmt", "str", "Must be 'vmdk' if present"),
    Option("compat6", "bool", "VMDK version 6 image", default=False),
    Option("hwversion", "str", "VMDK hardware version", default="undefined"),
    Option("toolsversion", "str", "VMware guest tools version"),
    Option(
        "subformat",
        "str",
        "VMDK flat extent format, can be one of {monolithicSparse (default) | monolithicFlat | "
        "twoGbMaxExtentSparse | twoGbMaxExtentFlat | streamOptimized} ",
    ),
    Option("zeroed_grain", "bool", "Enable efficient zero writes using the zeroed-grain GTE feature"),
)


@hookimpl
def vm_format_drivers() -> list[FormatDriver]:
    """The formats ``vmdk`` and ``ova``."""
    return [
        FormatDriver(
            name="vmdk",
            summary="VMware's disk format: sparse, flat, split and stream-optimized images",
            implementation="vm_vmdk.image:Vmdk",
            capabilities={"write", "create", "backing", "check", "compress"},
            signatures=(Signature(0, b"KDMV"), Signature(0, b"COWD")),
            probe="vm_vmdk.probe:probe",
            extensions=(".vmdk",),
            create_options=_CREATE_OPTIONS,
        ),
    ]
