"""``-o``: options by name, checked against the format's descriptor, and listed by ``-o help``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import PluginError, VmError
from ...options import pieces, split
from .common import Exit, Failure, Tool, reason

if TYPE_CHECKING:
    from ...descriptors import Option

_HELP = ("help", "?")
#: The width that an option and its type are padded to.
_WIDTH = 22
_SHAPES = {"size": "size", "bool": "bool (on/off)", "int": "num"}


def find_format(tool: Tool, name: str, wanted: str = "image creation") -> Any:
    """The descriptor of the format *name*, *wanted* for something. Ends the run in the peer's words without one."""
    from ...plugins import find

    try:
        return find("format", name)
    except PluginError as error:
        try:
            return find("protocol", name)
        except PluginError:
            from ...known_drivers import READ_ONLY_FORMATS

            if name in READ_ONLY_FORMATS:
                raise Failure(f"Format driver '{name}' does not support {wanted}") from None
            tool.error(f"Unknown file format '{name}'")
            tool.hint(creatable(error))
            raise Exit(1) from None


def creatable(error: PluginError) -> str:
    """What the *error* of a format that is not there says, with those that can be made in place of all there are."""
    from ...plugins import drivers

    told, separator, _ = str(error).partition("; there is: ")
    names = sorted(one.name for one in drivers("format") if "create" in one.capabilities)
    return f"{told}{separator}{', '.join(names)}" if separator else told


def check_list(text: str) -> str:
    """One argument of ``-o``. Raises Failure where commas stand at its ends."""
    if not text or text.startswith(",") or _ends_open(text):
        raise Failure(f"Invalid option list: {text}")
    return text


def _ends_open(text: str) -> bool:
    commas = len(text) - len(text.rstrip(","))
    return commas % 2 == 1


def wants_help(texts: Sequence[str]) -> bool:
    """Whether ``help`` or ``?`` is among the options."""
    return any(piece in _HELP for text in texts for piece in pieces(text))


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
    known = {option.name for option in _create_options(tool, format, target)}
    options: dict[str, Any] = {}
    for text in texts:
        options.update(split(check_list(text)))
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


def _create_options(tool: Tool, format: str, target: str | None) -> list[Option]:
    driver = find_format(tool, format)
    if target is None:
        return [option for option in driver.create_options if not (tool.peer and option.ours)]
    from ...block.create import create_options, find_drivers

    try:
        _, _, protocol, _ = find_drivers(target, format)
    except VmError as error:
        raise Failure(reason(error)) from error
    return create_options(driver, protocol, peer=tool.peer)


def backing_is_ours(format: str) -> bool:
    """Whether the peer can make no images of *format* with a backing file, while this program can."""
    from ...plugins import find

    try:
        driver = find("format", format)
    except PluginError:
        return False
    return any(one.name == "backing_file" and one.ours for one in getattr(driver, "create_options", ()))


def show_options(tool: Tool, format: str, target: str | None) -> None:
    """``-o help``: what can be given when an image of *format* is made at *target* (None: not said). Ends the run."""
    driver = find_format(tool, format)
    if "create" not in driver.capabilities:
        raise Failure(f"Format driver '{format}' does not support image creation")
    options = _create_options(tool, format, target)
    print("Supported options:" if target is not None else f"Supported {format} options:")
    _print(options)
    if target is None:
        print(
            "\nThe protocol level may support further options.\nSpecify the target filename to include those options."
        )
    raise Exit(0)


def show_amend_options(tool: Tool, format: str) -> None:
    """``amend -o help``. Ends the run."""
    driver = find_format(tool, format, "option amendment")
    options = getattr(driver, "amend_options", ())
    if not options:
        raise Failure(f"Format driver '{format}' does not support option amendment")
    print(f"Amend options for '{format}':")
    _print(options)
    raise Exit(0)


def _print(options: Iterable[Option]) -> None:
    for option in sorted(options, key=lambda one: one.name):
        shape = f"{option.name}=<{_SHAPES.get(option.type, 'str')}>"
        sys.stdout.write(f"  {shape:<{_WIDTH}} - {option.help}\n")
