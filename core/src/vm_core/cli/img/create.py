"""``create``: a new image."""

from __future__ import annotations

import sys

from ...errors import VmError
from .common import Exit, Failure, OpenFailure, Tool, reason
from .createopts import check_list, show_options, wants_help

_LONG = {"help": "h", "object:": "object"}


def run(args: list[str], tool: Tool) -> int:
    """``create [-q] [-f FMT] [-b FILE [-F FMT]] [-u] [-o OPTIONS] FILE [SIZE]``."""
    format, backing, backing_format, unsafe = "raw", None, None, False
    texts: list[str] = []
    options = tool.options(args, "F:b:f:ho:qu", _LONG)
    for key, value in options:
        if key == "F":
            backing_format = value
        elif key == "b":
            backing = value
        elif key == "f":
            format = value
        elif key == "o":
            texts.append(check_list(value))
        elif key == "q":
            tool.quiet = True
        elif key == "u":
            unsafe = True
        elif key == "object":
            tool.add_object(value)
    names = options.rest
    filename = names[0] if names else None
    if wants_help(texts):
        show_options(tool, format, filename)
    if filename is None:
        tool.usage("Expecting image file name")
    size = None
    if len(names) > 1:
        size = tool.size(names[1], "image size")
    if len(names) > 2:
        tool.usage(f"Unexpected argument: {names[2]}")
    _create(tool, filename, format, size, texts, backing, backing_format, unsafe)
    return 0


def _create(
    tool: Tool,
    filename: str,
    format: str,
    size: int | None,
    texts: list[str],
    backing: str | None,
    backing_format: str | None,
    unsafe: bool,
) -> None:
    from ...block.create import MissingBackingFormatError, prepare
    from ...options import split

    try:
        given = {name: value for text in texts for name, value in split(text).items()}
        if size is not None and "size" in given:
            raise Failure("The image size must be specified only once")
        new = prepare(
            filename,
            format,
            size,
            given,
            backing=backing,
            backing_format=backing_format,
            check_backing=not unsafe,
            gate=tool.gate(),
            peer=tool.peer,
        )
        tool.say(f"Formatting '{filename}', {new.describe()}")
        sys.stdout.flush()
        with tool.target(filename) as made:
            made.kept = True
            new.create()
    except MissingBackingFormatError as error:
        # The peer's second line has no end.
        tool.error(f"{filename}: {reason(error)}", end="" if tool.peer else "\n")
        tool.hint("name the backing file's format: -F FORMAT")
        raise Exit(1) from None
    except (VmError, OSError) as error:
        raise OpenFailure(f"{filename}: {reason(error)}", error) from error
