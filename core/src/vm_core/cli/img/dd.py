"""``dd``: copy a part of an image, block by block."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...errors import VmError
from .common import Failure, Tool, need_medium, reason

if TYPE_CHECKING:
    from ...descriptors import Descriptor

LONG = {"help": "h", "object:": "object", "image-opts": "image-opts", "force-share": "U"}

INT_MAX = (1 << 31) - 1


def run(args: list[str], tool: Tool) -> int:
    """``dd [-f FMT] [-O FMT] [bs=N] [count=N] [skip=N] [isize=N] if=FILE of=FILE``."""
    format, target_format, image_opts, share = None, "raw", False, False
    options = tool.options(args, "hf:O:U", LONG)
    for key, value in options:
        match key:
            case "f":
                format = value
            case "O":
                target_format = value
            case "U":
                share = True
            case "object":
                tool.add_object(value)
            case "image-opts":
                image_opts = True
    words: dict[str, str] = {}
    block, count, skip, source_size = 512, -1, 0, -1
    for word in options.rest:
        key, equals, value = word.partition("=")
        if not equals or (key not in ("bs", "count", "if", "of", "skip") and (tool.peer or key != "isize")):
            raise Failure(f"unrecognized operand {key}")
        words[key] = value
        match key:
            case "bs":
                block = tool.size(value, "bs", 1, INT_MAX)
            case "count":
                count = tool.size(value, "count")
            case "skip":
                skip = tool.size(value, "skip")
            case "isize":
                source_size = tool.size(value, "isize")
    if "if" not in words or "of" not in words:
        raise Failure("Must specify both input and output files")
    with ExitStack() as stack:
        source = stack.enter_context(tool.open(words["if"], image_opts=image_opts, format=format, share=share))
        driver = _driver(target_format)
        if "create" not in driver.capabilities:
            raise Failure(f"Format driver '{target_format}' does not support image creation")
        need_medium(source, f"Failed to get size for '{words['if']}'", why=False)
        size = source.size if source_size < 0 else min(source_size, source.size)
        if count >= 0:
            size = min(size, count * block)  # as the peer has it: blocks that are skipped count
        start = skip * block
        beyond = start > size
        length = 0 if beyond else size - start
        fresh = stack.enter_context(tool.target(words["of"]))
        from ...block.jobs.dd import dd
        from ...block.open import create_image

        try:
            create_image(words["of"], target_format, length, {})
        except (VmError, OSError) as error:
            raise Failure(f"{words['of']}: error while creating output image: {reason(error)}") from error
        fresh.begun = True
        fresh.kept = tool.peer  # which leaves what it could not finish
        target = stack.enter_context(tool.open(words["of"], format=target_format, write=True))
        if beyond:
            tool.error(f"{words['if']}: cannot skip to specified offset")
            return 0
        dd(source, target, start, length)
    return 0


def _driver(name: str) -> Descriptor:
    from ...errors import PluginError
    from ...plugins import find

    try:
        return find("format", name)
    except PluginError:
        raise Failure("Unknown file format") from None
