"""The descriptor of an appliance: OVF, *Open Virtualization Format Specification* (DMTF DSP0243), sections 5 to 9."""

from __future__ import annotations

from typing import NamedTuple
from xml.sax.saxutils import escape, quoteattr

from vm_core.errors import ImageError

#: Bytes of a descriptor that are read.
MAX_LENGTH = 4 << 20
#: ``ovf:format`` of a stream-optimized disk.
STREAM = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"


class Disk(NamedTuple):
    """A virtual disk of the appliance."""

    #: ``ovf:diskId``.
    identity: str
    #: The file in the archive.
    href: str
    #: ``ovf:format``: a URI.
    format: str
    #: ``ovf:compression`` of the file: ``gzip``, or nothing.
    compression: str
    #: ``ovf:chunkSize`` of the file, where it comes in pieces.
    chunks: str


def read_disks(data: bytes, name: str) -> list[Disk]:
    """The disks that a descriptor lists (*DiskSection*), in order. Raises ImageError."""
    from xml.parsers import expat

    files: dict[str, dict[str, str]] = {}
    disks: list[dict[str, str]] = []

    def start(element: str, attributes: dict[str, str]) -> None:
        local = {key.rpartition("|")[2]: value for key, value in attributes.items()}
        word = element.rpartition("|")[2]
        if word == "File" and "id" in local:
            files[local["id"]] = local
        elif word == "Disk":
            disks.append(local)

    def entity(*arguments: object) -> None:
        raise ImageError(name, "the OVF descriptor declares entities: it is not read")

    parser = expat.ParserCreate(namespace_separator="|")
    parser.StartElementHandler = start
    parser.EntityDeclHandler = entity
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise ImageError(name, f"the OVF descriptor is no XML: {error}") from None
    found = []
    for disk in disks:
        file = files.get(disk.get("fileRef", ""))
        if file is not None:
            found.append(
                Disk(
                    disk.get("diskId", ""),
                    file.get("href", ""),
                    disk.get("format", ""),
                    file.get("compression", ""),
                    file.get("chunkSize", ""),
                )
            )
    return found


class Appliance(NamedTuple):
    """What a new appliance is."""

    name: str
    #: The disk's file.
    href: str
    #: Bytes that the guest sees, and bytes of the file.
    capacity: int
    size: int
    #: ``ide``, ``lsilogic``, ``buslogic``: the controller.
    adapter: str
    #: ``vmx-13``.
    hardware: str
    cpus: int
    #: MiB.
    memory: int

    def text(self) -> str:
        """The descriptor: one machine with processors, memory, a controller and the disk."""
        ide = self.adapter == "ide"
        controller = _item(
            3, "ideController0" if ide else "scsiController0", 5 if ide else 6, "" if ide else self.adapter
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1"'
            ' xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1"'
            ' xmlns:rasd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_ResourceAllocationSettingData"'
            ' xmlns:vssd="http://schemas.dmtf.org/wbem/wscim/1/cim-schema/2/CIM_VirtualSystemSettingData">\n'
            "  <References>\n"
            f'    <File ovf:href={quoteattr(self.href)} ovf:id="file1" ovf:size="{self.size}"/>\n'
            "  </References>\n"
            "  <DiskSection>\n"
            "    <Info>Virtual disks</Info>\n"
            f'    <Disk ovf:capacity="{self.capacity}" ovf:capacityAllocationUnits="byte" ovf:diskId="vmdisk1"'
            f' ovf:fileRef="file1" ovf:format="{STREAM}"/>\n'
            "  </DiskSection>\n"
            f"  <VirtualSystem ovf:id={quoteattr(self.name)}>\n"
            "    <Info>A virtual machine</Info>\n"
            f"    <Name>{escape(self.name)}</Name>\n"
            '    <OperatingSystemSection ovf:id="1">\n'
            "      <Info>The guest operating system</Info>\n"
            "    </OperatingSystemSection>\n"
            "    <VirtualHardwareSection>\n"
            "      <Info>Virtual hardware</Info>\n"
            "      <System>\n"
            "        <vssd:ElementName>Virtual Hardware Family</vssd:ElementName>\n"
            "        <vssd:InstanceID>0</vssd:InstanceID>\n"
            f"        <vssd:VirtualSystemIdentifier>{escape(self.name)}</vssd:VirtualSystemIdentifier>\n"
            f"        <vssd:VirtualSystemType>{escape(self.hardware)}</vssd:VirtualSystemType>\n"
            "      </System>\n"
            f"{_item(1, f'{self.cpus} virtual CPUs', 3, quantity=self.cpus, units='hertz * 10^6')}"
            f"{_item(2, f'{self.memory} MB of memory', 4, quantity=self.memory, units='byte * 2^20')}"
            f"{controller}"
            f"{_item(4, 'disk0', 17, host='ovf:/disk/vmdisk1', parent=3)}"
            "    </VirtualHardwareSection>\n"
            "  </VirtualSystem>\n"
            "</Envelope>\n"
        )


def _item(
    identity: int,
    name: str,
    kind: int,
    subtype: str = "",
    *,
    quantity: int = 0,
    units: str = "",
    host: str = "",
    parent: int = 0,
) -> str:
    """An ``Item``: its members stand in the order of the alphabet."""
    fields = [
        ("Address", "0" if kind in (5, 6) else ""),
        ("AddressOnParent", "0" if parent else ""),
        ("AllocationUnits", units),
        ("ElementName", name),
        ("HostResource", host),
        ("InstanceID", str(identity)),
        ("Parent", str(parent) if parent else ""),
        ("ResourceSubType", subtype),
        ("ResourceType", str(kind)),
        ("VirtualQuantity", str(quantity) if quantity else ""),
    ]
    inside = "".join(f"        <rasd:{key}>{escape(value)}</rasd:{key}>\n" for key, value in fields if value)
    return f"      <Item>\n{inside}      </Item>\n"
