"""From names to nodes: QEMU's syntax, probing, chains, the gate, snapshot=on, create."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.gate import Gate
from vm_core.block.graph import Graph
from vm_core.block.open import create_image, open_node
from vm_core.block.raw import RawNode
from vm_core.errors import BlockError, GateError, ImageError, LockError, PluginError, UsageError

pytestmark = pytest.mark.usefixtures("toy_driver")

K = 1024


def silent(text: str) -> None:
    pass


def make(path: Path, size: int = 64 * K, **options: str) -> str:
    create_image(str(path), "toy", size, options, check_backing=False)
    return str(path)


def fill(path: str, data: bytes, **how: Any) -> None:
    with open_node(path, readonly=False, **how) as node:
        node.pwrite(0, data)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd")) if sys.platform == "linux" else set()


@pytest.mark.parametrize(
    "spell",
    [
        lambda p: p,
        lambda p: Path(p),
        lambda p: f"file:{p}",
        lambda p: "json:" + json.dumps({"driver": "toy", "file": {"driver": "file", "filename": p}}),
        lambda p: "json:" + json.dumps({"driver": "toy", "file.filename": p}),
        lambda p: f"driver=toy,file.driver=file,file.filename={p}",
        lambda p: f"driver=toy,file.filename={p}",
        lambda p: f"file.filename={p}",
        lambda p: {"driver": "toy", "file": {"driver": "file", "filename": p}},
        lambda p: {"driver": "toy", "file.driver": "file", "file.filename": p},
        lambda p: {"driver": "toy", "filename": p},
        lambda p: {"filename": p},
    ],
)
def test_ways_to_name_an_image(tmp_path: Path, spell: Any) -> None:
    """Each of QEMU's spellings opens the same image in the same format."""
    name = make(tmp_path / "a,b.toy" if "json" in str(spell) else tmp_path / "a.toy")
    fill(name, b"here")
    with open_node(spell(name)) as node:
        assert node.driver == "toy"
        assert node.pread(0, 4) == b"here"
        assert node.filename == name


def test_a_protocol_can_be_opened_alone(tmp_path: Path) -> None:
    """With a protocol as driver there is no format on top, and nothing is probed."""
    name = make(tmp_path / "a.toy")
    with open_node({"driver": "file", "filename": name}) as node:
        assert node.driver == "file"
        assert node.pread(0, 4) == b"TOYF"


def test_nodes_by_name(tmp_path: Path) -> None:
    """A node refers to others by node-name; names are unique and free again after closing."""
    graph = Graph()
    name = make(tmp_path / "a.toy")
    storage = open_node({"driver": "file", "filename": name, "node-name": "store"}, graph=graph)
    node = open_node({"driver": "toy", "file": "store", "node-name": "disk"}, graph=graph)
    assert graph.find("disk") is node
    with pytest.raises(UsageError, match="there is a node of this name already"):
        open_node({"driver": "file", "filename": name, "node-name": "disk"}, graph=graph)
    with pytest.raises(UsageError, match="no node 'nope'"):
        open_node({"driver": "toy", "file": "nope"}, graph=graph)
    node.close()
    assert storage.pread(0, 4) == b"TOYF", "a referenced node is not closed with its parent"
    storage.close()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("driver=toy,file.filename=X,colour=blue", "toy: no option 'colour'"),
        ("driver=toy,file.filename=X,file.colour=blue", "file: no option 'colour'"),
        ("driver=raw,file.filename=X,offset=many", "raw: offset=many: a size is needed"),
        ("driver=raw,file.filename=X,size=1G", "past the end of the file"),
        ("driver=raw,file.filename=X,backing=none", "raw: no option 'backing'"),
        ("driver=toy,file.filename=X,read-only=maybe", "'on' or 'off'"),
        ("driver=toy,file.filename=X,discard=maybe", "discard=maybe"),
        ("driver=toy,file.filename=X,cache.mode=none", "cache.mode"),
        ("driver=toy", "'file' is missing"),
        ("driver=toy,file=nowhere", "no node 'nowhere'"),
        ("json:{", "not JSON"),
        ("json:[]", "JSON object"),
        ("driver=tqy,file.filename=X", "'toy'"),
    ],
)
def test_wrong_options_are_refused_by_name(tmp_path: Path, spec: str, text: str) -> None:
    """One line that names the option; nothing stays open."""
    name = make(tmp_path / "a.toy")
    before = open_descriptors()
    with pytest.raises((UsageError, ImageError, PluginError)) as caught:
        open_node(spec.replace("X", name))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert open_descriptors() == before


