"""Fixed images: the disk as it is, and a footer behind it."""

from __future__ import annotations

from collections.abc import Sequence

from vm_core.block.mapping import Allocation, Kind, Mapping
from vm_core.block.node import Node
from vm_core.errors import ImageError

from .footer import SECTOR, Footer
from .image import Vpc


class FixedVpc(Vpc):
    """One open fixed image."""

    sparse = True

    def __init__(self, file: Node, name: str, footer: Footer, sectors: int, end: int, *, readonly: bool) -> None:
        """*end* is where the footer begins. Raises ImageError where the disk does not fit before it."""
        self.file = file
        self.name = name
        self.footer = footer
        self.sectors = sectors
        self.readonly = readonly
        if sectors * SECTOR > end:
            other = footer.current_size
            hint = "; force_size_calc=current_size opens it" if other <= end and other != sectors * SECTOR else ""
            raise ImageError(
                name,
                f"a fixed disk of {sectors * SECTOR} bytes has only {end} bytes in the file before its footer{hint}",
            )

    def map(self, offset: int, length: int) -> Sequence[Mapping]:
        return (Mapping(Kind.DATA, offset, length, self.file, offset, not self.readonly),)

    def map_cached(self, offset: int, length: int) -> Sequence[Mapping] | None:
        return self.map(offset, length)

    def allocate(self, offset: int, length: int) -> Sequence[Allocation]:
        return (Allocation(offset, length, self.file, offset, False),)

    def blank(self, offset: int, length: int) -> bool:
        self.file.zero(offset, length, unmap=True)
        return True

    def reopen(self, *, readonly: bool) -> None:
        self.readonly = readonly
