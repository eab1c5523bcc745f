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
        FormatDriver(
            name="ova",
            summary="virtual appliances: a stream-optimized VMDK disk with its OVF descriptor in an archive",
            implementation="vm_vmdk.ova:Ova",
            capabilities={"write", "create", "check", "compress"},
            probe="vm_vmdk.probe:probe_appliance",
            extensions=(".ova",),
            options=(Option("disk", "str", "Which disk: its number (from 0), diskId or file name"),),
            create_options=(
                Option("size", "size", "Virtual disk size"),
                Option("adapter_type", "str", "Disk controller: lsilogic (default), buslogic or ide"),
                Option("hwversion", "str", "Virtual hardware version (13: ESXi 6.5 and later)"),
                Option("name", "str", "Name of the virtual machine (default: that of the file)"),
                Option("cpus", "int", "Processors of the virtual machine (default: 1)"),
                Option("memory", "int", "Memory of the virtual machine in MiB (default: 1024)"),
            ),
        ),
    ]
