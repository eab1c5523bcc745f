"""Each filter does what the peer's does, and what it is for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from vm_core.block.gate import Gate
from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.errors import FatalError, UsageError
from vm_core.testing.iopeer import assert_same, both, needs_peer
from vm_core.testing.nodes import MemoryNode
from vm_filters import groups
from vm_filters.blkverify import Blkverify
from vm_filters.buckets import Bucket
from vm_filters.quorum import Quorum
from vm_filters.throttle import Throttle


def commands(*lines: str) -> list[str]:
    return [word for line in lines for word in ("-c", line)]


@pytest.fixture(autouse=True)
def no_groups() -> Iterator[None]:
    """Groups of one test are not those of another."""
    groups.forget()
    yield
    groups.forget()


RAWS = tuple(f"create -q -f raw x{number} 1M" for number in range(3))
THREE = ",".join(f"children.{n}.driver=raw,children.{n}.file.filename=x{n}" for n in range(3))
TWO = ",".join(f"children.{n}.driver=raw,children.{n}.file.filename=x{n}" for n in range(2))
USUAL = ("length", "info", "map", "write -P 5 0 64k", "read -P 5 0 64k", "write -z 0 4k", "flush")
OTHER = {"x1": bytes(4096) + b"\7" * 4096 + bytes((1 << 20) - 8192)}

QUORUM = (
    "{three},vote-threshold=2",
    "{three}",
    "{three},vote-threshold=4",
    "{three},vote-threshold=0",
    "{three},vote-threshold=x",
    "{three},vote-threshold=1,blkverify=on",
    "{three},vote-threshold=2,read-pattern=foo",
    "{three},vote-threshold=2,read-pattern=fifo",
    "{three},vote-threshold=2,rewrite-corrupted=bogus",
    "vote-threshold=1",
    "vote-threshold=1,children.0.driver=raw,children.0.file.filename=x0",
)


@needs_peer
@pytest.mark.parametrize("options", QUORUM)
def test_quorum_like_the_peer(options: str, tmp_path: Path) -> None:
    """Quorums open, are refused, and pass requests on as in the peer."""
    words = ["--image-opts", *commands(*USUAL, "truncate 2M"), f"driver=quorum,{options.format(three=THREE)}"]
    assert_same(tmp_path, RAWS, words)


@needs_peer
@pytest.mark.parametrize(
    "options",
    [
        f"{THREE},vote-threshold=2",
        f"{THREE},vote-threshold=3",
        f"{TWO},vote-threshold=2",
        f"{TWO},vote-threshold=2,blkverify=on",
        f"{THREE},vote-threshold=2,read-pattern=fifo",
        f"{THREE},vote-threshold=2,rewrite-corrupted=on",
    ],
)
def test_quorum_votes_like_the_peer(options: str, tmp_path: Path) -> None:
    """What is read where one image differs, and what becomes of that image."""
    words = ["--image-opts", *commands("read -P 0 4k 4k", "read -P 0 0 64k"), f"driver=quorum,{options}"]
    assert_same(tmp_path, RAWS, words, files=OTHER)


class Failing(MemoryNode):
    """Fails every request with an errno."""

    code = 5

    @property
    def size(self) -> int:
        return 512

    def read(self, offset: int, buffers: Any) -> None:
        raise OSError(self.code, "no")

    def write(self, offset: int, buffers: Any, *, fua: bool = False) -> None:
        raise OSError(self.code, "no")


def test_quorum_survives_failures_down_to_its_threshold() -> None:
    """As many children as the threshold have to succeed; with fewer the most frequent error is told."""
    good, bad = MemoryNode(b"a" * 512), Failing()
    assert Quorum([good, bad, MemoryNode(b"a" * 512)], 2).pread(0, 4) == b"aaaa"
    with pytest.raises(OSError, match="no"):
        Quorum([good, bad], 2).pread(0, 4)
    assert good.pread(0, 4) == b"aaaa"
    Quorum([good, bad, bad], 1).pwrite(0, b"b")
    assert good.pread(0, 1) == b"b"
    with pytest.raises(OSError, match="no"):
        Quorum([good, bad], 2).pwrite(0, b"b")
    assert Quorum([bad, good], 1, fifo=True).pread(0, 1) == b"b"


PAIR = ("create -q -f raw v.raw 1M", "create -q -f qcow2 v.qcow2 1M")


@needs_peer
@pytest.mark.parametrize(
    "words",
    [
        [
            "-f",
            "raw",
            *commands("length", "info", "map", "write -P 1 0 64k", "read -P 1 0 64k", "flush", "truncate 2M"),
        ],
        ["-f", "raw", *commands("discard 0 64k", "aio_write 4k 4k", "aio_flush", "read 0 1M")],
    ],
    ids=["usual", "aio"],
)
def test_blkverify_like_the_peer(words: list[str], tmp_path: Path) -> None:
    """Requests go to both images."""
    assert_same(tmp_path, PAIR, [*words, "blkverify:v.raw:v.qcow2"])


DIFFERENT = {"v.raw": bytes(8192) + b"\1" + bytes((1 << 20) - 8193)}
DIFFERENCE = {"a": b"\0" * 512 + b"x" * 512, "b": b"\0" * 512 + b"y" * 512}
#: Neither the start nor the end, at which formats are looked for.
MIDDLE = {name: bytes(200 << 10) + data + bytes(200 << 10) for name, data in DIFFERENCE.items()}


@needs_peer
@pytest.mark.parametrize(
    "lines",
    [
        ["read 0 4k", "read 4k 8k", "read 0 4k"],
        ["readv 0 4k 1k", "write 64k 4k", "readv 4k 2k 6k", "write 64k 4k"],
        ["read -P 0 0 4k", "read -P 0 4k 8k"],
        ["aio_read 4k 8k", "aio_flush", "read 0 4k"],
        ["read 0 1k", "aio_read 4k 8k"],
        ["truncate 2M", "read 4k 8k"],
        ["read 0 16k", "quit"],
    ],
    ids=lambda lines: lines[0],
)
def test_blkverify_ends_the_program_at_a_difference(lines: list[str], tmp_path: Path) -> None:
    """The first byte that differs is told, and nothing more is done."""
    words = ["-f", "raw", *commands(*lines), "blkverify:v.raw:v.qcow2"]
    peer, mine = both(tmp_path, PAIR, words, files=DIFFERENT)
    assert (mine.out, mine.err, mine.status) == (peer.out, peer.err, peer.status)
    assert "contents mismatch" in mine.err
    assert mine.status == 1


@needs_peer
def test_blkverify_ends_the_program_at_an_error_of_one_image(tmp_path: Path) -> None:
    """A request that fails on one image alone is such a difference, too."""
    files = {"errors": '[inject-error]\nevent = "write_aio"\nerrno = "5"\n'}
    words = ["-f", "raw", *commands("read 0 4k", "write 0 4k", "read 0 4k"), "blkverify:v.raw:blkdebug:errors:v.qcow2"]
    peer, mine = both(tmp_path, PAIR, words, files=files)
    assert (mine.out, mine.err, mine.status) == (peer.out, peer.err, peer.status)


@needs_peer
def test_quorum_with_blkverify_ends_the_program(tmp_path: Path) -> None:
    """So does a quorum of two that compares."""
    options = f"driver=quorum,{TWO},vote-threshold=2,blkverify=on"
    words = ["--image-opts", *commands("read 0 4k", "aio_read 4k 8k", "aio_flush", "read 0 4k"), options]
    peer, mine = both(tmp_path, RAWS, words, files=OTHER)
    assert (mine.out, mine.err, mine.status) == (peer.out, peer.err, peer.status)
    assert mine.status == 1


QUORUM_NAME = "json:" + json.dumps(
    {
        "driver": "quorum",
        "vote-threshold": 2,
        "blkverify": True,
        "children": [{"driver": "file", "filename": name} for name in ("a", "b")],
    }
)


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is missing: apt-get install qemu-utils")
@pytest.mark.parametrize("name", ["blkverify:a:b", QUORUM_NAME], ids=["blkverify", "quorum"])
@pytest.mark.parametrize("words", ["convert -O raw {} o", "compare {} a", "info {}", "bench -c 6 -s 65536 {}"])
def test_the_tools_end_like_the_peers(words: str, name: str, tmp_path: Path) -> None:
    """vm-img says what qemu-img does, without its own name before it, and exits with the same status."""
    if words.startswith("bench") and name != QUORUM_NAME:
        pytest.skip("the peer compares with what its buffers held before")
    for file, data in MIDDLE.items():
        (tmp_path / file).write_bytes(data)
    command = [word.format(name) for word in words.split()]
    peer = subprocess.run(["qemu-img", *command], cwd=tmp_path, capture_output=True, text=True)
    ours = [sys.executable, "-c", "import sys; from vm_core.cli.img.main import main; sys.exit(main(None, 'qemu-img'))"]
    mine = subprocess.run([*ours, *command], cwd=tmp_path, capture_output=True, text=True)
    assert (mine.stderr, mine.returncode) == (peer.stderr, peer.returncode)
    assert mine.stdout == peer.stdout


@pytest.mark.parametrize("which", ["blkverify", "quorum"])
def test_a_difference_ends_no_program_by_itself(which: str) -> None:
    """The library raises FatalError, again and again, whatever is asked for; the images stay as they are."""
    one, two = MemoryNode(DIFFERENCE["a"]), MemoryNode(DIFFERENCE["b"])
    node: Node = Blkverify(one, two) if which == "blkverify" else Quorum([one, two], 2, verify=True)
    assert node.pread(0, 512) == bytes(512)
    node.pwrite(0, b"z")
    for _ in range(2):
        with pytest.raises(FatalError, match=f"^{which}: .*contents mismatch at offset 512$"):
            node.pread(512, 512)
    with pytest.raises(FatalError, match="mismatch"):
        node.pread(0, 1)
    with pytest.raises(FatalError, match="mismatch"):
        node.pwrite(0, b"y")
    with pytest.raises(FatalError, match="mismatch"):
        node.zero(0, 1)
    node.flush()
    node.close()
    assert one.pread(0, 1) == two.pread(0, 1) == b"z"


@needs_peer
@pytest.mark.parametrize("name", ["blkverify:nofile:v.qcow2", "blkverify:v.raw:nofile", "blkverify:v.raw"])
def test_blkverify_names(name: str, tmp_path: Path) -> None:
    """Names that cannot be opened are refused in the peer's words."""
    assert_same(tmp_path, PAIR, [*commands("length"), name])


