"""``info``: what an image is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...sizes import human
from .common import Failure, Tool

if TYPE_CHECKING:
    from ...block.node import Node

_LONG = {
    "help": "h",
    "format:": "f",
    "output:": "output",
    "backing-chain": "backing-chain",
    "object:": "object",
    "image-opts": "image-opts",
    "force-share": "U",
}


def run(args: list[str], tool: Tool) -> int:
    """``info [-f FMT] [--output=OFMT] [--backing-chain] [-U] FILE``."""
    format, image_opts, share, chain, output = None, False, False, False, None
    options = tool.options(args, "hf:U", _LONG)
    for key, value in options:
        if key == "f":
            format = value
        elif key == "U":
            share = True
        elif key == "output":
            output = value
        elif key == "backing-chain":
            chain = True
        elif key == "object":
            tool.add_object(value)
        elif key == "image-opts":
            image_opts = True
    if len(options.rest) != 1:
        tool.usage("Expecting one image file name")
    as_json = tool.output(output) if output is not None else False
    found = _collect(tool, options.rest[0], format, image_opts, chain, share)
    if as_json:
        tool.json(found if chain else found[0])
    else:
        sys.stdout.write("\n".join(describe(one) for one in found))
    return 0


def _collect(
    tool: Tool, name: str, format: str | None, image_opts: bool, chain: bool, share: bool
) -> list[dict[str, Any]]:
    """The ImageInfo of the image, and of those below it with *chain*."""
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    while True:
        if name in seen:
            raise Failure(f"Backing file '{name}' creates an infinite loop.")
        seen.add(name)
        with tool.open(name, image_opts=image_opts, format=format, share=share, backing=False, io=False) as node:
            info = image_info(node)
        found.append(info)
        below = info.get("full-backing-filename")
        if not chain or below is None:
            return found
        _check_gate(tool, info["filename"], info["backing-filename"], below)
        name, format, image_opts = below, info.get("backing-filename-format"), False


def _check_gate(tool: Tool, image: str, reference: str, path: str) -> None:
    """What only the image names is not opened unasked."""
    from ...block.gate import SCHEME

    plain = None if SCHEME.match(reference) and not reference.startswith("file:") else path.removeprefix("file:")
    tool.gate().check(image, "backing", reference, plain)


def image_info(node: Node) -> dict[str, Any]:
    """QEMU's ImageInfo of an open image."""
    from ...block.create import backing_path
    from ...block.formatnode import FormatNode
    from ...block.medium import present
    from ...block.names import place_of
    from ...block.node import sectors_up

    info: dict[str, Any] = {
        "filename": node.filename,
        "format": node.driver,
        "virtual-size": sectors_up(node.size),
        **node.known_allocated(),
        "dirty-flag": False,
    }
    if not present(node):  # nothing more is known of it
        del info["dirty-flag"]
    elif isinstance(node, FormatNode):
        format = node.format
        if format.tells_clusters:
            if format.cluster_size > 1:
                info["cluster-size"] = format.cluster_size
            info["dirty-flag"] = format.dirty
        else:
            del info["dirty-flag"]
        if getattr(format, "encrypted", False):
            info["encrypted"] = True
        reference = format.backing_reference
        if reference is not None:
            info["backing-filename"] = reference.filename
            place = place_of(node)
            if place is not None:
                info["full-backing-filename"] = backing_path(reference.filename, place)
            if reference.format:
                info["backing-filename-format"] = reference.format
        snapshots = list(format.snapshots())
        if snapshots:
            info["snapshots"] = snapshots
    try:
        specific = node.info()
    except OSError:  # storage that knows nothing of itself
        specific = {}
    if specific:
        info["format-specific"] = {"type": node.driver, "data": specific}
    return info


def describe(info: dict[str, Any]) -> str:
    """An ImageInfo for people."""
    lines = [
        f"image: {info['filename']}",
        f"file format: {info['format']}",
        f"virtual size: {human(info['virtual-size'])} ({info['virtual-size']} bytes)",
        f"disk size: {human(info['actual-size']) if 'actual-size' in info else 'unavailable'}",
    ]
    if info.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in info:
        lines.append(f"cluster_size: {info['cluster-size']}")
    if info.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    backing = info.get("backing-filename")
    if backing is not None:
        full = info.get("full-backing-filename")
        more = " (cannot determine actual path)" if full is None else f" (actual path: {full})"
        lines.append(f"backing file: {backing}{more if full != backing else ''}")
        if "backing-filename-format" in info:
            lines.append(f"backing file format: {info['backing-filename-format']}")
    if "snapshots" in info:
        lines += snapshot_table(info["snapshots"])
    if "format-specific" in info:
        from ..facts import lines as facts

        lines.append("Format specific information:")
        lines += [fact.rstrip("\n") for fact in facts(info["format-specific"]["data"], 1)]
    return "".join(line + "\n" for line in lines)


def snapshot_table(snapshots: Sequence[dict[str, Any]]) -> list[str]:
    """The table of ``snapshot -l``, lines of QEMU's SnapshotInfo."""
    import time

    lines = ["Snapshot list:", f"{'ID':<10}{'TAG':<17}{'VM SIZE':>8}{'DATE':>20}{'VM CLOCK':>13}{'ICOUNT':>11}"]
    for one in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        seconds, nanoseconds = one["vm-clock-sec"], one["vm-clock-nsec"]
        clock = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{nanoseconds // 1000000:03}"
        count = one.get("icount")
        lines.append(
            f"{one['id']:<9} {one['name']:<16} {human(one['vm-state-size']):>8}{date:>20}{clock:>13}"
            f"{'' if count is None else count:>11}"
        )
    return lines
