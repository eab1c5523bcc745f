"""Runs one command line by the peer and by this program, in twin directories, and compares all that can be seen."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

QEMU_IMG = shutil.which("qemu-img") or ""
QEMU_IO = shutil.which("qemu-io") or ""

needs_peer = pytest.mark.skipif(not QEMU_IMG or not QEMU_IO, reason="qemu-img and qemu-io are not installed")

#: What differs from run to run.
_VARYING = (
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "DATE"),
    (re.compile(r'("date-n?sec": )\d+'), r"\1N"),
    (re.compile(r"#block\d+"), "NODE"),
    (re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"), "UUID"),
)


class Outcome(NamedTuple):
    """What a program did."""

    code: int
    out: str
    err: str

    def plain(self) -> Outcome:
        """Without what differs from run to run."""
        out, err = self.out, self.err
        for pattern, word in _VARYING:
            out, err = pattern.sub(word, out), pattern.sub(word, err)
        return Outcome(self.code, out, err)


def theirs(words: list[str], where: Path) -> Outcome:
    """The peer's."""
    done = subprocess.run([QEMU_IMG, *words], cwd=where, capture_output=True, timeout=60)
    return Outcome(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def ours(words: list[str], where: Path) -> Outcome:
    """This program's, called by the peer's name, within this process."""
    from vm_core.cli.img.main import main
    from vm_core.crypto import secrets

    secrets.clear()
    before = Path.cwd()
    out, err = io.StringIO(), io.StringIO()
    os.chdir(where)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words, "qemu-img")
    finally:
        os.chdir(before)
    return Outcome(code, out.getvalue(), err.getvalue())


def as_process(words: list[str], where: Path, program: str = "qemu-img", **environ: str) -> Outcome:
    """This program's, as a process of its own."""
    start = f"import sys; from vm_core.cli.img.main import main; sys.exit(main(program={program!r}))"
    done = subprocess.run(
        [sys.executable, "-c", start, *words],
        cwd=where,
        capture_output=True,
        timeout=60,
        env={**os.environ, **environ},
    )
    return Outcome(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))


def peer(line: str, where: Path) -> None:
    """Run a line of the peer's own programs to prepare something; ``io:`` begins one of qemu-io."""
    words = shlex.split(line)
    if words[0] == "io:":
        words = [QEMU_IO, *words[1:]]
    else:
        words = [QEMU_IMG, *words]
    for _ in range(10):
        done = subprocess.run(words, cwd=where, capture_output=True, timeout=60, text=True)
        if "Unable to get accurate CPU usage" not in done.stderr:  # LUKS on a busy machine: not for us to judge
            break
    assert done.returncode == 0, (line, done.stderr)


def contents(where: Path) -> dict[str, bytes]:
    """Every regular file below *where*."""
    return {
        str(path.relative_to(where)): path.read_bytes()
        for path in sorted(where.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def compare(line: str, base: Path, tmp_path: Path, *, files: bool = True) -> None:
    """Run *line* by both in copies of *base*; everything must be the same, the *files* afterwards too."""
    words = shlex.split(line)
    results = []
    for name, run in (("theirs", theirs), ("ours", ours)):
        where = tmp_path / name / "x"
        shutil.copytree(base, where, symlinks=True)
        results.append((run(words, where).plain(), contents(where) if files else {}))
    (expected, expected_files), (found, found_files) = results
    assert found == expected
    assert sorted(found_files) == sorted(expected_files)
    for name, data in expected_files.items():
        assert found_files[name] == data, f"{name} differs from byte {_first_difference(found_files[name], data):#x}"


def _first_difference(one: bytes, two: bytes) -> int:
    for at, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return at
    return min(len(one), len(two))
