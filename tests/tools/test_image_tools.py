"""vm-img compare, commit, rebase, measure, dd, bench and compact beside qemu-img's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from both import Both


@pytest.fixture
def chain(both: Both) -> Both:
    """Three images above each other, and others to compare with."""
    both.make("create", "-q", "-f", "qcow2", "a.qcow2", "40M")
    both.write("a.qcow2", "write -q -P 1 0 10M", "write -q -P 2 20M 1M")
    both.make("create", "-q", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", "m.qcow2")
    both.write("m.qcow2", "write -q -P 3 1M 3M", "write -q -z 5M 1M")
    both.make("create", "-q", "-f", "qcow2", "-b", "m.qcow2", "-F", "qcow2", "t.qcow2", "44M")
    both.write("t.qcow2", "write -q -P 4 2M 3M", "write -q -z 7M 1M", "write -q -P 3 42M 64k")
    both.make("convert", "-O", "raw", "t.qcow2", "t.raw")
    both.make("convert", "-O", "qcow2", "a.qcow2", "b.qcow2")
    both.write("b.qcow2", "write -q -P 9 9000k 1k")
    both.make("create", "-q", "-f", "qcow2", "-o", "compat=0.10", "old.qcow2", "1M")
    return both


@pytest.mark.parametrize(
    "case",
    [
        "a.qcow2 a.qcow2", "a.qcow2 b.qcow2", "b.qcow2 a.qcow2", "-q a.qcow2 b.qcow2", "t.qcow2 t.raw",
        "-s t.qcow2 t.raw", "-s a.qcow2 m.qcow2", "-s t.qcow2 a.qcow2", "t.qcow2 a.qcow2", "a.qcow2 t.raw",
        "-f raw t.qcow2 t.qcow2", "-f raw -F qcow2 t.raw t.qcow2", "nope a.qcow2", "a.qcow2 nope", "a.qcow2",
        "-T foo a.qcow2 b.qcow2", "-f foo a.qcow2 b.qcow2", "--image-opts -f raw a.qcow2 b.qcow2",
        "--image-opts driver=qcow2,file.filename=a.qcow2 driver=qcow2,file.filename=t.qcow2", "-p a.qcow2 old.qcow2",
        "old.qcow2 a.qcow2",
    ],
)  # fmt: skip
def test_compare(chain: Both, case: str) -> None:
    """The words, the first differing offset and the status are qemu-img's."""
    chain.start()
    chain.same("compare", *case.split())


@pytest.mark.parametrize(
    "case",
    ["t.qcow2", "-d t.qcow2", "-q m.qcow2", "-b a.qcow2 t.qcow2", "-b m.qcow2 t.qcow2", "-r 100M t.qcow2"],
)
def test_commit(chain: Both, case: str) -> None:
    """All images of the chain hold afterwards what they hold after qemu-img's commit, and are clean."""
    chain.start()
    chain.same("commit", *case.split())
    for name in ("a.qcow2", "m.qcow2", "t.qcow2"):
        chain.same_contents(name)
    # An emptied overlay has no more data of its own.
    chain.same_files(case.split()[-1])


@pytest.mark.parametrize("case", ["a.qcow2", "-b nope t.qcow2", "-r x t.qcow2", "-t foo t.qcow2", "-f raw t.raw", "",
                                  "-b sub/m.qcow2 t.qcow2"])  # fmt: skip
def test_commit_refusals(chain: Both, case: str) -> None:
    """What is wrong is told in qemu-img's words."""
    chain.start()
    assert chain.same("commit", *case.split()).code == 1


@pytest.mark.parametrize(
    "case",
    [
        ["-b", "a.qcow2", "-F", "qcow2", "t.qcow2"],
        ["-b", "b.qcow2", "-F", "qcow2", "t.qcow2"],
        ["-b", "", "t.qcow2"],
        ["-p", "-b", "m.qcow2", "-F", "qcow2", "t.qcow2"],
        ["-b", "old.qcow2", "-F", "qcow2", "t.qcow2"],
        ["-b", "t.raw", "-F", "raw", "m.qcow2"],
        ["-u", "-b", "a.qcow2", "-F", "qcow2", "t.qcow2"],
        ["-u", "-b", "", "t.qcow2"],
        ["-u", "-b", "nope", "-F", "raw", "t.qcow2"],
        ["-b", "b.qcow2", "-F", "qcow2", "a.qcow2"],
    ],
)
def test_rebase(chain: Both, case: list[str]) -> None:
    """The image is the one that qemu-img's rebase makes, byte by byte."""
    chain.start()
    assert chain.same("rebase", *case).code == 0
    chain.same_files(case[-1])


