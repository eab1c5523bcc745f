"""Encrypted images, from either side, read and written by the other."""

from __future__ import annotations

import json
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.open import create_image, open_node
from vm_core.crypto import secrets
from vm_core.errors import ImageError, UsageError, VmError
from vm_core.testing.qemu import LONG, Qemu

KIB, MIB = 1 << 10, 1 << 20
SIZE = 2 * MIB
OBJECT = ("--object", "secret,id=sec,data=correct horse")
LUKS: dict[str, Any] = {"encrypt.format": "luks", "encrypt.key-secret": "sec", "encrypt.iter-time": 1}
AES: dict[str, Any] = {"encrypt.format": "aes", "encrypt.key-secret": "sec"}

VARIANTS = [
    LUKS,
    AES,
    {**LUKS, "cluster_size": 4096, "compat": "0.10"},
    {**LUKS, "extended_l2": True},
    *(
        [
            {"encryption": True, "encrypt.key-secret": "sec", "cluster_size": 512},
            {**LUKS, "encrypt.cipher-mode": "cbc", "encrypt.ivgen-alg": "essiv", "encrypt.hash-alg": "sha1"},
            {**LUKS, "preallocation": "metadata"},
            {**LUKS, "cluster_size": 2 * MIB},
        ]
        if LONG
        else []
    ),
]


@pytest.fixture(autouse=True)
def _secret() -> Iterator[None]:
    secrets.clear()
    secrets.add({"id": "sec", "data": "correct horse"})
    yield
    secrets.clear()


def words(options: dict[str, Any]) -> str:
    shown = {True: "on", False: "off"}
    return ",".join(f"{key}={shown.get(value, value) if value is True else value}" for key, value in options.items())


def spec(path: Path) -> dict[str, Any]:
    return {"driver": "qcow2", "encrypt.key-secret": "sec", "file.filename": str(path)}


def opened(path: Path) -> str:
    return f"driver=qcow2,encrypt.key-secret=sec,file.filename={path}"


