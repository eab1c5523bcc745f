"""Running vm-io and the peer, qemu-io, side by side on equal images: what drivers are compared with.

from vm_core.testing.iopeer import assert_same, needs_peer

@needs_peer
def test_read(tmp_path):
    assert_same(tmp_path, ["create -q -f raw a.img 1M"], ["-f", "raw", "-c", "read 0 4k", "a.img"])
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
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
    """A command line that runs vm-io under the peer's name, by a script put into *directory*."""
    link = directory / "qemu-io"
    if not link.exists():
        link.write_text(f"#!{sys.executable}\nimport sys\nfrom vm_core.cli.io.main import main\nsys.exit(main())\n")
        link.chmod(0o755)
    return [str(link)]


def make(directory: Path, *commands: str) -> None:
    """Make images with the peer: each command is the words after ``qemu-img``."""
    for command in commands:
        subprocess.run([str(PEER_IMG), *command.split()], cwd=directory, check=True, capture_output=True, timeout=60)


def need_formats(images: Sequence[str], words: Sequence[str]) -> None:
    """Skip the test where *words* are about an image of a format that is not installed here."""
    made = {}
    for command in images:
        parts = command.split()
        if "-f" in parts:
            made.update(dict.fromkeys(parts, parts[parts.index("-f") + 1]))
    for format in {*made.values()} - {"raw"}:
        wanted = any(format in word or made.get(word) == format for word in words)
        if wanted and find_spec(f"vm_{format}") is None:
            pytest.skip(f"needs vm-{format}")


def both(
    directory: Path,
    images: Sequence[str],
    words: Sequence[str],
    *,
    typed: str | None = None,
    files: Mapping[str, str | bytes] | None = None,
) -> tuple[Outcome, Outcome]:
    """What the peer and vm-io do with *words* (and what is *typed*), each beside its own *images* and text *files*."""
    need_formats(images, words)
    found = []
    for which in ("peer", "ours"):
        place = directory / which
        place.mkdir()
        make(place, *images)
        for name, data in (files or {}).items():
            (place / name).write_bytes(data.encode() if isinstance(data, str) else data)
        found.append(run([str(PEER)] if which == "peer" else ours(directory), words, place, typed=typed))
    peer, mine = found
    return peer, mine._replace(err=mine.err.replace(f"{directory}/qemu-io:", f"{PEER}:"))


def assert_same(
    directory: Path,
    images: Sequence[str],
    words: Sequence[str],
    *,
    typed: str | None = None,
    files: Mapping[str, str | bytes] | None = None,
) -> None:
    """Both print the same, end the same way and leave the same files."""
    peer, mine = both(directory, images, words, typed=typed, files=files)
    assert (mine.out, mine.err, mine.status) == (peer.out, peer.err, peer.status)
    assert mine.files == peer.files