OVERLAY = ("create -q -f qcow2 v.qcow2 1M", "create -q -f qcow2 -b v.qcow2 -F qcow2 ov 1M")
COR = "driver=copy-on-read,file.driver=qcow2,file.file.filename=ov"


@needs_peer
def test_copy_on_read_like_the_peer(tmp_path: Path) -> None:
    """What is read becomes the image's own, cluster by cluster, at the same places."""
    lines = ("map", "read -P 0 0 64k", "read 100k 1", "map", "alloc 0 1M", "info", "length", "write 300k 5k", "map")
    assert_same(tmp_path, OVERLAY, ["--image-opts", *commands(*lines), COR])


@needs_peer
@pytest.mark.parametrize("more", [",foo=1", ",bottom=foo"])
def test_copy_on_read_options(more: str, tmp_path: Path) -> None:
    """Wrong options are refused in the peer's words."""
    assert_same(tmp_path, OVERLAY, ["--image-opts", *commands("length"), COR + more])


@needs_peer
def test_copy_on_read_option_of_the_program(tmp_path: Path) -> None:
    """``-C`` does the same to the image itself."""
    assert_same(tmp_path, OVERLAY, ["-C", *commands("read 200k 1", "map", "info", "reopen -r"), "ov"])


@needs_peer
def test_compress_like_the_peer(tmp_path: Path) -> None:
    """Whole clusters and parts are compressed; what is there already cannot be replaced."""
    lines = ("write 0 64k", "write -P 1 100k 3k", "write 0 64k", "map", "info", "read -P 1 100k 3k", "write 128k 1")
    words = ["--image-opts", *commands(*lines), "driver=compress,file.driver=qcow2,file.file.filename=v.qcow2"]
    assert_same(tmp_path, OVERLAY[:1], words)


