"""What this distribution brings: one format."""

from vm_core.descriptors import FormatDriver, Signature
from vm_core.hookspecs import hookimpl


@hookimpl
def vm_format_drivers():
    """Bochs' growing images, read-only."""
    return [
        FormatDriver(
            name="bochs",
            summary="Bochs growing disk image (read-only)",
            implementation="vm_bochs.format:Bochs",
            signatures=(Signature(0, b"Bochs Virtual HD Image\0"),),
        )
    ]
