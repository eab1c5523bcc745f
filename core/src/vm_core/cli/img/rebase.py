"""``rebase``: give an image another backing image."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...errors import PluginError, VmError
from .common import Failure, Tool, need_medium, reason

if TYPE_CHECKING:
    from ...block.cache import CacheMode
    from ...block.node import Node

LONG = {"help": "h", "object:": "object", "image-opts": "image-opts", "force-share": "U", "compress": "c"}

#: What a rebase that did not come to its end has left.
_LEFT = "the image has its former backing file and the same contents: the same command goes on"


def run(args: list[str], tool: Tool) -> int:
    """``rebase (-u | -b FILE) [-F FMT] [-f FMT] [-c] [-p] [-t CACHE] [-T CACHE] FILE``."""
    format, backing, backing_format = None, None, None
    cache, source_cache = "writeback", "writeback"
    unsafe = show = image_opts = share = compressed = False
    options = tool.options(args, "hf:F:b:upt:T:qU" if tool.peer else "hf:F:b:upt:T:qUc", LONG)
    for key, value in options:
        match key:
            case "f":
                format = value
            case "F":
                backing_format = value
            case "b":
                backing = value
            case "u":
                unsafe = True
            case "c":
                compressed = True
            case "p":
                show = True
            case "t":
                cache = value
            case "T":
                source_cache = value
            case "q":
                tool.quiet = True
            case "U":
                share = True
            case "object":
                tool.add_object(value)
            case "image-opts":
                image_opts = True
    show = show and not tool.quiet
    if len(options.rest) != 1:
        tool.usage("Expecting one image file name")
    if not unsafe and backing is None:
        tool.usage("Must specify backing file (-b) or use unsafe mode (-u)")
    name = options.rest[0]
    progress = tool.progress(show)
    try:
        mode = tool.cache(cache)
        source_mode = tool.cache(source_cache, source=True)
        with ExitStack() as stack:
            node = stack.enter_context(
                tool.open(
                    name,
                    image_opts=image_opts,
                    format=format,
                    write=True,
                    cache=mode,
                    backing=not unsafe,
                )
            )
            _check_format(backing_format)
            if not unsafe:
                new = None
                if backing:
                    new = stack.enter_context(_open_new(tool, node, backing, backing_format, source_mode, share))
                need_medium(node, f"Could not get size of '{name}'")
                _check_name(tool, node, backing, backing_format)
                _move(tool, node, new, compressed, progress if show or tool.progress_mode == "json" else None)
            _change(tool, node, backing or None, backing_format)
    finally:
        progress.end(failed=True)  # the peer does not say 100 % at the end
    return 0


def _check_format(name: str | None) -> None:
    if name is None:
        return
    from ...plugins import find

    try:
        find("format", name)
        return
    except PluginError:
        pass
    try:
        find("protocol", name)  # anything that can be opened may be recorded
    except PluginError:
        raise Failure(f"Invalid format name: '{name}'") from None


def _open_new(tool: Tool, node: Node, name: str, format: str | None, cache: CacheMode, share: bool) -> Node:
    """The new backing image; its name is relative to the image, as it will be found later.

    *share* is ``-U``, which has no use for the image itself: that is written.
    """
    from ...block.gate import SCHEME
    from ...block.open import open_node

    path = name
    if not name.startswith("json:") and not SCHEME.match(name):
        path = os.path.join(os.path.dirname(node.filename), name)
    try:
        return open_node(path, format=format, cache=cache, share=share, gate=tool.gate(), warn=tool.open_warning)
    except (VmError, OSError) as error:
        raise Failure(f"Could not open new backing file '{name}': {reason(error)}") from error


def _move(tool: Tool, node: Node, new: Node | None, compressed: bool, progress: object) -> None:
    from ...block.formatnode import FormatNode
    from ...block.jobs.commit import chain
    from ...block.jobs.convert import CopyError
    from ...block.jobs.job import Job
    from ...block.jobs.rebase import rebase

    image = chain(node)[0]
    if not isinstance(image, FormatNode):
        return
    if compressed:
        from .convert import can_compress

        if not can_compress(image):
            raise Failure("Compression not supported for this file format")
    try:
        rebase(image, new, compressed=compressed, job=Job(progress))  # type: ignore[arg-type]
    except CopyError as error:
        tool.afterwards(_LEFT)
        if error.what == "writing":
            raise Failure(f"Error while writing to COW image: {error.text}") from error
        raise
    except KeyboardInterrupt:
        tool.afterwards(_LEFT)
        raise


def _check_name(tool: Tool, node: Node, backing: str | None, format: str | None) -> None:
    """Refuse what cannot be recorded, before anything is written."""
    from ...block.formatnode import FormatNode
    from ...block.jobs.commit import chain
    from .createopts import backing_is_ours

    image = chain(node)[0]
    if not isinstance(image, FormatNode) or (tool.peer and backing_is_ours(image.driver)):
        raise Failure(f"Could not change the backing file to '{backing or ''}': Operation not supported")
    if backing and not format:
        raise Failure(f"Could not change the backing file to '{backing}': backing format must be specified")


def _change(tool: Tool, node: Node, backing: str | None, format: str | None) -> None:
    from ...block.formatnode import FormatNode
    from ...block.jobs.commit import chain
    from ...errors import UsageError
    from .createopts import backing_is_ours

    image = chain(node)[0]
    shown = backing or ""
    _check_name(tool, node, backing, format)
    assert isinstance(image, FormatNode)
    try:
        with image.quiesce() as driver:
            driver.change_backing(backing, format if backing else None)
            driver.flush()
    except UsageError as error:
        told = reason(error) if backing_is_ours(image.driver) else "Operation not supported"
        raise Failure(f"Could not change the backing file to '{shown}': {told}") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            text = f"Could not change the backing file to '{shown}': No space left in the file header"
            raise Failure(text) from error
        raise Failure(f"Could not change the backing file to '{shown}': {reason(error)}") from error
    except VmError as error:
        raise Failure(f"Could not change the backing file to '{shown}': {reason(error)}") from error
