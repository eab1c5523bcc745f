"""Appliances: an archive with a descriptor, a disk and a manifest."""

from __future__ import annotations

import hashlib
import io
import random
import re
import tarfile
import xml.etree.ElementTree as Tree
from pathlib import Path
from typing import Any

import pytest
from vmdk_images import stream

from vm_core.block.jobs.convert import convert
from vm_core.block.open import create_image, open_node
from vm_core.errors import ImageError, UsageError, VmError
from vm_core.plugins import registry
from vm_core.testing.nodes import MemoryNode, RecordingNode
from vm_core.testing.qemu import LONG, Qemu
from vm_core.testing.replay import power_cuts

MIB = 1 << 20
OVF = "{http://schemas.dmtf.org/ovf/envelope/1}"


def make(path: Path, size: int, **options: Any) -> bytes:
    """An appliance converted from a raw image with holes and data, and its bytes."""
    chance = random.Random(5)
    data = bytearray(size)
    for _ in range(20):
        offset, length = chance.randrange(size), chance.randrange(1, 300_000)
        data[offset : offset + length] = (chance.randbytes(999) * 400)[: min(length, size - offset)]
    raw = path.with_suffix(".raw")
    raw.write_bytes(data)
    create_image(str(path), "ova", size, options)
    with open_node(str(raw), format="raw") as source, open_node(str(path), readonly=False) as target:
        assert target.driver == "ova"
        convert([source], target)
    return bytes(data)


def test_an_appliance(tmp_path: Path, qemu: Qemu) -> None:
    """Every tool finds in it what went in: the archive, the descriptor's sizes, the manifest's sums, the disk."""
    path = tmp_path / "machine.ova"
    size = 20 * MIB + 512
    data = make(path, size, name="A <machine>", cpus=2, memory=512)
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["machine.ovf", "machine-disk1.vmdk", "machine.mf"]
        files = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    for line in files["machine.mf"].decode().splitlines():
        found = re.fullmatch(r"SHA256\((.*)\)= ([0-9a-f]{64})", line)
        assert found is not None
        assert hashlib.sha256(files[found[1]]).hexdigest() == found[2]
    tree = Tree.fromstring(files["machine.ovf"])
    assert tree.find(f".//{OVF}File").attrib[f"{OVF}size"] == str(len(files["machine-disk1.vmdk"]))  # type: ignore[union-attr]
    assert tree.find(f".//{OVF}Disk").attrib[f"{OVF}capacity"] == str(size)  # type: ignore[union-attr]
    assert tree.find(f".//{OVF}Name").text == "A <machine>"  # type: ignore[union-attr]
    disk = tmp_path / "disk.vmdk"
    disk.write_bytes(files["machine-disk1.vmdk"])
    assert qemu.read(disk) == data
    qemu.sound(disk)
    assert qemu.info(disk)["format-specific"]["data"]["create-type"] == "streamOptimized"
    with open_node(str(path)) as node:
        assert node.driver == "ova"
        assert node.pread(0, size) == data
        assert node.info()["extents"][0]["filename"] == "machine-disk1.vmdk"
    # An offset is all that the peer needs to read the disk where it is.
    with tarfile.open(path) as archive:
        member = archive.getmember("machine-disk1.vmdk")
    window = f"driver=vmdk,file.driver=raw,file.offset={member.offset_data},file.size={member.size}"
    qemu.img("convert", "--image-opts", f"{window},file.file.filename={path}", "-O", "raw", tmp_path / "x.raw")
    assert (tmp_path / "x.raw").read_bytes() == data


def test_an_appliance_is_written_once(tmp_path: Path) -> None:
    """A finished appliance opens for reading only; an empty one has its disk too."""
    path = tmp_path / "m.ova"
    make(path, MIB)
    with pytest.raises(ImageError, match="written once"):
        open_node(str(path), readonly=False)
    with open_node(str(path), readonly=False, auto_readonly=True) as node:
        assert node.readonly
    empty = tmp_path / "e.ova"
    create_image(str(empty), "ova", 64 * MIB, {"adapter_type": "ide"})
    with open_node(str(empty)) as node:
        assert node.pread(0, 64 * MIB) == bytes(64 * MIB)
    with tarfile.open(empty) as archive:
        assert archive.getnames() == ["e.ovf", "e-disk1.vmdk"]


@pytest.mark.parametrize(
    "options", [{"adapter_type": "floppy"}, {"hwversion": "x"}, {"cpus": 0}, {"name": "n" * 9000}, {"foo": "1"}]
)
def test_wrong_options(tmp_path: Path, options: dict[str, Any]) -> None:
    """Are refused in a line, and nothing is left behind."""
    path = tmp_path / "m.ova"
    with pytest.raises(UsageError):
        create_image(str(path), "ova", MIB, options)
    assert not path.exists()


