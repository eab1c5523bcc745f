"""``resize``: a larger or smaller image."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import VmError
from .common import Failure, Tool, need_medium, reason

if TYPE_CHECKING:
    from ...block.node import Node

_LONG = {
    "help": "h",
    "object:": "object",
    "image-opts": "image-opts",
    "preallocation:": "preallocation",
    "shrink": "shrink",
}

_PREALLOCATION = ("off", "metadata", "falloc", "full")


def run(args: list[str], tool: Tool) -> int:
    """``resize [-f FMT] [--preallocation=MODE] [-q] [--shrink] FILE [+|-]SIZE``."""
    # The size is the last word and may begin with a minus: it is taken away before the options are read.
    if len(args) < 2:
        if args and args[0] in ("-h", "--help"):
            list(tool.options(args, "h", {"help": "h"}))
        tool.usage("Not enough arguments")
    args, text = args[:-1], args[-1]
    format, image_opts, shrink, preallocation = None, False, False, "off"
    options = tool.options(args, "f:hq", _LONG)
    for key, value in options:
        if key == "f":
            format = value
        elif key == "q":
            tool.quiet = True
        elif key == "object":
            tool.add_object(value)
        elif key == "image-opts":
            image_opts = True
        elif key == "preallocation":
            if value not in _PREALLOCATION:
                raise Failure(f"Invalid preallocation mode '{value}'")
            preallocation = value
        elif key == "shrink":
            shrink = True
    if len(options.rest) != 1:
        tool.usage("Expecting image file name and size")
    sign = text[:1] if text[:1] in ("+", "-") else ""
    amount = _amount(text[len(sign) :])
    with tool.open(options.rest[0], image_opts=image_opts, format=format, write=True) as node, tool.telling():
        _resize(tool, node, sign, amount, preallocation, shrink)
    return 0


def _amount(text: str) -> int:
    from ...sizes import NotANumberError, OutOfRangeError, parse

    try:
        return parse(text)
    except NotANumberError:
        raise Failure(
            "Parameter 'size' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively."
        ) from None
    except OutOfRangeError:
        raise Failure(f"Value '{text}' is out of range for parameter 'size'") from None


def _resize(tool: Tool, node: Node, sign: str, amount: int, preallocation: str, shrink: bool) -> None:
    need_medium(node, "Failed to inquire current image length")
    from ...block.node import sectors_up

    current = sectors_up(node.size)
    total = current + amount if sign == "+" else current - amount if sign == "-" else amount
    if not 0 < total < 1 << 63:
        raise Failure("New image size must be positive")
    if total <= current and preallocation != "off":
        raise Failure("Preallocation can only be used for growing images")
    if total < current and not shrink:
        tool.error("Use the --shrink option to perform a shrink operation.")
        tool.warn(
            "Shrinking an image will delete all data beyond the shrunken image's end. Before performing such an "
            "operation, make sure there is no important data there."
        )
        from .common import Exit

        raise Exit(1)
    from ...block.resize import NOT_RESIZABLE, grow_allocated, on_device, resizable

    if not resizable(node):
        raise Failure(NOT_RESIZABLE)
    if preallocation == "off" and total != current and on_device(node):
        raise Failure("Cannot resize device files")
    try:
        if preallocation != "off":
            grow_allocated(node, total, preallocation)
        else:
            node.truncate(total)
        node.flush()
    except (VmError, OSError) as error:
        raise Failure(reason(error)) from error
    tool.say("Image resized.")
