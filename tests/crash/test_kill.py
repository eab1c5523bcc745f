"""kill -9 of ``vm`` at any instant leaves an image without corruption and with every flushed byte in place."""

from __future__ import annotations

import json
import random
import re
import struct
import time
from pathlib import Path

import pytest

from vmtest import LONG, ROOT, assemble, program, run
from vmtest.guest import Guest

MASK = 0xFFFFFFFF
ROUNDS = 60 if LONG else 4


def lba(i: int) -> int:
    """Where the guest's write number *i* goes."""
    return 64 + ((i * 0x9E3779B1 & MASK) >> 16 & 0x3FFF)


def sector(i: int) -> bytes:
    """What it writes there."""
    word = (i * 0x9E3779B1 + 12345) & MASK
    words = []
    for _ in range(128):
        words.append(word)
        word = (word * 1664525 + 1013904223) & MASK
    return struct.pack("<128I", *words)


@pytest.mark.parametrize("options", ["compat=1.1", "compat=1.1,lazy_refcounts=on", "compat=0.10,cluster_size=4k"])
@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_kill_9_while_the_guest_writes(tmp_path: Path, options: str, cache: str) -> None:
    """Whatever instant the machine dies at, flushed sectors hold what was flushed or something written later."""
    boot = tmp_path / "boot.img"
    boot.write_bytes(assemble(ROOT / "tests/guests/writer.S", tmp_path))
    qemu_img, qemu_io = program("qemu-img", "qemu-utils"), program("qemu-io", "qemu-utils")
    chance = random.Random(f"{options} {cache}")
    most = 0
    for _ in range(max(1, ROUNDS // 2)):
        disk = tmp_path / "disk.qcow2"
        disk.unlink(missing_ok=True)
        run(qemu_img, "create", "-q", "-f", "qcow2", "-o", options, disk, "16M")
        run(qemu_io, "-c", f"write -s {boot} 0 512", disk)
        drive = f"file={disk},format=qcow2,if=ide,cache={cache}"
        with Guest("-accel", "unicorn", "-m", "16", "-drive", drive) as guest:
            guest.expect(r"F[0-9a-f]{8}\n", 60)
            time.sleep(chance.uniform(0, 1.5))
            guest.kill()
            flushed = int(re.findall(rb"F([0-9a-f]{8})\r?\n", guest.seen)[-1], 16)
        most = max(most, flushed)
        # Lazy refcounts are out of date by design after a crash; anything else may only have leaked clusters.
        if "lazy" in options:
            run(qemu_img, "check", "-r", "all", disk)
        else:
            report = json.loads(run(qemu_img, "check", "--output=json", disk, check=False))
            assert not report.get("corruptions"), report
        raw = tmp_path / "disk.raw"
        run(qemu_img, "convert", "-O", "raw", disk, raw)
        data = raw.read_bytes()
        last = {lba(i): i for i in range(flushed)}
        later: dict[int, list[int]] = {}
        for i in range(flushed, flushed + 4096):
            later.setdefault(lba(i), []).append(i)
        for at, i in last.items():
            found = data[at * 512 : at * 512 + 512]
            if found != sector(i):
                allowed = [j for j in later.get(at, ()) if sector(j) == found]
                assert allowed, f"sector {at}, flushed by write {i} of {flushed}, holds something else"
    assert most > 20, "the guest hardly wrote"
