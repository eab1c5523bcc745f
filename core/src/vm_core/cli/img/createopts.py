"""``-o`` of the commands that make images: create options by name, checked against the format's descriptor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import PluginError
from ...options import split
from .common import Exit, Failure, Tool


def find_format(tool: Tool, name: str) -> Any:
    """The descriptor of the format *name*. Raises Failure with the peer's sentence."""
    from ...plugins import find

    try:
        return find("format", name)
    except PluginError as error:
        tool.error(f"Unknown file format '{name}'")
        tool.hint(str(error))
        raise Exit(1) from None


def parse_options(
    tool: Tool,
    format: str,
    target: str,
    texts: Sequence[str],
    *,
    backing: str = "",
    backing_format: str = "",
) -> dict[str, Any]:
    """The create options that *texts* (each an argument of ``-o``), ``-b`` and ``-F`` name. Raises Failure."""
    driver = find_format(tool, format)
    if "create" not in driver.capabilities:
        raise Failure(f"Format driver '{format}' does not support image creation")
    known = {option.name for option in driver.create_options}
    options: dict[str, Any] = {}
    for text in texts:
        if not text or text.startswith(",") or (text.endswith(",") and not text.endswith(",,")):
            raise Failure(f"Invalid option list: {text}")
        options.update(split(text))
    for name in options:
        if name not in known and name != "size":
            raise Failure(f"Invalid parameter '{name}'")
    if backing:
        if "backing_file" not in known:
            raise Failure(f"Backing file not supported for file format '{format}'")
        options["backing_file"] = backing
    if backing_format:
        if "backing_fmt" not in known:
            raise Failure(f"Backing format not supported for file format '{format}'")
        options["backing_fmt"] = backing_format
    return options


def show_options(tool: Tool, format: str, target: str | None) -> None:
    """``-o help``."""
    driver = find_format(tool, format)
    print(f"Supported {format} options:" if target is None else "Supported options:")
    for option in sorted(driver.create_options, key=lambda one: one.name):
        word = {"size": "size", "bool": "bool (on/off)", "int": "num"}.get(option.type, "str")
        print(f"  {option.name + '=<' + word + '>':<23}- {option.help}")
    raise Exit(0)



