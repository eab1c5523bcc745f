"""New images: the same bytes as qemu-img's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vm_core.block.open import create_image, open_node
from vm_core.errors import UsageError
from vm_core.testing.qemu import Qemu

BACKING = {"backing_file": "base.qcow2", "backing_fmt": "qcow2"}

CASES: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (1000, {}),
    (64 << 20, {}),
    (4 << 30, {"cluster_size": 512}),
    (1 << 40, {"cluster_size": 4096}),
    (100 << 20, {"cluster_size": 2 << 20}),
    (64 << 20, {"compat": "0.10"}),
    (64 << 20, {"compat": "v2", "cluster_size": 1024}),
    (64 << 20, {"lazy_refcounts": "on"}),
    (64 << 20, {"compression_type": "zstd"}),
    *[(64 << 20, {"refcount_bits": width, "cluster_size": 512}) for width in (1, 2, 4, 8, 16, 32, 64)],
    *[(64 << 20, {"cluster_size": 512 << n}) for n in range(13)],
    (64 << 20, BACKING),
    (64 << 20, {**BACKING, "compat": "0.10"}),
    *[(64 << 20, {**BACKING, "cluster_size": 512 << n}) for n in range(6)],
    *[(4 << 20, {"preallocation": "metadata", "cluster_size": size}) for size in (512, 4096, 65536, 2 << 20)],
    # The refcount table has to move on the way.
    (20 << 20, {"preallocation": "metadata", "cluster_size": 512}),
    (40 << 20, {"preallocation": "metadata", "cluster_size": 512, "refcount_bits": 64}),
    (300 << 20, {"preallocation": "metadata", "cluster_size": 16384}),
    (1000, {"preallocation": "metadata"}),
    *[
        (size << 20, {"preallocation": "falloc", "cluster_size": cluster, "refcount_bits": width})
        for size in (1, 3)
        for cluster, width in ((512, 1), (512, 16), (512, 64), (4096, 16), (65536, 16), (1 << 20, 8))
    ],
    (3 << 20, {"preallocation": "full", "cluster_size": 4096}),
    *[(3 << 20, {"preallocation": mode, "extended_l2": "on"}) for mode in ("off", "metadata", "falloc", "full")],
    (3 << 20, {"preallocation": "metadata", "extended_l2": "on", "cluster_size": 16384, **BACKING}),
    *[(3 << 20, {"preallocation": mode, "data_file": "d.raw"}) for mode in ("off", "metadata", "falloc", "full")],
    (3 << 20, {"data_file": "d.raw", "data_file_raw": "on", "extended_l2": "on"}),
    (3 << 20, {"data_file": "d.raw", "data_file_raw": "on", "refcount_bits": 1, "lazy_refcounts": "on"}),
]


@pytest.mark.parametrize(("size", "options"), CASES, ids=lambda value: str(value))
def test_same_bytes_as_the_peer(
    tmp_path: Path, qemu: Qemu, monkeypatch: pytest.MonkeyPatch, size: int, options: dict[str, Any]
) -> None:
    """With the same options, every byte of a new image is where qemu-img puts it."""
    qemu.create(tmp_path / "base.qcow2", 64 << 20)
    monkeypatch.chdir(tmp_path)
    theirs, ours = tmp_path / "theirs.qcow2", tmp_path / "ours.qcow2"
    qemu.create(theirs, size, options)
    create_image(str(ours), "qcow2", size, options)
    assert ours.stat().st_size == theirs.stat().st_size
    with theirs.open("rb") as a, ours.open("rb") as b:
        while True:
            piece = a.read(1 << 22)
            assert piece == b.read(1 << 22), f"before {a.tell()}"
            if not piece:
                break


@pytest.mark.parametrize("mode", ["falloc", "full"])
@pytest.mark.parametrize("cluster", [512, 65536])
def test_preallocation_takes_host_space(tmp_path: Path, qemu: Qemu, mode: str, cluster: int) -> None:
    """falloc and full set aside what the whole disk takes, full by writing it; it reads as zeroes and is sound."""
    path = tmp_path / "disk.qcow2"
    create_image(str(path), "qcow2", 4 << 20, {"preallocation": mode, "cluster_size": cluster})
    assert path.stat().st_blocks * 512 >= 4 << 20
    qemu.sound(path)
    assert qemu.read(path) == bytes(4 << 20)
    before = path.stat().st_size
    qemu.io(path, "write -P 1 0 4M")
    assert path.stat().st_size == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cluster_size": 100}, "power of two between 512 and 2048k"),
        ({"cluster_size": 4 << 20}, "power of two between 512 and 2048k"),
        ({"refcount_bits": 3}, "power of two and may not exceed 64 bits"),
        ({"refcount_bits": 128}, "power of two and may not exceed 64 bits"),
        ({"compat": "0.10", "refcount_bits": 1}, "compatibility level 1.1"),
        ({"compat": "0.10", "lazy_refcounts": "on"}, "compatibility level 1.1"),
        ({"compat": "0.10", "compression_type": "zstd"}, "compatibility level 1.1"),
        ({"compat": "2.0"}, "compat"),
        ({"backing_file": "x" * 1024, "backing_fmt": "raw"}, "too long"),
        ({"backing_file": "x", "backing_fmt": "raw", "preallocation": "metadata"}, "preallocation"),
    ],
    ids=str,
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    """An option that cannot be says why, and no file is left behind."""
    path = tmp_path / "disk.qcow2"
    with pytest.raises(UsageError, match=words):
        create_image(str(path), "qcow2", 1 << 20, options, check_backing=False)
    assert not path.exists()


def test_too_large_for_the_l1_table(tmp_path: Path) -> None:
    """A size that the L1 table cannot cover is refused before anything is written."""
    with pytest.raises(UsageError, match="larger cluster size"):
        create_image(str(tmp_path / "disk.qcow2"), "qcow2", 1 << 40, {"cluster_size": 512})


def test_info_is_the_peers(tmp_path: Path, qemu: Qemu) -> None:
    """The format's facts have the names and values that qemu-img info gives them."""
    import json

    for options in ({}, {"compat": "0.10"}, {"lazy_refcounts": "on", "refcount_bits": 1, "compression_type": "zstd"}):
        path = tmp_path / "disk.qcow2"
        create_image(str(path), "qcow2", 1 << 20, options)
        theirs = json.loads(qemu.img("info", "--output=json", path))["format-specific"]["data"]
        with open_node(str(path)) as node:
            assert node.info() == theirs
        path.unlink()
