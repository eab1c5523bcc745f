"""Running vm-io and the peer side by side on equal images."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

PEER = shutil.which("qemu-io")
PEER_IMG = shutil.which("qemu-img")

needs_peer = pytest.mark.skipif(PEER is None or PEER_IMG is None, reason="needs qemu-io and qemu-img")

#: What depends on the moment: durations and rates.
_TIMES = re.compile(r"(ops; )[0-9:. sec]+ \([0-9.e+inf]+ [KMGTPEiB]*(?:bytes)?/sec and [0-9.e+inf]+ ops/sec\)")
_BARE = re.compile(r"^(\d+,\d+),[\d:.]+,[\d.]+,[\d.]+$", re.M)
_NODE = re.compile(r"#block\d+")


class Outcome(NamedTuple):
    """What a run printed, its exit status, and the files that it left."""

    out: str
    err: str
    status: int
    files: dict[str, bytes]


def masked(text: str) -> str:
    """*text* without what depends on the moment."""
    return _NODE.sub("#blockN", _BARE.sub(r"\1,T,R,R", _TIMES.sub(r"\1T", text)))


def run(program: Sequence[str], words: Sequence[str], directory: Path, *, typed: str | None = None) -> Outcome:
    """Run *program* in *directory*, with *typed* on its standard input."""
    done = subprocess.run(
        [*program, *words],
        cwd=directory,
        input=(typed or "").encode(),
        capture_output=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}
    return Outcome(
        masked(done.stdout.decode(errors="surrogateescape")),
        masked(done.stderr.decode(errors="surrogateescape")),
        done.returncode,
        files,
    )


def ours(directory: Path) -> list[str]:
    """A command line that runs vm-io under the peer's name."""
    link = directory / "qemu-io"
    if not link.exists():
        link.write_text(f"#!{sys.executable}\nimport sys\nfrom vm_core.cli.io.main import main\nsys.exit(main())\n")
        link.chmod(0o755)
    return [str(link)]


def make(directory: Path, *commands: str) -> None:
    """Make images with the peer: each command is the words after ``qemu-img``."""
    for command in commands:
        subprocess.run([str(PEER_IMG), *command.split()], cwd=directory, check=True, capture_output=True, timeout=60)
