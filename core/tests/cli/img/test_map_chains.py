"""``map`` of backing chains with subclusters, zero flags and layers of any length is the peer's, letter for letter."""

from __future__ import annotations

import os
import random
import subprocess
from pathlib import Path

import pytest

from .peer import QEMU_IMG, QEMU_IO, needs_peer, ours, theirs

K = 1024
LONG = os.environ.get("VM_LONG", "") not in ("", "0")


def chain(chance: random.Random, where: Path) -> tuple[str, str]:
    """One to three layers; the name and format of the top one."""
    below: tuple[str, str] | None = None
    for level in range(chance.randrange(1, 4)):
        name = f"layer{level}"
        format = chance.choice(["qcow2", "qcow2", "qcow2", "raw"]) if level == 0 else "qcow2"
        size = chance.choice([1024 * K, 512 * K, 700 * K + 512, 64 * K * chance.randrange(1, 20)])
        if chance.random() < 0.2:
            size = chance.randrange(1, 3000) * 512
        cluster = chance.choice([4, 16, 16, 32, 64, 64]) * K
        words = [QEMU_IMG, "create", "-q", "-f", format]
        if format == "qcow2":
            fine = "on" if cluster >= 16 * K and chance.random() < 0.75 else "off"
            words += ["-o", f"cluster_size={cluster},extended_l2={fine}"]
        if below is not None:
            words += ["-b", below[0], "-F", below[1]]
        subprocess.run([*words, name, str(size)], cwd=where, check=True, timeout=60)
        lines = []
        for _ in range(chance.randrange(0, 10)):
            start = chance.randrange(0, size, chance.choice([512, 2048]))
            length = min(
                chance.choice([512, 2048, 4096, 8192, 65536, chance.randrange(512, 200 * K, 512)]), size - start
            )
            action = chance.choice(["write -P 5", "write -P 6", "write -z", "write -z -u", "discard", "write -c -P 7"])
            if action.startswith("write -c"):
                if format == "raw":
                    continue
                start -= start % cluster
                length = min(cluster * chance.randrange(1, 3), size - start)
            lines += ["-c", f"{action} {start} {length}"]
        if lines:
            subprocess.run([QEMU_IO, "-f", format, *lines, name], cwd=where, stdout=subprocess.DEVNULL, timeout=60)
        below = name, format
    assert below is not None
    return below


@needs_peer
@pytest.mark.parametrize("seed", range(200 if LONG else 25))
def test_like_the_peer(seed: int, tmp_path: Path) -> None:
    """Both forms of output, of the whole and of parts: runs end where the peer's do and have its offsets, also past the
    end of a shorter backing image, where clusters that are there in part have their place."""
    pytest.importorskip("vm_qcow2")
    chance = random.Random(seed)
    name, format = chain(chance, tmp_path)
    start, length = chance.randrange(0, 1 << 20, chance.choice([1, 512])), chance.randrange(1, 1 << 20)
    for words in (
        ["--output=json"],
        [],
        ["--output=json", "-s", str(start)],
        ["--output=json", "-s", str(start), "-l", str(length)],
        ["-l", str(length)],
    ):
        line = ["map", "-f", format, *words, name]
        assert ours(line, tmp_path) == theirs(line, tmp_path), line


@needs_peer
def test_parts_of_clusters_past_a_shorter_backing_image(tmp_path: Path) -> None:
    """A cluster that holds one subcluster has its offset in the entries of the others, and only from the backing
    image's end on: before it, the backing image is asked."""
    pytest.importorskip("vm_qcow2")
    for line in (
        [QEMU_IMG, "create", "-q", "-f", "qcow2", "base", "96k"],
        [QEMU_IMG, "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", "-b", "base", "-F", "qcow2", "top", "256k"],
        [QEMU_IO, "-c", "write 80k 2k", "-c", "write 192k 2k", "top"],
    ):
        subprocess.run(line, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL, timeout=60)
    line = ["map", "--output=json", "top"]
    found = ours(line, tmp_path)
    assert found == theirs(line, tmp_path)
    assert '"present": false, "zero": true, "data": false, "offset"' in found.out
