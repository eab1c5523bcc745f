"""qemu-img and qemu-io as the judges of an image format, for tests.

:class:`Qemu` runs the tools, :func:`run` any program; :func:`take_turns` has an image written here and by the tools in
turns, :func:`lockstep` does the same to two images; :func:`differences` compares two files; :class:`QemuConformance` is
the conformance kit with the tools as its oracle.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.gate import Gate
from vm_core.block.node import Node
from vm_core.block.open import open_node

from .conformance import FormatConformance

#: Thousands of operations instead of hundreds.
LONG = os.environ.get("VM_LONG", "") not in ("", "0")


def run(*words: object) -> str:
    """The output of a program that has to succeed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Qemu:
    """Runs the tools on images of one format."""

    def __init__(self, format: str) -> None:
        """Skip the test (in CI: fail it) where the tools are not installed."""
        self.format = format
        self.img_path = shutil.which("qemu-img")
        self.io_path = shutil.which("qemu-io")
        if not (self.img_path and self.io_path):
            if os.environ.get("CI"):
                pytest.fail("qemu-img and qemu-io are missing: apt-get install qemu-utils")
            pytest.skip("qemu-img and qemu-io are missing: apt-get install qemu-utils")

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """qemu-img, whatever comes of it."""
        return subprocess.run([str(self.img_path), *map(str, arguments)], capture_output=True, text=True, timeout=120)

    def img(self, *arguments: object, ok: tuple[int, ...] = (0,)) -> str:
        """qemu-img's output."""
        done = self.run(*arguments)
        assert done.returncode in ok, f"qemu-img {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def error(self, *arguments: object) -> str:
        """What qemu-img says when it fails."""
        done = self.run(*arguments)
        assert done.returncode == 1, f"qemu-img {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stderr.removeprefix("qemu-img: ").rstrip("\n")

    def io(self, path: Path, *commands: str, options: tuple[str, ...] = ()) -> str:
        """qemu-io's output after *commands*."""
        script = [word for command in commands for word in ("-c", command)]
        done = subprocess.run(
            [str(self.io_path), "-f", self.format, *options, *script, str(path)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
        assert "failed" not in text, text
        return text

    def create(self, path: Path, size: int | str, options: dict[str, Any] | None = None, *extra: object) -> None:
        """A new image; *extra* are further words of the command (``-b``, …)."""
        words = [f"{key}={_word(value)}" for key, value in (options or {}).items()]
        given = ["-o", ",".join(words)] if words else []
        self.img("create", "-q", "-f", self.format, *given, *extra, path, size)

    def info(self, path: Path) -> dict[str, Any]:
        """``info --output=json``."""
        found: dict[str, Any] = json.loads(self.img("info", "-U", "-f", self.format, "--output=json", path))
        return found

    def check(self, path: Path) -> dict[str, Any]:
        """``check --output=json``; its exit code under ``code``, what it printed besides under ``text``."""
        done = self.run("check", "-U", "-f", self.format, "--output=json", path)
        assert done.returncode in (0, 2, 3), done.stderr
        return {**json.loads(done.stdout), "code": done.returncode, "text": done.stderr}

    def sound(self, path: Path, *, leaks: bool = False) -> None:
        """The tools find no corruption, and no leaks unless they are allowed."""
        found = self.check(path)
        assert found["code"] in ((0, 3) if leaks else (0,)), found

    def read(self, path: Path) -> bytes:
        """What the tools find in an image."""
        raw = path.with_suffix(".raw-of-peer")
        self.img("convert", "-U", "-f", self.format, "-O", "raw", path, raw)
        data = raw.read_bytes()
        raw.unlink()
        return data


def _word(value: Any) -> str:
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def differences(one: Path, two: Path, ignore: Iterable[tuple[int, int]] = ()) -> list[int]:
    """Positions (the first few) at which two files differ, outside the ranges (start, end) to *ignore*.

    A difference in length counts at the shorter one's end.
    """
    found: list[int] = []
    skipped = list(ignore)
    position = 0
    with one.open("rb") as first, two.open("rb") as second:
        while len(found) < 20:
            a, b = first.read(1 << 20), second.read(1 << 20)
            if a != b:
                for index in range(min(len(a), len(b))):
                    where = position + index
                    if a[index] != b[index] and not any(start <= where < end for start, end in skipped):
                        found.append(where)
                if len(a) != len(b):
                    found.append(position + min(len(a), len(b)))
                    break
            if not a:
                break
            position += len(a)
    return found[:20]


def take_turns(
    qemu: Qemu,
    path: Path,
    model: bytearray,
    chance: random.Random,
    turns: int,
    *,
    options: dict[str, Any] | None = None,
    longest: int = 3 << 20,
    check: bool = True,
) -> None:
    """Have an image, which holds *model*, written here and by the peer in turns, and read by whoever did not write.

    *options* are those that opening it here takes. *longest* is the length of a write, at most.
    """
    size = len(model)

    def place() -> tuple[int, int]:
        length = min(size, chance.choice([512, 4096, 65536, chance.randrange(512, longest)]))
        length = max(length // 512 * 512, 512)
        return chance.choice([0, size - length, chance.randrange(size - length + 1) // 512 * 512]), length

    def ours(readonly: bool) -> Node:
        spec = {"driver": qemu.format, "file": {"driver": "file", "filename": str(path)}, **(options or {})}
        return open_node(spec, readonly=readonly)

    for _ in range(turns):
        if chance.random() < 0.5:
            with ours(False) as node:
                for _ in range(chance.randrange(1, 12)):
                    offset, length = place()
                    what = chance.random()
                    if what < 0.7:
                        data = chance.randbytes(length)
                        node.pwrite(offset, data)
                        model[offset : offset + length] = data
                    elif what < 0.9:
                        node.zero(offset, length, unmap=chance.random() < 0.5)
                        model[offset : offset + length] = bytes(length)
                    else:
                        node.flush()
            assert qemu.read(path) == model, "the peer reads other bytes than were written here"
            if check:
                qemu.sound(path)
        else:
            commands = []
            for _ in range(chance.randrange(1, 12)):
                offset, length = place()
                if chance.random() < 0.8:
                    value = chance.randrange(1, 256)
                    commands.append(f"write -P {value} {offset} {length}")
                    model[offset : offset + length] = bytes([value]) * length
                else:
                    commands.append(f"write -z {offset} {length}")
                    model[offset : offset + length] = bytes(length)
            qemu.io(path, *commands)
            with ours(True) as node:
                assert node.pread(0, size) == model, "read here: other bytes than the peer wrote"


def lockstep(qemu: Qemu, ours: Path, theirs: Path, chance: random.Random, *, turns: int = 3, steps: int = 10) -> None:
    """Do the same to two equal images, to one here and to the other by the peer, opened anew in each of *turns*.

    Data and zeroes are written, and discarded what was: where that has to lie is what the images are compared for.
    """

    def opened(readonly: bool) -> Node:
        spec = {"driver": qemu.format, "file": {"driver": "file", "filename": str(ours)}}
        return open_node(spec, readonly=readonly, gate=Gate.follow())

    with opened(True) as node:
        size = node.size
    for _ in range(turns):
        commands = []
        with opened(False) as node:
            for _ in range(steps):
                length = min(chance.choice([512, 4096, 65536, 1 << 20, chance.randrange(1, 8000) * 512]), size)
                offset = chance.choice([size - length, *[chance.randrange(size - length + 1) for _ in range(6)]])
                offset -= offset % chance.choice([512, 512, 65536, 1 << 20])
                value, what = chance.randrange(1, 256), chance.random()
                if what < 0.5:
                    commands.append(f"write -P {value} {offset} {length}")
                    node.pwrite(offset, bytes([value]) * length)
                elif what < 0.85:
                    unmap = what < 0.65
                    commands.append(f"write -z {'-u' if unmap else ''} {offset} {length}")
                    node.zero(offset, length, unmap=unmap)
                else:
                    commands.append(f"discard {offset} {length}")
                    node.discard(offset, length)
        qemu.io(theirs, *commands, options=("-d", "unmap"))


class QemuConformance(FormatConformance):
    """The kit's tests with qemu-img as the oracle; skips what needs it where it is missing."""

    #: Whether ``qemu-img check`` knows the format.
    checks: bool = True

    def oracle_read(self, path: Path) -> bytes | None:
        return Qemu(self.driver).read(path) if shutil.which("qemu-img") else None

    def oracle_check(self, path: Path) -> None:
        if self.checks and shutil.which("qemu-img"):
            Qemu(self.driver).sound(path, leaks=True)

    def oracle_make(self, path: Path, data: bytes, options: dict[str, Any]) -> bool:
        if not shutil.which("qemu-img"):
            return False
        raw = path.with_suffix(".source")
        raw.write_bytes(data)
        words = [word for key, value in options.items() for word in ("-o", f"{key}={_word(value)}")]
        Qemu(self.driver).img("convert", "-f", "raw", "-O", self.driver, *words, raw, path)
        return True
