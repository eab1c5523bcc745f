"""Images from either side, read and written by the other: qemu-img, qemu-io, cryptsetup."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from luks_peer import LONG, OBJECT, PASSWORD, Peers, add_secret, opened

from vm_core.block.open import create_image, open_node
from vm_core.cli.img.main import main
from vm_core.crypto import secrets
from vm_core.errors import ImageError, UsageError, VmError

SIZE = 256 * 1024

#: What both can do. QEMU gives up on keys of 24 bytes, whose key material is no whole number of sectors.
SUITES = [
    (cipher, mode, vectors)
    for cipher, mode, vectors in itertools.product(
        ("aes-128", "aes-192", "aes-256"), ("xts", "cbc", "ecb"), ("plain", "plain64", "essiv")
    )
    if cipher != "aes-192" or mode == "xts"
]
HASHES = ["md5", "sha1", "sha224", "sha256", "sha384", "sha512"] if LONG else ["sha1", "sha512"]


def spec(path: Path) -> dict[str, Any]:
    return {"driver": "luks", "key-secret": "sec", "file": {"driver": "file", "filename": str(path)}}


def create(path: Path, size: int, **options: object) -> None:
    given = {"key-secret": "sec", "iter-time": 1, **{name.replace("_", "-"): value for name, value in options.items()}}
    create_image(str(path), "luks", size, given)


@pytest.mark.parametrize(("cipher", "mode", "vectors"), SUITES if LONG else SUITES[::4])
def test_every_suite_in_both_directions(tmp_path: Path, peers: Peers, cipher: str, mode: str, vectors: str) -> None:
    """Made here, written there, read here, written here, read there; and made there."""
    chance = random.Random(f"{cipher}{mode}{vectors}")
    ours, theirs = tmp_path / "ours.luks", tmp_path / "theirs.luks"
    create(ours, SIZE, cipher_alg=cipher, cipher_mode=mode, ivgen_alg=vectors)
    peers.create(theirs, SIZE, f"cipher-alg={cipher}", f"cipher-mode={mode}", f"ivgen-alg={vectors}")
    assert ours.stat().st_size == theirs.stat().st_size
    for path in (ours, theirs):
        data = bytearray(chance.randbytes(SIZE))
        peers.write(path, bytes(data))
        with open_node(spec(path), readonly=False) as node:
            assert node.pread(0, SIZE) == data
            for _ in range(10):
                offset = chance.randrange(SIZE - 5000)
                piece = chance.randbytes(chance.randrange(1, 5000))
                node.pwrite(offset, piece)
                data[offset : offset + len(piece)] = piece
        assert peers.read(path) == data


@pytest.mark.parametrize("name", HASHES)
def test_every_hash_in_both_directions(tmp_path: Path, peers: Peers, name: str) -> None:
    """Each hash of PBKDF2 and the splitter, from either side."""
    ours, theirs = tmp_path / "ours.luks", tmp_path / "theirs.luks"
    create(ours, SIZE, hash_alg=name)
    peers.create(theirs, SIZE, f"hash-alg={name}")
    with open_node(spec(theirs)) as node:
        found = node.pread(0, SIZE)
    assert peers.read(theirs) == found
    with open_node(spec(ours)) as node:
        assert peers.read(ours) == node.pread(0, SIZE)


def test_virtual_sizes_that_are_no_sectors(tmp_path: Path, peers: Peers) -> None:
    """An image of 1000 bytes has as many more as qemu-img's."""
    ours, theirs = tmp_path / "ours.luks", tmp_path / "theirs.luks"
    create(ours, 1000)
    peers.create(theirs, 1000)
    assert ours.stat().st_size == theirs.stat().st_size
    with open_node(spec(ours), readonly=False) as node:
        assert node.size == 1000
        node.pwrite(990, b"0123456789")
        assert node.pread(980, 30)[10:] == b"0123456789" + bytes(10)


@pytest.mark.parametrize("mode", ["xts", "cbc"])
def test_cryptsetup_is_a_witness(tmp_path: Path, peers: Peers, mode: str) -> None:
    """cryptsetup opens what was made here, slots added later too, and finds erased ones gone."""
    path = tmp_path / "x.luks"
    create(path, SIZE, cipher_mode=mode)
    assert peers.unlocks(path, PASSWORD)
    secrets.add({"id": "more", "data": "second"})
    with open_node(spec(path), readonly=False) as node:
        node.amend({"state": "active", "new-secret": "more", "iter-time": 1})  # type: ignore[attr-defined]
    assert peers.unlocks(path, "second")
    with open_node(spec(path), readonly=False) as node:
        node.amend({"state": "inactive", "old-secret": "sec"})  # type: ignore[attr-defined]
    assert not peers.unlocks(path, PASSWORD)
    assert peers.unlocks(path, "second")


