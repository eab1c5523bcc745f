"""``convert-inplace``: make an image one of another format, without copying its data."""

from __future__ import annotations

from .common import Failure, Tool

_LONG = {"help": "h", "format:": "f", "target-format:": "O", "progress-bar": "p", "quiet": "q"}


def run(args: list[str], tool: Tool) -> int:
    """``convert-inplace [-f FMT] -O FMT [-p] [-q] FILE``."""
    format, target, progress = None, "", False
    options = tool.options(args, "hf:O:pq", _LONG)
    for key, value in options:
        if key == "f":
            format = value
        elif key == "O":
            target = value
        elif key == "p":
            progress = True
        elif key == "q":
            tool.quiet = True
    if len(options.rest) != 1:
        tool.usage("Expecting one image file name")
    if not target:
        raise Failure("the format to convert to is needed: -O FMT")
    from ...block.jobs.inplace import convert_inplace

    filename = options.rest[0]
    with tool.progress(progress) as tell:
        done = convert_inplace(filename, target, format=format, gate=tool.gate(), progress=tell)
    tool.say(
        f"'{filename}' is a {target} image now (it was {done.former}): {_size(done.metadata)} of new metadata, "
        f"{_size(done.reclaimed)} of old metadata and free clusters given back."
    )
    if done.lost:
        tool.warn(f"{_size(done.lost)} stay unused in the file until it is copied with vm-img convert")
    return 0


def _size(length: int) -> str:
    from ...sizes import human

    return human(length)
