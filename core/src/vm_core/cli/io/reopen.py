"""The command ``reopen``: another cache mode, read-only or not, and changed options of the image and its children."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...errors import UsageError, VmError
from ..getopt import UNKNOWN, LibraryGetopt
from ..img.common import reason
from .commands import usage
from .session import parse_cache, parse_options

if TYPE_CHECKING:
    from ...block.cache import CacheMode
    from ...block.node import Node
    from .session import Session

_TRUE, _FALSE = ("on", "yes", "true", "y"), ("off", "no", "false", "n")
_DISCARD = {"ignore": False, "off": False, "unmap": True, "on": True}
_DETECT = ("off", "on", "unmap")
_CACHE = ("cache.direct", "cache.no-flush")


class Change:
    """What is to become of one node. Everything is checked before anything is changed."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.readonly: bool | None = None
        self.discard: bool | None = None
        self.detect: str | None = None
        self.direct: bool | None = None
        self.no_flush: bool | None = None
        self.driver: dict[str, Any] = {}


def run(session: Session, words: Sequence[str]) -> int:
    """``reopen``. Returns 1 where it failed."""
    tool = session.tool
    readonly: bool | None = None
    cache: CacheMode | None = None
    options: dict[str, str] = {}
    given = False
    scan = LibraryGetopt(words, "c:o:rw")
    for key, value in scan:
        if key == UNKNOWN:
            return usage(session, words)
        if key == "c":
            cache = parse_cache(value)
            if cache is None:
                tool.error(f"Invalid cache option: {value}")
                return 1
        elif key == "o":
            if given:
                return usage(session, words)
            given = True
            options = parse_options(value, tool)
        elif readonly is not None:
            tool.error("Only one -r/-w option may be given")
            return 1
        else:
            readonly = key == "r"
    if scan.rest:
        return usage(session, words)
    if session.busy:
        session.queue.flush()
    try:
        _reopen(session, readonly, cache, options)
    except (VmError, OSError) as error:
        tool.error(reason(error))
        return 1
    return 0


def _reopen(session: Session, readonly: bool | None, cache: CacheMode | None, options: dict[str, str]) -> None:
    if readonly is not None and "read-only" in options:
        raise UsageError("Cannot set both -r/-w and 'read-only'")
    if cache is not None and any(key in options for key in _CACHE):
        raise UsageError("Cannot set both -c and the cache options")
    top = session.image
    changes: dict[int, Change] = {id(top): Change(top)}
    _plan(top, options, changes, "")
    change = changes[id(top)]
    if readonly is not None:
        change.readonly = readonly
    elif change.readonly and not top.readonly:
        raise UsageError(f"Read-only block node '{top.node_name}' cannot support read-write users")
    if change.readonly and session.how.copy_on_read:
        raise UsageError(f"Can't set node '{top.node_name}' to r/o with copy-on-read enabled")
    if cache is not None:
        change.direct, change.no_flush = cache.direct, cache.no_flush
    for each in changes.values():
        _apply(each)
    if cache is not None:
        session.writethrough = cache.writethrough
    how = session.how
    session.how = how._replace(
        direct=how.direct if change.direct is None else change.direct,
        no_flush=how.no_flush if change.no_flush is None else change.no_flush,
    )


def _plan(node: Node, options: dict[str, str], changes: dict[int, Change], path: str) -> None:
    """Sort *options* of *node* and of its children into *changes*. Raises UsageError."""
    change = changes.setdefault(id(node), Change(node))
    children = node.children()
    below: dict[str, dict[str, str]] = {}
    for key, value in options.items():
        role, dot, rest = key.partition(".")
        if dot and role in children:
            below.setdefault(role, {})[rest] = value
        elif key in children:
            if value != children[key].node_name:
                raise UsageError(f"Cannot find device='' nor node-name='{value}'")
        else:
            _sort(change, key, value)
    unmap = getattr(node, "discard_unmap", True) if change.discard is None else change.discard
    if change.detect == "unmap" and not unmap:
        raise UsageError("setting detect-zeroes to unmap is not allowed without setting discard operation to unmap")
    for role, rest_options in below.items():
        _plan(children[role], rest_options, changes, f"{path}{role}.")


def _sort(change: Change, key: str, value: str) -> None:
    """One option of a node."""
    node = change.node
    if key == "read-only":
        change.readonly = _switch(key, value)
    elif key == "cache.direct":
        change.direct = _switch(key, value)
    elif key == "cache.no-flush":
        change.no_flush = _switch(key, value)
    elif key == "auto-read-only":
        if _switch(key, value) and not node.readonly:
            return
    elif key == "discard":
        if value not in _DISCARD:
            raise UsageError("Invalid discard option")
        change.discard = _DISCARD[value]
    elif key == "detect-zeroes":
        if value not in _DETECT:
            raise UsageError(f"invalid parameter value: {value}")
        change.detect = value
    elif key in ("driver", "node-name", "filename"):
        now = {"driver": node.driver, "node-name": node.node_name, "filename": node.filename}[key]
        if value != now:
            raise UsageError(f"Cannot change the option '{key}'")
    else:
        option = next((option for option in _driver_options(node) if option.name == key), None)
        if option is None:
            raise UsageError(f"Cannot change the option '{key}'")
        if option.type == "bool":
            change.driver[key] = _switch(key, value)
        else:
            change.driver[key] = value


def _switch(key: str, value: str) -> bool:
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise UsageError(f"Parameter '{key}' expects 'on' or 'off'")


def _driver_options(node: Node) -> Sequence[Any]:
    """The options that the node's driver can change while it is open."""
    from ...block.formatnode import FormatNode
    from ...block.raw import RawNode
    from ...plugins import find

    return find("format", node.driver).options if isinstance(node, FormatNode | RawNode) else ()


def _apply(change: Change) -> None:
    from ...block.file import FileProtocol
    from ...block.formatnode import FormatNode
    from ...block.imagenode import ImageNode
    from ...block.raw import RawNode

    node = change.node
    if change.direct is not None or change.no_flush is not None:
        for each in _stack(node):
            if isinstance(each, FileProtocol):
                each.recache(
                    direct=each.direct if change.direct is None else change.direct,
                    no_flush=each.no_flush if change.no_flush is None else change.no_flush,
                )
    if change.readonly is not None and change.readonly != node.readonly:
        node.reopen(readonly=change.readonly)
    if isinstance(node, ImageNode):
        if change.discard is not None:
            node.discard_unmap = change.discard
        if change.detect is not None:
            node.detect_zeroes = change.detect
    if change.driver:
        assert isinstance(node, FormatNode | RawNode)
        node.reconfigure(change.driver)


def _stack(node: Node) -> list[Node]:
    """*node* and the nodes that store it, without its backing images."""
    found = [node]
    for one in found:
        found.extend(child for role, child in one.children().items() if role != "backing")
    return found
