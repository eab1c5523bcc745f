"""``measure``: the bytes that a new image takes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ...errors import VmError
from .common import Failure, Tool, reason

if TYPE_CHECKING:
    from ...block.node import Node

LONG = {
    "help": "h",
    "image-opts": "image-opts",
    "object:": "object",
    "output:": "output",
    "size:": "size",
    "force-share": "U",
}


def run(args: list[str], tool: Tool) -> int:
    """``measure [-O FMT] [-o OPTIONS] (--size N | [-f FMT] [-l SNAPSHOT] FILE)``."""
    format, target, image_opts, share, json, snapshot, size = None, "raw", False, False, False, "", -1
    texts: list[str] = []
    from .convert import snapshot_names
    from .createopts import check_list

    options = tool.options(args, "hf:l:o:O:U", LONG)
    for key, value in options:
        match key:
            case "f":
                format = value
            case "l":
                snapshot = value
                snapshot_names(tool, value)
            case "o":
                texts.append(check_list(value))
            case "O":
                target = value
            case "U":
                share = True
            case "object":
                tool.add_object(value)
            case "image-opts":
                image_opts = True
            case "output":
                json = tool.output(value)
            case "size":
                size = tool.size(value, "image size")
    if len(options.rest) > 1:
        raise Failure("At most one filename argument is allowed.")
    name = options.rest[0] if options.rest else None
    if name is None and (image_opts or format or snapshot):
        raise Failure("--image-opts, -f, and -l require a filename argument.")
    if name is None and size < 0:
        raise Failure("Either --size N or one filename must be specified.")
    if name is not None and size >= 0:
        raise Failure("--size N cannot be used together with a filename.")
    with ExitStack() as stack:
        source: Node | None = None
        if name is not None:
            source = stack.enter_context(tool.open(name, image_opts=image_opts, format=format, share=share))
            if snapshot:
                from .convert import load_snapshot

                load_snapshot(tool, [source], snapshot)
            size = source.size
        found = _measure(tool, target, texts, size, source)
    if json:
        tool.json(found)
    else:
        print(f"required size: {found['required']}")
        print(f"fully allocated size: {found['fully-allocated']}")
        if "bitmaps" in found:
            print(f"bitmaps size: {found['bitmaps']}")
    return 0


def _measure(tool: Tool, format: str, texts: list[str], size: int, source: Node | None) -> dict[str, int]:
    from ...block.jobs.measure import measure
    from .createopts import find_format

    driver = find_format(tool, format)
    if "measure" not in driver.capabilities:
        raise Failure(f"Block driver '{format}' does not support size measurement")
    from ...options import split

    given: dict[str, Any] = {}
    for text in texts:
        given.update(split(text))
    from ...block.create import create_options
    from ...plugins import find

    # As when an image is made in a file; what only the file would take changes no size.
    options = create_options(driver, find("protocol", "file"))
    known = {option.name for option in options}
    own = {option.name for option in driver.create_options}
    for name in given:
        if name not in known:
            tool.error(f"Invalid parameter '{name}'")
            raise Failure(f"Invalid options for file format '{format}'")
    from ...options import typed

    try:
        values = typed(given, options, f"Format driver '{format}'")
        return measure(driver, size, source, {name: value for name, value in values.items() if name in own})
    except (VmError, OSError) as error:
        raise Failure(reason(error)) from error
