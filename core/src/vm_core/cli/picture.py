"""The assembled stack as a tree of lines: frontend → backend → format → protocol, with what matters of each."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from ..block.node import Node
    from ..qmp.monitor import Drive


@attrs.frozen
class Layer:
    """One box of the picture: its role, its name, what it is, and what is below it."""

    role: str
    name: str
    detail: str = ""
    below: tuple[Layer, ...] = ()


def size(count: int) -> str:
    """Bytes for people: ``64 MiB``, ``1.5 GiB``, ``200 KiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def drive_layers(drive: Drive) -> Layer:
    """The picture of one drive."""
    backend = drive.backend
    cache = [f"cache={backend.cache.name}", f"aio={drive.engine}"]
    cache.append("read-only" if backend.readonly else f"write cache {'on' if backend.write_cache else 'off'}")
    below = (
        (node_layers(backend.node),) if backend.node is not None else (Layer("medium", "none", "the tray is empty"),)
    )
    device = drive.device
    detail = device.describe() if device is not None else "not connected to a device"
    name = drive.id if device is None or not device.id or device.id == drive.id else f"{device.id} ({drive.id})"
    return Layer("frontend", name, detail, (Layer("backend", ", ".join(cache), "", below),))


def node_layers(node: Node, role: str = "format") -> Layer:
    """The picture of *node* and of all below it."""
    from ..block.medium import present

    children = node.children()
    if not children:
        return Layer("protocol" if role == "format" else role, node.driver, short_path(node.filename))
    facts = [size(node.size) if present(node) else "no medium"]
    allocated = node.known_allocated().get("actual-size", 0)
    if allocated:
        facts.append(f"{size(allocated)} on the host")
    if node.cluster_size > 1:
        facts.append(f"{size(node.cluster_size)} clusters")
    if node.readonly:
        facts.append("read-only")
    below = tuple(
        node_layers(child, "protocol" if name == "file" else name)
        for name, child in sorted(children.items(), key=lambda item: (item[0] == "backing", item[0] != "file"))
    )
    return Layer(role, node.driver, ", ".join(facts), below)


def short_path(path: str) -> str:
    """*path* relative to the current directory where that is shorter, ``~`` for the home directory."""
    if "://" in path or path.startswith("json:"):
        return path
    candidates = [path]
    with contextlib.suppress(ValueError, OSError):  # another drive (Windows), a directory that is gone
        candidates.append(os.path.relpath(path))
    home = os.path.expanduser("~")
    if path.startswith(home + os.sep):
        candidates.append("~" + path[len(home) :])
    return min(candidates, key=len)


def plain(layers: Sequence[Layer], indent: str = "") -> list[str]:
    """The picture as lines of text."""
    lines = []
    for layer in layers:
        lines.append(f"{indent}{layer.role}: {layer.name}{': ' if layer.detail else ''}{layer.detail}")
        lines += plain(layer.below, indent + "  ")
    return lines
