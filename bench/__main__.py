"""``python -m bench [NAME…]``: print a table of ratios against the peer (below 1: faster than it).

``tools`` stands for all of vm-img's benchmarks, ``requests`` for those of the host-I/O engines, ``boot`` for those of
whole machines.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from . import measured
from .interleave import Result, interleave

if TYPE_CHECKING:
    from .tools import Bench

ROOT = Path(__file__).resolve().parents[1]


BOOT = ("grub-ide", "grub-virtio", "kernel", "reads")


def main() -> int:
    """Run the chosen benchmarks."""
    # The guests are made by the same code as the tests' guests.
    sys.path.insert(0, str(ROOT / "tests"))

    from .requests import BENCHES as REQUESTS
    from .tools import BENCHES as TOOLS

    benches = {**TOOLS, **REQUESTS}
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    known = ", ".join(("boot", *BOOT, "tools", *TOOLS, "requests", *REQUESTS))
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {known} (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="a folder for images, kept for the next run (default: temporary)")
    parser.add_argument("--cold", action="store_true", help="leave the machine's free memory as it is")
    options = parser.parse_args()
    names: list[str] = []
    for name in options.names or ["boot", "tools", "requests"]:
        names += {"boot": BOOT, "tools": tuple(TOOLS), "requests": tuple(REQUESTS)}.get(name, (name,))
    for name in names:
        if name not in BOOT and name not in benches:
            parser.error(f"no benchmark {name!r}; there is {known}")
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        if any(name in BOOT for name in names):
            boots(work, [name for name in names if name in BOOT], options.rounds)
        if any(name in benches for name in names):
            with nullcontext() if options.cold else measured.warm():
                images(work, {name: benches[name] for name in names if name in benches}, options.rounds)
    return 0


def boots(work: Path, names: list[str], rounds: int) -> None:
    """Whole machines."""
    from vmtest.linux import linux_parts

    from . import boot

    table = Table("work", "qemu, s", "vm, s", "ratio", title="medians, interleaved")
    for name in names:
        if name.startswith("grub-"):
            add(table, f"firmware to GRUB's menu, {name[5:]}", interleave(boot.grub(work, name[5:]), rounds))
        elif name == "kernel":
            add(table, "i386 kernel to its shell", interleave(boot.kernel(work, linux_parts()), rounds))
        else:
            first, second = boot.guest_reads(work, linux_parts())
            add(table, "guest reads 64 MiB in order, virtio-blk", interleave(first, 1))
            add(table, "guest reads 400 random 4 KiB, virtio-blk", interleave(second, 1))
    Console(width=110).print(table)


def images(work: Path, benches: dict[str, Bench], rounds: int) -> None:
    """vm-img and vm-io."""
    from .images import Images

    columns = ("work", "qemu, s", "vm, s", "ratio", "best", "goal", "cpu ratio", "memory")
    table = Table(*columns, title="medians, interleaved; ratios vm/qemu, best: of the fastest runs")
    found = Images(work)
    for name, bench in benches.items():
        try:
            one = bench(found, rounds)
        except subprocess.CalledProcessError as error:
            table.add_row(name, "", "", "", "", f"failed: {error.returncode}")
            continue
        goal = "" if one.goal is None else f"{one.goal:.2f}{'' if one.ratio <= one.goal else ' missed'}"
        table.add_row(
            one.title,
            f"{one.peer.wall:.3f}",
            f"{one.ours.wall:.3f}",
            f"{one.ratio:.2f}",
            f"{one.best:.2f}",
            goal if goal else f"+{(one.ours.cpu - one.peer.cpu) * 1000:.0f} ms cpu (60)",
            f"{one.ours.cpu / max(one.peer.cpu, 0.001):.2f}",
            f"{one.memory:.2f}",
        )
    Console(width=120).print(table)


def add(table: Table, title: str, results: list[Result]) -> None:
    """A row for one comparison."""
    by_name = {r.name: r.median for r in results}
    ratio = by_name["vm"] / by_name["qemu"]
    table.add_row(title, f"{by_name['qemu']:.2f}", f"{by_name['vm']:.2f}", f"{ratio:.2f}")


if __name__ == "__main__":
    sys.exit(main())
