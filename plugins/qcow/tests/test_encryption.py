"""Encrypted images, from either side, read and written by the other."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vm_core
from vm_core.block.formatnode import FormatNode
from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.crypto import secrets
from vm_core.errors import ImageError, UsageError, VmError
from vm_core.testing.nodes import MemoryNode
from vm_core.testing.qemu import LONG, Qemu, QemuConformance

MIB = 1 << 20
OBJECT = ("--object", "secret,id=sec,data=correct horse battery staple")
AES: dict[str, Any] = {"encrypt.format": "aes", "encrypt.key-secret": "sec"}


@pytest.fixture(autouse=True)
def _secret() -> Iterator[None]:
    secrets.clear()
    secrets.add({"id": "sec", "data": "correct horse battery staple"})
    secrets.add({"id": "short", "data": "key"})
    yield
    secrets.clear()


@pytest.fixture(autouse=True)
def qemu() -> Qemu:
    """Skipped (in CI: failed) where qemu-img is not installed."""
    return Qemu("qcow")


def opened(path: Path, *, readonly: bool = True, key: str = "sec") -> Node:
    spec = {"driver": "qcow", "encrypt.key-secret": key, "file.filename": str(path)}
    return open_node(spec, readonly=readonly, gate=vm_core.Gate.follow())


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The peer with both secrets."""
    words = [program, *map(str, arguments[:1])] if program == "qemu-img" else [program]
    rest = arguments[1:] if program == "qemu-img" else arguments
    short = ("--object", "secret,id=short,data=key")
    return subprocess.run([*words, *OBJECT, *short, *map(str, rest)], capture_output=True, text=True, timeout=60)


