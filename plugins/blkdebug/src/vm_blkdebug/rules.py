"""Rules: what happens at an event, in which state. Their attributes are those of QEMU's QAPI types
*BlkdebugInjectErrorOptions* and *BlkdebugSetStateOptions*."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from vm_core.errors import ImageError

#: What format drivers and the node itself announce (QAPI: *BlkdebugEvent*). ``none`` comes once, when it is opened.
_EVENT_NAMES = """
    l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update l2_update_compressed
    l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio read_compressed write_aio write_compressed vmstate_load
    vmstate_save cow_read cow_write reftable_load reftable_grow reftable_update refblock_load refblock_update
    refblock_update_part refblock_alloc refblock_alloc_hookup refblock_alloc_write refblock_alloc_write_blocks
    refblock_alloc_write_table refblock_alloc_switch_table cluster_alloc cluster_alloc_bytes cluster_free flush_to_os
    flush_to_disk pwritev_rmw_head pwritev_rmw_after_head pwritev_rmw_tail pwritev_rmw_after_tail pwritev pwritev_zero
    pwritev_done empty_image_prepare l1_shrink_write_table l1_shrink_free_l2_clusters cor_write cluster_alloc_space none
"""
EVENTS = frozenset(_EVENT_NAMES.split())

#: Kinds of requests (QAPI: *BlkdebugIOType*).
READ, WRITE, WRITE_ZEROES, DISCARD, FLUSH, BLOCK_STATUS = (
    "read",
    "write",
    "write-zeroes",
    "discard",
    "flush",
    "block-status",
)
IO_TYPES = (READ, WRITE, WRITE_ZEROES, DISCARD, FLUSH, BLOCK_STATUS)
#: Those that fail where a rule does not say which.
USUAL = frozenset(IO_TYPES) - {BLOCK_STATUS}

SECTOR = 512

#: Attribute → how it is written.
_INJECT = {
    "event": "str",
    "state": "number",
    "iotype": "str",
    "errno": "number",
    "sector": "number",
    "once": "switch",
    "immediately": "switch",
}
_SET_STATE = {"event": "str", "state": "number", "new_state": "number"}
SECTIONS: dict[str, dict[str, str]] = {"inject-error": _INJECT, "set-state": _SET_STATE}


class Rule:
    """One rule. *state* 0 is any."""

    __slots__ = ("event", "state")

    def __init__(self, event: str, state: int = 0) -> None:
        self.event = event
        self.state = state


class InjectError(Rule):
    """The next request of one of *kinds* that touches *offset* (-1: any) fails with *code*; only one if *once*.

    Whether a request fails before or after it was put on its way (*immediately*) makes no difference to callers that
    wait for it.
    """

    __slots__ = ("code", "immediately", "kinds", "offset", "once")

    def __init__(
        self,
        event: str,
        state: int = 0,
        code: int = errno.EIO,
        *,
        kinds: frozenset[str] = USUAL,
        offset: int = -1,
        once: bool = False,
        immediately: bool = False,
    ) -> None:
        super().__init__(event, state)
        self.code = code
        self.kinds = kinds
        self.offset = offset
        self.once = once
        self.immediately = immediately

    def hits(self, kind: str, offset: int, length: int) -> bool:
        """Whether a request fails."""
        if kind not in self.kinds:
            return False
        return self.offset < 0 or offset <= self.offset < offset + max(length, 1)


class SetState(Rule):
    """Another state."""

    __slots__ = ("new",)

    def __init__(self, event: str, state: int, new: int) -> None:
        super().__init__(event, state)
        self.new = new


class Suspend(Rule):
    """A breakpoint: stop the request, and call it *tag*."""

    __slots__ = ("tag",)

    def __init__(self, event: str, tag: str) -> None:
        super().__init__(event)
        self.tag = tag


def make(section: str, values: Mapping[str, Any]) -> Rule:
    """The rule that *values* of a *section* describe. Raises ImageError."""
    known = SECTIONS[section]
    parsed = {name: _parse(name, values[name], shape) for name, shape in known.items() if name in values}
    event = parsed.get("event")
    if event is None:
        raise ImageError("", "Missing event name for rule")
    if event not in EVENTS:
        raise ImageError("", f"invalid parameter value: {event}")
    state = parsed.get("state", 0)
    if section == "set-state":
        return SetState(event, state, parsed.get("new_state", 0))
    kind = parsed.get("iotype")
    if kind is not None and kind not in IO_TYPES:
        raise ImageError("", f"invalid parameter value: {kind}")
    sector = parsed.get("sector", -1)
    return InjectError(
        event,
        state,
        parsed.get("errno", errno.EIO),
        kinds=USUAL if kind is None else frozenset({kind}),
        offset=-1 if sector == -1 else sector * SECTOR,
        once=parsed.get("once", False),
        immediately=parsed.get("immediately", False),
    )


def _parse(name: str, value: Any, shape: str) -> Any:
    if shape == "switch":
        if isinstance(value, bool):
            return value
        if value in ("on", "yes", "true", "y"):
            return True
        if value in ("off", "no", "false", "n"):
            return False
        raise ImageError("", f"Parameter '{name}' expects 'on' or 'off'")
    if shape == "number":
        try:
            number = value if isinstance(value, int) else int(str(value), 0)
        except ValueError:
            raise ImageError("", f"Parameter '{name}' expects a number") from None
        # A sector of -1, in whichever way it is written, is every sector.
        return -1 if number == (1 << 64) - 1 else number
    return str(value)