@needs_peer
def test_compress_needs_a_format_that_can(tmp_path: Path) -> None:
    """Formats without compression are refused by name."""
    words = ["--image-opts", *commands("length"), "driver=compress,file.driver=raw,file.file.filename=x0"]
    assert_same(tmp_path, RAWS, words)


THROTTLE = "driver=throttle,throttle-group=g,file.driver=raw,file.file.filename=x0"

LIMITS = (
    "x-bps-total=-1",
    "x-bps-total=x",
    "x-foo=1",
    "x-bps-total=1,x-bps-read=1",
    "x-bps-total-max=1",
    "x-bps-total=10,x-bps-total-max=5",
    "x-bps-total-max-length=1",
    "x-bps-total=10,x-bps-total-max-length=2",
    "x-bps-total=10,x-bps-total-max=100,x-bps-total-max-length=0",
    "x-bps-total=2000000000000000",
    "x-iops-size=4096",
    "x-iops-size=4096,x-iops-write=4",
    "limits=1",
    "limits.bps-total=1000",
)


@needs_peer
@pytest.mark.parametrize("limits", LIMITS)
def test_throttle_groups_like_the_peer(limits: str, tmp_path: Path) -> None:
    """Limits that contradict each other are refused in the peer's words."""
    words = ["--object", f"throttle-group,id=g,{limits}", "--image-opts", *commands("length"), THROTTLE]
    assert_same(tmp_path, RAWS, words)


