"""vm-img convert beside qemu-img convert: the same words, the same bytes, the same layout where that is determined."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from both import LONG, Both


@pytest.fixture
def sources(both: Both) -> Both:
    """Images to convert: chains, snapshots, compressed, sparse and odd ones."""
    both.make("create", "-q", "-f", "qcow2", "base.qcow2", "6M")
    both.write(
        "base.qcow2", "write -q -P 1 0 300k", "write -q -P 0 64k 128k", "write -q -P 2 3M 70000", "write -q -z 4M 512k"
    )
    both.make("snapshot", "-c", "one", "base.qcow2")
    both.write("base.qcow2", "write -q -P 7 2M 64k")
    both.make("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", "7M")
    both.write("top.qcow2", "write -q -P 3 100k 700k", "write -q -z 3M 64k", "write -q -P 4 6800k 100k")
    both.make("convert", "-c", "-O", "qcow2", "top.qcow2", "zip.qcow2")
    both.make("convert", "-O", "raw", "top.qcow2", "flat.raw")
    both.make("convert", "-O", "qcow2", "-o", "compat=0.10,cluster_size=4k", "top.qcow2", "old.qcow2")
    (both.peer / "odd.raw").write_bytes(b"odd" * 1111)
    return both


CASES = [
    "-O raw top.qcow2 out",
    "-O raw zip.qcow2 out",
    "-O raw old.qcow2 out",
    "-f raw -O raw flat.raw out",
    "-O raw -S 0 top.qcow2 out",
    "-O raw -S 64k top.qcow2 out",
    "-O raw -S 12k flat.raw out",
    "-f raw -O raw odd.raw out",
    "-O raw odd.raw flat.raw zip.qcow2 out",
    "-O raw -l one base.qcow2 out",
    "-O raw -l snapshot.id=1 base.qcow2 out",
    "-O raw -C -f raw flat.raw out",
    "-O qcow2 top.qcow2 out",
    "-O qcow2 -m 1 flat.raw out",
    "-O qcow2 -S 0 top.qcow2 out",
    "-O qcow2 -S 1M flat.raw out",
    "-O qcow2 -o cluster_size=512 top.qcow2 out",
    "-O qcow2 -o cluster_size=2M top.qcow2 out",
    "-O qcow2 -o compat=0.10 top.qcow2 out",
    "-O qcow2 -o refcount_bits=1 zip.qcow2 out",
    "-O qcow2 -o preallocation=metadata top.qcow2 out",
    "-O qcow2 -B base.qcow2 -F qcow2 top.qcow2 out",
    "-O qcow2 -o backing_file=base.qcow2,backing_fmt=qcow2 top.qcow2 out",
    "-O qcow2 odd.raw odd.raw out",
    "-n -O qcow2 top.qcow2 old.qcow2",
    "-n -O raw top.qcow2 flat.raw",
    "-n --target-is-zero -O raw top.qcow2 flat.raw",
    "-n --target-image-opts --image-opts driver=qcow2,file.filename=top.qcow2 driver=raw,file.filename=flat.raw",
    "-p -q -O raw top.qcow2 out",
]
#: Those whose layout depends on more than the order of guest offsets.
LOOSE = [
    "-O qcow2 -W -m 4 top.qcow2 out",
    "-O qcow2 -c top.qcow2 out",
    "-O qcow2 -c -o compression_type=zstd old.qcow2 out",
    "-O qcow2 -c -o cluster_size=4k flat.raw out",
    "-r 100M -O qcow2 top.qcow2 out",
]


@pytest.mark.parametrize("case", CASES)
def test_same_bytes(sources: Both, case: str) -> None:
    """One thread or many: the file is the one that qemu-img makes."""
    sources.start()
    words = case.split()
    assert sources.same("convert", *words).code == 0
    sources.same_files(words[-1].rpartition("=")[2])


@pytest.mark.parametrize("case", LOOSE)
def test_same_contents(sources: Both, case: str) -> None:
    """Where threads or codecs decide the layout the contents are the same and the image is clean."""
    sources.start()
    assert sources.same("convert", *case.split()).code == 0
    sources.same_contents("out")


def test_sparse_files_are_equally_sparse(sources: Both) -> None:
    """What qemu-img leaves out of a raw file is left out here."""
    sources.start()
    sources.same("convert", "-O", "raw", "top.qcow2", "out")
    assert (sources.ours / "out").stat().st_blocks == (sources.peer / "out").stat().st_blocks


REFUSED = [
    "base.qcow2",
    "-S abc base.qcow2 out",
    "-S 100 base.qcow2 out",
    "-m 0 base.qcow2 out",
    "-m 17 base.qcow2 out",
    "-r x base.qcow2 out",
    "-C -c -O qcow2 base.qcow2 out",
    "-C -S 4k -O qcow2 base.qcow2 out",
    "-C --salvage -O qcow2 base.qcow2 out",
    "--target-is-zero base.qcow2 out",
    "--target-image-opts base.qcow2 driver=raw,file.filename=out",
    "--target-image-opts -n -O raw base.qcow2 driver=raw,file.filename=out",
    "-n base.qcow2 out",
    "-n base.qcow2 odd.raw",
    "-n -o size=5 base.qcow2 flat.raw",
    "--skip-broken-bitmaps base.qcow2 out",
    "--bitmaps base.qcow2 out",
    "--bitmaps -O qcow2 flat.raw out",
    "-B base.qcow2 -O raw top.qcow2 out",
    "-B base.qcow2 -O qcow2 top.qcow2 out",
    "-B base.qcow2 -F qcow2 -O qcow2 top.qcow2 top.qcow2 out",
    "-F qcow2 -O qcow2 top.qcow2 out",
    "-l nope -O raw base.qcow2 out",
    "-l snapshot.foo=1 -O qcow2 base.qcow2 out",
    "-l one -O raw base.qcow2 base.qcow2 out",
    "-c base.qcow2 out",
    "-O nosuch base.qcow2 out",
    "-f nosuch base.qcow2 out",
    "-o foo=1 -O qcow2 base.qcow2 out",
    "-o cluster_size=3 -O qcow2 base.qcow2 out",
    "-O qcow2 base.qcow2 /nonexistent/out",
    "-O qcow2 nope out",
    "-t foo -O qcow2 base.qcow2 out",
    "-T foo -O qcow2 base.qcow2 out",
    "-O qcow2 -o backing_file=base.qcow2 top.qcow2 out",
    "-c -o preallocation=metadata -O qcow2 base.qcow2 out",
    "-U --image-opts -f raw base.qcow2 out",
    "-O qcow2 -o ,, base.qcow2 out",
]


@pytest.mark.parametrize("case", REFUSED)
def test_same_refusals(sources: Both, case: str) -> None:
    """What is wrong is told in qemu-img's words, with its status."""
    sources.start()
    assert sources.same("convert", *case.split()).code == 1


