"""What this distribution offers: the accelerator ``unicorn``."""

from __future__ import annotations

from collections.abc import Iterable

from vm_core.descriptors import AcceleratorDriver, Option
from vm_core.hookspecs import hookimpl

UNICORN = AcceleratorDriver(
    name="unicorn",
    summary="Translates guest code on any host (Unicorn engine, from PyPI)",
    implementation="vm_unicorn.accelerator:UnicornAccelerator",
    aliases=("tcg",),
    options=(
        Option(
            "mode",
            "enum",
            "How the guest is stopped and its exceptions are delivered: 'native' by machine code and the engine itself,"
            " 'block' by machine code and Python, 'count' by instruction counts and Python (any host, slowest);"
            " 'auto' takes the first that this host offers",
            default="auto",
            choices=("auto", "native", "block", "count"),
        ),
    ),
    capabilities=frozenset({"i386"}),
)


@hookimpl
def vm_accelerators() -> Iterable[AcceleratorDriver]:
    """Offer the accelerator."""
    return [UNICORN]