def pack(path: Path, files: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def describe(*disks: str, more: str = "", file: str = "") -> bytes:
    """An OVF descriptor as VMware writes it."""
    files = "".join(f'<File ovf:href="{disk}" ovf:id="f{n}" ovf:size="1"{file}/>' for n, disk in enumerate(disks))
    listed = "".join(
        f'<Disk ovf:capacity="8" ovf:diskId="v{n}" ovf:fileRef="f{n}" ovf:format="x"/>' for n in range(len(disks))
    )
    space = "http://schemas.dmtf.org/ovf/envelope/1"
    return (
        f'<?xml version="1.0"?>{more}<Envelope xmlns="{space}" xmlns:ovf="{space}"><References>{files}</References>'
        f"<DiskSection>{listed}</DiskSection></Envelope>"
    ).encode()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_appliances_of_others(tmp_path: Path, form: int) -> None:
    """Archives of every dialect, with long names, other files and several disks."""
    disks = {}
    for number in range(2):
        stream(tmp_path / "d.vmdk", 4096, {number: bytes([number + 1]) * 65536})
        disks[f"{'x' * (60 if form == tarfile.USTAR_FORMAT else 130)}-{number}.vmdk"] = (
            tmp_path / "d.vmdk"
        ).read_bytes()
    path = tmp_path / "m.ova"
    pack(path, {"m.ovf": describe(*disks), "m.mf": b"SHA1(x)= 00\n", **disks}, form)
    with pytest.raises(ImageError, match="several disks: choose one with disk=…: 0 "):
        open_node(str(path))
    for number, name in enumerate(disks):
        for wanted in (str(number), f"v{number}", name):
            with open_node({"driver": "ova", "file.filename": str(path), "disk": wanted}) as node:
                assert node.pread(number * 65536, 65536) == bytes([number + 1]) * 65536
    with pytest.raises(ImageError, match="there is no disk 'v9'"):
        open_node({"driver": "ova", "file.filename": str(path), "disk": "v9"})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"m.ovf": b"<x"}, "no XML"),
        ({"m.ovf": describe()}, "lists no disk"),
        ({"m.ovf": describe("a.vmdk")}, "'a.vmdk' is not in the archive"),
        ({"m.ovf": describe("a.vmdk"), "a.vmdk": b"x" * 1000}, "is not a VMDK image"),
        ({"m.ovf": describe("a.vmdk", file=' ovf:compression="gzip"'), "a.vmdk": b"x"}, "compressed with gzip"),
        ({"m.ovf": describe("a.vmdk", file=' ovf:chunkSize="99"'), "a.vmdk": b"x"}, "cut into chunks"),
        ({"m.ovf": describe("../../etc/passwd")}, "is not in the archive"),
        (
            {"m.ovf": describe("a.vmdk", more='<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]>')},
            "declares entities",
        ),
    ],
)
def test_malformed_appliances(tmp_path: Path, files: dict[str, bytes], expected: str) -> None:
    """Each is one line that names what is wrong."""
    path = tmp_path / "m.ova"
    pack(path, files)
    with pytest.raises(ImageError, match=expected):
        open_node(str(path))


def test_random_damage(tmp_path: Path) -> None:
    """An appliance with random damage gives bytes or one error."""
    chance = random.Random(7)
    path = tmp_path / "m.ova"
    make(path, MIB)
    good = path.read_bytes()
    for _ in range(2000 if LONG else 200):
        bad = bytearray(good)
        at = chance.randrange(chance.choice([512, 9728, 12000]))
        bad[at : at + 4] = chance.choice([chance.randbytes(4), b"\xff" * 4, bytes(4)])
        if chance.random() < 0.2:
            del bad[chance.randrange(len(bad)) :]
        path.write_bytes(bad)
        try:
            with open_node(str(path), format="ova") as node:
                node.pread(0, min(node.size, 4 * MIB))
        except (VmError, OSError) as error:
            assert "\n" not in str(error)  # noqa: PT017 - it may also open


def test_power_cuts(tmp_path: Path) -> None:
    """Until an appliance is finished, what was flushed of its disk can be read, whenever the power fails."""
    chance = random.Random(3)
    size = 4 * MIB
    file = MemoryNode()
    file.filename = "m.ova"
    registry().find("format", "ova").load().create(file, size, {})
    recorder = RecordingNode(file)
    model = bytearray(size)
    touched = []
    recorder.mark(bytes(model))
    with open_node({"driver": "ova", "file": recorder}, readonly=False) as node:
        for offset in chance.sample(range(0, size, 65536), 20):
            data = chance.randbytes(100) * 655 + bytes(36)
            touched.append((recorder.now(), offset))
            node.pwrite(offset, data)
            model[offset : offset + 65536] = data
            if chance.random() < 0.4:
                node.flush()
                recorder.mark(bytes(model))
    recorder.mark(bytes(model))
    since = {id(what): when for when, what in recorder.marks}
    for cut in power_cuts(recorder, seed=1, limit=400 if LONG else 80, variants=4):
        with open_node({"driver": "ova", "file": MemoryNode(cut.image, readonly=True)}) as node:
            found = node.pread(0, size)
        if cut.mark is None:
            continue
        expected = bytearray(cut.mark)
        for moment, offset in touched:
            if since[id(cut.mark)] <= moment <= cut.moment:
                expected[offset : offset + 65536] = found[offset : offset + 65536]
        assert found == expected, cut.story