@needs_peer
@pytest.mark.parametrize("options", [THROTTLE, "driver=throttle,file.driver=raw,file.file.filename=x0"])
def test_throttle_options(options: str, tmp_path: Path) -> None:
    """The group has to be named and there."""
    assert_same(tmp_path, RAWS, ["--image-opts", *commands("length"), options])


def test_buckets() -> None:
    """The waits are those of the leaky bucket: a tenth of a second's worth without burst, the burst's size with one."""
    plain = Bucket(average=100)
    plain.fill(100)
    assert plain.delay() == pytest.approx(0.9)
    plain.leak(0.5)
    assert plain.delay() == pytest.approx(0.4)
    burst = Bucket(average=2, burst=4)
    burst.fill(16)
    assert burst.delay() == pytest.approx(6.0)
    long = Bucket(average=100, burst=2000, length=60)
    long.fill(400)
    assert long.delay() == pytest.approx(0.1)  # 400 are 200 more than a tenth of a second of burst
    long.fill(120_000)
    assert long.delay() == pytest.approx((120_400 - 120_000) / 100)
    assert Bucket().delay() == 0


def test_throttle_takes_its_time() -> None:
    """Four writes of one unit at twenty a second take at least their time, reads are not held up by them."""
    node = Throttle(MemoryNode(bytes(4096)), groups.Group({"iops-write": 20}))
    before = monotonic()
    for _ in range(5):
        node.pwrite(0, b"x")
    taken = monotonic() - before
    assert 0.1 <= taken < 2
    before = monotonic()
    node.pread(0, 100)
    assert monotonic() - before < 0.05


def test_members_take_turns() -> None:
    """Of two nodes of a group one cannot starve the other."""
    group = groups.Group({"iops-total": 50})
    one, two = (Throttle(MemoryNode(bytes(512)), group) for _ in range(2))
    done: list[str] = []

    def work(node: Throttle, name: str) -> None:
        node.pread(0, 1)
        done.append(name)

    threads = [threading.Thread(target=work, args=(one, "one")) for _ in range(12)]
    for thread in threads:
        thread.start()
    late = threading.Thread(target=work, args=(two, "two"))
    late.start()
    for thread in [*threads, late]:
        thread.join(20)
    # It waits at most for what could go at once, what was in flight and the turn of the other.
    assert done.index("two") < 10


def test_group_limits_are_checked() -> None:
    """A burst needs a limit."""
    with pytest.raises(UsageError, match="require corresponding"):
        groups.Group({"bps-read-max": 5})


def test_bottom_limits_what_is_copied(tmp_path: Path) -> None:
    """What lies below the bottom node is read, not copied."""
    pytest.importorskip("vm_qcow2")
    for name, below in (("a", None), ("b", "a"), ("c", "b")):
        options = {} if below is None else {"backing_file": below, "backing_fmt": "qcow2"}
        create_image(str(tmp_path / name), "qcow2", 1 << 20, options)
        if name != "c":
            with open_node(str(tmp_path / name), readonly=False) as node:
                node.pwrite(0 if name == "a" else 1 << 16, name.encode() * 10)
    spec = {
        "driver": "copy-on-read",
        "bottom": "middle",
        "file": {
            "driver": "qcow2",
            "file": {"driver": "file", "filename": str(tmp_path / "c")},
            "backing": {
                "driver": "qcow2",
                "node-name": "middle",
                "file": {"driver": "file", "filename": str(tmp_path / "b")},
            },
        },
    }
    with open_node(spec, readonly=False, gate=Gate.follow()) as node:
        assert node.pread(0, 3) == b"aaa"
        assert node.pread(1 << 16, 3) == b"bbb"
        image = next(iter(node.children().values()))
        kinds = [run.kind.name for run in image.map(0, 1 << 17)]
    assert kinds == ["UNALLOCATED", "DATA"]


def test_names(tmp_path: Path) -> None:
    """A quorum is called by json:, blkverify by its own form."""
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(1024))
    children = [{"driver": "raw", "file": {"driver": "file", "filename": f"{tmp_path}/{name}"}} for name in "ab"]
    with open_node({"driver": "quorum", "vote-threshold": 1, "children": children}) as node:
        assert node.filename.startswith('json:{"children": [{')
        with open_node(node.filename) as again:
            assert again.size == 1024
    name = f"blkverify:{tmp_path}/a:{tmp_path}/b"
    with open_node(name, format="raw") as node:
        assert node.filename == name
