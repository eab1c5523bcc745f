"""Descriptors as other programs and people write them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vmdk_images import describe

from vm_core.block.open import create_image, open_node
from vm_core.errors import ImageError
from vm_core.plugins import registry
from vm_core.testing.qemu import Qemu
from vm_vmdk.descriptor import Descriptor
from vm_vmdk.probe import probe

FLAT = 'RW 128 FLAT "a.raw" 0'


def variant(text: str, *changes: tuple[str, str]) -> bytes:
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return text.encode()


VARIANTS = {
    "plain": variant(describe(FLAT)),
    "dos line ends": variant(describe(FLAT), ("\n", "\r\n")),
    "blanks around =": variant(describe(FLAT), ("CID=", "CID = "), ("createType=", "createType \t= ")),
    "no quotes": variant(describe(FLAT), ('"twoGbMaxExtentFlat"', "twoGbMaxExtentFlat")),
    "other case": variant(describe(FLAT), ("createType", "CREATETYPE"), ("twoGbMax", "TWOGBMAX"), ("RW ", "rw ")),
    "upper-case digits": variant(describe(FLAT), ("12345678", "ABCDEF12")),
    "comments and keys": variant(describe(FLAT, more='# hello\nisNativeSnapshot="no"\nfoo.bar="a=b"')),
    "blanks before": variant(describe(FLAT), ("RW ", "   RW\t ")),
    "blank lines first": b"\n\n" + variant(describe(FLAT)),
    "no title": variant(describe(FLAT), ("# Disk DescriptorFile\n", "")),
    "byte order mark": b"\xef\xbb\xbf" + variant(describe(FLAT)),
    "encoding first": variant(describe(FLAT), ("version=1", 'encoding="windows-1252"\nversion=1')),
    "version 3, change tracking": variant(
        describe(FLAT, more='changeTrackPath="d-ctk.vmdk"'), ("version=1", "version=3")
    ),
    "long content ID": variant(describe(FLAT), ("CID=12345678", "CID=fffffffe")),
    "workstation's name of the type": variant(describe(FLAT), ("twoGbMaxExtentFlat", "2GbMaxExtentFlat")),
    "vmfs": variant(describe('RW 128 VMFS "a.raw"', kind="vmfs")),
    "thin": variant(describe('RW 128 VMFS "a.raw" 0', kind="vmfsThin")),
    "uuids": variant(describe(FLAT), ("#DDB", '#DDB\nddb.uuid.image="b2ac9f5b-0000"\nddb.uuid = "60 00 C2 9a"')),
    "zeroes behind": variant(describe(FLAT)) + bytes(700),
}


@pytest.mark.parametrize("text", VARIANTS.values(), ids=VARIANTS)
def test_variants(tmp_path: Path, text: bytes) -> None:
    """Each is recognised and opened; a write changes the content ID alone, and fills the last sector."""
    (tmp_path / "a.raw").write_bytes(b"A" * 65536)
    path = tmp_path / "d.vmdk"
    path.write_bytes(text)
    with open_node(str(path)) as node:
        assert node.driver == "vmdk"
        assert node.pread(0, 65536) == b"A" * 65536
        before = node.info()["cid"]
    assert path.read_bytes() == text, "reading changes nothing"
    with open_node(str(path), readonly=False) as node:
        node.pwrite(512, b"B" * 512)
        node.pwrite(512, b"C" * 512)
        after = node.info()["cid"]
    assert before != after
    changed = path.read_bytes()
    assert changed[len(text) :] == bytes(-len(text) % 512)
    differing = [at for at, (one, two) in enumerate(zip(text, changed, strict=False)) if one != two]
    line = changed.rindex(b"\n", 0, differing[0]) + 1
    assert changed[line : line + 3].upper() == b"CID"
    assert max(differing) < line + 20
    with open_node(str(path)) as node:
        assert node.info()["cid"] == after


def test_names_in_other_encodings(tmp_path: Path) -> None:
    """A file's name is in the descriptor's encoding, UTF-8 where it does not say."""
    for encoding, name in (
        ("windows-1252", "Übung.raw"),
        ("UTF-8", "映像.raw"),
        ("Shift_JIS", "映像2.raw"),
        ("", "é.raw"),
    ):
        (tmp_path / name).write_bytes(b"A" * 65536)
        text = describe(f'RW 128 FLAT "{name}" 0')
        if encoding:
            text = text.replace("version=1", f'version=1\nencoding="{encoding}"')
        path = tmp_path / "d.vmdk"
        path.write_bytes(text.encode(encoding or "utf-8"))
        with open_node(str(path)) as node:
            assert node.pread(0, 1) == b"A", encoding


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """A file's name may be any bytes."""
    import os

    name = b"\xff\xfe.raw"
    Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(b"A" * 65536)
    path = tmp_path / "d.vmdk"
    path.write_bytes(describe('RW 128 FLAT "@" 0').encode().replace(b"@", name))
    with open_node(str(path)) as node:
        assert node.pread(0, 1) == b"A"