def peer(*arguments: object, ok: bool = True) -> str:
    """qemu-img with the secret. It sometimes cannot measure how fast the computer is: again."""
    command = ["qemu-img", str(arguments[0]), *OBJECT, *map(str, arguments[1:])]
    for _ in range(10):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if "Unable to get accurate CPU usage" not in done.stderr:
            break
    assert not ok or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def contents(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    peer("convert", "--image-opts", opened(path), "-O", "raw", raw)
    return raw.read_bytes()


def metadata(path: Path) -> list[int]:
    """Where header, refcount table, L1 table and encryption header are."""
    head = path.read_bytes()[:1024]
    l1_size, l1, table, clusters = struct.unpack_from(">IQQI", head, 36)
    start = struct.unpack_from(">I", head, 100)[0] if head[7] == 3 else 72
    found = [len(path.read_bytes()), head[35], l1_size, l1, table, clusters]
    while True:
        kind, length = struct.unpack_from(">II", head, start)
        if not kind:
            return found
        found.append(kind)
        if kind == 0x0537BE77:
            found += struct.unpack_from(">QQ", head, start + 8)
        start += 8 + (length + 7 & ~7)


@pytest.mark.parametrize("options", VARIANTS, ids=words)
def test_both_directions(tmp_path: Path, qemu: Qemu, options: dict[str, Any]) -> None:
    """Made by either, written by both in turn, read by both; clusters are where qemu-img puts them."""
    chance = random.Random(words(options))
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    create_image(str(ours), "qcow2", SIZE, dict(options))
    patient = {**options, "encrypt.iter-time": 20} if "encrypt.iter-time" in options else options
    peer("create", "-q", "-f", "qcow2", "-o", words(patient), theirs, SIZE)
    assert metadata(ours) == metadata(theirs)
    for path in (ours, theirs):
        model = bytearray(contents(path))
        with open_node(spec(path), readonly=False) as node:
            for _ in range(12):
                offset = chance.randrange(SIZE - 70_000)
                piece = chance.randbytes(chance.choice([1, 511, 4096, 65536, 65537]))
                node.pwrite(offset, piece)
                model[offset : offset + len(piece)] = piece
            node.zero(700_001, 200_000)
            model[700_001:900_001] = bytes(200_000)
        done = subprocess.run(
            ["qemu-io", *OBJECT, "-c", "write -P 7 33k 100k", "-c", "write -P 9 1M 1000", "--image-opts", opened(path)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "failed" not in done.stdout
        model[33 * KIB : 133 * KIB] = b"\7" * (100 * KIB)
        model[MIB : MIB + 1000] = b"\11" * 1000
        assert contents(path) == model
        with open_node(spec(path)) as node:
            assert node.pread(0, SIZE) == model
        peer("check", "-q", "--image-opts", opened(path))


def test_nothing_is_stored_in_clear(tmp_path: Path) -> None:
    """What a guest wrote is not found in the file, whichever way it was written."""
    for number, options in enumerate((LUKS, AES)):
        path = tmp_path / f"{number}.qcow2"
        create_image(str(path), "qcow2", SIZE, dict(options))
        secret = b"the treasure is under the oak." * 20
        with open_node(spec(path), readonly=False) as node:
            node.pwrite(3000, secret)
            node.pwrite(200_000, secret)
        assert b"treasure" not in path.read_bytes()


@pytest.mark.parametrize("options", [LUKS, AES], ids=["luks", "aes"])
@pytest.mark.parametrize("output", ["human", "json"])
def test_info_shows_the_peers_section(tmp_path: Path, qemu: Qemu, options: dict[str, Any], output: str) -> None:
    """The node's own description is qemu-img's ``format-specific`` data."""
    path = tmp_path / "x.qcow2"
    create_image(str(path), "qcow2", SIZE, dict(options))
    found = json.loads(peer("info", "--output=json", path))
    assert found["encrypted"]
    with open_node({"driver": "qcow2", "file.filename": str(path)}, io=False) as node:
        assert isinstance(node, FormatNode)
        assert node.format.encrypted
        assert node.info() == found["format-specific"]["data"]


def test_snapshots_keep_their_contents(tmp_path: Path, qemu: Qemu) -> None:
    """Snapshots of encrypted images, taken and gone back to here, are whole for the peer."""
    for number, options in enumerate((LUKS, AES)):
        path = tmp_path / f"{number}.qcow2"
        create_image(str(path), "qcow2", SIZE, dict(options))
        with open_node(spec(path), readonly=False) as node:
            assert isinstance(node, FormatNode)
            node.pwrite(0, b"first" * 1000)
            with node.quiesce() as driver:
                driver.snapshot_create("one")
            node.pwrite(0, b"later" * 1000)
        assert contents(path)[:5000] == b"later" * 1000
        with open_node(spec(path), readonly=False) as node:
            assert isinstance(node, FormatNode)
            with node.quiesce() as driver:
                driver.snapshot_apply("one")
        assert contents(path)[:5000] == b"first" * 1000
        peer("check", "-q", "--image-opts", opened(path))


def test_compressed_clusters_are_read(tmp_path: Path, qemu: Qemu) -> None:
    """Compressed clusters of an encrypted image, which are not encrypted, read as the peer has them."""
    path = tmp_path / "x.qcow2"
    create_image(str(path), "qcow2", SIZE, dict(LUKS))
    subprocess.run(
        ["qemu-io", *OBJECT, "-c", "write -c -P 5 64k 64k", "--image-opts", opened(path)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    with open_node(spec(path)) as node:
        assert node.pread(64 * KIB, 64 * KIB) == b"\5" * (64 * KIB)


def test_wrong_options_are_told_as_by_the_peer(tmp_path: Path, qemu: Qemu) -> None:
    """Create options that contradict each other or are incomplete, in QEMU's words."""
    for options in (
        {"encryption": True},
        {"encrypt.format": "luks"},
        {"encrypt.format": "foo"},
        {"encrypt.key-secret": "sec"},
        {"encrypt.cipher-alg": "aes-128"},
        {"encryption": True, **LUKS},
        {**AES, "encrypt.cipher-alg": "aes-256"},
        {**LUKS, "encrypt.cipher-alg": "foo"},
    ):
        path = tmp_path / "x.qcow2"
        expected = peer("create", "-q", "-f", "qcow2", "-o", words(options), path, SIZE, ok=False)
        with pytest.raises((UsageError, ImageError)) as caught:
            create_image(str(path), "qcow2", SIZE, dict(options))
        assert expected == f"qemu-img: {path}: {caught.value.peer or caught.value}\n", options


def test_opening_wants_the_right_method(tmp_path: Path) -> None:
    """The method in the options has to be the image's, and a key is needed."""
    luks, aes, plain = (tmp_path / name for name in ("luks", "aes", "plain"))
    for path, options in ((luks, LUKS), (aes, AES), (plain, {})):
        create_image(str(path), "qcow2", SIZE, dict(options))
    for path, wanted, told in (
        (luks, "aes", "Header reported 'luks' encryption format but options specify 'aes'"),
        (aes, "luks", "Header reported 'aes' encryption format but options specify 'luks'"),
        (plain, "luks", "No encryption in image header, but options specified format 'luks'"),
    ):
        with pytest.raises(ImageError, match=told):
            open_node({**spec(path), "encrypt.format": wanted})
    for path in (luks, aes):
        with pytest.raises(UsageError, match=r"Parameter 'encrypt.key-secret' is required for cipher"):
            open_node({"driver": "qcow2", "file.filename": str(path)})
    open_node(spec(plain)).close()


def test_malformed_pointers_are_told(tmp_path: Path) -> None:
    """The extension that points at the LUKS header, damaged in each way, is one line; for most of them QEMU's."""
    path, broken = tmp_path / "x.qcow2", tmp_path / "broken.qcow2"
    create_image(str(path), "qcow2", SIZE, dict(LUKS))
    image = path.read_bytes()
    for offset, data, told in (
        (35, b"\0", "CRYPTO header extension only expected with LUKS encryption method"),
        (35, b"\1", "CRYPTO header extension only expected with LUKS encryption method"),
        (35, b"\3", "Unsupported encryption method 3"),
        (0x70, struct.pack(">I", 0x12345678), "Missing CRYPTO header for crypt method 2"),
        (0x74, struct.pack(">I", 8), "CRYPTO header extension size 8, but expected size 16"),
        (
            0x78,
            struct.pack(">Q", 0x40001),
            "Encryption header offset '262145' is not a multiple of cluster size '65536'",
        ),
        (0x78, struct.pack(">Q", 0), "Volume is not in LUKS format"),
        (0x78, struct.pack(">Q", 1 << 50), "Volume is not in LUKS format"),
        (0x78, struct.pack(">Q", 1 << 63), "Could not read encryption header: Input/output error"),
        (0x80, struct.pack(">Q", 0), "Request for data outside of extension header"),
        (0x80, struct.pack(">Q", 512), "Request for data outside of extension header"),
    ):
        broken.write_bytes(image[:offset] + data + image[offset + len(data) :])
        with pytest.raises(VmError) as caught:
            open_node(spec(broken))
        assert caught.value.peer == told
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cluster", [512, 65536, 2 * MIB])
def test_measure_counts_the_header(qemu: Qemu, cluster: int) -> None:
    """``measure`` adds the clusters of the LUKS header, as qemu-img does."""
    from vm_qcow2.image import Qcow2

    options = {**LUKS, "cluster_size": cluster}
    patient = words({**options, "encrypt.iter-time": 20})
    expected = json.loads(peer("measure", "--output=json", "-O", "qcow2", "-o", patient, "--size", "1G"))
    found = Qcow2.measure(1 << 30, [], options)
    assert found["required"] == expected["required"]
    assert found["fully-allocated"] == expected["fully-allocated"]
