"""``check``: whether an image's metadata is in order, and mending it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from .common import Exit, Failure, Tool, reason

if TYPE_CHECKING:
    from ...block.node import Node

_LONG = {
    "help": "h",
    "format:": "f",
    "repair:": "r",
    "output:": "output",
    "object:": "object",
    "image-opts": "image-opts",
    "force-share": "U",
}

#: Statuses: the check could not be done, the image is damaged, clusters are leaked, the format has no checks.
FAILED, CORRUPT, LEAKS, UNSUPPORTED = 1, 2, 3, 63

#: Members of ImageCheck that are left out of JSON where they are 0.
_OPTIONAL = (
    "corruptions",
    "leaks",
    "corruptions-fixed",
    "leaks-fixed",
    "image-end-offset",
    "total-clusters",
    "allocated-clusters",
    "fragmented-clusters",
    "compressed-clusters",
)


def run(args: list[str], tool: Tool) -> int:
    """``check [-f FMT] [--output=OFMT] [-r leaks|all] [-T CACHE] [-U] [-q] FILE``."""
    format, image_opts, share, output, repair, cache = None, False, False, None, "", "writeback"
    options = tool.options(args, "hf:r:T:qU", _LONG)
    for key, value in options:
        if key == "f":
            format = value
        elif key == "r":
            if value not in ("leaks", "all"):
                tool.usage(f"Unknown option value for -r (expecting 'leaks' or 'all'): {value}")
            repair = value
        elif key == "T":
            cache = value
        elif key == "q":
            tool.quiet = True
        elif key == "U":
            share = True
        elif key == "output":
            output = value
        elif key == "object":
            tool.add_object(value)
        elif key == "image-opts":
            image_opts = True
    if len(options.rest) != 1:
        tool.usage("Expecting one image file name")
    as_json = tool.output(output) if output is not None else False
    mode = tool.cache(cache, source=True)
    name = options.rest[0]
    with tool.open(
        name, image_opts=image_opts, format=format, write=bool(repair), cache=mode, share=share, check=True
    ) as node:
        return _check(tool, node, repair, as_json)


def _check(tool: Tool, node: Node, repair: str, as_json: bool) -> int:
    result = _collect(tool, node, repair)
    fixed_corruptions, fixed_leaks = result.get("corruptions-fixed", 0), result.get("leaks-fixed", 0)
    if fixed_corruptions or fixed_leaks:
        if not as_json:
            tool.say("The following inconsistencies were found and repaired:\n")
            tool.say(f"    {fixed_leaks} leaked clusters\n    {fixed_corruptions} corruptions\n")
            tool.say("Double checking the fixed image now...")
        result = {**_collect(tool, node, ""), "corruptions-fixed": fixed_corruptions, "leaks-fixed": fixed_leaks}
    if as_json:
        shown = {name: value for name, value in result.items() if value or name not in _OPTIONAL}
        tool.json({"filename": node.filename, "format": node.driver, **shown})
    else:
        _describe(tool, result)
    if result["check-errors"]:
        return FAILED
    if result.get("corruptions"):
        return CORRUPT
    if result.get("leaks"):
        return LEAKS
    return 0


def _collect(tool: Tool, node: Node, repair: str) -> dict[str, Any]:
    """One run of the format's check: QEMU's ImageCheck."""
    from ...block.formatnode import FormatNode
    from ...plugins import find

    if not isinstance(node, FormatNode) or "check" not in find("format", node.driver).capabilities:
        tool.error("This image format does not support checks")
        raise Exit(UNSUPPORTED)
    try:
        with node.quiesce() as format:
            result = dict(format.check(repair=repair))
    except UsageError as error:
        if "cannot be checked" in str(error):
            tool.error("This image format does not support checks")
            raise Exit(UNSUPPORTED) from None
        raise
    except OSError as error:
        import os

        # The errno's words alone; what the driver knows besides goes into the advice.
        if reason(error) != os.strerror(error.errno or 0):
            tool.hint(reason(error))
        raise Failure(f"Check failed: {os.strerror(error.errno or 0)}", FAILED) from error
    for line in result.pop("messages", ()):
        sys.stderr.write(f"{line}\n")
    for line in result.pop("reports", ()):  # with the program's name, as QEMU's drivers of some formats do
        tool.error(line)
    result.setdefault("check-errors", 0)
    return result


def _describe(tool: Tool, result: dict[str, Any]) -> None:
    errors, corruptions, leaks = result["check-errors"], result.get("corruptions", 0), result.get("leaks", 0)
    if not (errors or corruptions or leaks):
        tool.say("No errors were found on the image.")
    else:
        if corruptions:
            tool.say(
                f"\n{corruptions} errors were found on the image.\n"
                "Data may be corrupted, or further writes to the image may corrupt it."
            )
        if leaks:
            tool.say(
                f"\n{leaks} leaked clusters were found on the image.\n"
                "This means waste of disk space, but no harm to data."
            )
        if errors:
            tool.say(f"\n{errors} internal errors have occurred during the check.")
    total, allocated = result.get("total-clusters", 0), result.get("allocated-clusters", 0)
    if total and allocated:
        fragmented, compressed = result.get("fragmented-clusters", 0), result.get("compressed-clusters", 0)
        tool.say(
            f"{allocated}/{total} = {allocated * 100 / total:0.2f}% allocated, "
            f"{fragmented * 100 / allocated:0.2f}% fragmented, "
            f"{compressed * 100 / allocated:0.2f}% compressed clusters"
        )
    if result.get("image-end-offset"):
        tool.say(f"Image end offset: {result['image-end-offset']}")
