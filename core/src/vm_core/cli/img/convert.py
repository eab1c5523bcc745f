"""``vm-img convert``: copy images into a new one, of whatever format."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ...errors import ImageError, UsageError, VmError
from .common import Failure, Tool, need_medium, reason

if TYPE_CHECKING:
    from ...block.formatnode import FormatNode
    from ...block.node import Node

LONG = {
    "help": "h",
    "object:": "object",
    "source-image-opts": "source-image-opts",
    "image-opts": "image-opts",
    "target-image-opts": "target-image-opts",
    "force-share": "U",
    "target-is-zero": "target-is-zero",
    "salvage": "salvage",
    "bitmaps": "bitmaps",
    "skip-broken-bitmaps": "skip-broken-bitmaps",
}
SHORT = "hf:O:B:CcF:o:l:S:pt:T:qnm:WUr:"

#: ``-S`` is at most what a request can be.
MAX_SPARSE = 16 * 1024 * 1024
MAX_WORKERS = 16


class _Arguments:
    """The command line."""

    def __init__(self) -> None:
        self.format: str | None = None
        self.image_opts = False
        self.share = False
        self.target_format: str | None = None
        self.target_image_opts = False
        self.target_is_zero = False
        self.create = True
        self.create_options: list[str] = []
        self.backing = ""
        self.backing_format = ""
        self.snapshot = ""
        self.sparse: int | None = None
        self.workers = 8
        self.in_order = True
        self.compressed = False
        self.copy_range = False
        self.salvage = False
        self.bitmaps = False
        self.skip_broken_bitmaps = False
        self.rate = 0
        self.progress = False
        self.cache = "unsafe"
        self.source_cache = "writeback"
        self.names: list[str] = []
        self.target = ""


def run(args: list[str], tool: Tool) -> int:
    """Run the command."""
    given = _parse(args, tool)
    if given is None:
        return 0
    source_cache = tool.cache(given.source_cache, source=True)
    if not given.create and given.create_options:
        raise Failure("-o has no effect when skipping image creation")
    with ExitStack() as stack:
        sources = [
            stack.enter_context(
                tool.open(
                    name,
                    image_opts=given.image_opts,
                    format=given.format,
                    share=given.share,
                    cache=source_cache,
                    exclusive=True,
                )
            )
            for name in given.names
        ]
        if given.snapshot:
            _load_snapshot(tool, sources, given.snapshot)
        _convert(tool, given, sources, stack)
    return 0


def _parse(args: list[str], tool: Tool) -> _Arguments | None:
    """The command line; None where it asked for help on create options, which has been shown."""
    from .createopts import check_list

    given = _Arguments()
    options = tool.options(args, SHORT, LONG)
    for key, value in options:
        match key:
            case "f":
                given.format = value
            case "O":
                given.target_format = value
            case "B":
                given.backing = value
            case "C":
                given.copy_range = True
            case "c":
                given.compressed = True
            case "F":
                given.backing_format = value
            case "o":
                given.create_options.append(check_list(value))
            case "l":
                given.snapshot = value
                snapshot_names(tool, value)
            case "S":
                given.sparse = tool.size(value, "buffer size for sparse output")
                if given.sparse % 512 or given.sparse > MAX_SPARSE:
                    raise Failure(
                        "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 up to "
                        f"{MAX_SPARSE}. Select 0 to disable sparse detection (fully allocates output)."
                    )
            case "p":
                given.progress = True
            case "t":
                given.cache = value
            case "T":
                given.source_cache = value
            case "q":
                tool.quiet = True
            case "n":
                given.create = False
            case "m":
                if not value.isdigit() or not 1 <= int(value) <= MAX_WORKERS:
                    raise Failure(
                        f"Invalid number of coroutines. Allowed number of coroutines is between 1 and {MAX_WORKERS}"
                    )
                given.workers = int(value)
            case "W":
                given.in_order = False
            case "U":
                given.share = True
            case "r":
                given.rate = tool.size(value, "rate limit")
            case "object":
                tool.add_object(value)
            case "image-opts" | "source-image-opts":
                given.image_opts = True
            case "target-image-opts":
                given.target_image_opts = True
            case "target-is-zero":
                given.target_is_zero = True
            case "salvage":
                given.salvage = True
            case "bitmaps":
                given.bitmaps = True
            case "skip-broken-bitmaps":
                given.skip_broken_bitmaps = True
    if given.target_format is None and not given.target_image_opts:
        given.target_format = "raw"
    if given.skip_broken_bitmaps and not given.bitmaps:
        raise Failure("Use of --skip-broken-bitmaps requires --bitmaps")
    if given.target_image_opts and given.create:
        raise Failure("--target-image-opts requires use of -n flag")
    if given.target_is_zero and given.create:
        raise Failure("--target-is-zero requires use of -n flag")
    if given.copy_range:
        if given.compressed:
            raise Failure("Cannot enable copy offloading when -c is used")
        if given.sparse is not None:
            raise Failure("Cannot enable copy offloading when -S is used")
        if given.salvage:
            raise Failure("Cannot use copy offloading in salvaging mode")
    if tool.quiet:
        given.progress = False
    if _asks_for_help(given.create_options):
        from .createopts import show_options

        show_options(tool, given.target_format or "raw", options.rest[-1] if options.rest else None)
        return None
    if len(options.rest) < 2:
        raise Failure("Must specify image file name")
    *given.names, given.target = options.rest
    return given


def _asks_for_help(texts: Sequence[str]) -> bool:
    from ...options import pieces

    return any(piece in ("help", "?") for text in texts for piece in pieces(text))


def _load_snapshot(tool: Tool, sources: list[Node], text: str) -> None:
    """Have the source show an internal snapshot: its id or name, or ``snapshot.id=…,snapshot.name=…``."""
    load_snapshot(tool, sources, text)


def snapshot_names(tool: Tool, text: str) -> list[dict[str, str]]:
    """What ``-l`` may mean, the likeliest first: an id, a name, or both as options. Raises Failure."""
    if not text.startswith("snapshot."):
        return [{"id": text}, {"name": text}]
    from ...options import split

    found = split(text)
    for key in found:
        if key not in ("snapshot.id", "snapshot.name"):
            tool.error(f"Invalid parameter '{key}'")
            raise Failure(f"Failed in parsing snapshot param '{text}'")
    return [{key.partition(".")[2]: value for key, value in found.items()}]


def load_snapshot(tool: Tool, sources: list[Node], text: str) -> None:
    """``-l``: have the only one of *sources* show an internal snapshot. Raises Failure."""
    from ...block.formatnode import FormatNode

    how = snapshot_names(tool, text)
    if len(sources) > 1:
        raise Failure("No support for concatenating multiple snapshot")
    node = sources[0]
    if not isinstance(node, FormatNode):
        raise Failure(f"Failed to load snapshot: Device '{node.node_name}' does not support internal snapshots")
    error: VmError | None = None
    for names in how:
        try:
            with node.quiesce() as driver:
                driver.snapshot_load(**names)
        except VmError as caught:
            error = caught
        else:
            return
    assert error is not None
    if isinstance(error, UsageError):
        raise Failure("Failed to load snapshot: Can't find snapshot")
    raise Failure(f"Failed to load snapshot: {reason(error)}")


def _convert(tool: Tool, given: _Arguments, sources: list[Node], stack: ExitStack) -> None:
    from ...block.formatnode import FormatNode
    from ...block.jobs.convert import SPARSE, ConvertOptions, convert
    from ...block.jobs.job import Job
    from ...block.node import sectors_up

    for name, node in zip(given.names, sources, strict=False):
        need_medium(node, f"Could not get size of {name}")
    size = sum(sectors_up(node.size) for node in sources)
    options = _create_options(tool, given)
    backing = options.get("backing_file", "") if given.create else given.backing
    if len(sources) > 1 and backing:
        raise Failure("Having a backing file for the target makes no sense when concatenating multiple input images")
    if given.create:
        if backing and not options.get("backing_fmt"):
            raise Failure("Use of backing file requires explicit backing format")
        _check_compression(given, options)
    if given.bitmaps:
        _check_bitmaps(tool, given, sources)
    cache = tool.cache(given.cache)
    fresh = stack.enter_context(tool.target(given.target)) if given.create else None
    if given.create:
        _create(tool, given, size, options)
    if fresh is not None:
        fresh.begun = True
        fresh.kept = tool.peer  # which leaves what it could not finish
    target = stack.enter_context(
        tool.open(
            given.target,
            image_opts=given.target_image_opts,
            format=given.target_format,
            write=True,
            cache=cache,
            options={key: value for key, value in options.items() if ("." + key).endswith(".key-secret")},
        )
    )
    need_medium(target, "unable to get output image length")
    if target.size < size and not (given.create and "size" in options):
        if not given.create:
            raise Failure("output file is smaller than input file")
        target.truncate(size)
    if given.compressed and not (isinstance(target, FormatNode) and can_compress(target)):
        raise Failure("Compression not supported for this file format")
    if given.compressed and target.cluster_size <= 1:
        raise Failure("invalid cluster size")
    if given.bitmaps and not (isinstance(target, FormatNode) and target.format.keeps_bitmaps):
        raise Failure(f"Format driver '{target.driver}' does not support bitmaps")
    below = -1
    if backing:
        below = target.backing.size if target.backing is not None else 0
    zero_init: bool | None = None
    if not given.create:
        zero_init = given.target_is_zero
    with tool.progress(given.progress) as progress:
        job = Job(progress if given.progress or tool.progress_mode == "json" else None, rate=given.rate)
        try:
            convert(
                sources,
                target,
                ConvertOptions(
                    sparse=SPARSE if given.sparse is None else given.sparse,
                    workers=given.workers,
                    in_order=given.in_order,
                    compressed=given.compressed,
                    copy_range=given.copy_range,
                    salvage=given.salvage,
                    backing=below,
                    zero_init=zero_init,
                ),
                job=job,
                warn=tool.warn,
            )
        except BaseException:
            if not given.create:
                tool.afterwards(f"'{given.target}' is not complete now")
            raise
    if given.bitmaps:
        assert isinstance(target, FormatNode)
        _copy_bitmaps(tool, given, sources[0], target)


def can_compress(node: FormatNode) -> bool:
    """Whether compressed clusters can be written to an image of this format."""
    from ...plugins import find

    return "compress" in find("format", node.driver).capabilities


def _create_options(tool: Tool, given: _Arguments) -> dict[str, Any]:
    """``-o``, ``-B`` and ``-F`` as create options by name."""
    from .createopts import parse_options

    if not given.create:
        return {}
    assert given.target_format is not None
    return parse_options(
        tool,
        given.target_format,
        given.target,
        given.create_options,
        backing=given.backing,
        backing_format=given.backing_format,
    )


def _check_compression(given: _Arguments, options: dict[str, Any]) -> None:
    if not given.compressed:
        return
    from ...plugins import find

    driver = find("format", given.target_format or "raw")
    if "compress" not in driver.capabilities:
        raise Failure("Compression not supported for this file format")
    if options.get("encryption") in ("on", True) or options.get("encrypt.format"):
        raise Failure("Compression and encryption not supported at the same time")
    if options.get("preallocation", "off") != "off":
        raise Failure("Compression and preallocation not supported at the same time")


def _create(tool: Tool, given: _Arguments, size: int, options: dict[str, Any]) -> None:
    from ...block.open import create_image

    assert given.target_format is not None
    try:
        create_image(
            given.target,
            given.target_format,
            None if "size" in options else size,
            dict(options),
            check_backing=False,
            gate=tool.gate(),
        )
    except (VmError, OSError) as error:
        raise Failure(f"{given.target}: error while converting {given.target_format}: {reason(error)}") from error


# Bitmaps


def _check_bitmaps(tool: Tool, given: _Arguments, sources: list[Node]) -> None:
    """Before anything is written: both formats have bitmaps, and none of the source's is broken."""
    from ...block.formatnode import FormatNode
    from ...plugins import find

    if given.target_format is not None:
        driver = find("format", given.target_format)
        if "bitmaps" not in driver.capabilities:
            raise Failure(f"Format driver '{given.target_format}' does not support bitmaps")
    if len(sources) > 1:
        raise Failure("Copying bitmaps only possible with single source")
    source = sources[0]
    if not isinstance(source, FormatNode) or "bitmaps" not in find("format", source.driver).capabilities:
        raise Failure("Source lacks bitmap support")
    if not source.format.keeps_bitmaps:
        raise Failure("Source lacks bitmap support")
    if not given.skip_broken_bitmaps:
        with source.quiesce() as driver_:
            for bitmap in reversed(driver_.bitmaps()):  # as the peer keeps them: newest first
                if "in-use" in bitmap["flags"]:
                    raise Failure(
                        f"Cannot copy inconsistent bitmap '{bitmap['name']}'\n"
                        f"Try --skip-broken-bitmaps, or use '{tool.program} bitmap --remove' to delete it"
                    )


def _copy_bitmaps(tool: Tool, given: _Arguments, source: Node, target: FormatNode) -> None:
    from ...block.formatnode import FormatNode

    assert isinstance(source, FormatNode)
    with source.quiesce() as old, target.quiesce() as new:
        for bitmap in reversed(old.bitmaps()):
            name = bitmap["name"]
            if "in-use" in bitmap["flags"]:
                tool.warn(f"Skipping inconsistent bitmap '{name}'")
                continue
            try:
                new.bitmap_add(name, bitmap["granularity"], enabled="auto" in bitmap["flags"])
            except (ImageError, UsageError) as error:
                raise Failure(f"Failed to create bitmap {name}: {reason(error)}") from error
            try:
                new.bitmap_merge(name, *old.bitmap_load(name))
            except (VmError, OSError) as error:
                new.bitmap_remove(name)
                raise Failure(f"Failed to populate bitmap {name}: {reason(error)}") from error
