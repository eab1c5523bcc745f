"""This program's version, from the metadata of its distribution."""

from __future__ import annotations

from typing import Any

from .distributions import entry_points


def version() -> str:
    """The version of vm-core as installed; ``0`` for a source tree that is not."""
    return next((point.version for point in entry_points("vm_core") if point.value == "vm_core.builtin"), "0")


def qapi_version() -> dict[str, Any]:
    """The same as QMP's ``VersionInfo``: three numbers in the member that QEMU's clients read, and the name."""
    words = version()
    numbers = [int(part) if part.isdigit() else 0 for part in words.split("+")[0].split(".")[:3]]
    major, minor, micro = (*numbers, 0, 0, 0)[:3]
    return {"qemu": {"micro": micro, "minor": minor, "major": major}, "package": f"vm-core {words}"}
