"""Fetch Debian packages of another architecture without touching the system's own package state."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path


class PackageError(Exception):
    """A package cannot be had; the message says what to do."""


def fetch_i386(work: Path, names: list[str]) -> Path:
    """Download and unpack the i386 packages *names* and return the folder they were unpacked into.

    apt is run with a state and cache of its own below *work*, so neither root nor ``dpkg --add-architecture`` is
    needed. A meta package (``linux-image-686``) brings the versioned kernel package it depends on.
    """
    for tool in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise PackageError(
                f"{tool} is not here: the guest is made of Debian's packages; run this on Debian or Ubuntu"
            )
    root = work / "root"
    if (root / "complete").exists():
        return root
    downloads = work / "debs"
    shutil.rmtree(root, ignore_errors=True)
    shutil.rmtree(downloads, ignore_errors=True)
    for folder in (root, downloads, work / "apt/state/lists/partial", work / "apt/cache/archives/partial"):
        folder.mkdir(parents=True, exist_ok=True)
    private = [
        *("-o", f"Dir::State={work.resolve()}/apt/state", "-o", "Dir::State::status=/dev/null"),
        *("-o", f"Dir::Cache={work.resolve()}/apt/cache", "-o", "APT::Sandbox::User="),
        *("-o", "APT::Architecture=i386", "-o", "APT::Architectures=i386"),
    ]
    _run(["apt-get", *private, "-qq", "update"], work, tolerant=True)
    wanted = list(names)
    for name in names:
        depends = _run(["apt-cache", *private, "depends", name], work)
        wanted += [w for w in depends.split() if w.startswith("linux-image-") and w not in wanted]
    _run(["apt-get", *private, "-qq", "download", *wanted], downloads)
    for deb in sorted(downloads.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(deb.resolve()), str(root.resolve())], work)
    (root / "complete").touch()
    return root


def _run(command: list[str], folder: Path, *, tolerant: bool = False) -> str:
    result = subprocess.run(command, cwd=folder, text=True, capture_output=True, check=False)
    if result.returncode and not tolerant:
        raise PackageError(f"{' '.join(command[:1] + command[-2:])}: {result.stderr.strip() or result.returncode}")
    if result.stderr and tolerant and result.returncode:
        print(result.stderr.strip().splitlines()[-1], file=sys.stderr)
    return result.stdout
