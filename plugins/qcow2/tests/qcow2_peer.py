"""The peer whose judgement counts: qemu-img and qemu-io."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

#: Thousands of operations instead of hundreds.
LONG = os.environ.get("VM_LONG", "") not in ("", "0")


class Qemu:
    """Runs the peer's tools."""

    def __init__(self) -> None:
        self.img_path = shutil.which("qemu-img")
        self.io_path = shutil.which("qemu-io")
        if not (self.img_path and self.io_path):
            if os.environ.get("CI"):
                pytest.fail("qemu-img and qemu-io are missing: apt-get install qemu-utils")
            pytest.skip("qemu-img and qemu-io are missing: apt-get install qemu-utils")

    def img(self, *arguments: object, ok: tuple[int, ...] = (0,)) -> str:
        """qemu-img's output."""
        done = subprocess.run([str(self.img_path), *map(str, arguments)], capture_output=True, text=True, timeout=60)
        assert done.returncode in ok, f"qemu-img {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def io(self, path: Path, *commands: str, options: tuple[str, ...] = ()) -> str:
        """qemu-io's output after *commands*."""
        script = [word for command in commands for word in ("-c", command)]
        done = subprocess.run(
            [str(self.io_path), *options, *script, str(path)], capture_output=True, text=True, timeout=60
        )
        text = done.stdout + done.stderr
        assert done.returncode == 0, text
        assert "failed" not in text, text
        return text

    def create(self, path: Path, size: int, options: dict[str, Any] | None = None, *extra: object) -> None:
        """A new qcow2 image."""
        words = ["-o", ",".join(f"{key}={value}" for key, value in options.items())] if options else []
        self.img("create", "-q", "-f", "qcow2", *words, *extra, path, size)

    def check(self, path: Path) -> dict[str, Any]:
        """The peer's check; its exit code under ``code`` (0 clean, 2 corrupt, 3 leaks)."""
        done = subprocess.run(
            [str(self.img_path), "check", "-U", "-f", "qcow2", "--output=json", str(path)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode in (0, 2, 3), done.stderr
        return {**json.loads(done.stdout), "code": done.returncode, "text": done.stderr}

    def sound(self, path: Path, *, leaks: bool = False) -> None:
        """The peer finds no corruption, and no leaks unless they are allowed."""
        found = self.check(path)
        assert found["code"] in ((0, 3) if leaks else (0,)), found

    def read(self, path: Path) -> bytes:
        """What the peer finds in an image."""
        raw = path.with_suffix(".raw-of-peer")
        self.img("convert", "-U", "-f", "qcow2", "-O", "raw", path, raw)
        data = raw.read_bytes()
        raw.unlink()
        return data
