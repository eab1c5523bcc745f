"""``-p``: how far a long operation is.

* ``text``: what the peer prints, ``    (12.34/100%)`` and a carriage return, on standard output; the way of pipes;
* ``bar``: a bar with rate and remaining time on standard error, on a terminal;
* ``json``: a line ``{"done": BYTES, "total": BYTES}`` on standard error for each step;
* ``none``.

``--progress MODE`` chooses; without it a terminal gets a bar and everything else the text.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from .common import Tool

MODES = ("text", "bar", "json", "none")


class Progress:
    """Call it with what is done and what there is. The base says nothing."""

    def __call__(self, done: int, total: int) -> None:
        """*done* of *total* units (bytes, mostly) are done."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(failed=kind is not None)

    def end(self, *, failed: bool) -> None:
        """No more will be said."""


class Text(Progress):
    """The peer's text. Nothing is said for steps of less than *step* per cent."""

    def __init__(self, step: float = 1.0) -> None:
        self._step = step
        self._last = 0.0
        self._show(0.0)

    def __call__(self, done: int, total: int) -> None:
        part = 100.0 * done / total if total else 100.0
        if not 0.0 <= part - self._last < self._step or part >= 100.0 > self._last:
            self._last = part
            self._show(part)

    def _show(self, part: float) -> None:
        sys.stdout.write(f"    ({part:3.2f}/100%)\r")
        sys.stdout.flush()

    def end(self, *, failed: bool) -> None:
        if not failed:
            self._show(100.0)
        sys.stdout.write("\n")
        sys.stdout.flush()


class Json(Progress):
    """Lines for programs."""

    def __init__(self) -> None:
        self._last = (-1, -1)

    def __call__(self, done: int, total: int) -> None:
        if (done, total) != self._last:
            self._last = (done, total)
            sys.stderr.write(f'{{"done": {done}, "total": {total}}}\n')
            sys.stderr.flush()


class Bar(Progress):
    """A bar on a terminal."""

    def __init__(self, label: str) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import (
            Progress as Rich,
        )

        self._rich: Any = Rich(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>5.1f} %"),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._rich.add_task(label, total=None)
        self._rich.start()

    def __call__(self, done: int, total: int) -> None:
        self._rich.update(self._task, completed=done, total=total)

    def end(self, *, failed: bool) -> None:
        self._rich.stop()


def make(tool: Tool, enabled: bool, step: float = 1.0) -> Progress:
    """The progress of one operation; the text leaves out steps of less than *step* per cent."""
    mode = tool.progress_mode
    if not enabled and mode != "json":
        return Progress()
    if not mode:
        mode = "bar" if not tool.peer and sys.stderr.isatty() and sys.stdout.isatty() else "text"
    if mode == "text":
        return Text(step)
    if mode == "json":
        return Json()
    return Bar(tool.command) if mode == "bar" else Progress()