@pytest.mark.parametrize("name", ["image:a.raw", "file:a.raw", "nbd:a.raw", "json:{}"])
@pytest.mark.parametrize("given", ["{}/d.vmdk", "d.vmdk", "file:d.vmdk"])
def test_names_with_a_colon(tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, name: str, given: str) -> None:
    """An extent's name is a path beside the descriptor, even where it reads as a protocol."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "d.vmdk"
    path.write_text(describe(f'RW 128 FLAT "{name}" 0'))
    (tmp_path / "a.raw").write_bytes(b"B" * 65536)
    with pytest.raises(ImageError, match="No such file or directory"):
        open_node(given.format(tmp_path))
    (tmp_path / name).write_bytes(b"A" * 65536)
    assert qemu.read(path)[:1] == b"A"
    with open_node(given.format(tmp_path)) as node:
        assert node.pread(0, 1) == b"A"


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"# just a comment\n",
        b"version=1",
        b"hello\nversion=1\n",
        b"# comment\nversion=4\n",
        b"\nversion=1\n",
        b"#!/bin/sh\nversion=$1\n",
        b"# comment\n\n\nversion = 1\n",
    ],
)
def test_other_texts_are_not_taken_for_descriptors(text: bytes, tmp_path: Path, qemu: Qemu) -> None:
    """A text without the title is a descriptor only where VMware and the peer say so."""
    path = tmp_path / "x"
    path.write_bytes(text or b" ")
    peer = json.loads(qemu.run("info", "--output=json", path).stdout or '{"format": "vmdk"}')["format"]
    if text != b"version=1":  # a file of nine bytes
        assert (probe(text, len(text), "x") > 0) == (peer == "vmdk")


def test_every_create_option_has_the_help_of_the_peer(qemu: Qemu) -> None:
    """``-o help`` of both say the same."""
    found = registry().find("format", "vmdk")
    theirs = qemu.img("create", "-f", "vmdk", "-o", "help")
    for option in found.create_options:  # type: ignore[attr-defined]
        assert f"  {option.name}=<" in theirs
        assert f"- {option.help}\n" in theirs


def test_unknown_descriptor_keys_stay(tmp_path: Path, qemu: Qemu) -> None:
    """What VirtualBox and VMware add to an embedded descriptor is still there after writing."""
    path = tmp_path / "d.vmdk"
    create_image(str(path), "vmdk", 1 << 20)
    data = bytearray(path.read_bytes())
    end = data.index(b"\0", 512)
    extra = b'ddb.uuid.image="b2ac9f5b-7a0c-4d67-a0d6-000000000000"\nddb.longContentID = "00112233445566778899aabb"\n'
    data[end : end + len(extra)] = extra
    path.write_bytes(data)
    with open_node(str(path), readonly=False) as node:
        node.pwrite(0, b"x")
    text = path.read_bytes()[512:10752]
    assert extra in text
    found = Descriptor(text, "d")
    assert found.values["ddb.uuid.image"] == "b2ac9f5b-7a0c-4d67-a0d6-000000000000"
    assert qemu.info(path)["format-specific"]["data"]["cid"] == found.cid


def test_a_new_content_id_has_as_many_digits() -> None:
    """Whatever the old one looked like, only its digits change."""
    for old in ("1", "12", "0000000f", "12345678", "ffffffff", "ABCDEF01"):
        data = f"version=1\nCID={old}\nparentCID=ffffffff\n".encode()
        found = Descriptor(data, "d")
        for _ in range(50):
            place, digits = found.new_cid() or (0, b"")
            assert place == 14
            assert len(digits) == len(old)
            assert found.data[:14] + found.data[14 + len(old) :] == data[:14] + data[14 + len(old) :]
            assert found.cid == int(digits, 16)
            assert found.parent_cid == 0xFFFFFFFF


def test_an_extent_alone_is_not_an_image(tmp_path: Path, qemu: Qemu) -> None:
    """An extent of a split image says that it is one."""
    qemu.create(tmp_path / "d.vmdk", 1 << 20, {"subformat": "twoGbMaxExtentSparse"})
    with pytest.raises(ImageError, match="extents of an image are opened by its descriptor"):
        open_node(str(tmp_path / "d-s001.vmdk"))
