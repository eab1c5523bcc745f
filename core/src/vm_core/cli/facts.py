"""A format's facts about an image as people read them: ``Format specific information`` of the tools."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..jsontext import ordered


def lines(facts: dict[str, Any], indent: int) -> Iterator[str]:
    """One line a fact, *indent* levels deep, members in QEMU's order."""
    for name, value in ordered(facts):
        yield from _line(f"{name.replace('-', ' ')}", value, indent)


def _line(name: str, value: Any, indent: int) -> Iterator[str]:
    blanks = "    " * indent
    if isinstance(value, dict):
        yield f"{blanks}{name}:\n"
        yield from lines(value, indent + 1)
    elif isinstance(value, list | tuple):
        yield f"{blanks}{name}:\n"
        for number, member in enumerate(value):
            yield from _line(f"[{number}]", member, indent + 1)
    else:
        if isinstance(value, bool):
            value = "true" if value else "false"
        yield f"{blanks}{name}: {value}\n"
