"""Opening: which of the three kinds an image is.

A footer at the end that says ``fixed`` is believed first: what lies at the start of such an image is the guest's, and
must not turn it into another kind. Else the copy of the footer at the start is what counts, as with QEMU; where that is
broken, the footer at the end of a dynamic image stands in for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vm_core.block.format import Format
from vm_core.block.node import Node
from vm_core.errors import ImageError, UsageError

from .footer import (
    COOKIE,
    DIFFERENCING,
    DYNAMIC,
    FIXED,
    FOOTER_LENGTH,
    HEADER_COOKIE,
    HEADER_LENGTH,
    SECTOR,
    DynamicHeader,
    Footer,
    footer_at_end,
    sealed,
)
from .geometry import MAX_SECTORS, disk_sectors

if TYPE_CHECKING:
    from vm_core.block.open import OpenContext


class Vpc(Format):
    """What ``open`` and ``create`` have in common; open images are of a class for their kind."""

    create_failure = "Unable to create or write VHD header"
    zero_parts = False

    file: Node
    name: str
    footer: Footer
    sectors: int

    @classmethod
    def open(cls, file: Node, options: dict[str, Any], context: OpenContext) -> Vpc:
        calculation = options.pop("force_size_calc", None)
        if calculation not in (None, "chs", "current_size"):
            raise UsageError(f"Invalid size calculation mode: '{calculation}'")
        name = context.filename or file.filename
        head = file.pread(0, FOOTER_LENGTH)
        end = footer_at_end(file)
        if end is not None and _is_fixed(end[1]):
            footer = Footer.parse(end[1])
            sectors = _sectors(footer, calculation, file, name)
            from .fixed import FixedVpc

            return FixedVpc(file, name, footer, sectors, end[0], readonly=context.readonly)
        healed = False
        if not (head.startswith(COOKIE) and sealed(head, 64)):
            head, healed = _other_footer(head, end, file, name), True
        footer = Footer.parse(head)
        sectors = _sectors(footer, calculation, file, name)
        header, raw = _read_header(file, name, footer, sectors)
        opened: Vpc
        if footer.disk_type == DIFFERENCING:
            from .differencing import DifferencingVpc

            opened = DifferencingVpc(file, name, footer, header, sectors, raw, readonly=context.readonly)
            opened.find_parent(context)
        else:
            from .dynamic import DynamicVpc

            opened = DynamicVpc(file, name, footer, header, sectors, readonly=context.readonly)
        if healed and not context.readonly:
            file.pwrite(0, head)
        return opened

    @property
    def size(self) -> int:
        return self.sectors * SECTOR

    @classmethod
    def create(cls, file: Node, size: int, options: dict[str, Any]) -> None:
        from .create import create

        create(file, size, options)


def _is_fixed(data: bytes) -> bool:
    """Whether this footer at the end of a file is sound and that of a fixed image."""
    return Footer.parse(data).disk_type == FIXED and sealed(data, 64)


def _other_footer(head: bytes, end: tuple[int, bytes] | None, file: Node, name: str) -> bytes:
    """The footer at the end, where the copy at the start cannot be used. Raises ImageError in QEMU's words."""
    if end is not None and sealed(end[1], 64) and Footer.parse(end[1]).disk_type in (DYNAMIC, DIFFERENCING):
        return end[1]
    if head.startswith(COOKIE):
        raise ImageError(name, "Incorrect header checksum")
    if file.size < FOOTER_LENGTH:
        raise ImageError(name, "File too small for a VHD header")
    if end is not None and Footer.parse(end[1]).disk_type == FIXED:
        raise ImageError(name, "Incorrect header checksum")
    raise ImageError(name, "invalid VPC image")


def _sectors(footer: Footer, calculation: str | None, file: Node, name: str) -> int:
    sectors = disk_sectors(footer, calculation)
    if sectors > MAX_SECTORS:
        raise ImageError(
            name,
            f"a disk of {sectors} sectors is larger than a VHD image can be ({MAX_SECTORS})",
            peer=f"Could not open '{file.filename}': File too large",
        )
    return sectors


def _read_header(file: Node, name: str, footer: Footer, sectors: int) -> tuple[DynamicHeader, bytes]:
    """The dynamic disk header, checked but for what the table holds. Raises ImageError in QEMU's words."""
    if footer.data_offset > (1 << 63) - 1 - HEADER_LENGTH:
        raise ImageError(name, "Error reading dynamic VHD header")
    raw = file.pread(footer.data_offset, HEADER_LENGTH)
    header = DynamicHeader.parse(raw)
    if header.cookie != HEADER_COOKIE:
        raise ImageError(name, "Invalid header magic")
    size = header.block_size
    if size < SECTOR or size & (size - 1):
        raise ImageError(name, f"Invalid block size {size}")
    entries = header.max_table_entries
    if entries * size < sectors * SECTOR:
        raise ImageError(name, "Page table too small")
    if entries > 0x7FFFFFFF // 4:
        shown = entries - (1 << 32) if entries >> 31 else entries
        raise ImageError(name, f"Max Table Entries too large ({shown})")
    if header.table_offset + 4 * entries > -(-file.size // SECTOR) * SECTOR:
        raise truncated(name)
    return header, raw


def truncated(name: str) -> ImageError:
    """The error of an image whose table or blocks reach past the end of its file."""
    return ImageError(
        name, "block-vpc: free_data_block_offset points after the end of file. The image has been truncated."
    )
