"""``amend``: change the options of an image that is there."""

from __future__ import annotations

from typing import Any

from ...errors import UsageError, VmError
from ...options import convert, split
from .common import Failure, Tool, reason
from .createopts import check_list, find_format, show_amend_options, wants_help

_LONG = {"help": "h", "object:": "object", "image-opts": "image-opts", "force": "force"}


def run(args: list[str], tool: Tool) -> int:
    """``amend [-p] [-q] [-f FMT] [-t CACHE] [--force] -o OPTIONS FILE``."""
    format, image_opts, force, cache, progress = None, False, False, "writeback", False
    texts: list[str] = []
    options = tool.options(args, "ho:f:t:pq", _LONG)
    for key, value in options:
        if key == "o":
            texts.append(check_list(value))
        elif key == "f":
            format = value
        elif key == "t":
            cache = value
        elif key == "p":
            progress = True
        elif key == "q":
            tool.quiet = True
        elif key == "object":
            tool.add_object(value)
        elif key == "image-opts":
            image_opts = True
        elif key == "force":
            force = True
    if not texts:
        tool.usage("Must specify options (-o)")
    if tool.quiet:
        progress = False
    names = options.rest
    if format is not None and wants_help(texts):
        show_amend_options(tool, format)
    if len(names) != 1:
        raise Failure("Expecting one image file name")
    mode = tool.cache(cache)
    with (
        tool.progress(progress) as report,
        tool.open(names[0], image_opts=image_opts, format=format, write=True, cache=mode) as node,
        tool.telling(),
    ):
        if wants_help(texts):
            show_amend_options(tool, node.driver)
        descriptor = find_format(tool, node.driver)
        known = getattr(descriptor, "amend_options", ())
        if not known:
            raise Failure(f"Format driver '{node.driver}' does not support option amendment")
        values = _values(texts, descriptor, known)
        from ...block.formatnode import FormatNode

        assert isinstance(node, FormatNode)
        try:
            node.amend(values, force=force, progress=report)
            node.flush()
        except (VmError, OSError) as error:
            raise Failure(reason(error)) from error
    return 0


def _values(texts: list[str], descriptor: Any, known: Any) -> dict[str, Any]:
    """The options typed. Raises Failure."""
    options = {option.name: option for option in known}
    values: dict[str, Any] = {}
    for text in texts:
        for name, value in split(text).items():
            option = options.get(name)
            if option is None:
                later = ""
                if any(name == other.name for other in descriptor.create_options):
                    later = "\nThis option is only supported for image creation"
                raise Failure(f"Invalid parameter '{name}'{later}")
            try:
                values[name] = value if option.type == "enum" else convert(value, option, "amend")
            except UsageError as error:
                raise Failure(reason(error)) from error
    return values