def test_progress_is_the_peers(sources: Both) -> None:
    """Piped, -p prints what qemu-img prints."""
    sources.start()
    sources.same("convert", "-p", "-m", "1", "-O", "raw", "old.qcow2", "out")


@pytest.mark.parametrize("event", ["read_aio", "write_aio"])
def test_errors_are_told_with_their_place(sources: Both, event: str) -> None:
    """Read and write errors end with qemu-img's sentence."""
    sources.peer.joinpath("debug").write_text(f'[inject-error]\nevent = "{event}"\nerrno = "5"\nsector = "3"\n')
    sources.start()
    if event == "read_aio":
        sources.same("convert", "-O", "raw", "blkdebug:debug:flat.raw", "out")
        sources.same("convert", "--salvage", "-O", "raw", "blkdebug:debug:flat.raw", "out")
        sources.same_files("out")
    else:
        sources.same("convert", "-n", "-f", "raw", "-O", "raw", "odd.raw", "blkdebug:debug:flat.raw")


@pytest.mark.parametrize("seed", range(200 if LONG else 12))
def test_generated_images(both: Both, seed: int) -> None:
    """Random images in random formats become the same files."""
    chance = random.Random(seed)
    size = chance.choice((1 << 20, (5 << 20) + 512, 70 << 20))
    cluster = chance.choice((512, 4096, 65536, 1 << 20))
    both.make("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", "source", str(size))
    commands = []
    for _ in range(chance.randrange(1, 30)):
        offset = chance.randrange(size // 512) * 512
        length = min(size - offset, chance.choice((512, 4096, 60000 // 512 * 512, 1 << 20, 5 << 20)))
        pattern = chance.choice((0, chance.randrange(1, 256)))
        commands.append(f"write -q {chance.choice((f'-P {pattern}', f'-P {pattern}', '-z'))} {offset} {length}")
    both.write("source", *commands)
    both.start()
    target = chance.choice((512, 1024, 4096, 65536, 2 << 20))
    both.same("convert", "-O", "raw", "source", "flat")
    both.same("convert", "-O", "qcow2", "-o", f"cluster_size={target}", "source", "out")
    both.same("convert", "-c", "-O", "qcow2", "-o", f"cluster_size={target}", "source", "zip")
    both.same_files("flat")
    both.same_contents("out")
    both.same_contents("zip")
    (both.ours / "out2").unlink(missing_ok=True)
    assert (both.ours / "out").stat().st_size == (both.peer / "out").stat().st_size


def test_interrupted_convert_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C ends convert soon, with a shell's status for that, and the half-made file is gone."""
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        for _ in range(64):
            file.write(random.Random(1).randbytes(1 << 20))
    tool = Path(sys.executable).with_name("vm-img")
    process = subprocess.Popen(
        [tool, "convert", "-f", "raw", "-r", "1M", source, target], stderr=subprocess.PIPE, text=True
    )
    for _ in range(200):
        if target.exists() and target.stat().st_blocks:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert not target.exists()
    assert "Traceback" not in errors


def test_failed_convert_leaves_nothing(tmp_path: Path) -> None:
    """Under its own name the tool takes a target that it could not finish away; an older file it names."""
    source, config, target = tmp_path / "source", tmp_path / "debug", tmp_path / "target"
    source.write_bytes(b"x" * (1 << 20))
    config.write_text('[inject-error]\nevent = "read_aio"\nerrno = "5"\n')
    tool = Path(sys.executable).with_name("vm-img")
    command = [tool, "convert", f"blkdebug:{config}:{source}", target]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error while reading at byte 0: Input/output error" in done.stderr
    assert not target.exists()
    target.write_bytes(b"old")
    done = subprocess.run(command, capture_output=True, text=True)
    assert f"'{target}' is not complete now" in done.stderr
