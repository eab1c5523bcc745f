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


def test_compact_shortens_files(both: Both) -> None:
    """What lies at the end moves to the front; a dry run tells as much before, and changes nothing."""
    both.make("create", "-q", "-f", "qcow2", "image", "64M")
    both.write("image", "write -q -P 1 0 48M", "discard 0 40M", "write -q -P 3 30M 1M")
    both.ours.mkdir()
    shutil.copy(both.peer / "image", both.ours)
    before = (both.ours / "image").read_bytes()
    told = json.loads(vm_img(both.ours, "compact", "-n", "--output=json", "image").stdout)
    assert (both.ours / "image").read_bytes() == before
    done = vm_img(both.ours, "compact", "--output=json", "--progress=json", "image")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert told["length-after"] == found["length-after"] == (both.ours / "image").stat().st_size < 10 << 20
    assert told["moved"] == found["moved"] > 7 << 20
    assert json.loads(done.stderr.splitlines()[-1])["done"] > 0
    both.same_contents("image")


def test_compact_says_what_it_cannot_move(both: Both) -> None:
    """A format whose driver moves nothing is named; holes are punched all the same."""
    both.ours.mkdir()
    vm_img(both.ours, "create", "-q", "-f", "parallels", "image", "8M")
    vm_io = Path(sys.executable).with_name("vm-io")
    subprocess.run([vm_io, "-c", "write -q -P 0 0 4M", "-c", "write -q -P 1 4M 1M", "image"], cwd=both.ours, check=True)
    done = vm_img(both.ours, "compact", "image")
    assert done.returncode == 0, done.stderr
    assert "In parallels images nothing is moved" in done.stdout


def test_compact_with_a_copy_takes_no_dry_run(both: Both) -> None:
    """They contradict each other."""
    both.make("create", "-q", "-f", "qcow2", "image", "1M")
    done = vm_img(both.peer, "compact", "-n", "image", "copy")
    assert done.returncode == 1
    assert "give no copy" in done.stderr
    assert not (both.peer / "copy").exists()


def test_copies_that_would_lose_something(both: Both) -> None:
    """Nothing is written over the image, its data file or its encryption; what a copy leaves out is told."""
    both.make("create", "-q", "-f", "qcow2", "-o", "data_file=data", "beside", "1M")
    both.write("beside", "write -q -P 7 0 1M")
    secret = ("--object", "secret,id=s,data=abc")
    luks = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=100"
    made = vm_img(both.peer, "create", "-q", *secret, "-f", "qcow2", "-o", luks, "hidden", "1M")
    assert made.returncode == 0, made.stderr
    both.make("create", "-q", "-f", "qcow2", "image", "1M")
    both.make("snapshot", "-c", "one", "image")
    folder = both.peer
    data = (folder / "data").read_bytes()
    assert data.count(7) == 1 << 20
    for words, said in (
        (("beside", "copy"), "which would use the same data file"),
        (("image", "image"), "is the image itself"),
        ((*secret, "--image-opts", "driver=qcow2,encrypt.key-secret=s,file.filename=hidden", "copy"), "encrypted"),
    ):
        done = vm_img(folder, "compact", *words)
        assert done.returncode == 1
        assert said in done.stderr
        assert not (folder / "copy").exists()
    assert (folder / "data").read_bytes() == data
    done = vm_img(folder, "compact", "image", "copy")
    assert (done.returncode, done.stderr) == (
        0,
        "vm-img: warning: the copy has none of the image's 1 internal snapshots\n",
    )


