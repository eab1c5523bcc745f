"""The peers whose judgement counts: qemu-img, qemu-io, and cryptsetup where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from vm_core.crypto import secrets

#: Thousands of operations instead of hundreds.
LONG = os.environ.get("VM_LONG", "") not in ("", "0")
PASSWORD = "correct horse"
OBJECT = ("--object", f"secret,id=sec,data={PASSWORD}")


def opened(path: Path) -> str:
    """The options that open an image."""
    return f"driver=luks,key-secret=sec,file.filename={path}"


class Peers:
    """Runs the peers' tools."""

    def __init__(self) -> None:
        if not (shutil.which("qemu-img") and shutil.which("qemu-io")):
            if os.environ.get("CI"):
                pytest.fail("qemu-img and qemu-io are missing: apt-get install qemu-utils")
            pytest.skip("qemu-img and qemu-io are missing: apt-get install qemu-utils")
        self.cryptsetup = shutil.which("cryptsetup") or shutil.which("cryptsetup", path="/usr/sbin:/sbin")

    def img(self, *arguments: object, ok: bool = True) -> str:
        """qemu-img's output, with the secret given. It sometimes cannot measure how fast the computer is: again."""
        command = ["qemu-img", str(arguments[0]), *OBJECT, *map(str, arguments[1:])]
        for _ in range(10):
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if "Unable to get accurate CPU usage" not in done.stderr:
                break
        assert not ok or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def create(self, path: Path, size: int, *options: str) -> None:
        """A new image."""
        self.img("create", "-q", "-f", "luks", "-o", ",".join(("key-secret=sec", "iter-time=20", *options)), path, size)

    def read(self, path: Path) -> bytes:
        """What the peer finds in an image."""
        raw = path.with_suffix(".raw-of-peer")
        self.img("convert", "--image-opts", opened(path), "-O", "raw", raw)
        data = raw.read_bytes()
        raw.unlink()
        return data

    def write(self, path: Path, data: bytes) -> None:
        """Let the peer write *data* into an image."""
        raw = path.with_suffix(".raw-for-peer")
        raw.write_bytes(data)
        self.img("convert", "-n", "-f", "raw", raw, "--target-image-opts", opened(path))
        raw.unlink()

    def unlocks(self, path: Path, password: str) -> bool:
        """Whether cryptsetup finds a slot for *password*; skips without it."""
        if self.cryptsetup is None:
            pytest.skip("cryptsetup is missing: apt-get install cryptsetup-bin")
        done = subprocess.run(
            [self.cryptsetup, "open", "--test-passphrase", "--type", "luks1", "--key-file", "-", str(path)],
            input=password.encode(),
            capture_output=True,
        )
        return done.returncode == 0


def add_secret() -> None:
    """The secret ``sec``."""
    secrets.clear()
    secrets.add({"id": "sec", "data": PASSWORD})