@pytest.mark.parametrize("cipher", ["aes-xts-plain64", "aes-cbc-essiv:sha256"])
@pytest.mark.parametrize("bits", [256, 192, 128])
def test_images_of_cryptsetup(tmp_path: Path, peers: Peers, cipher: str, bits: int) -> None:
    """What cryptsetup formats opens here, keys of 192 bits, whose material is no whole number of sectors, too."""
    if peers.cryptsetup is None:
        pytest.skip("cryptsetup is missing: apt-get install cryptsetup-bin")
    path = tmp_path / "x.luks"
    path.write_bytes(bytes(4 << 20))
    key_size = bits * 2 if "xts" in cipher else bits
    done = subprocess.run(
        [
            *(peers.cryptsetup, "luksFormat", "--type", "luks1", "--batch-mode", "--key-file", "-"),
            *("--cipher", cipher, "--key-size", str(key_size), "--pbkdf-force-iterations", "1000", str(path)),
        ],
        input=PASSWORD.encode(),
        capture_output=True,
    )
    if done.returncode:
        pytest.skip(f"cryptsetup: {done.stderr.decode().strip()}")
    with open_node(spec(path), readonly=False) as node:
        node.pwrite(1000, b"hello")
        node.amend({"state": "active", "new-secret": "sec", "iter-time": 1})  # type: ignore[attr-defined]
    assert peers.unlocks(path, PASSWORD)
    with open_node(spec(path)) as node:
        assert node.pread(1000, 5) == b"hello"


