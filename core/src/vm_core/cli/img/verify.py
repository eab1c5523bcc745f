"""``verify``: whether an image's metadata is in order and its contents are those of a manifest; and making one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ...errors import UsageError, VmError
from .common import Failure, Tool, reason

if TYPE_CHECKING:
    from ...block.jobs.verify import Manifest, Verification
    from ...block.node import Node

LONG = {
    "help": "h",
    "manifest:": "m",
    "write:": "w",
    "algorithm:": "a",
    "block-size:": "b",
    "sum": "sum",
    "backing-chain": "backing-chain",
    "object:": "object",
    "image-opts": "image-opts",
    "force-share": "U",
    "output:": "output",
}

#: Statuses: it could not be done, the contents differ, the metadata is damaged.
FAILED, DIFFERENT, DAMAGED = 1, 2, 3
#: Ranges that are told, at most.
MOST = 1000
#: Bytes of a manifest, at most.
MOST_BYTES = 1 << 30


def run(args: list[str], tool: Tool) -> int:
    """``verify [-f FMT] [-m FILE] [-w FILE] [--sum] [--backing-chain] [-p] [-q] [-U] [--output=OFMT] IMAGE``."""
    format, cache, image_opts, share, show, json = None, "writeback", False, False, False, False
    given, target, algorithm, block, total, chain = "", "", "", "", False, False
    options = tool.options(args, "hf:T:pqUm:w:a:b:", LONG)
    for key, value in options:
        match key:
            case "f":
                format = value
            case "T":
                cache = value
            case "p":
                show = True
            case "q":
                tool.quiet = True
            case "U":
                share = True
            case "m":
                given = value
            case "w":
                target = value
            case "a":
                algorithm = value
            case "b":
                block = value
            case "sum":
                total = True
            case "backing-chain":
                chain = True
            case "object":
                tool.add_object(value)
            case "image-opts":
                image_opts = True
            case "output":
                json = tool.output(value)
    if len(options.rest) != 1:
        tool.usage("Expecting one image file name")
    if given and target:
        raise Failure("--manifest compares with one and --write makes one: give one of them")
    if given and (algorithm or block):
        raise Failure("algorithm and block size are those of the manifest: give them with --write")
    if target == "-" and json:
        raise Failure("--write=- and --output=json both want standard output")
    size = tool.size(block, "block size", 1) if block else None
    manifest = _load(given) if given else None
    name = options.rest[0]
    show = show and not tool.quiet
    with tool.open(
        name, image_opts=image_opts, format=format, cache=tool.cache(cache, source=True), share=share, check=True
    ) as node:
        facts: dict[str, Any] = {"filename": node.filename, "format": node.driver}
        checked = [_check(tool, one) for one in (_chain(node) if chain else [node])]
        damaged = any(one["corruptions"] or one["check-errors"] for one in checked)
        facts["checks"] = checked
        if damaged and target:
            raise Failure(f"{name}: its metadata is damaged; no manifest of it is made", DAMAGED)
        from ...block.jobs.job import Job

        result: Verification | None = None
        with tool.progress(show) as progress:
            job = Job(progress if show or tool.progress_mode == "json" else None)
            if manifest is not None:
                from ...block.jobs.verify import verify

                result = verify(node, manifest, with_sum=total, job=job)
                now = result.manifest
            else:
                from ...block.jobs.verify import make_manifest

                try:
                    now = make_manifest(node, algorithm=algorithm or "sha256", block_size=size, with_sum=total, job=job)
                except UsageError as error:
                    raise Failure(str(error)) from error
    if target:
        _store(tool, now, target)
    _facts(facts, now, manifest, result)
    if json:
        tool.json(facts)
    else:
        _tell(tool, now, manifest, result, checked, target)
    if result is not None and result.unreadable:
        return FAILED
    if result is not None and not result.same:
        return DIFFERENT
    return DAMAGED if damaged else 0


def _load(path: str) -> Manifest:
    from ...block.jobs.verify import Manifest, ManifestError

    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ManifestError(f"it has more than {MOST_BYTES} bytes")
        return Manifest.parse(data)
    except VmError as error:
        raise Failure(f"Manifest '{path}' cannot be used: {error}") from error
    except OSError as error:
        raise Failure(f"Could not open manifest '{path}': {error.strerror}") from error


def _store(tool: Tool, manifest: Manifest, path: str) -> None:
    """Write the manifest: all of it, or nothing."""
    if path == "-":
        sys.stdout.writelines(manifest.lines())
        return
    try:
        with _replacing(path) as partial, open(partial, "x", encoding="ascii") as file:
            file.writelines(manifest.lines())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Failure(f"Could not write manifest '{path}': {error.strerror}") from error


@contextmanager
def _replacing(path: str) -> Iterator[str]:
    """A name for a new file, which becomes *path* at the end."""
    partial = f"{path}.{os.getpid()}.part"
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        if os.path.lexists(partial):
            os.unlink(partial)
        raise


def _chain(node: Node) -> list[Node]:
    from ...block.jobs.commit import chain

    return chain(node)


def _check(tool: Tool, node: Node) -> dict[str, Any]:
    """The format's own check of one image: how much was found. Formats without one have nothing to tell."""
    from ...block.formatnode import FormatNode
    from ...plugins import find

    told: dict[str, Any] = {"filename": node.filename, "format": node.driver, "check-errors": 0, "corruptions": 0,
                            "leaks": 0}  # fmt: skip
    if not isinstance(node, FormatNode) or "check" not in find("format", node.driver).capabilities:
        return told
    try:
        with node.quiesce() as format:
            found = dict(format.check())
    except UsageError:
        return told
    except (VmError, OSError) as error:
        tool.error(f"{node.filename}: {reason(error)}")
        return told | {"check-errors": 1}
    for line in (*found.get("messages", ()), *found.get("reports", ())):
        sys.stderr.write(f"{line}\n")
    return told | {name: found.get(name, 0) for name in ("check-errors", "corruptions", "leaks")}


