"""Images written here and by the peer in turns, against a bytearray; and the same changes to two images."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.extents import walk
from vm_core.block.mapping import Kind
from vm_core.block.open import create_image, open_node
from vm_core.testing.qemu import LONG, Qemu, lockstep, take_turns

MIB = 1 << 20

#: Each subformat with what it can be combined with.
VARIANTS: list[dict[str, Any]] = [
    {"subformat": "monolithicSparse"},
    {"subformat": "monolithicSparse", "zeroed_grain": True},
    {"subformat": "monolithicFlat"},
    {"subformat": "twoGbMaxExtentSparse"},
    {"subformat": "twoGbMaxExtentSparse", "zeroed_grain": True},
    {"subformat": "twoGbMaxExtentFlat"},
]


def name(options: dict[str, Any]) -> str:
    return "-".join(str(value) for value in options.values())


#: Digits of a CID, and what ends a string.
LONGEST = 9


def without_cid(data: bytes) -> bytes:
    """An image's bytes without what is random in them."""
    text, mark, rest = data.partition(b"# Extent description")
    shorter = re.sub(rb"CID=[0-9a-f]{1,8}\n", b"CID=\n", text)
    # A CID of fewer digits than the one before leaves a zero and the former end behind the text.
    return shorter + mark + rest.partition(b"\0")[0] if len(data) < 65536 else _same_length(data)


def _same_length(data: bytes) -> bytes:
    found = re.search(rb"CID=([0-9a-f]{1,8})\n", data)
    if found is None:
        return data
    end = data.index(b"\0", found.start())
    # Behind the text, too, lies the former end of one whose CID was longer: at most its digits and the zero.
    text, behind = data[found.end() : end], end + LONGEST
    return data[: found.start()] + text + b"\0" * (behind - found.start() - len(text)) + data[behind:]


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "theirs"])
@pytest.mark.parametrize("options", VARIANTS, ids=name)
@pytest.mark.parametrize("seed", range(20 if LONG else 1))
def test_turns(tmp_path: Path, qemu: Qemu, options: dict[str, Any], ours: bool, seed: int) -> None:
    """Whoever made the image and whoever wrote last: both read the same, and the peer finds it sound."""
    path = tmp_path / "disk.vmdk"
    size = 5 * MIB + 1536
    if ours:
        create_image(str(path), "vmdk", size, options)
    else:
        qemu.create(path, size, options)
    take_turns(qemu, path, bytearray(size), random.Random(seed), 40 if LONG else 8)


@pytest.mark.parametrize("backing", [False, True], ids=["alone", "backing"])
@pytest.mark.parametrize("options", VARIANTS, ids=name)
@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_grains_lie_where_the_peer_puts_them(
    tmp_path: Path, qemu: Qemu, options: dict[str, Any], backing: bool, seed: int
) -> None:
    """After the same writes, of zeroes too, with the image opened anew between them, both have the same bytes."""
    if backing and "monolithicSparse" not in options["subformat"]:
        pytest.skip("the peer makes no others with a parent")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = tmp_path / "a/d.vmdk", tmp_path / "b/d.vmdk"
    size = 90 * MIB + 512 * (seed % 2)
    if backing:
        base = tmp_path / "a/base.vmdk"
        qemu.create(base, 50 * MIB)
        qemu.io(base, "write -P 77 3M 30M")
        shutil.copy(base, tmp_path / "b/base.vmdk")
        for path in (ours, theirs):
            qemu.create(path, size, {**options, "backing_file": "base.vmdk", "backing_fmt": "vmdk"})
    else:
        create_image(str(ours), "vmdk", size, options)
        qemu.create(theirs, size, options)
    lockstep(qemu, ours, theirs, random.Random(seed))
    for one in sorted((tmp_path / "a").iterdir()):
        mine, other = one.read_bytes(), (tmp_path / "b" / one.name).read_bytes()
        assert without_cid(mine) == without_cid(other), one.name


