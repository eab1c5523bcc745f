"""``compact``: give back the host space that an image holds for nothing, in place or into a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import VmError
from .common import Failure, Tool, reason

if TYPE_CHECKING:
    from ...block.node import Node

LONG = {"help": "h", "object:": "object", "image-opts": "image-opts", "output:": "output"}


def run(args: list[str], tool: Tool) -> int:
    """``compact [-f FMT] [-c] [-t CACHE] [-p] [-q] [--output=json] FILE [COPY]``."""
    format, cache, image_opts, show, json, compressed = None, "writeback", False, False, False, False
    options = tool.options(args, "hf:t:pqc", LONG)
    for key, value in options:
        match key:
            case "f":
                format = value
            case "t":
                cache = value
            case "p":
                show = True
            case "q":
                tool.quiet = True
            case "c":
                compressed = True
            case "object":
                tool.add_object(value)
            case "image-opts":
                image_opts = True
            case "output":
                json = tool.output(value)
    if not 1 <= len(options.rest) <= 2:
        tool.usage("Expecting an image file name, and at most one of a copy")
    if compressed and len(options.rest) == 1:
        raise Failure("-c compresses a copy: give its name behind the image's")
    show = show and not tool.quiet
    name = options.rest[0]
    mode = tool.cache(cache)
    in_place = len(options.rest) == 1
    with tool.open(name, image_opts=image_opts, format=format, write=in_place, cache=mode) as node:
        from ...block.jobs.job import Job

        with tool.progress(show) as progress:
            job = Job(progress if show or tool.progress_mode == "json" else None)
            if in_place:
                from ...block.jobs.compact import compact

                result = compact(node, job=job)
                before, after = result.before, result.after
            else:
                before = node.allocated()
                after = _copy(tool, node, options.rest[1], compressed, job)
    if json:
        tool.json({"filename": options.rest[-1], "before": before, "after": after})
    else:
        from ...sizes import human

        tool.say(f"Image compacted: {human(before)} on disk before, {human(after)} now.")
    return 0


def _moved(name: str, image: str, target: str) -> str:
    """The name of a backing image as *target* has to give it: relative names start at the image's directory."""
    import os

    from ...block.gate import SCHEME

    if name.startswith("json:") or SCHEME.match(name) or os.path.isabs(name):
        return name
    here, there = os.path.dirname(os.path.abspath(image)), os.path.dirname(os.path.abspath(target))
    return name if here == there else os.path.relpath(os.path.join(here, name), there)


def _copy(tool: Tool, node: Node, target: str, compressed: bool, job: Any) -> int:
    """A copy of the same format, with the same options and backing image; returns the bytes it takes on disk."""
    from ...block.formatnode import FormatNode
    from ...block.jobs.convert import ConvertOptions, convert
    from ...block.open import create_image
    from ...plugins import find

    driver: Any = find("format", node.driver)
    if "create" not in driver.capabilities:
        raise Failure(f"Format driver '{node.driver}' does not support image creation")
    image = node if isinstance(node, FormatNode) else None
    given: dict[str, Any] = {}
    if image is not None:
        facts = {**image.info(), "cluster-size": image.cluster_size}
        for option in driver.create_options:
            fact = facts.get(option.name.replace("_", "-"))
            if fact is not None and not isinstance(fact, (dict, list)):
                given[option.name] = fact
        reference = image.format.backing_reference
        if reference is not None:
            given["backing_file"] = _moved(reference.filename, node.filename, target)
            given["backing_fmt"] = reference.format or (image.backing.driver if image.backing is not None else "raw")
    if compressed and (image is None or "compress" not in driver.capabilities):
        raise Failure("Compression not supported for this file format")
    with tool.target(target):
        try:
            create_image(target, node.driver, node.size, given, check_backing=False, gate=tool.gate())
        except (VmError, OSError) as error:
            raise Failure(f"{target}: {reason(error)}") from error
        with tool.open(target, format=node.driver, write=True, backing=False) as copy:
            below = -1
            if image is not None and image.backing is not None:
                assert isinstance(copy, FormatNode)
                copy.set_backing(image.backing, owned=False)  # open already, wherever it lies
                below = image.backing.size
            convert([node], copy, ConvertOptions(compressed=compressed, backing=below), job=job)
            copy.flush()
            return copy.allocated()
