"""``commit``: write an overlay's changes into a backing image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...errors import ImageError, VmError
from .common import Failure, Tool, reason

if TYPE_CHECKING:
    from ...block.node import Node

LONG = {"help": "h", "object:": "object", "image-opts": "image-opts"}

#: What a commit that did not come to its end has left.
_LEFT = "the overlay is as it was: the same command goes on"


def run(args: list[str], tool: Tool) -> int:
    """``commit [-b BASE] [-d] [-r RATE] [-t CACHE] [-f FMT] [-p] FILE``."""
    format, cache, base, keep, show, image_opts, rate = None, "writeback", None, False, False, False, 0
    options = tool.options(args, "f:ht:b:dpqr:", LONG)
    for key, value in options:
        match key:
            case "f":
                format = value
            case "t":
                cache = value
            case "b":
                base, keep = value, True
            case "d":
                keep = True
            case "p":
                show = True
            case "q":
                tool.quiet = True
            case "r":
                rate = tool.size(value, "rate limit")
            case "object":
                tool.add_object(value)
            case "image-opts":
                image_opts = True
    show = show and not tool.quiet
    if len(options.rest) != 1:
        tool.usage("Expecting one image file name")
    name = options.rest[0]
    mode = tool.cache(cache)
    with tool.open(name, image_opts=image_opts, format=format, write=True, cache=mode) as node:
        from ...block.jobs.commit import chain, commit
        from ...block.jobs.job import Job

        images = chain(node)
        if base is None:
            if len(images) < 2:
                raise Failure("Image does not have a backing file")
            target = images[1]
        else:
            found = _find(images, base)
            if found is None:
                raise Failure(f"Did not find '{base}' in the backing chain of '{name}'")
            target = found
        with tool.progress(show) as progress:
            watched = show or tool.progress_mode == "json"
            try:
                commit(node, target, keep=keep, job=Job(progress if watched else None, rate=rate))
            except ImageError as error:
                raise Failure(error.peer) from error
            except KeyboardInterrupt:
                tool.afterwards(_LEFT)
                raise
            except (VmError, OSError) as error:
                tool.afterwards(_LEFT)
                raise Failure(f"Block job failed: {_cause(error)}") from error
    tool.say("Image committed.")
    return 0


def _cause(error: BaseException) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if number else reason(error)


def _find(images: list[Node], name: str) -> Node | None:
    """The backing image that *name* names, seen from the directory of the image above it."""
    from itertools import pairwise

    from ...block.gate import SCHEME

    for overlay, image in pairwise(images):
        path = os.path.join(os.path.dirname(overlay.filename), name)
        try:
            if os.path.samefile(path, image.filename):
                return image
        except OSError:
            if SCHEME.match(name) and name == image.filename:
                return image
    return None