@pytest.mark.parametrize(
    "case",
    [
        ["t.qcow2"], ["-b", "a.qcow2", "t.qcow2"], ["-u", "-b", "nope", "t.qcow2"], ["-b", "nope", "t.qcow2"],
        ["-u", "-b", "nope", "-F", "foo", "t.qcow2"], ["-b", "a.qcow2", "-F", "foo", "t.qcow2"],
        ["-b", "", "-f", "raw", "t.raw"], ["-t", "foo", "-b", "", "t.qcow2"], ["-T", "foo", "-b", "", "t.qcow2"],
        ["-b", "", "nope"], ["-u", "-b", "x" * 1100, "-F", "raw", "t.qcow2"], ["-c", "-b", "", "t.qcow2"],
    ],
)  # fmt: skip
def test_rebase_refusals(chain: Both, case: list[str]) -> None:
    """What is wrong is told in qemu-img's words, and nothing is changed."""
    chain.start()
    before = (chain.ours / "t.qcow2").read_bytes()
    assert chain.same("rebase", *case).code == 1
    assert (chain.ours / "t.qcow2").read_bytes() == before


@pytest.mark.parametrize(
    "case",
    [
        "--size 1G", "--size 1G -O qcow2", "--size 1G -O qcow2 --output=json", "--size 1000 -O raw",
        "--size 1000 -O qcow2",
        "--size 1T -O qcow2 -o refcount_bits=1", "--size 100G -O qcow2 -o cluster_size=512",
        "--size 100T -O qcow2 -o cluster_size=2M,refcount_bits=64", "--size 2E -O qcow2", "-O qcow2 t.qcow2",
        "-O qcow2 --output=json t.qcow2", "-O raw t.qcow2", "-O qcow2 -o cluster_size=4k t.raw",
        "-O qcow2 -o compat=0.10 t.qcow2", "-O qcow2 -o backing_file=x,backing_fmt=raw t.qcow2",
        "-O qcow2 -o preallocation=full t.qcow2", "-O qcow2 -o extended_l2=on t.qcow2", "-O qcow2 old.qcow2",
        "--size x", "--size 1G t.qcow2", "t.qcow2 t.qcow2", "", "-f raw --size 1G", "-l one --size 1G", "-O qcow2 nope",
        "-O nosuch --size 1G", "-O qcow2 -o foo=1 t.qcow2", "-O qcow2 -o , t.qcow2", "-O qcow2 --output foo t.qcow2",
        "-O qcow2 -o cluster_size=3 --size 1G", "-O qcow2 -l nope t.qcow2", "-l snapshot.foo=1 t.qcow2",
    ],
)  # fmt: skip
def test_measure(chain: Both, case: str) -> None:
    """The figures are qemu-img's."""
    chain.start()
    chain.same("measure", *case.split())


@pytest.mark.parametrize(
    "case",
    [
        "if=a.qcow2 of=out bs=1M", "if=a.qcow2 of=out bs=1M count=3", "if=a.qcow2 of=out bs=1M skip=19 count=3",
        "if=a.qcow2 of=out bs=3000 count=7 skip=1", "if=a.qcow2 of=out bs=1M skip=100",
        "-O qcow2 if=a.qcow2 of=out bs=1M",
        "-f raw -O qcow2 if=t.raw of=out bs=64k count=100", "if=a.qcow2 of=out count=0 bs=1M",
        "if=a.qcow2", "of=out", "if=a.qcow2 of=out foo=1", "if=a.qcow2 of=out foo", "if=a.qcow2 of=out bs=0",
        "if=a.qcow2 of=out bs=x", "if=a.qcow2 of=out count=x", "if=a.qcow2 of=out skip=x", "if=nope of=out",
        "-O nosuch if=a.qcow2 of=out", "-f nosuch if=a.qcow2 of=out", "if=a.qcow2 of=/nonexistent/out",
        "isize=1 if=a of=b",
    ],
)  # fmt: skip
def test_dd(chain: Both, case: str) -> None:
    """The copy is qemu-img's, byte by byte, and so are the complaints."""
    chain.start()
    chain.same("dd", *case.split())
    if (chain.peer / "out").exists():
        chain.same_files("out")


