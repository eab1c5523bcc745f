"""What the tests that cross packages share: finding peer programs, running ``vm``, and making guests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Long forms of the suites run (thousands of operations, every combination).
LONG = os.environ.get("VM_LONG") == "1"
#: A program that a test compares with must be there: its absence is a failure, not a skip.
STRICT = os.environ.get("VM_TEST_STRICT") == "1"


def absent(what: str) -> None:
    """Skip because *what* is not on this machine, or fail where nothing may be skipped."""
    if STRICT:
        pytest.fail(what)
    pytest.skip(what)


def program(name: str, package: str) -> str:
    """The path of a peer program from Debian's *package*."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if path is None:
        absent(f"{name} is not here: apt-get install {package}")
    return str(path)


def media(path: str, package: str) -> Path:
    """A file from Debian's *package*."""
    if not Path(path).exists():
        absent(f"{path} is not here: apt-get install {package}")
    return Path(path)


def run(*command: str | Path, check: bool = True, timeout: float = 120, **kwargs: object) -> str:
    """Run a program and return its standard output; failures show what it said."""
    result = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=timeout, check=False, **kwargs
    )  # type: ignore[call-overload]
    if check and result.returncode:
        pytest.fail(f"{' '.join(map(str, command))}: exit {result.returncode}\n{result.stdout}{result.stderr}")
    return str(result.stdout)


def vm_command() -> list[str]:
    """How to start ``vm`` from the environment that runs the tests."""
    script = Path(sys.executable).with_name("vm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "vm_core.cli.vm"]


def assemble(source: Path, work: Path) -> bytes:
    """A boot sector from GNU assembler source."""
    run(program("as", "binutils"), "--32", "-o", work / "boot.o", source)
    run("ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", work / "boot.bin", work / "boot.o")
    return (work / "boot.bin").read_bytes()
