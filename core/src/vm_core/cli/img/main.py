"""``vm-img``: find the subcommand, run it, tell its errors.

Called as ``qemu-img`` (a link) the program is the peer to the letter. Nothing is imported here that a run may not use.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import FatalError, VmError
from ..getopt import MISSING, UNKNOWN, Getopt
from .common import Exit, Failure, Tool

if TYPE_CHECKING:
    from types import ModuleType

#: Subcommand → module of this package. Those in EXTRA the peer does not have.
COMMANDS: dict[str, str] = {
    "amend": "amend",
    "bench": "bench",
    "bitmap": "bitmap",
    "check": "check",
    "commit": "commit",
    "compare": "compare",
    "convert": "convert",
    "create": "create",
    "dd": "dd",
    "info": "info",
    "map": "map",
    "measure": "measure",
    "snapshot": "snapshot",
    "rebase": "rebase",
    "resize": "resize",
}
EXTRA: dict[str, str] = {
    "compact": "compact",
    "completion": "completion",
    "convert-inplace": "convert_inplace",
    "verify": "verify",
}

_LONG = {"help": "h", "version": "V", "trace:": "T"}

#: The release of QEMU whose command line this is.
PEER_VERSION = "7.2.0"

#: The status of a program that was interrupted, as shells give it for SIGINT.
INTERRUPTED = 130


def main(words: Sequence[str] | None = None, program: str | None = None) -> int:
    """Run the program with *words* (the process's arguments), called *program*, and return its exit status.

    ``VM_DEBUG=1`` keeps the traceback of errors.
    """
    if program is None:
        program = os.path.basename(sys.argv[0]) or "vm-img"
    tool = Tool(program)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # file names are bytes: they go out as they came in
            reconfigure(errors="surrogateescape")
    if hasattr(sys.stdout, "reconfigure") and not sys.stdout.isatty():
        # Whole at the end, like the peer's, also under PYTHONUNBUFFERED: both streams mix in its order then.
        sys.stdout.reconfigure(write_through=False)
    try:
        code = _run(tool, list(sys.argv[1:] if words is None else words))
        sys.stdout.flush()
        return code
    except Exit as end:
        return _end(end.code)
    except FatalError as error:
        code = _end(1)
        sys.stderr.write(f"{error}\n")
        return code
    except BrokenPipeError:
        # The reader of our output has gone; nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (VmError, OSError) as error:
        if os.environ.get("VM_DEBUG"):
            raise
        tool.tell(error)
        return _end(error.code if isinstance(error, Failure) else 1)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        tool.conclude()
        return _end(INTERRUPTED)


def _end(code: int) -> int:
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _run(tool: Tool, words: list[str]) -> int:
    scan = Getopt(
        words,
        "hVT:",
        _LONG,
        exact=None if tool.peer else {"trust:": "trust", "progress:": "progress"},
        permute=False,
        program=sys.argv[0] if tool.program == os.path.basename(sys.argv[0]) else tool.program,
    )
    for key, value in scan:
        if key == "h":
            from .help import show

            show(tool)
            return 0
        if key == "V":
            print(version_text(tool))
            return 0
        if key == "T":
            from .trace import accept

            accept(tool, value)
        elif key == "trust":
            tool.trust.append(value)
        elif key == "progress":
            tool.choose_progress(value)
        elif key == UNKNOWN:
            tool.usage(f"unrecognized option '{value}'")
        elif key == MISSING:
            tool.usage(f"missing argument for option '{value}'")
    if not scan.rest:
        tool.usage("Not enough arguments")
    name, *rest = scan.rest
    module = _module(tool, name)
    tool.command = name
    code: int = module.run(rest, tool)
    return code


def _module(tool: Tool, name: str) -> ModuleType:
    where = COMMANDS.get(name) or (None if tool.peer else EXTRA.get(name))
    if where is None:
        hint = ""
        if not tool.peer:
            import difflib

            close = difflib.get_close_matches(name, (*COMMANDS, *EXTRA), 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there is: {', '.join(sorted((*COMMANDS, *EXTRA)))}"
        tool.usage(f"Command not found: {name}", hint=hint)
    from importlib import import_module

    try:
        return import_module(f"{__package__}.{where}")
    except ModuleNotFoundError as error:
        if error.name == f"{__package__}.{where}":
            raise Failure(f"{name}: not part of this version") from error
        raise


def version_text(tool: Tool) -> str:
    """The line of ``--version``; called by the peer's name, the version whose behaviour this is."""
    from ...version import version

    if tool.peer:
        return f"{tool.program} version {PEER_VERSION} (vm-core {version()})"
    return f"{tool.program} {version()}"


if __name__ == "__main__":
    sys.exit(main())
