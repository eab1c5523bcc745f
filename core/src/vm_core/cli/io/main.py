"""``vm-io``: the program's options, and the loop over its commands.

Called as ``qemu-io`` (a link) the program is the peer to the letter. Nothing is imported here that a run may not use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from io import TextIOWrapper

from ...errors import FatalError, VmError
from ..getopt import UNKNOWN, LibraryGetopt
from ..img.common import Exit, reason
from . import commands
from .session import How, Session, parse_options, take

_SHORT = "hVc:d:f:rsnCmki:t:T:U"
_LONG = {
    "help": "h",
    "version": "V",
    "cmd:": "c",
    "format:": "f",
    "read-only": "r",
    "snapshot": "s",
    "nocache": "n",
    "copy-on-read": "C",
    "misalign": "m",
    "native-aio": "k",
    "aio:": "i",
    "discard:": "d",
    "cache:": "t",
    "trace:": "T",
    "force-share": "U",
    "object:": "object",
    "image-opts": "image-opts",
    "trust:": "trust",
}

#: The status of a program that was interrupted, as shells give it for SIGINT.
INTERRUPTED = 130


def main(words: Sequence[str] | None = None, path: str | None = None) -> int:
    """Run the program with *words* (the process's arguments), called *path*, and return its exit status."""
    if path is None:
        path = sys.argv[0] or "vm-io"
    out = sys.stdout
    for stream in (out, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")
    if isinstance(out, TextIOWrapper):
        # Buffered as the peer's, so that both streams mix in the same order.
        out.reconfigure(write_through=False, line_buffering=out.isatty())
    session = Session(os.path.basename(path), path, out)
    try:
        code = _run(session, list(sys.argv[1:] if words is None else words))
        out.flush()
        return code
    except Exit as end:
        return _end(end.code)
    except FatalError as error:
        code = _end(1)
        sys.stderr.write(f"{error}\n")
        return code
    except BrokenPipeError:
        # The reader of our output has gone; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return 1
    except (VmError, OSError) as error:
        if os.environ.get("VM_DEBUG"):
            raise
        session.tool.error(reason(error))
        return _end(1)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return _end(INTERRUPTED)


def _end(code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(session: Session, words: list[str]) -> int:
    lines: list[str] = []
    how: How | None = How()
    image_opts = False
    format_name: str | None = None
    tool = session.tool
    long = dict(_LONG)
    if tool.peer:
        del long["trust:"]
    scan = LibraryGetopt([session.path, *words], _SHORT, long)
    for key, value in scan:
        assert how is not None
        if key == UNKNOWN:
            _usage(session)
            return 1
        if key == "h":
            _usage(session)
            return 0
        if key == "V":
            _print_version(session)
            return 0
        if key == "c":
            lines.append(value)
        elif key == "f":
            format_name = value
        elif key == "m":
            session.misalign = True
        elif key == "T":
            from ..img.trace import accept

            accept(tool, value)
        elif key == "object":
            tool.add_object(value)
        elif key == "image-opts":
            image_opts = True
        elif key == "trust":
            tool.trust.append(value)
        else:
            how = take(how, key, value, tool)
            if how is None:
                return 1
    assert how is not None
    if len(scan.rest) > 1:
        _usage(session)
        return 1
    if image_opts and format_name is not None:
        tool.error("--image-opts and -f are mutually exclusive")
        return 1
    try:
        if scan.rest:
            name: str | None = scan.rest[0]
            options: dict[str, str] = {}
            if image_opts:
                options, name = parse_options(scan.rest[0], tool), None
            elif format_name is not None:
                options = {"driver": format_name}
            if session.open(name, how, options):
                return 1
        failed = False
        for line in lines or _typed(session):
            if commands.run(session, line):
                failed = True
            if session.done:
                break
    except FatalError:
        session.abandon()
        raise
    finally:
        session.end()
    return int(failed)


def _usage(session: Session) -> None:
    from .help import usage

    usage(session)


def _print_version(session: Session) -> None:
    from ...version import version

    number = f"7.2.0 (vm-core {version()})" if session.tool.peer else version()
    session.out.write(f"{session.program} version {number}\n")


def _typed(session: Session) -> Iterator[str]:
    """Lines from standard input, after a prompt each, until its end. Requests that finish meanwhile are reported."""
    from .lines import Lines

    source = Lines(sys.stdin.fileno())
    while True:
        session.out.write(f"{session.program}> ")
        session.out.flush()
        line = source.next(session)
        if line is None:
            return
        yield line


if __name__ == "__main__":
    sys.exit(main())
