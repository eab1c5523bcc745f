"""``vm-img compare``: whether two images hold the same."""

from __future__ import annotations

from .common import Failure, Tool, need_medium, reason

LONG = {"help": "h", "object:": "object", "image-opts": "image-opts", "force-share": "U"}

#: Exit statuses: the images differ; one could not be opened; one could not be read.
DIFFERENT, CANNOT_OPEN, CANNOT_READ = 1, 2, 4


def run(args: list[str], tool: Tool) -> int:
    """Run the command."""
    formats: list[str | None] = [None, None]
    cache, image_opts, strict, share, show = "writeback", False, False, False, False
    options = tool.options(args, "hf:F:T:pqsU", LONG)
    for key, value in options:
        match key:
            case "f":
                formats[0] = value
            case "F":
                formats[1] = value
            case "T":
                cache = value
            case "p":
                show = True
            case "q":
                tool.quiet = True
            case "s":
                strict = True
            case "U":
                share = True
            case "object":
                try:
                    tool.add_object(value)
                except Failure as failure:
                    failure.code = CANNOT_OPEN
                    raise
            case "image-opts":
                image_opts = True
    if len(options.rest) != 2:
        tool.usage("Expecting two image file names")
    show = show and not tool.quiet
    from contextlib import ExitStack

    from ...block.jobs.compare import compare
    from ...block.jobs.job import Job

    with ExitStack() as stack:
        progress = tool.progress(show, 2.0)
        stack.callback(progress.end, failed=True)  # the peer does not say 100 % at the end
        try:
            mode = tool.cache(cache, source=True)
            first, second = (
                stack.enter_context(tool.open(name, image_opts=image_opts, format=format, share=share, cache=mode))
                for name, format in zip(options.rest, formats, strict=True)
            )
        except Failure as failure:
            failure.code = CANNOT_OPEN
            raise
        for name, node in zip(options.rest, (first, second), strict=True):
            try:
                need_medium(node, f"Can't get size of {name}")
            except Failure as failure:
                failure.code = CANNOT_READ
                raise
        watched = show or tool.progress_mode == "json"
        result = compare(first, second, strict=strict, job=Job(progress if watched else None))
        found = result.difference
        if result.sizes_differ and not strict:
            tool.say("Warning: Image size mismatch!")
        if found is None:
            tool.say("Images are identical.")
            return 0
        if found.kind == "error":
            assert found.error is not None
            name = options.rest[found.image]
            tool.error(f"Error while reading offset {found.offset} of {name}: {reason(found.error)}")
            return CANNOT_READ
        if found.kind == "size":
            tool.say("Strict mode: Image size mismatch!")
        elif found.kind == "status":
            tool.say(f"Strict mode: Offset {found.offset} block status mismatch!")
        else:
            tool.say(f"Content mismatch at offset {found.offset}!")
        return DIFFERENT
