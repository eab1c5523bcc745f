"""``snapshot``: the snapshots inside an image."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ...errors import UsageError, VmError
from .common import Failure, Tool, reason

if TYPE_CHECKING:
    from ...block.node import Node

_LONG = {"help": "h", "object:": "object", "image-opts": "image-opts", "force-share": "U"}

_VERBS = {"c": "create", "a": "apply", "d": "delete"}


def run(args: list[str], tool: Tool) -> int:
    """``snapshot [-q] [-U] [-l | -a SNAPSHOT | -c SNAPSHOT | -d SNAPSHOT] FILE``."""
    action, name, image_opts, share = "", "", False, False
    options = tool.options(args, "la:c:d:hqU", _LONG)
    for key, value in options:
        if key in ("l", "a", "c", "d"):
            if action:
                tool.usage("Cannot mix '-l', '-a', '-c', '-d'")
            action, name = key, value
        elif key == "q":
            tool.quiet = True
        elif key == "U":
            share = True
        elif key == "object":
            tool.add_object(value)
        elif key == "image-opts":
            image_opts = True
    if len(options.rest) != 1:
        tool.usage("Expecting one image file name")
    write = action in _VERBS
    with tool.open(options.rest[0], image_opts=image_opts, write=write, share=share) as node:
        if action == "l":
            _list(node)
        elif write:
            with tool.telling():
                _change(node, action, name)
    return 0


def _list(node: Node) -> None:
    from ...block.formatnode import FormatNode
    from .info import snapshot_table

    found = list(node.format.snapshots()) if isinstance(node, FormatNode) else []
    if found:
        sys.stdout.write("\n".join(snapshot_table(found)) + "\n")


def _change(node: Node, action: str, name: str) -> None:
    from ...block.formatnode import FormatNode
    from ...plugins import find

    what = f"Could not {_VERBS[action]} snapshot '{name}': "
    if not isinstance(node, FormatNode) or "snapshots" not in find("format", node.driver).capabilities:
        raise Failure(
            what
            + {
                "c": "-95 (Operation not supported)",
                "a": "Block driver does not support snapshots",
                "d": "snapshot not found",
            }[action]
        )
    try:
        with node.quiesce() as format:
            if action == "c":
                format.snapshot_create(name)
            elif action == "a":
                format.snapshot_apply(name)
            else:
                known: Any = format.snapshots()
                if not any(name in (one["id"], one["name"]) for one in known):
                    raise Failure(what + "snapshot not found")
                format.snapshot_delete(name)
        node.flush()
    except Failure:
        raise
    except UsageError as error:
        raise Failure(what + reason(error)) from error
    except (VmError, OSError) as error:
        code = getattr(error, "errno", None)
        raise Failure(what + (f"-{code} ({reason(error)})" if action == "c" and code else reason(error))) from error