@pytest.mark.parametrize(
    "case",
    [
        "-c 100 a.qcow2", "-c 50 -d 4 -w a.qcow2",
        "-c 20 -d 4 -w --pattern 3 --flush-interval 5 -o 512 -s 4k -S 8k a.qcow2",
        "-c 20 -w -d 3 --no-drain --flush-interval 10 a.qcow2", "-c 10 --flush-interval 2 a.qcow2", "-c x a.qcow2",
        "-d x a.qcow2", "-o x a.qcow2", "-s x a.qcow2", "-S x a.qcow2", "--pattern 256 a.qcow2", "-i foo a.qcow2",
        "-t foo a.qcow2", "-w -d 3 --no-drain --flush-interval 2 a.qcow2", "-q -c 1 a.qcow2", "", "-c 10 nope",
    ],
)  # fmt: skip
def test_bench(chain: Both, case: str) -> None:
    """It says what qemu-img says, seconds apart, and writes what it writes."""
    chain.start()
    peer, ours = chain.run("bench", *case.split())
    words = [re.sub(r"[\d.]+ seconds", "N seconds", one.out) for one in (peer, ours)]
    assert (words[1], ours.err, ours.code) == (words[0], peer.err, peer.code)
    chain.same_contents("a.qcow2")


def vm_img(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Our tool under its own name."""
    tool = Path(sys.executable).with_name("vm-img")
    return subprocess.run([tool, *arguments], cwd=folder, capture_output=True, text=True, timeout=60)


def test_compact_in_place(both: Both) -> None:
    """Zeroes and discarded clusters are given back to the host; contents and metadata stay good."""
    both.make("create", "-q", "-f", "qcow2", "image", "60M")
    both.write("image", "write -q -P 1 0 40M", "write -q -P 0 10M 10M", "discard 30M 2M", "write -q -P 0 38M 2M")
    both.ours.mkdir()
    shutil.copy(both.peer / "image", both.ours)  # holes and zeroes become data
    done = vm_img(both.ours, "compact", "--output=json", "image")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["after"] < told["before"] - (11 << 20)
    assert (both.ours / "image").stat().st_blocks * 512 == told["after"]
    assert (both.ours / "image").stat().st_size < (both.peer / "image").stat().st_size
    both.same_contents("image")


def test_compact_to_a_copy(both: Both) -> None:
    """A copy has the same options and backing image, and no more than it needs."""
    both.make("create", "-q", "-f", "qcow2", "base", "8M")
    both.write("base", "write -q -P 5 0 8M")
    options = "cluster_size=16k,refcount_bits=8,compat=1.1"
    both.make("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "-o", options, "image")
    both.write("image", "write -q -P 1 0 4M", "write -q -P 0 1M 1M")
    both.start()
    for extra in ([], ["-c"]):
        done = vm_img(both.ours, "compact", *extra, "image", "copy")
        assert done.returncode == 0, done.stderr
        info = json.loads(subprocess.run([both.img, "info", "--output=json", "copy"], cwd=both.ours,
                                         capture_output=True, check=True).stdout)  # fmt: skip
        assert info["cluster-size"] == 16384
        assert info["backing-filename"] == "base"
        assert info["format-specific"]["data"]["refcount-bits"] == 8
        compare = [both.img, "compare", "image", "copy"]
        assert subprocess.run(compare, cwd=both.ours, capture_output=True).returncode == 0


def test_compact_refuses_damage(both: Both) -> None:
    """An image with a reference count that is too low is not touched."""
    both.make("create", "-q", "-f", "qcow2", "image", "8M")
    both.write("image", "write -q -P 1 0 1M")
    with (both.peer / "image").open("r+b") as file:
        file.seek(2 * 65536 + 2 * 6)
        file.write(b"\0\0")
    before = (both.peer / "image").read_bytes()
    done = vm_img(both.peer, "compact", "image")
    assert done.returncode == 1
    assert "repair it first" in done.stderr
    assert (both.peer / "image").read_bytes() == before