@pytest.fixture
def held(both: Both) -> Path:
    """A folder with the same bytes as raw, qcow2 over a backing image, and compressed vmdk."""
    both.make("create", "-q", "-f", "qcow2", "base", "20M")
    both.write("base", "write -q -P 5 0 3M", "write -q -P 6 7M 64k")
    both.make("create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "overlay", "20M")
    both.write("overlay", "write -q -P 1 1M 1M", "write -q -z 2M 512k", "write -q -P 9 19M 700k")
    both.make("convert", "-O", "raw", "overlay", "raw")
    both.make("convert", "-O", "vmdk", "-o", "subformat=streamOptimized", "overlay", "vmdk")
    return both.peer


@pytest.mark.parametrize("options", [[], ["-a", "blake2b"], ["-b", "64k"], ["--sum"]], ids=str)
def test_manifests_are_the_same(held: Path, options: list[str]) -> None:
    """Of a chain, of a raw and of a compressed image; each verifies with that of another."""
    texts = set()
    for name in ("overlay", "raw", "vmdk"):
        done = vm_img(held, "verify", *options, "-w", f"{name}.json", "-f", {"overlay": "qcow2"}.get(name, name), name)
        assert done.returncode == 0, done.stderr
        texts.add((held / f"{name}.json").read_text())
    assert len(texts) == 1
    manifest = json.loads(texts.pop())
    if "--sum" in options:
        sums = subprocess.run(["sha256sum", "raw"], cwd=held, capture_output=True, text=True, check=True).stdout
        assert sums.split()[0] == manifest["sum"]
    for name in ("overlay", "vmdk"):
        done = vm_img(held, "verify", "--backing-chain", "--sum", "-m", "raw.json", name)
        assert done.returncode == 0, done.stderr
        *others, last = done.stdout.splitlines()
        assert last == "The image holds what the manifest says."
        assert bool(others) is ("--sum" not in options)  # that there is nothing to compare a sum with


def test_verify_tells_each_range(held: Path) -> None:
    """Each range that differs in a line, all of it in JSON, status 2."""
    assert vm_img(held, "verify", "-q", "-b", "64k", "-w", "m", "overlay").stdout == ""
    with (held / "raw").open("r+b") as file:
        for offset in (100, 5 << 20, (5 << 20) + 70_000, 19 << 20):
            file.seek(offset)
            file.write(b"?")
    done = vm_img(held, "verify", "-f", "raw", "-m", "m", "raw")
    assert done.returncode == 2
    assert done.stdout.splitlines() == [
        "Content differs: offset 0, length 65536",
        "Content differs: offset 5242880, length 131072",
        "Content differs: offset 19922944, length 65536",
    ]
    found = json.loads(vm_img(held, "verify", "-f", "raw", "-m", "m", "--output=json", "raw").stdout)
    assert found["same"] is False
    assert found["differing-ranges"] == 3
    assert found["differing-bytes"] == 262144
    assert found["differences"][1] == {"offset": 5242880, "length": 131072}
    with (held / "raw").open("r+b") as file:
        file.truncate(10 << 20)
    done = vm_img(held, "verify", "-f", "raw", "-m", "m", "raw")
    assert done.returncode == 2
    assert done.stdout.startswith("Size differs: 10485760 bytes instead of 20971520\n")


def test_verify_tells_damaged_metadata(held: Path) -> None:
    """Status 3 where the contents are right and the metadata is not; no manifest is made of such an image."""
    assert vm_img(held, "verify", "-w", "m", "overlay").returncode == 0
    for name, words in (("overlay", ()), ("base", ("--backing-chain",))):
        data = bytearray((held / name).read_bytes())
        good = bytes(data)
        data[2 * 65536 + 2 * 5 : 2 * 65536 + 2 * 5 + 2] = b"\0\0"  # a refcount
        (held / name).write_bytes(data)
        done = vm_img(held, "verify", *words, "-m", "m", "overlay")
        assert done.returncode == 3, done.stdout + done.stderr
        assert f"{name}: metadata is damaged: " in done.stdout
        done = vm_img(held, "verify", *words, "-w", "n", "overlay")
        assert done.returncode == 3
        assert not (held / "n").exists()
        (held / name).write_bytes(good)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "none", "raw"], "Could not open manifest 'none': No such file or directory"),
        (["-m", "raw", "raw"], "Manifest 'raw' cannot be used: not a manifest"),
        (["-m", "m", "-w", "n", "raw"], "give one of them"),
        (["-m", "m", "-b", "64k", "raw"], "those of the manifest"),
        (["-b", "1000", "raw"], "a power of two"),
        (["-a", "crc", "raw"], "algorithm 'crc' is not known; there is: sha256, blake2b"),
        (["-w", "-", "--output=json", "raw"], "both want standard output"),
        (["-w", "no/where", "raw"], "Could not write manifest 'no/where': No such file or directory"),
        (["none"], "Could not open 'none'"),
        ([], "Expecting one image file name"),
    ],
    ids=str,
)
def test_verify_errors(held: Path, words: list[str], said: str) -> None:
    """One sentence, status 1."""
    done = vm_img(held, "verify", "-f", "raw", *words)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_to_standard_output(held: Path) -> None:
    """``-w -`` prints the manifest and nothing else."""
    done = vm_img(held, "verify", "-w", "-", "overlay")
    assert json.loads(done.stdout)["virtual-size"] == 20 << 20
    assert done.stderr == ""
