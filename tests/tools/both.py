"""The same command run by the peer's tool and by ours, in two equal folders, and what came of it compared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from vmtest import program

#: Thousands of cases instead of dozens.
LONG = os.environ.get("VM_LONG", "") not in ("", "0")


class Outcome(NamedTuple):
    """What a command said and left behind."""

    code: int
    out: str
    err: str


class Both:
    """Two folders with the same files: ``peer`` is worked on by qemu-img, ``ours`` by vm-img under its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.peer, self.ours = folder / "peer", folder / "ours"
        self.img = program("qemu-img", "qemu-utils")
        self.io = program("qemu-io", "qemu-utils")
        links = folder / "links"
        links.mkdir()
        self.link = links / "qemu-img"
        self.link.symlink_to(Path(sys.executable).with_name("vm-img"))
        self._environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        self.peer.mkdir()

    def make(self, *arguments: str) -> None:
        """Run qemu-img in the peer's folder, to make what the commands work on."""
        subprocess.run([self.img, *arguments], cwd=self.peer, check=True, capture_output=True)

    def write(self, image: str, *commands: str, options: tuple[str, ...] = ()) -> None:
        """Run qemu-io commands on an image in the peer's folder."""
        words = [word for command in commands for word in ("-c", command)]
        subprocess.run([self.io, *options, *words, image], cwd=self.peer, check=True, capture_output=True)

    def start(self) -> None:
        """Copy what was made, so that both begin with the same."""
        shutil.rmtree(self.ours, ignore_errors=True)
        subprocess.run(["cp", "-a", "--sparse=auto", self.peer, self.ours], check=True)

    def run(self, *arguments: str, timeout: int = 120) -> tuple[Outcome, Outcome]:
        """The command in both folders."""
        return self._run(self.img, self.peer, arguments, timeout), self._run(
            str(self.link), self.ours, arguments, timeout
        )

    def _run(self, tool: str, folder: Path, arguments: tuple[str, ...], timeout: int) -> Outcome:
        done = subprocess.run(
            [tool, *arguments], cwd=folder, capture_output=True, text=True, timeout=timeout, env=self._environment
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def same(self, *arguments: str) -> Outcome:
        """Assert that both say the same and end with the same status."""
        peer, ours = self.run(*arguments)
        assert ours == peer, f"qemu-img {' '.join(arguments)}"
        return peer

    def same_files(self, *names: str) -> None:
        """Assert that files are the same in both folders, byte by byte."""
        for name in names:
            done = subprocess.run(["cmp", self.peer / name, self.ours / name], capture_output=True, text=True)
            assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"

    def same_contents(self, name: str, *options: str) -> None:
        """Assert that images hold the same, and that the peer finds nothing wrong with ours."""
        words = [self.img, "compare", *options, str(self.peer / name), str(self.ours / name)]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
        done = subprocess.run([self.img, "check", self.ours / name], capture_output=True, text=True)
        assert done.returncode in (0, 63), f"{name}: {done.stdout}{done.stderr}"
