"""``vm``: a virtual machine assembled from what is installed, with the command line of qemu-system-x86_64.

This module parses, calls and prints; the work is elsewhere. Imports stay inside the functions that need them, so that
asking for the version or the plugins costs little.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import FatalError, VmError

if TYPE_CHECKING:
    from .arguments import CommandLine


def main(words: Sequence[str] | None = None) -> int:
    """Run ``vm`` with *words* (the process's arguments) and return its exit status.

    Every error that a user, an image or a plugin can cause is one line on standard error and status 1; with
    ``VM_DEBUG=1`` it keeps its traceback.
    """
    try:
        return _main(sys.argv[1:] if words is None else words)
    except (VmError, OSError, FatalError) as error:
        if os.environ.get("VM_DEBUG"):
            raise
        if isinstance(error, BrokenPipeError):
            # The reader of our output has gone; nobody is left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        print(f"vm: {_sentence(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, VmError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _main(words: Sequence[str]) -> int:
    if list(words) in (["--version"], ["-version"]):
        _print_version()
        return 0
    from . import arguments

    line = arguments.parse(words)
    if "help" in line:
        print(arguments.usage())
    elif "version" in line:
        _print_version()
    elif "list-plugins" in line:
        return _list_plugins(line)
    elif "completion" in line:
        from .completion import script

        print(script(line.value("completion") or ""))
    elif (text := _asked_help(line)) is not None:
        print(text)
    else:
        from .run import run

        return run(line)
    return 0


def _print_version() -> None:
    from ..version import version

    print(f"vm-core {version()}")


def _list_plugins(line: CommandLine) -> int:
    from .. import plugins
    from . import listing

    kind = listing.parse_kind(line.value("list-plugins") or "")
    registry = plugins.PluginRegistry()
    registry.discover()
    if "verify" in line or plugins.strict():
        registry.verify()
    print(
        listing.plugins(kind, as_json="json" in line, terminal=sys.stdout.isatty(), plugin_registry=registry),
        flush=True,
    )
    if plugins.strict():
        registry.require_health()
    return 0


def _asked_help(line: CommandLine) -> str | None:
    """The text of the first ``-OPTION help`` or ``-device NAME,help`` of *line*."""
    for given in line.given:
        first, *rest = given.value.split(",")
        name = first.rpartition("=")[2]
        if name not in ("help", "?") and not {"help", "?"} & set(rest):
            continue
        from . import help

        text = help.text(given.name, name)
        if text is not None:
            return text
    return None


if __name__ == "__main__":
    sys.exit(main())
