"""The PIIX3 IDE controller with ATA disks and ATAPI CD-ROM drives."""
