"""Converting images in place: QCOW2 to QED and back, with the peer's tools as judges."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vm_qcow2")
pytest.importorskip("vm_qed")

from vm_core.block.jobs.inplace import convert_inplace, convert_storage
from vm_core.block.mapping import Kind
from vm_core.block.open import open_node
from vm_core.block.probe import probe
from vm_core.errors import ImageError, UsageError, VmError
from vm_core.testing.nodes import MemoryNode, RecordingNode
from vm_core.testing.replay import power_cuts

LONG = os.environ.get("VM_LONG", "") not in ("", "0")
KIB, MIB = 1 << 10, 1 << 20
OTHER = {"qcow2": "qed", "qed": "qcow2"}

pytestmark = pytest.mark.skipif(
    not (shutil.which("qemu-img") and shutil.which("qemu-io")) and not os.environ.get("CI"),
    reason="qemu-img and qemu-io are missing: apt-get install qemu-utils",
)


def run(*words: object, ok: tuple[int, ...] = (0,)) -> str:
    """A program's output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120)
    assert done.returncode in ok, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def create(path: Path, format: str, size: int, options: str = "", *extra: object) -> None:
    run("qemu-img", "create", "-q", "-f", format, *(["-o", options] if options else []), *extra, path, size)


def contents(path: Path, format: str) -> bytes:
    """What the peer reads."""
    raw = path.with_suffix(".raw")
    run("qemu-img", "convert", "-f", format, "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data


def places(path: Path, format: str) -> list[tuple[int, int]]:
    """Where data is: guest offset and host offset of each cluster of 4 KiB, which divides all others here."""
    with open_node(path, format=format) as node:
        return [
            (run.offset + at, run.host + at)
            for run in node.map(0, node.size)
            if run.kind is Kind.DATA
            for at in range(0, run.length, 4096)
        ]


def scribble(path: Path, format: str, size: int, count: int, chance: random.Random, *, whole: int = 0) -> None:
    """Random changes by the peer; in multiples of *whole* bytes where that is given."""
    unit = whole or 512
    commands: list[str] = []
    for _ in range(count):
        offset = chance.randrange(size // unit) * unit
        length = min(size - offset, chance.randrange(1, max(2, 200 * KIB // unit)) * unit)
        verb = chance.choice(["write -P 7", "write -P 9", "write -z", "write -zu", "discard"])
        commands += ["-c", f"{verb} {offset} {length}"]
    if commands:
        run("qemu-io", "-f", format, *commands, path)


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("qcow2", ""),
        ("qcow2", "cluster_size=4k,refcount_bits=1"),
        ("qcow2", "cluster_size=2M,compat=0.10"),
        ("qcow2", "cluster_size=16k,lazy_refcounts=on"),
        ("qcow2", "cluster_size=8k,preallocation=metadata"),
        ("qed", ""),
        ("qed", "cluster_size=4k,table_size=2"),
        ("qed", "cluster_size=2M,table_size=2"),
        ("qed", "cluster_size=32k,table_size=16"),
    ],
)
@pytest.mark.parametrize("seed", range(10 if LONG else 1))
def test_round_trips(tmp_path: Path, format: str, options: str, seed: int) -> None:
    """The guest's bytes stay, and stay where they are; the peer finds nothing wrong, not even leaks, and goes on."""
    chance = random.Random(f"{options} {seed}")
    path, size = tmp_path / "image", chance.choice([MIB, 700 * KIB + 512, 30 * MIB, 200 * MIB])
    create(path, format, size, options)
    scribble(path, format, size, chance.randrange(40), chance)
    for _ in range(4):
        before, where = contents(path, format), places(path, format)
        done = convert_inplace(str(path), OTHER[format], format=format)
        assert (done.former, done.lost) == (format, 0)
        format = OTHER[format]
        run("qemu-img", "check", "-f", format, path)
        with open_node(path, format=format) as node:
            assert node.driver == format
            assert probe(node.children()["file"]) == format
            assert not {"corruptions", "leaks"} & set(node.format.check())  # type: ignore[attr-defined]
            assert node.pread(0, size) == before
        assert contents(path, format) == before
        assert places(path, format) == where
        scribble(path, format, size, chance.randrange(10), chance)
        run("qemu-img", "check", "-f", format, path)


@pytest.mark.parametrize("format", ["qcow2", "qed"])
@pytest.mark.parametrize("below", ["raw", "qcow2"])
def test_backing_files(tmp_path: Path, format: str, below: str) -> None:
    """Name and format of the backing file go along, also a long name; zeroes go on hiding it."""
    chance = random.Random(below + format)
    (tmp_path / "data").write_bytes(chance.randbytes(600 * KIB))
    directory = tmp_path / ("d" * 200)
    directory.mkdir()
    base, path = directory / ("b" * 250), directory / "image"
    run("qemu-img", "convert", "-f", "raw", "-O", below, tmp_path / "data", base)
    create(path, format, MIB, "", "-b", base, "-F", below)
    scribble(path, format, MIB, 12, chance, whole=65536)
    for _ in range(3):
        before = contents(path, format)
        convert_inplace(str(path), OTHER[format], format=format)
        format = OTHER[format]
        run("qemu-img", "check", "-f", format, path)
        assert contents(path, format) == before
        info = json.loads(run("qemu-img", "info", "-f", format, "--output=json", path))
        assert info["backing-filename"] == str(base)
        if format == "qcow2" or below == "raw":
            assert info["backing-filename-format"] == below
        scribble(path, format, MIB, 3, chance, whole=65536)


def test_a_grown_image_shows_no_old_metadata(tmp_path: Path) -> None:
    """Clusters that only the former format used are set aside past the end: growing the image finds zeroes there."""
    path = tmp_path / "image"
    create(path, "qcow2", MIB, "cluster_size=4k")
    run("qemu-io", "-c", "write -P 7 0 1M", "-c", "discard 64k 256k", path)
    convert_inplace(str(path), "qed")
    run("qemu-img", "check", path)
    run("qemu-img", "resize", "-q", path, 20 * MIB)
    assert contents(path, "qed")[MIB:] == bytes(19 * MIB)
    run("qemu-io", "-c", "write -P 9 1M 4M", path)
    run("qemu-img", "check", path)


# Refusals


def _snapshot(path: Path) -> None:
    run("qemu-img", "snapshot", "-c", "before", path)


def _bitmap(path: Path) -> None:
    run("qemu-img", "bitmap", "--add", path, "dirty")


def _compress(path: Path) -> None:
    run("qemu-io", "-c", "write -c -P 5 0 64k", path)


def _dirty(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\1")


def _corrupt(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(79)
        file.write(b"\2")


def _damage(path: Path) -> None:
    """A data cluster that is counted as free."""
    run("qemu-io", "-c", "write 0 64k", path)
    with path.open("r+b") as file:
        file.seek(2 * 65536 + 5 * 2)
        file.write(b"\0\0")


def _state(path: Path) -> None:
    run("qemu-io", "-c", "write -b 0 64k", path)


def _nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("options", "prepare", "reason"),
    [
        ("", _snapshot, "internal snapshot 'before' (vm-img snapshot -d 'before' "),
        ("", _bitmap, "dirty bitmap 'dirty' (vm-img bitmap --remove "),
        ("", _compress, "compressed clusters (vm-img convert"),
        ("", _dirty, "not been closed (vm-img check -r all "),
        ("", _corrupt, "marked as corrupt (vm-img check -r all "),
        ("", _damage, "is damaged (2 errors) and is not converted; vm-img check -r all "),
        ("", _state, "saved machine state"),
        ("cluster_size=2k", _nothing, "clusters of 2048 bytes; a qed image has 4096 to 67108864"),
        ("extended_l2=on", _nothing, "extended L2 entries (subclusters)"),
        ("data_file=DATA", _nothing, "external data file"),
        ("encrypt.format=aes,encrypt.key-secret=s", _nothing, "its encryption"),
    ],
)
def test_what_qed_cannot_hold(tmp_path: Path, options: str, prepare: Any, reason: str) -> None:
    """Each is refused by name, with what to do; the file is as it was."""
    path = tmp_path / "image"
    options = options.replace("DATA", str(tmp_path / "data"))
    secret = ["--object", "secret,id=s,data=word"] if "encrypt" in options else []
    create(path, "qcow2", MIB, options, *secret)
    prepare(path)
    before = path.read_bytes()
    with pytest.raises(VmError) as caught:
        convert_inplace(str(path), "qed")
    assert reason in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "feature", "reason"),
    [
        ("cluster_size=4M,table_size=2", b"", "clusters of 4194304 bytes; a qcow2 image has 512 to 2097152"),
        ("", b"\x02", "not been closed (vm-img check -r all "),
    ],
)
def test_what_qcow2_cannot_hold(tmp_path: Path, options: str, feature: bytes, reason: str) -> None:
    """The same the other way round."""
    path = tmp_path / "image"
    create(path, "qed", MIB, options)
    if feature:
        with path.open("r+b") as file:
            file.seek(16)
            file.write(feature)
    before = path.read_bytes()
    with pytest.raises(ImageError) as caught:
        convert_inplace(str(path), "qcow2")
    assert reason in str(caught.value)
    assert path.read_bytes() == before


def test_sizes_beyond_qed(tmp_path: Path) -> None:
    """The tables of QED limit the size; larger tables are taken where smaller ones do not reach."""
    path = tmp_path / "image"
    create(path, "qcow2", 300 << 30, "cluster_size=4k")
    with pytest.raises(ImageError, match="a qed image has at most 274877906944"):
        convert_inplace(str(path), "qed")
    path.unlink()
    create(path, "qcow2", 200 << 30, "cluster_size=4k")
    convert_inplace(str(path), "qed")
    run("qemu-img", "check", path)
    assert path.read_bytes()[8] == 16


def test_formats_that_take_no_part(tmp_path: Path) -> None:
    """They are refused by name, and so is a conversion to what the image is already."""
    path = tmp_path / "image"
    create(path, "raw", MIB)
    with pytest.raises(UsageError, match="format 'raw' cannot be converted in place; qcow2, qed can"):
        convert_inplace(str(path), "qed", format="raw")
    path.unlink()
    create(path, "qed", MIB)
    with pytest.raises(ImageError, match="is a qed image already"):
        convert_inplace(str(path), "qed")


@pytest.mark.parametrize("format", ["qcow2", "qed"])
def test_interrupted_before_the_switch(tmp_path: Path, format: str) -> None:
    """Whoever interrupts gets the file back as it was, to the byte."""
    path = tmp_path / "image"
    create(path, format, MIB)
    run("qemu-io", "-c", "write -P 7 0 300k", path)
    before = path.read_bytes()

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_inplace(str(path), OTHER[format], progress=interrupt)
    assert path.read_bytes() == before


# Power cuts


def _images(tmp_path: Path) -> Iterator[tuple[str, bytes, bytes, bytes]]:
    """Format, image, guest bytes, bytes of the backing file."""
    chance = random.Random(4)
    for format, options in (("qcow2", "cluster_size=4k"), ("qed", "cluster_size=4k,table_size=2"), ("qcow2", "")):
        for backed in (False, True):
            base = chance.randbytes(300 * KIB) if backed else b""
            (tmp_path / "base").write_bytes(base)
            path = tmp_path / "made"
            extra = ["-b", "base", "-F", "raw"] if backed else []
            create(path, format, 900 * KIB + 512, options, *extra)
            scribble(path, format, 896 * KIB, 12, chance, whole=4096 if backed else 0)
            yield format, path.read_bytes(), contents(path, format), base
            path.unlink()


def test_power_cuts(tmp_path: Path) -> None:
    """At every moment the file is a sound image of exactly one of the formats, with the guest's bytes in it."""
    judged = 0
    for format, image, guest, base in _images(tmp_path):
        backing = MemoryNode(base, readonly=True) if base else None
        storage = MemoryNode(image)
        recorder = RecordingNode(storage)
        convert_storage(recorder, OTHER[format], backing=backing)
        seen = set()
        for number, cut in enumerate(power_cuts(recorder, seed=2, variants=4, limit=None if LONG else 40)):
            file = MemoryNode(cut.image, readonly=True)
            found = probe(file)
            seen.add(found)
            with open_node({"driver": found, "file": file, "backing": backing}) as node:
                assert node.pread(0, node.size) == guest, cut.story
                assert not node.format.check().get("corruptions"), cut.story  # type: ignore[attr-defined]
            if number % (1 if LONG else 12) == 0:
                judged += 1
                path = tmp_path / "cut"
                path.write_bytes(cut.image)
                (tmp_path / "base").write_bytes(base)
                run("qemu-img", "check", "-f", found, path, ok=(0, 3))
                assert contents(path, found) == guest
        assert seen == {format, OTHER[format]}
    assert judged > 20


def test_a_bad_target_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """New metadata is read back before the switch; what differs from the old image is found, and nothing is changed."""
    from vm_qed.inplace import QedTarget

    path = tmp_path / "image"
    create(path, "qcow2", MIB, "cluster_size=4k")
    run("qemu-io", "-c", "write -P 7 0 300k", "-c", "write -P 8 8k 4k", path)
    before = path.read_bytes()
    honest = QedTarget.data

    def shifted(self: QedTarget, offset: int, length: int, host: int) -> None:
        honest(self, offset, length, host + (4096 if offset == 0 else 0))

    monkeypatch.setattr(QedTarget, "data", shifted)
    with pytest.raises(ImageError, match="nothing changed"):
        convert_inplace(str(path), "qed")
    assert path.read_bytes() == before


def test_the_command(tmp_path: Path) -> None:
    """vm-img convert-inplace: output, progress, silence, errors."""
    path = tmp_path / "image"
    create(path, "qcow2", MIB)
    script = Path(sys.executable).with_name("vm-img")
    if not script.exists():
        pytest.skip("the console script vm-img is not installed")
    program = [script, "convert-inplace"]
    assert "is a qed image now (it was qcow2)" in run(*program, "-O", "qed", path)
    assert run(*program, "-q", "-O", "qcow2", path) == ""
    assert "(100.00/100%)" in run(*program, "-p", "-f", "qcow2", "-O", "qed", path)
    assert "is a qed image already" in run(*program, "-O", "qed", path, ok=(1,))
    assert "-O FMT" in run(*program, path, ok=(1,))
