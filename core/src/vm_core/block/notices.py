"""Sentences that a driver has to tell whoever runs the program, while a request goes on or fails.

They are whole lines (QEMU's own, where it has them), not prefixed by the program's name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

#: Where the lines go; a program may put something else here.
sink: Callable[[str], None] | None = None


#: The name of the program, where it has one that its messages begin with.
program: str = ""


def report(text: str) -> None:
    """Tell a line that begins with the program's name, as its own errors do."""
    notice(f"{program}: {text}" if program else text)


def notice(text: str) -> None:
    """Tell one line; on standard error unless :data:`sink` says otherwise."""
    if sink is not None:
        sink(text)
    else:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