def test_absent_protocol_names_its_distribution() -> None:
    """nbd:… without the plugin says what to install; a word nobody knows is an unknown protocol."""
    with pytest.raises(PluginError, match="pip install vm-sheepdog"):
        open_node("sheepdog:vdi")
    with pytest.raises(PluginError, match="Unknown protocol 'gopher'"):
        open_node("gopher://host/disk")


def test_missing_image_is_one_line(tmp_path: Path) -> None:
    """As the peer says it."""
    with pytest.raises(ImageError, match=r"^Could not open '.*/none': No such file or directory$"):
        open_node(str(tmp_path / "none"))
    with pytest.raises(ImageError, match="requires a regular file"):
        open_node({"driver": "file", "filename": str(tmp_path)})


def test_probed_raw_is_guarded_and_given_raw_is_not(tmp_path: Path) -> None:
    """A guest cannot turn a raw image into another format unless the user said that it is raw."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(128 * K))
    said: list[str] = []
    with open_node(str(path), readonly=False, warn=said.append) as node:
        assert isinstance(node, RawNode)
        with pytest.raises(BlockError) as caught:
            node.pwrite(0, b"TOYFxxxx")
        assert caught.value.code == errno.EPERM
        assert node.pread(0, 8) == bytes(8)
        node.pwrite(0, b"TO")
        with pytest.raises(BlockError):
            node.pwrite(2, b"YF")
        node.pwrite(64 * K, b"TOYF")
        node.pwrite(0, b"boot")
    assert len(said) == 1
    assert "probing guessed raw" in said[0]
    with open_node(str(path), readonly=False, format="raw", warn=said.append) as node:
        node.pwrite(0, b"TOYF")
    assert len(said) == 1


def test_zeroing_cannot_get_around_the_guard(tmp_path: Path) -> None:
    """Zeroes are no format's header, so zeroing stays allowed on a guarded image."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * 8 * K)
    with open_node(str(path), readonly=False, warn=silent) as node:
        node.zero(0, 4 * K)
    assert path.read_bytes() == bytes(4 * K) + b"x" * 4 * K


def test_raw_window(tmp_path: Path) -> None:
    """raw,offset=,size= is a window that neither reads nor writes beside itself."""
    path = tmp_path / "disk"
    path.write_bytes(b"a" * K + b"b" * K + b"c" * K)
    with open_node(f"driver=raw,file.filename={path},offset=1k,size=1k", readonly=False) as node:
        assert node.size == K
        assert node.pread(0, 2 * K) == b"b" * K + bytes(K)
        with pytest.raises(BlockError):
            node.pwrite(K, b"x")
        node.pwrite(0, b"B")
        with pytest.raises(ImageError, match="fixed size"):
            node.truncate(2 * K)
    assert path.read_bytes() == b"a" * K + b"B" + b"b" * (K - 1) + b"c" * K


# Chains


def chain(directory: Path, names: list[str], **recorded: str) -> str:
    """Images on top of each other, first the base; returns the top's path."""
    below: str | None = None
    for name in names:
        options: dict[str, str] = {}
        if below is not None:
            options = {"backing_file": below, "backing_fmt": "toy", **recorded}
        make(directory / name, 64 * K, **options)
        below = name
    return str(directory / names[-1])


def test_backing_chain_is_followed_in_the_own_directory(tmp_path: Path) -> None:
    """Relative names start at the image's directory, wherever the program runs."""
    top = chain(tmp_path, ["base.toy", "mid.toy", "top.toy"])
    fill(str(tmp_path / "base.toy"), b"base")
    with open_node(top) as node:
        assert node.pread(0, 4) == b"base"
        assert node.backing is not None
        assert node.backing.backing is not None
        assert node.backing.backing.filename == str(tmp_path / "base.toy")
        assert node.backing.readonly


