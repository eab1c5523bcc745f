"""Which distribution brings what is not installed: data for error messages.

Only names of this project's own family stand here; a driver of somebody else's plugin needs no entry to work.
"""

from __future__ import annotations

#: kind → driver name → distribution.
KNOWN_DRIVERS: dict[str, dict[str, str]] = {
    "device": {
        "ahci": "vm-ahci",
        "floppy": "vm-floppy",
        "ich9-ahci": "vm-ahci",
        "ide-cd": "vm-ide",
        "ide-hd": "vm-ide",
        "isa-fdc": "vm-floppy",
        "lsi53c895a": "vm-lsi",
        "nvme": "vm-nvme",
        "piix3-ide": "vm-ide",
        "scsi-cd": "vm-virtio-scsi",
        "scsi-hd": "vm-virtio-scsi",
        "usb-storage": "vm-usb-storage",
        "virtio-blk": "vm-virtio-blk",
        "virtio-blk-pci": "vm-virtio-blk",
        "virtio-scsi-pci": "vm-virtio-scsi",
    },
    "engine": {
        "io_uring": "vm-aio",
        "native": "vm-aio",
    },
    "format": {
        "bochs": "vm-bochs",
        "cloop": "vm-cloop",
        "compress": "vm-filters",
        "copy-on-read": "vm-filters",
        "dmg": "vm-dmg",
        "luks": "vm-luks",
        "ova": "vm-vmdk",
        "parallels": "vm-parallels",
        "preallocate": "vm-filters",
        "qcow": "vm-qcow",
        "qcow2": "vm-qcow2",
        "qed": "vm-qed",
        "quorum": "vm-filters",
        "throttle": "vm-filters",
        "vdi": "vm-vdi",
        "vhdx": "vm-vhdx",
        "vmdk": "vm-vmdk",
        "vpc": "vm-vpc",
    },
    "protocol": {
        "blkdebug": "vm-blkdebug",
        "blkverify": "vm-filters",
        "curl": "vm-curl",
        "http": "vm-curl",
        "https": "vm-curl",
        "iscsi": "vm-iscsi",
        "nbd": "vm-nbd",
        "nfs": "vm-nfs",
        "null-aio": "vm-null",
        "null-co": "vm-null",
        "rbd": "vm-ceph",
        "sheepdog": "vm-sheepdog",
        "ssh": "vm-ssh",
    },
    "accelerator": {
        "kvm": "vm-kvm",
        "unicorn": "vm-unicorn",
    },
    "export": {
        "fuse": "vm-fuse",
        "vhost-user-blk": "vm-vhost-user",
    },
}

#: Formats of the family that are only read: making such an image is refused alike with and without the plugin.
READ_ONLY_FORMATS = ("bochs", "cloop", "dmg")

#: ``-drive if=`` → distribution.
KNOWN_INTERFACES: dict[str, str] = {
    "floppy": "vm-floppy",
    "ide": "vm-ide",
    "scsi": "vm-virtio-scsi",
    "virtio": "vm-virtio-blk",
}

#: Offset, bytes and format of what formats of the family begin with: an image of one that is not installed must not be
#: taken for raw, least of all when it is opened for writing.
KNOWN_SIGNATURES: tuple[tuple[int, bytes, str], ...] = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
)
