"""``bitmap``: the dirty bitmaps kept in an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import VmError
from .common import Failure, Tool, reason

if TYPE_CHECKING:
    from ...block.node import Node

_LONG = {
    "help": "h",
    "add": "add",
    "remove": "remove",
    "clear": "clear",
    "enable": "enable",
    "disable": "disable",
    "merge:": "merge",
    "granularity:": "g",
    "source-file:": "b",
    "source-format:": "F",
    "object:": "object",
    "image-opts": "image-opts",
}

_ACTIONS = ("add", "remove", "clear", "enable", "disable", "merge")


def run(args: list[str], tool: Tool) -> int:
    """``bitmap (--merge SOURCE | --add | …)… [-b FILE [-F FMT]] [-g GRANULARITY] [-f FMT] FILE BITMAP``."""
    format, image_opts, source, source_format, granularity = None, False, None, None, 0
    actions: list[tuple[str, str]] = []
    options = tool.options(args, "b:f:F:g:h", _LONG)
    for key, value in options:
        if key in _ACTIONS:
            actions.append((key, value))
        elif key == "b":
            source = value
        elif key == "f":
            format = value
        elif key == "F":
            source_format = value
        elif key == "g":
            granularity = tool.size(value, "granularity")
        elif key == "object":
            tool.add_object(value)
        elif key == "image-opts":
            image_opts = True
    if len(options.rest) != 2 and actions:
        raise Failure("Expecting filename and bitmap name")
    names = [action for action, _ in actions]
    if not names:
        raise Failure("Need at least one of --add, --remove, --clear, --enable, --disable, or --merge")
    if granularity and "add" not in names:
        raise Failure("granularity only supported with --add")
    if source_format is not None and source is None:
        raise Failure("-F only supported with -b")
    if source is not None and "merge" not in names:
        raise Failure("Merge bitmap source file only supported with --merge")
    filename, bitmap = options.rest
    with tool.open(filename, image_opts=image_opts, format=format, write=True, backing=False) as node:
        if source is None:
            _run(node, node, bitmap, granularity, actions)
        else:
            with tool.open(source, format=source_format, backing=False) as other:
                _run(node, other, bitmap, granularity, actions)
        node.flush()
    return 0


def _run(node: Node, source: Node, bitmap: str, granularity: int, actions: list[tuple[str, str]]) -> None:
    for action, argument in actions:
        try:
            _act(node, source, bitmap, granularity, action, argument)
        except (VmError, OSError) as error:
            raise Failure(f"Operation {action} on bitmap {bitmap} failed: {reason(error)}") from error


def _act(node: Node, source: Node, bitmap: str, granularity: int, action: str, argument: str) -> None:
    from ...block.formatnode import FormatNode

    if action == "add":
        if not bitmap:
            raise Failure("Bitmap name cannot be empty")
        if granularity and (granularity < 512 or granularity > 1 << 31 or granularity & granularity - 1):
            raise Failure("Granularity must be power of 2 and at least 512")
    if not isinstance(node, FormatNode) or not _has_bitmaps(node):
        if action == "add":
            raise Failure(f"Can't store persistent bitmaps to {node.node_name}: Operation not supported")
        raise Failure(f"Dirty bitmap '{bitmap}' not found")
    known = {one["name"] for one in node.format.bitmaps()}
    if action == "add":
        if bitmap in known:
            raise Failure(f"Bitmap already exists: {bitmap}")
    elif bitmap not in known:
        raise Failure(f"Dirty bitmap '{bitmap}' not found")
    if action == "merge":
        if not isinstance(source, FormatNode) or argument not in {one["name"] for one in source.format.bitmaps()}:
            raise Failure(f"Dirty bitmap '{argument}' not found")
        with source.quiesce() as other:
            width, bits = other.bitmap_load(argument)
        with node.quiesce() as format:
            format.bitmap_merge(bitmap, width, bits)
        return
    with node.quiesce() as format:
        if action == "add":
            try:
                format.bitmap_add(bitmap, granularity or None)
            except VmError as error:
                raise Failure(
                    f"Can't make bitmap '{bitmap}' persistent in '{node.node_name}': {reason(error)}"
                ) from error
        elif action == "remove":
            format.bitmap_remove(bitmap)
        elif action == "clear":
            format.bitmap_clear(bitmap)
        else:
            format.bitmap_enable(bitmap, enabled=action == "enable")


def _has_bitmaps(node: Node) -> bool:
    from ...plugins import find

    return "bitmaps" in find("format", node.driver).capabilities
