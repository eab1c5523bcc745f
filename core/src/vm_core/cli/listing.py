"""Listings made from descriptors: ``--list-plugins``, ``-device help``, ``-device NAME,help``, ``-drive help``, ….

Plain text everywhere but on a terminal, where ``--list-plugins`` is a table drawn by rich.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from ..descriptors import KINDS, Descriptor, DeviceFrontend, Option
from ..errors import UsageError
from ..options import describe, suggest
from ..plugins import Health, PluginEntry, PluginRegistry, registry

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Plural and everyday words for kinds, besides their names.
_KIND_WORDS = {
    **{kind: kind for kind in KINDS},
    **{f"{kind}s": kind for kind in KINDS},
    "accel": "accelerator",
    "aio": "engine",
    "backend": "engine",
    "backends": "engine",
    "frontend": "device",
    "frontends": "device",
    "plugin": "plugin",
    "plugins": "plugin",
}


def parse_kind(word: str) -> str:
    """The kind that *word* means; empty for all."""
    if not word:
        return ""
    if word not in _KIND_WORDS:
        raise UsageError(f"--list-plugins: no kind {word!r}{suggest(word, KINDS)}")
    return _KIND_WORDS[word]


def plugins(kind: str, *, as_json: bool, terminal: bool, plugin_registry: PluginRegistry) -> str:
    """The text of ``--list-plugins``: entries of *kind*, and always the plugins that cannot be asked for theirs."""
    entries = [entry for entry in plugin_registry.entries() if kind in ("", entry.kind) or entry.kind == "plugin"]
    if as_json:
        return json.dumps([_as_json(entry) for entry in entries], indent=2)
    return _rich_table(entries) if terminal else _plain_table(entries)


def _as_json(entry: PluginEntry) -> dict[str, str]:
    shown = {
        "kind": entry.kind,
        "name": entry.name,
        "summary": entry.summary,
        "distribution": entry.distribution,
        "version": entry.version,
        "health": str(entry.health),
    }
    if entry.health is not Health.OK:
        shown |= {"reason": entry.reason, "remedy": entry.remedy}
    return shown


def _plain_table(entries: Sequence[PluginEntry]) -> str:
    rows = [("KIND", "NAME", "DISTRIBUTION", "VERSION", "HEALTH", "SUMMARY")]
    for entry in entries:
        text = entry.summary if entry.health is Health.OK else f"{entry.reason}; {entry.remedy}"
        rows.append((entry.kind, entry.name, entry.distribution, entry.version or "-", str(entry.health), text))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[5]]).rstrip()
        for row in rows
    )


_COLOURS = {
    Health.OK: "green",
    Health.BROKEN: "bold red",
    Health.WRONG_API: "bold red",
    Health.CONFLICT: "bold yellow",
    Health.DISABLED: "dim",
}


def _rich_table(entries: Sequence[PluginEntry]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("kind", "name", "summary", "distribution", "version", "health"):
        table.add_column(column, no_wrap=column != "summary", overflow="fold")
    previous = ""
    for entry in entries:
        summary = Text(entry.summary)
        if entry.health is not Health.OK:
            summary = Text(entry.reason, style="red" if entry.health is not Health.DISABLED else "dim")
            summary.append(f"\n→ {entry.remedy}", style="bold")
        colour = _COLOURS[entry.health]
        shown = entry.kind if entry.kind != previous else ""
        previous = entry.kind
        table.add_row(
            Text(shown, style="cyan"),
            Text(entry.name, style="bold"),
            summary,
            Text(entry.distribution),
            Text(entry.version or "-", style="dim"),
            Text(f"● {entry.health}", style=colour),
        )
    console = Console(file=sys.stdout)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")


def drivers(kind: str, heading: str) -> str:
    """The drivers of *kind*, a line each: ``-accel help``, ``-device help``."""
    found = registry().all(kind)
    return _lines(heading, found)


def devices() -> str:
    """``-device help``: frontends by the bus they plug into."""
    parts: list[str] = []
    found = [each for each in registry().all("device") if isinstance(each, DeviceFrontend)]
    for bus in sorted({each.bus for each in found}):
        parts.append(_lines(f"Devices for a bus of type {bus}:", [each for each in found if each.bus == bus]))
    return "\n\n".join(parts) or "No device is installed: pip install vm-ide or vm-virtio-blk"


def _lines(heading: str, found: Sequence[Descriptor]) -> str:
    width = max((len(each.name) for each in found), default=0)
    aliases = {each.name: f" (also: {', '.join(each.aliases)})" if each.aliases else "" for each in found}
    return "\n".join([heading, *(f"  {each.name:<{width}}  {each.summary}{aliases[each.name]}" for each in found)])


def driver_options(kind: str, name: str, common: Sequence[Option] = ()) -> str:
    """``NAME,help``: the options of one driver."""
    descriptor = registry().find(kind, name)
    lines = [f"{descriptor.name}: {descriptor.summary}"]
    lines += describe(descriptor.options) or ["  (no options of its own)"]
    if common:
        lines += ["", f"Options of every {kind}:", *describe(common)]
    return "\n".join(lines)