def peer(program: str, *arguments: object) -> str:
    done = run(program, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout, done.stdout
    return done.stdout


def spec(path: Path, key: str = "sec") -> str:
    return f"driver=qcow,encrypt.key-secret={key},file.filename={path}"


class TestEncryptedQcow(QemuConformance):
    """The kit, on images made here with a key."""

    driver = "qcow"
    checks = False
    create_options = (AES,)
    size = MIB + 512
    operations = 60
    rounds = 500 if LONG else 10
    cuts = 200 if LONG else 20
    header = 48

    def open(self, storage: Node | str | Path, *, readonly: bool = True, **options: Any) -> Node:
        return super().open(storage, readonly=readonly, **{"encrypt.key-secret": "sec", **options})

    def oracle_read(self, path: Path) -> bytes | None:
        raw = path.with_suffix(".raw-of-peer")
        peer("qemu-img", "convert", "--image-opts", spec(path), "-O", "raw", raw)
        return raw.read_bytes()

    def oracle_make(self, path: Path, data: bytes, options: dict[str, Any]) -> bool:
        raw = path.with_suffix(".source")
        raw.write_bytes(data)
        words = ",".join(f"{key}={value}" for key, value in options.items())
        peer("qemu-img", "convert", "-f", "raw", "-O", "qcow", "-o", words, raw, path)
        return True


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize("key", ["sec", "short"])
@pytest.mark.parametrize("seed", range(10 if LONG else 1))
def test_the_same_writes_give_the_same_bytes(tmp_path: Path, backing: bool, key: str, seed: int) -> None:
    """Every byte is where the peer puts it and encrypted as by the peer, zeroes and what was not written too."""
    chance = random.Random(seed)
    size = 6 * MIB + 512
    ours, theirs = tmp_path / "ours.qcow", tmp_path / "theirs.qcow"
    base = chance.randbytes(4 * MIB)
    (tmp_path / "base").write_bytes(base)
    options = {"encrypt.format": "aes", "encrypt.key-secret": key}
    words = ["-b", "base", "-F", "raw"] if backing else []
    peer(
        "qemu-img", "create", "-q", "-f", "qcow", "-o", f"encryption=on,encrypt.key-secret={key}", *words, theirs, size
    )
    create_image(str(ours), "qcow", size, options | ({"backing_file": "base", "backing_fmt": "raw"} if backing else {}))
    assert ours.read_bytes() == theirs.read_bytes()
    model = bytearray(size)
    if backing:
        model[: 4 * MIB] = base
    for turn in range(3):
        commands: list[str] = []
        with opened(ours, readonly=False, key=key) as node:
            assert isinstance(node, FormatNode)
            assert node.format.encrypted
            for _ in range(12):
                length = chance.choice([512, 1024, 4096, 9 * 512, 65536, MIB])
                offset = chance.randrange((size - length) // 512 + 1) * 512
                byte = chance.randrange(1, 256)
                if chance.random() < 0.25:
                    commands += ["-c", f"write -z {offset} {length}"]
                    node.zero(offset, length)
                    byte = 0
                else:
                    commands += ["-c", f"write -P {byte} {offset} {length}"]
                    node.pwrite(offset, bytes([byte]) * length)
                model[offset : offset + length] = bytes([byte]) * length
        peer("qemu-io", *commands, "--image-opts", spec(theirs, key))
        assert ours.read_bytes() == theirs.read_bytes(), turn
        with opened(theirs, key=key) as node:
            assert node.pread(0, size) == model
    peer("qemu-img", "convert", "--image-opts", spec(ours, key), "-O", "raw", tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == model


def test_parts_of_sectors_and_compressed_clusters(tmp_path: Path) -> None:
    """Writes of single bytes change their sectors alone; compressed clusters are stored in clear, by both."""
    path = tmp_path / "disk.qcow"
    create_image(str(path), "qcow", MIB, dict(AES))
    peer("qemu-io", "-c", "write -P 1 0 64k", "-c", "write -c -P 5 64k 4k", "--image-opts", spec(path))
    model = bytearray(b"\1" * 65536 + b"\5" * 4096 + bytes(MIB - 65536 - 4096))
    chance = random.Random(3)
    with opened(path, readonly=False) as node:
        assert isinstance(node, FormatNode)
        node.write_compressed(512 * 1024, [memoryview(b"\6" * 4096)])
        model[512 * 1024 : 512 * 1024 + 4096] = b"\6" * 4096
        for _ in range(40):
            offset = chance.choice([chance.randrange(80_000), chance.randrange(MIB - 9000)])
            data = chance.randbytes(chance.choice([1, 3, 511, 700, 9000]))
            if offset < 524288 + 4096 and offset + len(data) > 524288:
                continue
            node.pwrite(offset, data)
            model[offset : offset + len(data)] = data
        assert node.pread(0, MIB) == model
    peer("qemu-img", "convert", "--image-opts", spec(path), "-O", "raw", tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == model


def test_nothing_is_stored_in_clear(tmp_path: Path) -> None:
    """What a guest wrote is not found in the file, and another key does not bring it back."""
    path = tmp_path / "disk.qcow"
    create_image(str(path), "qcow", MIB, {"encryption": True, "encrypt.key-secret": "sec"})
    secret = b"the treasure is under the oak." * 20
    with opened(path, readonly=False) as node:
        node.pwrite(3000, secret)
    assert b"treasure" not in path.read_bytes()
    with opened(path, key="short") as node:
        assert b"treasure" not in node.pread(0, MIB)


def test_without_its_key_an_image_is_described_only(tmp_path: Path) -> None:
    """info says what the peer's says, and needs no key; its data is not read."""
    from vm_core.cli.img.info import image_info

    path = tmp_path / "disk.qcow"
    create_image(str(path), "qcow", MIB, dict(AES))
    found = json.loads(peer("qemu-img", "info", "--output=json", path))
    assert found["encrypted"]
    with open_node({"driver": "qcow", "file.filename": str(path)}, io=False) as node:
        assert isinstance(node, FormatNode)
        assert image_info(node)["encrypted"]
        node.pread(0, 512)  # nothing is there
    with opened(path, readonly=False) as node:
        node.pwrite(0, b"x")
    with (
        open_node({"driver": "qcow", "file.filename": str(path)}, io=False) as node,
        pytest.raises(OSError, match="key"),
    ):
        node.pread(0, 512)


CREATE = [
    {"encryption": True},
    {"encrypt.format": "aes"},
    {"encrypt.format": "luks", "encrypt.key-secret": "sec"},
    {"encrypt.format": "foo"},
    {"encrypt.key-secret": "sec"},
    {"encryption": False, "encrypt.key-secret": "sec"},
    {"encrypt.format": "aes", "encrypt.key-secret": "nobody"},
    {"encryption": True, **AES},
    {"encryption": False, **AES},
    {"encryption": False},
]


@pytest.mark.parametrize("options", CREATE, ids=str)
def test_create_options_are_told_as_by_the_peer(tmp_path: Path, options: dict[str, Any]) -> None:
    """Options that contradict each other or are incomplete, in QEMU's words; the others make encrypted images."""
    shown = ",".join(
        f"{key}={('off', 'on')[value] if isinstance(value, bool) else value}" for key, value in options.items()
    )
    done = run("qemu-img", "create", "-q", "-f", "qcow", "-o", shown, tmp_path / "theirs", MIB)
    try:
        create_image(str(tmp_path / "ours"), "qcow", MIB, dict(options))
    except VmError as error:
        said = getattr(error, "peer", "") or str(error)
        assert done.stderr == f"qemu-img: {tmp_path / 'theirs'}: {said}\n"
    else:
        assert done.returncode == 0
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_open_options_are_told_as_by_the_peer(tmp_path: Path) -> None:
    """Missing keys, and options that do not fit the image, in QEMU's words."""
    path, plain = tmp_path / "disk.qcow", tmp_path / "plain.qcow"
    create_image(str(path), "qcow", MIB, dict(AES))
    create_image(str(plain), "qcow", MIB)
    for image, given in (
        (path, {}),
        (path, {"encrypt.format": "luks", "encrypt.key-secret": "sec"}),
        (path, {"encrypt.key-secret": "nobody"}),
        (plain, {"encrypt.format": "aes", "encrypt.key-secret": "sec"}),
    ):
        options = {"driver": "qcow", "file.filename": str(image), **given}
        with pytest.raises(VmError) as caught:
            open_node(options)
        reason = caught.value.reason if isinstance(caught.value, ImageError) else str(caught.value)
        done = run("qemu-io", "-c", "read 0 512", "--image-opts", ",".join(f"{k}={v}" for k, v in options.items()))
        assert done.stderr == f"qemu-io: can't open: {reason}\n"
    with pytest.raises(UsageError):
        open_node({"driver": "qcow", "file": MemoryNode(path.read_bytes())})
    with open_node({"driver": "qcow", "file.filename": str(plain), "encrypt.key-secret": "sec"}) as node:
        assert node.pread(0, 512) == bytes(512)  # a key that is not needed does no harm
