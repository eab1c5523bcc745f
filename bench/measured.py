"""Commands run and measured: wall time, processor time, peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import attrs

from .interleave import interleave


@attrs.frozen
class Run:
    """What one run of a command took."""

    wall: float
    #: Seconds of processor time, of all threads.
    cpu: float
    #: Peak resident memory, bytes.
    memory: int


#: Starts the command and tells what it took. A small process of its own: on Linux the peak memory of a program that a
#: larger one has started is at least the larger one's.
_LAUNCHER = """
import os, sys, time
begin = time.perf_counter()
child = os.fork()
if not child:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.execvp(sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
wall = time.perf_counter() - begin
print(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, os.waitstatus_to_exitcode(status))
"""


def run(command: Sequence[str | Path]) -> Run:
    """Run *command* to its end and measure it. Raises CalledProcessError where it fails."""
    words = [str(word) for word in command]
    # The developer's switches for Python (no compiled files, no buffers) are not what users run with.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *words]
    done = subprocess.run(launcher, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    wall, cpu, memory, code = done.stdout.split()
    if int(code):
        raise subprocess.CalledProcessError(int(code), words)
    return Run(float(wall), float(cpu), int(memory))


#: Bytes of memory that are kept at hand: more than any run takes.
_KEPT = 6 << 30
#: Takes so much memory, gives all of it back but one page of each MiB, and holds those until its input ends.
_COMB = """
import mmap, sys
NOHUGEPAGE, POPULATE_WRITE, TOOTH = 15, 23, 1 << 20
size = int(sys.argv[1])
memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(NOHUGEPAGE)
memory.madvise(POPULATE_WRITE)
for at in range(0, size, TOOTH):
    memory.madvise(mmap.MADV_DONTNEED, at + mmap.PAGESIZE, TOOTH - mmap.PAGESIZE)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def warm() -> Iterator[None]:
    """Keep free memory at hand while this lasts.

    A virtual machine may give its free pages back to the host, in blocks of 2 MiB and more. Whoever needs them again
    waits for the host: a copy into the page cache then takes four times as long, and which contestant is hit depends
    on its turn. Free memory of which a page in each MiB is in use stays, and Linux prefers such pieces to whole blocks.
    """
    if sys.platform != "linux":
        yield
        return
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    size = min(_KEPT, free // 2) >> 20 << 20
    command = [sys.executable, "-I", "-S", "-c", _COMB, str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as comb:
        assert comb.stdout is not None
        comb.stdout.readline()  # nothing where the kernel is too old for it: then memory is as it is
        yield


@attrs.frozen
class Contest:
    """The medians of the peer's runs and of ours, and of each the run that took the shortest time."""

    title: str
    goal: float | None
    peer: Run
    ours: Run
    peer_best: float
    ours_best: float

    @property
    def ratio(self) -> float:
        """Ours over theirs: below 1 is faster."""
        return self.ours.wall / self.peer.wall

    @property
    def best(self) -> float:
        """The same of the fastest runs, which the machine's other work disturbed least."""
        return self.ours_best / self.peer_best

    @property
    def memory(self) -> float:
        """The same of peak memory."""
        return self.ours.memory / self.peer.memory


def contest(
    title: str,
    goal: float | None,
    peer: Sequence[str | Path],
    ours: Sequence[str | Path],
    *,
    rounds: int,
    before: Callable[[], None] = lambda: None,
) -> Contest:
    """Run two commands in turns, each after *before* (removing what the last one made, say)."""
    runs: dict[str, list[Run]] = {"peer": [], "ours": []}

    def contestant(name: str, command: Sequence[str | Path]) -> Callable[[], float]:
        def work() -> float:
            before()
            os.sync()  # what waits to be written would slow down whoever writes next
            runs[name].append(run(command))
            return runs[name][-1].wall

        return work

    interleave({"peer": contestant("peer", peer), "ours": contestant("ours", ours)}, rounds)
    best = {name: min(run.wall for run in done) for name, done in runs.items()}
    return Contest(title, goal, _median(runs["peer"]), _median(runs["ours"]), best["peer"], best["ours"])


def _median(runs: Sequence[Run]) -> Run:
    from statistics import median

    return Run(
        median(run.wall for run in runs), median(run.cpu for run in runs), int(median(run.memory for run in runs))
    )