def _facts(facts: dict[str, Any], now: Manifest, manifest: Manifest | None, result: Verification | None) -> None:
    facts["virtual-size"] = now.size
    facts["algorithm"] = now.algorithm
    facts["block-size"] = now.block_size
    facts["digest"] = now.digest
    if now.sum:
        facts["sum"] = now.sum
    if manifest is None or result is None:
        return
    facts["same"] = result.same
    facts["manifest-virtual-size"] = manifest.size
    facts["manifest-digest"] = manifest.digest
    facts["differing-ranges"] = len(result.differences)
    facts["differing-bytes"] = sum(one.length for one in result.differences)
    facts["differences"] = [{"offset": one.offset, "length": one.length} for one in result.differences[:MOST]]
    facts["unreadable"] = [
        {"offset": one.offset, "length": one.length, "error": one.reason} for one in result.unreadable[:MOST]
    ]


def _tell(
    tool: Tool,
    now: Manifest,
    manifest: Manifest | None,
    result: Verification | None,
    checked: list[dict[str, Any]],
    target: str,
) -> None:
    if target == "-":
        return
    for one in checked:
        if one["corruptions"] or one["check-errors"]:
            tool.say(f"{one['filename']}: metadata is damaged: {one['corruptions'] + one['check-errors']} errors")
        elif one["leaks"]:
            tool.say(f"{one['filename']}: {one['leaks']} leaked clusters, which do no harm")
    if manifest is None or result is None:
        tool.say(f"digest: {now.digest} ({now.algorithm}, blocks of {now.block_size} bytes)")
        if now.sum:
            tool.say(f"sum: {now.sum}")
        return
    if result.resized:
        tool.say(f"Size differs: {now.size} bytes instead of {manifest.size}")
    _tell_ranges(tool, "Content differs", [f"offset {one.offset}, length {one.length}" for one in result.differences])
    _tell_ranges(
        tool, "Cannot be read", [f"offset {one.offset}, length {one.length}: {one.reason}" for one in result.unreadable]
    )
    if result.sum_differs:
        tool.say(f"Sum differs: {now.sum} instead of {manifest.sum}")
    if result.same:
        tool.say("The image holds what the manifest says.")


def _tell_ranges(tool: Tool, what: str, lines: list[str]) -> None:
    for line in lines[:MOST]:
        tool.say(f"{what}: {line}")
    if len(lines) > MOST:
        tool.say(f"{what}: {len(lines) - MOST} more ranges")