def told(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What vm-img says, called by the peer's name."""
    sys.argv[0] = "qemu-img"
    with suppress(SystemExit):
        main(list(words))
    captured = capsys.readouterr()
    add_secret()
    return captured.out + captured.err


@pytest.mark.parametrize("output", ["human", "json"])
def test_info_is_the_peers(
    tmp_path: Path, peers: Peers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """``info`` prints the same to the letter, without the key, for images from either side."""
    monkeypatch.setattr(sys, "argv", ["qemu-img"])
    for number, options in enumerate(({}, {"cipher_mode": "cbc", "ivgen_alg": "essiv", "hash_alg": "sha512"})):
        path = tmp_path / f"{number}.luks"
        create(path, SIZE, **options)
        expected = peers.img("info", f"--output={output}", path)
        assert told(capsys, "info", f"--output={output}", str(path)) == expected
        if output == "json":
            assert json.loads(expected)["format-specific"]["data"]["slots"][0]["active"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["-o", "key-secret=zz"],
        ["-o", "key-secret=sec,cipher-alg=foo"],
        ["-o", "key-secret=sec,cipher-mode=foo"],
        ["-o", "key-secret=sec,ivgen-alg=foo"],
        ["-o", "key-secret=sec,hash-alg=foo"],
        ["-o", "key-secret=sec,cipher-alg=des"],
        ["-o", "key-secret=sec,ivgen-alg=essiv,ivgen-hash-alg=sha1"],
        ["-o", "key-secret=sec,iter-time=x"],
        ["-o", "key-secret=sec,detached-header=on"],
        ["-o", "key-secret=sec", "-b", "none"],
    ],
)
def test_wrong_create_options_are_told_as_by_the_peer(
    tmp_path: Path,
    peers: Peers,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
) -> None:
    """Whatever is wrong with the options of a new image, the output is the peer's."""
    monkeypatch.setattr(sys, "argv", ["qemu-img"])
    path = str(tmp_path / "x.luks")
    words = ["create", "-f", "luks", *options, path, "1M"]
    expected = peers.img(*words, ok=False)
    secrets.clear()
    assert told(capsys, "create", *OBJECT, *words[1:]) == expected


@pytest.mark.parametrize("words", [["create", "-f", "luks", "-o", "help"], ["amend", "-f", "luks", "-o", "help"]])
def test_help_is_the_peers(
    peers: Peers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """``-o help`` lists the same options in the same order."""
    monkeypatch.setattr(sys, "argv", ["qemu-img"])
    expected = peers.img(*words)
    secrets.clear()
    assert told(capsys, *words) == expected


def test_measure_is_the_peers(
    peers: Peers, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``measure`` adds the header that the options lead to."""
    monkeypatch.setattr(sys, "argv", ["qemu-img"])
    for extra in ("", ",cipher-mode=cbc", ",cipher-alg=aes-128", ",preallocation=full"):
        words = ["-O", "luks", "-o", f"key-secret=sec,iter-time=20{extra}", "--size", "1G"]
        expected = peers.img("measure", *words)
        secrets.clear()
        assert told(capsys, "measure", *OBJECT, *words) == expected


def test_without_a_key_only_a_description(tmp_path: Path) -> None:
    """Opening for data needs a key-secret; opened to be described, nothing can be read."""
    path = tmp_path / "x.luks"
    create(path, SIZE)
    bare = {"driver": "luks", "file": {"driver": "file", "filename": str(path)}}
    with pytest.raises(UsageError, match="Parameter 'key-secret' is required for cipher"):
        open_node(bare)
    with open_node(bare, io=False) as node:
        assert node.size == SIZE
        assert node.info()["cipher-alg"] == "aes-256"
        with pytest.raises((OSError, VmError), match="without its key"):
            node.pread(0, 512)


def test_a_wrong_passphrase_is_told(tmp_path: Path) -> None:
    """The peer's sentence for a passphrase that fits no slot."""
    path = tmp_path / "x.luks"
    create(path, SIZE)
    secrets.add({"id": "other", "data": "wrong"})
    with pytest.raises(ImageError) as caught:
        open_node({**spec(path), "key-secret": "other"})
    assert caught.value.reason == "Invalid password, cannot unlock any keyslot"


def test_cut_files_are_told(tmp_path: Path) -> None:
    """A file that ends before its payload is refused, whether its key material is there or not."""
    path = tmp_path / "x.luks"
    create(path, SIZE)
    whole = path.read_bytes()
    for length in (6, 300, 592, 100_000, 300_000):
        path.write_bytes(whole[:length])
        with pytest.raises(ImageError) as caught:
            open_node(spec(path))
        assert "\n" not in str(caught.value)


def test_keys_are_not_changed_while_others_read(tmp_path: Path, peers: Peers) -> None:
    """Another process with the image open, be it just to read, keeps keys from being changed."""
    path = tmp_path / "x.luks"
    create(path, SIZE)
    secrets.add({"id": "more", "data": "second"})
    with (
        subprocess.Popen(
            ["qemu-io", *OBJECT, "-r", "--image-opts", f"{opened(path)}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as reader,
        open_node(spec(path), readonly=False) as node,
    ):
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write("read 0 512\n")
        reader.stdin.flush()
        reader.stdout.readline()
        with pytest.raises(VmError, match="consistent read"):
            node.amend({"state": "active", "new-secret": "more", "iter-time": 1})  # type: ignore[attr-defined]
        reader.stdin.close()
        reader.wait()
        node.amend({"state": "active", "new-secret": "more", "iter-time": 1})  # type: ignore[attr-defined]


def test_sizes_change_both_ways(tmp_path: Path, peers: Peers) -> None:
    """Growing and shrinking move the file's end, and nothing else."""
    path = tmp_path / "x.luks"
    create(path, SIZE)
    data = random.Random(1).randbytes(SIZE)
    with open_node(spec(path), readonly=False) as node:
        node.pwrite(0, data)
        node.truncate(2 * SIZE)
        assert node.size == 2 * SIZE
    assert peers.read(path)[:SIZE] == data
    with open_node(spec(path), readonly=False) as node:
        node.truncate(SIZE // 2)
    assert peers.read(path) == data[: SIZE // 2]


@pytest.mark.skipif(not LONG, reason="VM_LONG=1 runs it")
def test_thousands_of_operations(tmp_path: Path, peers: Peers) -> None:
    """A long random history of aligned and unaligned writes and zeroes is what a bytearray holds, for the peer too."""
    chance = random.Random(7)
    path = tmp_path / "x.luks"
    create(path, SIZE)
    model = bytearray(chance.randbytes(SIZE))
    with open_node(spec(path), readonly=False) as node:
        node.pwrite(0, bytes(model))
        for _ in range(5000):
            offset = chance.randrange(SIZE)
            length = min(SIZE - offset, chance.randrange(1, 20_000))
            if chance.random() < 0.3:
                node.zero(offset, length)
                model[offset : offset + length] = bytes(length)
            else:
                piece = chance.randbytes(length)
                node.pwrite(offset, piece)
                model[offset : offset + length] = piece
    assert peers.read(path) == model