def test_backing_options(tmp_path: Path) -> None:
    """backing=null or nothing: none; options: another one, or its format; a node's name: that node."""
    top = chain(tmp_path, ["base.toy", "top.toy"])
    fill(str(tmp_path / "base.toy"), b"base")
    other = make(tmp_path / "other.toy")
    fill(other, b"othr")
    for none in ({"backing": None}, {"backing": ""}):
        with open_node({"filename": top, **none}) as node:
            assert node.backing is None
            assert node.pread(0, 4) == bytes(4)
    with open_node("json:" + json.dumps({"driver": "toy", "file.filename": top, "backing": None})) as node:
        assert node.backing is None
    with open_node(top, backing=False) as node:
        assert node.backing is None
    with open_node(f"driver=toy,file.filename={top},backing.file.filename={other}") as node:
        assert node.pread(0, 4) == b"othr"
    with open_node(f"driver=toy,file.filename={top},backing.driver=raw") as node:
        assert node.pread(0, 4) == b"TOYF"
    graph = Graph()
    with (
        open_node({"filename": other, "node-name": "other"}, graph=graph) as below,
        open_node({"filename": top, "backing": "other"}, graph=graph) as node,
    ):
        assert node.backing is below


def test_gate_refuses_what_lies_outside(tmp_path: Path) -> None:
    """An image outside the directory, by absolute name, by .. or by a link, is not opened unless the user allows it."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    secret = make(outside / "secret.toy")
    fill(secret, b"secret")
    os.symlink(secret, inside / "link.toy")
    before = open_descriptors()
    for name in (secret, "../out/secret.toy", "link.toy", f"file:{secret}"):
        top = make(inside / "top.toy", backing_file=name, backing_fmt="toy")
        with pytest.raises(GateError) as caught:
            open_node(top)
        assert f"--trust {outside}" in str(caught.value)
        assert "backing=follow" in str(caught.value)
        with open_node(top, gate=Gate.default(str(outside))) as node:
            assert node.pread(0, 6) == b"secret"
        with open_node({"filename": top, "backing": "follow"}) as node:
            assert node.pread(0, 6) == b"secret"
        with open_node(top, gate=Gate.follow()) as node:
            assert node.pread(0, 6) == b"secret"
    assert open_descriptors() == before


def test_gate_honours_vm_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """VM_TRUST is a list of directories, like PATH."""
    (tmp_path / "in").mkdir()
    base = make(tmp_path / "base.toy")
    top = make(tmp_path / "in" / "top.toy", backing_file=base, backing_fmt="toy")
    with pytest.raises(GateError):
        open_node(top)
    monkeypatch.setenv("VM_TRUST", f"/nowhere{os.pathsep}{tmp_path}")
    with open_node(top) as node:
        assert node.backing is not None


def test_gate_refuses_other_kinds_of_names(tmp_path: Path) -> None:
    """json: definitions, protocols and devices in an image are refused, and so is a raw guess."""
    (tmp_path / "plain").write_bytes(b"root:x:0:0" * 100)
    os.mkfifo(tmp_path / "pipe")
    for name, text in [
        ("json:" + json.dumps({"driver": "file", "filename": "plain"}), "json: definition"),
        ("nbd://localhost/", "not a plain file"),
        ("pipe", "not a regular file"),
    ]:
        top = make(tmp_path / "top.toy", backing_file=name, backing_fmt="raw")
        with pytest.raises(GateError, match=text):
            open_node(top)
    top = make(tmp_path / "top.toy", backing_file="plain")
    with pytest.raises(GateError, match="looks raw"):
        open_node(top)
    with open_node({"filename": top, "backing": {"driver": "raw"}}) as node:
        assert node.pread(0, 4) == b"root"
    top = make(tmp_path / "top.toy", backing_file="plain", backing_fmt="raw")
    with open_node(top) as node:
        assert node.pread(0, 4) == b"root"
    with pytest.raises(GateError):
        open_node(top, gate=Gate.none())


def test_loops_are_one_error(tmp_path: Path) -> None:
    """An image that backs itself, or is backed by one that it backs, is refused at once, read-only or not."""
    make(tmp_path / "self.toy", backing_file="self.toy", backing_fmt="toy")
    make(tmp_path / "a.toy", backing_file="b.toy", backing_fmt="toy")
    make(tmp_path / "b.toy", backing_file="a.toy", backing_fmt="toy")
    os.symlink("a.toy", tmp_path / "c.toy")
    before = open_descriptors()
    for name in ("self.toy", "a.toy", "b.toy", "c.toy"):
        for readonly in (True, False):
            for gate in (None, Gate.follow()):
                with pytest.raises(ImageError, match="loop"):
                    open_node(str(tmp_path / name), readonly=readonly, gate=gate)
    assert open_descriptors() == before


def test_endless_chains_are_refused(tmp_path: Path) -> None:
    """A chain of 250 different images is refused without exhausting the stack or leaving files open."""
    names = [f"{number}.toy" for number in range(250)]
    top = chain(tmp_path, names)
    before = open_descriptors()
    with pytest.raises(ImageError, match="longer than 200"):
        open_node(top)
    assert open_descriptors() == before
    with open_node(str(tmp_path / "150.toy")) as node:
        assert node.pread(0, 4) == bytes(4)


def test_missing_backing_file_names_both(tmp_path: Path) -> None:
    """The message names the image and what is missing."""
    top = chain(tmp_path, ["base.toy", "top.toy"])
    os.unlink(tmp_path / "base.toy")
    with pytest.raises(ImageError, match=r"top\.toy: Could not open backing file: Could not open '.*base\.toy'"):
        open_node(top)


# Snapshots, creating, locks


def test_snapshot_needs_its_format_by_name(tmp_path: Path) -> None:
    """snapshot=on keeps changes aside and forgets them, or says which plugin it needs."""
    path = tmp_path / "disk"
    path.write_bytes(b"a" * 256 * K)
    try:
        node = open_node(str(path), readonly=False, snapshot=True, format="raw")
    except PluginError as error:
        assert "vm-qcow2" in str(error)  # noqa: PT017 - or it is installed
        return
    with node:
        assert isinstance(node, FormatNode)
        node.pwrite(1000, b"changed")
        assert node.pread(999, 9) == b"achangeda"
    assert path.read_bytes() == b"a" * 256 * K


def test_failed_create_leaves_nothing_behind(tmp_path: Path) -> None:
    """A create that fails on its options removes the new file; one in use is left as it was."""
    path = tmp_path / "new.toy"
    with pytest.raises(ImageError):
        create_image(str(path), "toy", K, {"cluster_size": 1000})
    assert not path.exists()
    with pytest.raises(UsageError, match="needs a size"):
        create_image(str(path), "toy", None)
    assert not path.exists()
    name = make(path)
    with open_node(name, readonly=False) as node:
        node.pwrite(0, b"kept")
        with pytest.raises(LockError):
            create_image(name, "toy", K)
        assert node.pread(0, 4) == b"kept"


def test_create_takes_its_size_from_the_backing_image(tmp_path: Path) -> None:
    """Without a size an overlay is as long as what it lies on."""
    make(tmp_path / "base.toy", 48 * K)
    create_image(str(tmp_path / "top.toy"), "toy", None, {"backing_file": "base.toy", "backing_fmt": "toy"})
    with open_node(str(tmp_path / "top.toy")) as node:
        assert node.size == 48 * K


@pytest.mark.skipif(sys.platform != "linux", reason="open-file-description locks are Linux's")
def test_two_writers_exclude_each_other(tmp_path: Path) -> None:
    """A second opening is refused while one writes; readers share; -U reads anyway."""
    name = make(tmp_path / "a.toy")
    with open_node(name, readonly=False):
        with pytest.raises(LockError, match=r'Failed to get "write" lock.*Is another process using the image'):
            open_node(name, readonly=False)
        with pytest.raises(LockError, match='Failed to get shared "write" lock'):
            open_node(name)
        with open_node(name, share=True) as second:
            assert second.size == 64 * K
    with open_node(name), open_node(name):
        pass
    with pytest.raises(UsageError, match="force-share"):
        open_node(name, share=True, readonly=False)


def test_auto_read_only(tmp_path: Path) -> None:
    """auto-read-only opens read-only what cannot be written."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(K))
    node = open_node({"driver": "raw", "file.filename": str(path), "read-only": False}, auto_readonly=True)
    assert not node.readonly
    node.close()
