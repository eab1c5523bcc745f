"""``python -m bench [NAME…]``: print a table of ratios against the peer (below 1: faster than it)."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .interleave import Result, interleave

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Run the chosen benchmarks."""
    # The guests are made by the same code as the tests' guests.
    sys.path.insert(0, str(ROOT / "tests"))
    from vmtest.linux import linux_parts

    from . import boot

    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("names", nargs="*", help="grub-ide, grub-virtio, kernel, reads (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    names = options.names or ["grub-ide", "grub-virtio", "kernel", "reads"]
    table = Table("work", "qemu, s", "vm, s", "ratio", title="medians, interleaved")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in names:
            if name.startswith("grub-"):
                add(
                    table,
                    f"firmware to GRUB's menu, {name[5:]}",
                    interleave(boot.grub(work, name[5:]), options.rounds),
                )
            elif name == "kernel":
                add(table, "i386 kernel to its shell", interleave(boot.kernel(work, linux_parts()), options.rounds))
            elif name == "reads":
                first, second = boot.guest_reads(work, linux_parts())
                add(table, "guest reads 64 MiB in order, virtio-blk", interleave(first, 1))
                add(table, "guest reads 400 random 4 KiB, virtio-blk", interleave(second, 1))
            else:
                parser.error(f"no benchmark {name!r}")
    Console(width=110).print(table)
    return 0


def add(table: Table, title: str, results: list[Result]) -> None:
    """A row for one comparison."""
    by_name = {r.name: r.median for r in results}
    ratio = by_name["vm"] / by_name["qemu"]
    table.add_row(title, f"{by_name['qemu']:.2f}", f"{by_name['vm']:.2f}", f"{ratio:.2f}")


if __name__ == "__main__":
    sys.exit(main())
