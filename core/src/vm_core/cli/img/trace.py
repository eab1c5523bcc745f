"""``-T``/``--trace``: there are no trace points here, which is what the peer says of a pattern that names none."""

from __future__ import annotations

from ...options import split
from .common import Exit, Tool


def accept(tool: Tool, text: str) -> None:
    """Take the argument of ``-T``. Files that would hold events are refused, patterns are told to match nothing."""
    options = split(text, "enable")
    pattern = options.pop("enable", None)
    if pattern in ("help", "?"):
        raise Exit(0)
    if options:
        tool.error(f"--trace: there are no trace events here, so {min(options)}={options[min(options)]} has no use")
        raise Exit(1)
    if pattern is not None and not any(each in pattern for each in "*?["):
        tool.warn(f"trace event '{pattern.removeprefix('-')}' does not exist")
