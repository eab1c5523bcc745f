"""The live boot status on a terminal, drawn by rich. Only this module and the plugin table import rich."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.rule import Rule
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from .picture import Layer, drive_layers, size
from .status import PHASES, Assembly, Phase, Status

_ROLE_STYLES = {
    "frontend": "bold cyan",
    "backend": "magenta",
    "format": "bold green",
    "protocol": "blue",
    "backing": "bold yellow",
    "medium": "dim",
}

#: Times per second that the picture is drawn.
_RATE = 10
#: Seconds without a new phase after which the console is shown: while the firmware looks for something to boot, and
#: when it has found it and nothing we know announces itself.
_PATIENCE = {"firmware": 10.0, "boot-device": 1.5}

#: What firmware sends first to a terminal it knows nothing about: reset, no line wrap, clear, plain colours. The
#: terminal is in order, and the picture should stay.
_CLEARING = re.compile(rb"\A(?:\x1bc|\x1b\[\?7l|\x1b\[2J|\x1b\[H|\x1b\[0m)+")

_CLEAR = re.compile(rb"\x1bc|\x1b\[[0-3]?J")


class RichStatus(Status):
    """A picture of the stack, the phases with their times, and the drives' counters, redrawn while the guest boots."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(highlight=False)
        self._picture: RenderableType | None = None
        self._spinner = Spinner("dots", style="cyan")
        self._previous: dict[str, tuple[float, int, int]] = {}
        self._rates: dict[str, tuple[float, float]] = {}
        self._stopping = threading.Lock()
        self._over = False
        self._final = False
        self._wanted = threading.Event()
        self._live = Live(
            get_renderable=self.render,
            console=self.console,
            refresh_per_second=_RATE,
            transient=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def assembled(self, assembly: Assembly) -> None:
        super().assembled(assembly)
        self._picture = _tree(assembly)

    def event(self, name: str, data: dict[str, Any]) -> None:
        super().event(name, data)
        if name in ("STOP", "SHUTDOWN", "INTERNAL_ERROR"):
            self.want_console()

    def want_console(self) -> None:
        self._wanted.set()

    def await_console(self, data: bytes) -> bytes:
        """Hold the firmware's messages back: the picture says the same. A boot loader or kernel gets the terminal."""
        while not self._wanted.wait(0.05):
            with self._lock:
                phase = self.phases[-1]
            patience = _PATIENCE.get(phase.name, 0.0) if phase.text else 0.0
            if time.monotonic() - phase.began >= patience:
                break
        self.hand_over()
        data = _CLEARING.sub(b"", data)
        if _CLEAR.search(data):
            # A boot loader clears the screen: push the picture up, where scrolling back finds it.
            self.console.file.write("\n" * self.console.height)
            self.console.file.flush()
        return data

    def warn(self, text: str) -> None:
        text = " ".join(text.removeprefix("WARNING: ").split())
        self.console.print(Text(f"vm: warning: {text}", style="yellow"))

    def hand_over(self) -> None:
        with self._stopping:
            if self._over:
                return
            self._over = self._final = True
            self._live.stop()
            if self.assembly is not None and self.assembly.console_here:
                self.console.print(Rule(Text("guest console · Ctrl-a h for help", style="dim"), style="dim"))

    def close(self) -> None:
        """Leave what was drawn, without the line that announces the guest's console; nothing if there is no machine."""
        self.want_console()
        with self._stopping:
            if not self._over:
                self._over = self._final = True
                self._live.transient = self.failed and self.assembly is None
                self._live.stop()

    def render(self) -> RenderableType:
        """The whole picture as of now."""
        parts: list[RenderableType] = []
        if self._picture is not None:
            parts += [self._picture, ""]
        with self._lock:
            phases = list(self.phases)
        parts.append(self._phase_table(phases))
        if self.assembly is not None:
            if self.assembly.drives:
                parts += ["", self._drive_table()]
            if not self._final:
                hint = "paused: Ctrl-a c, then cont" if self.paused else "Ctrl-a x ends the machine"
                where = f"console: {self.assembly.console} · " if self.assembly.console else ""
                parts += ["", Text(f"  {where}{hint} · Ctrl-a c monitor", style="dim")]
        return Group(*parts)

    def _phase_table(self, phases: list[Phase]) -> RenderableType:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(width=2)
        table.add_column(no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column(justify="right", no_wrap=True)
        now = time.monotonic()
        for phase in phases:
            done = phase.ended is not None
            mark: RenderableType = self._spinner
            if done or self._final:
                failed = self.failed and phase is phases[-1]
                mark = Text("✗", style="bold red") if failed else Text("✓", style="green")
            elapsed = (phase.ended or now) - phase.began
            table.add_row(
                mark,
                Text(PHASES.get(phase.name, phase.name), style="" if done else "bold"),
                Text(phase.text, style="dim" if done else ""),
                Text(_seconds(elapsed), style="dim" if done else "cyan"),
            )
        return Padding(table, (0, 0, 0, 2))

    def _drive_table(self) -> RenderableType:
        assert self.assembly is not None
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("drive", no_wrap=True)
        for column in ("reads", "read", "writes", "written", "flushes", "now"):
            table.add_column(column, justify="right", no_wrap=True)
        now = time.monotonic()
        for drive in self.assembly.drives:
            stats = drive.backend.stats
            rate = self._rate(drive.id, now, stats.read_bytes + stats.written_bytes)
            table.add_row(
                Text(drive.id, style="cyan"),
                f"{stats.reads:,}",
                size(stats.read_bytes),
                f"{stats.writes:,}",
                size(stats.written_bytes),
                f"{stats.flushes:,}",
                Text(f"{size(int(rate))}/s" if rate and not self._final else "–", style="dim"),
            )
        return Padding(table, (0, 0, 0, 2))

    def _rate(self, name: str, now: float, total: int) -> float:
        """Bytes per second of a drive, over about half a second."""
        then, before, _ = self._previous.get(name, (now, total, 0))
        if now - then >= 0.5:
            self._rates[name] = ((total - before) / (now - then), now)
            self._previous[name] = (now, total, 0)
        elif name not in self._previous:
            self._previous[name] = (now, total, 0)
        return self._rates.get(name, (0.0, 0.0))[0]


def _seconds(elapsed: float) -> str:
    return f"{elapsed * 1000:.0f} ms" if elapsed < 1 else f"{elapsed:.1f} s"


def _tree(assembly: Assembly) -> RenderableType:
    tree = Tree(Text(assembly.title, style="bold"), guide_style="dim")
    for drive in assembly.drives:
        _grow(tree, drive_layers(drive))
    return tree


def _grow(tree: Tree, layer: Layer) -> None:
    style = _ROLE_STYLES.get(layer.role, "bold yellow")
    text = Text()
    if layer.role not in ("frontend", "format"):
        text.append(f"{layer.role} ", style="dim")
    text.append(layer.name, style=style)
    if layer.detail:
        text.append(f"  {layer.detail}")
    branch = tree.add(text)
    for below in layer.below:
        _grow(branch, below)
