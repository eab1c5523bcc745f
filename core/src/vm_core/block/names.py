"""What an open image is called.

An image that is what its storage's name says is called by that name. Where options made it another image (a window of a
file, a fault injected below it, another backing image), only ``json:`` and all that defines it names it, in the form
that opens it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .filter import Filter
from .node import Node

if TYPE_CHECKING:
    from ..descriptors import Descriptor


def defining(options: dict[str, Any], descriptor: Descriptor | None) -> dict[str, Any]:
    """Those of *options* that make the image another one, with dotted keys."""
    if not options:
        return {}
    known = () if descriptor is None else descriptor.options
    wanted = {option.name for option in known if option.defining}
    if not wanted:
        return {}
    found = flat({key: value for key, value in options.items() if key in wanted})
    found.update({key: value for key, value in flat(options).items() if key in wanted})
    return found


def call(node: Node, driver: str, given: dict[str, Any]) -> None:
    """Name *node*, of *driver*, that was opened with the defining options *given*."""
    full = {"driver": driver, **given}
    children = node.children()
    for role, child in children.items():
        if role != "backing":
            full[role] = child.full_options
    node.full_options = full
    below = children.get("file")
    if isinstance(node, Filter):
        # A filter that has a name of its own form has given it to itself.
        plain = below is not None and node.filename != below.filename
    else:
        plain = not given and below is not None and below.is_protocol and not below.filename.startswith("json:")
    if not plain and below is not None:
        node.filename = json_name(full)


def call_with_backing(node: Node) -> None:
    """Name *node* again: the user put another backing image below it than it records."""
    below = node.backing
    node.full_options = {**node.full_options, "backing": None if below is None else below.full_options}
    node.filename = json_name(node.full_options)


def place_of(node: Node) -> str | None:
    """The file that relative names in the image *node* are relative to; None where no single one is known."""
    while children := node.children():
        below = children.get("file") or children.get("image")
        if below is None:
            return None
        node = below
    return node.filename


def json_name(options: dict[str, Any]) -> str:
    """``json:`` and *options*."""
    from ..jsontext import compact

    return "json:" + compact(options)


def flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """*options* with dotted keys, without nodes."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        if isinstance(value, list):
            value = {str(number): each for number, each in enumerate(value)}
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        elif not isinstance(value, Node):
            found[prefix + key] = value
    return found