@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_streams_are_written_by_both(tmp_path: Path, qemu: Qemu, seed: int) -> None:
    """Grains of a stream-optimized image, compressed here and by the peer in turns, each once."""
    chance = random.Random(seed)
    path = tmp_path / "disk.vmdk"
    size = 40 * MIB + 512
    create_image(str(path), "vmdk", size, {"subformat": "streamOptimized"})
    model = bytearray(-(-size // 65536) * 65536)
    places = list(range(0, size, 65536))
    chance.shuffle(places)
    while places:
        mine, places = places[:40], places[40:]
        with open_node(str(path), readonly=False) as node:
            for offset in mine:
                data = (chance.randbytes(700) * 100)[:65536]
                data = data[: min(65536, size - offset)]
                node.pwrite(offset, data)
                model[offset : offset + len(data)] = data
            with pytest.raises(OSError, match="Could not write to allocated cluster for streamOptimized"):
                node.pwrite(mine[0], bytes([1]) * min(65536, size - mine[0]))
            with pytest.raises(OSError, match="Invalid argument"):
                node.pwrite(512, b"x" * 512)
        commands = []
        theirs, places = places[:40], places[40:]
        for offset in theirs:
            length, value = min(65536, size - offset), chance.randrange(1, 256)
            commands.append(f"write -P {value} {offset} {length}")
            model[offset : offset + length] = bytes([value]) * length
        if commands:
            qemu.io(path, *commands)
        with open_node(str(path)) as node:
            assert node.pread(0, size) == model[:size]
        assert qemu.read(path) == model[:size]
        qemu.sound(path)


def test_zeroes_in_a_stream_are_grains(tmp_path: Path, qemu: Qemu) -> None:
    """They are compressed like any others, once, and whole; where the peer puts them."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    ours, theirs = tmp_path / "a/d.vmdk", tmp_path / "b/d.vmdk"
    for path in (ours, theirs):
        qemu.create(path, MIB, {"subformat": "streamOptimized"})
    with open_node(str(ours), readonly=False) as node:
        node.zero(65536, 3 * 65536, unmap=True)
        node.pwrite(0, b"\1" * 65536)
        for offset, length in ((512, 512), (8 * 65536, 4096)):
            with pytest.raises(OSError, match="Invalid argument"):
                node.zero(offset, length)
        with pytest.raises(OSError, match="Could not write to allocated cluster for streamOptimized"):
            node.zero(65536, 65536)
    qemu.io(theirs, "write -z -u 64k 192k", "write -P 1 0 64k")
    assert qemu.read(ours) == b"\1" * 65536 + bytes(15 * 65536)
    qemu.sound(ours)
    with open_node(str(ours)) as one, open_node(str(theirs)) as two:
        assert [run[:3] for run in walk(one)] == [run[:3] for run in walk(two)]
        assert [run.host for run in one.map(0, MIB)] == [run.host for run in two.map(0, MIB)]


@pytest.mark.parametrize("options", [{"subformat": "streamOptimized"}, {"subformat": "monolithicSparse"}], ids=name)
def test_convert_by_the_peer_and_here_give_equal_images(tmp_path: Path, qemu: Qemu, options: dict[str, Any]) -> None:
    """A raw image converted here has the grains in the same places as one converted by the peer."""
    from vm_core.block.jobs.convert import convert

    chance = random.Random(1)
    raw = tmp_path / "a.raw"
    pieces = [chance.choice([bytes(65536), bytes([chance.randrange(256)]) * 65536]) for _ in range(400)]
    raw.write_bytes(b"".join(pieces))
    theirs, ours = tmp_path / "theirs.vmdk", tmp_path / "ours.vmdk"
    qemu.img("convert", "-f", "raw", "-O", "vmdk", "-o", f"subformat={options['subformat']}", raw, theirs)
    create_image(str(ours), "vmdk", len(pieces) * 65536, options)
    with open_node(str(raw), format="raw") as source, open_node(str(ours), readonly=False) as target:
        convert([source], target)
    assert qemu.read(ours) == raw.read_bytes()
    qemu.sound(ours)
    with open_node(str(theirs)) as one, open_node(str(ours)) as two:
        assert [run[:3] for run in walk(one)] == [run[:3] for run in walk(two)]
        if options["subformat"] != "streamOptimized":
            assert [run.host for run in walk(one)] == [run.host for run in walk(two)]


def _without_ids(path: Path) -> tuple[int, bytes]:
    """A descriptor's file: bytes in all, and its text without content IDs and what fills the last sector."""
    data = path.read_bytes()
    text = re.sub(rb"CID=[0-9a-f]+", b"CID=", data.replace(bytes(path.parent), b"")).rstrip(b"\0")
    return len(data) if len(data) % 512 == 0 else 0, text


@pytest.mark.parametrize("options", [{"size": "1M"}, {"size": "90G"}, {"size": "1M", "backing": "below.vmdk"}], ids=str)
@pytest.mark.parametrize("subformat", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
def test_written_descriptors_end_with_a_sector(
    tmp_path: Path, qemu: Qemu, subformat: str, options: dict[str, str]
) -> None:
    """A descriptor of its own is what the peer makes of it, when new and when the image was written to."""
    if "backing" in options and "Flat" in subformat:
        pytest.skip("flat images have no parent")
    extra: dict[str, Any] = {"subformat": subformat}
    found = []
    # Names of one length, since they are in the text.
    for folder in (tmp_path / "theirs", tmp_path / "ourown"):
        folder.mkdir()
        below = folder / "below.vmdk"
        qemu.create(below, options["size"])
        path = folder / "disk.vmdk"
        backing = {"backing_file": str(below), "backing_fmt": "vmdk"} if "backing" in options else {}
        size = 1 << 20 if options["size"] == "1M" else 90 << 30
        if folder.name == "theirs":
            qemu.create(path, size, {**extra, **backing})
        else:
            create_image(str(path), "vmdk", size, {**extra, **backing})
        found.append([_without_ids(path)])
        if folder.name == "theirs":
            qemu.io(path, "write -P 1 0 64k")
        else:
            with open_node(str(path), readonly=False) as node:
                node.pwrite(0, b"\1" * 65536)
        found[-1].append(_without_ids(path))
    assert found[0] == found[1]
    assert found[1][1][0] > 0


def test_runs_are_long(tmp_path: Path, qemu: Qemu) -> None:
    """What was written in order is one run, across grain tables."""
    path = tmp_path / "disk.vmdk"
    qemu.create(path, "2G")
    qemu.io(path, "write -z 0 80M", "write -z 80M 20M")
    with open_node(str(path)) as node:
        runs = [(run.kind, run.length) for run in node.map(0, node.size)]
    assert runs == [(Kind.DATA, 100 * MIB), (Kind.UNALLOCATED, 1948 * MIB)]


def test_flat_images_tell_their_holes(tmp_path: Path, qemu: Qemu) -> None:
    """What was never written to a flat image is known without reading it."""
    path = tmp_path / "disk.vmdk"
    qemu.create(path, "5G", {"subformat": "twoGbMaxExtentFlat"})
    qemu.io(path, "write -P 1 3G 64k")
    with open_node(str(path)) as node:
        data = [extent for extent in walk(node) if extent.kind is Kind.DATA]
    assert sum(extent.length for extent in data) < 4 * MIB
    assert any(extent.offset <= 3 << 30 < extent.end for extent in data)


@pytest.mark.parametrize("options", VARIANTS, ids=name)
def test_reopening(tmp_path: Path, options: dict[str, Any]) -> None:
    """An open image changes between read-only and read-write with all its files."""
    path = tmp_path / "disk.vmdk"
    create_image(str(path), "vmdk", 4 * MIB, options)
    with open_node(str(path)) as node:
        for number in range(1, 4):
            node.reopen(readonly=False)
            node.pwrite(number * 70_000, bytes([number]) * 1000)
            node.reopen(readonly=True)
            with pytest.raises(OSError, match="Permission denied"):
                node.pwrite(0, b"x")
            with open_node(str(path), share=True) as other:
                assert other.pread(number * 70_000, 1000) == bytes([number]) * 1000
