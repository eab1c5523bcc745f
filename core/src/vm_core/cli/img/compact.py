"""``compact``: give back the host space that an image holds for nothing, in place or into a copy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import VmError
from .common import Failure, Tool, reason

if TYPE_CHECKING:
    from ...block.node import Node

LONG = {"help": "h", "dry-run": "n", "object:": "object", "image-opts": "image-opts", "output:": "output"}


def run(args: list[str], tool: Tool) -> int:
    """``compact [-f FMT] [-n] [-c] [-t CACHE] [-p] [-q] [--output=json] FILE [COPY]``."""
    format, cache, image_opts, show, json, compressed, dry_run = None, "writeback", False, False, False, False, False
    options = tool.options(args, "hf:t:pqcn", LONG)
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
            case "n":
                dry_run = True
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
    if dry_run and len(options.rest) == 2:
        raise Failure("-n tells what compacting in place would do: give no copy")
    show = show and not tool.quiet
    name = options.rest[0]
    mode = tool.cache(cache)
    in_place = len(options.rest) == 1
    with tool.open(name, image_opts=image_opts, format=format, write=in_place and not dry_run, cache=mode) as node:
        from ...block.jobs.job import Job

        with tool.progress(show) as progress:
            job = Job(progress if show or tool.progress_mode == "json" else None)
            if not in_place:
                before = node.allocated()
                after = _copy(tool, node, options.rest[1], compressed, job)
                facts = {"before": before, "after": after}
            else:
                from ...block.jobs.compact import compact

                result = compact(node, job=job, dry_run=dry_run)
                facts = {} if dry_run else {"before": result.before, "after": result.after}
                facts |= {"length-before": result.length_before, "length-after": result.length_after}
                facts |= {"zeroes": result.zeroes, "moved": result.moved or 0}
        driver, movable = node.driver, not in_place or result.moved is not None
    if json:
        tool.json({"filename": options.rest[-1], **facts})
    else:
        _tell(tool, facts, driver, movable, dry_run)
    return 0


def _tell(tool: Tool, facts: dict[str, int], driver: str, movable: bool, dry_run: bool) -> None:
    from ...sizes import human

    if dry_run:
        tool.say(
            f"The file would be about {human(facts['length-after'])} long instead of {human(facts['length-before'])}, "
            f"with {human(facts['moved'])} moved; {human(facts['zeroes'])} are zeroes that take space."
        )
    else:
        text = f"Image compacted: {human(facts['before'])} on disk before, {human(facts['after'])} now"
        if facts.get("length-before", 0) != facts.get("length-after", 0):
            text += f"; the file was {human(facts['length-before'])} long and is {human(facts['length-after'])} now"
        tool.say(f"{text}.")
    if not movable and driver != "raw":
        tool.say(f"In {driver} images nothing is moved: what lies at the end of the file stays there.")


def _moved(name: str, image: str, target: str) -> str:
    """The name of a backing image as *target* has to give it: relative names start at the image's directory."""
    import os

    from ...block.gate import SCHEME

    if name.startswith("json:") or SCHEME.match(name) or os.path.isabs(name):
        return name
    here, there = os.path.dirname(os.path.abspath(image)), os.path.dirname(os.path.abspath(target))
    return name if here == there else os.path.relpath(os.path.join(here, name), there)


def _refuse(tool: Tool, node: Node, target: str) -> None:
    """What a copy would not have, or would destroy. Raises Failure; what is left out knowingly is told."""
    import os

    from ...block.formatnode import FormatNode

    if os.path.exists(target) and os.path.exists(node.filename) and os.path.samefile(target, node.filename):
        raise Failure(f"'{target}' is the image itself: give no copy, and it is compacted in place")
    if not isinstance(node, FormatNode):
        return
    driver = node.format
    if "data-file" in node.children():
        raise Failure("an image with a data file cannot be compacted into a copy, which would use the same data file")
    if driver.encrypted:
        raise Failure(
            "an encrypted image cannot be compacted into a copy: vm-img convert makes one, with a key that it is given"
        )
    for what, found in (("internal snapshots", driver.snapshots()), ("dirty bitmaps", driver.bitmaps())):
        if found:
            tool.warn(f"the copy has none of the image's {len(found)} {what}")


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
    _refuse(tool, node, target)
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
    with tool.target(target) as fresh:
        try:
            create_image(target, node.driver, node.size, given, check_backing=False, gate=tool.gate())
        except (VmError, OSError) as error:
            raise Failure(f"{target}: {reason(error)}") from error
        fresh.begun = True
        with tool.open(target, format=node.driver, write=True, backing=False) as copy:
            below = -1
            if image is not None and image.backing is not None:
                assert isinstance(copy, FormatNode)
                copy.set_backing(image.backing, owned=False)  # open already, wherever it lies
                below = image.backing.size
            convert([node], copy, ConvertOptions(compressed=compressed, backing=below), job=job)
            copy.flush()
            return copy.allocated()
