"""Making differencing images: what is written into them, and that everybody reads them."""

from __future__ import annotations

import random
import shutil
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.gate import Gate
from vm_core.block.open import create_image, open_node
from vm_core.errors import UsageError
from vm_core.testing.overlays import LONG, OverlayConformance

MIB = 1 << 20


def read_by_dissect(*paths: Path) -> bytes | None:
    """What dissect.hypervisor finds in the first image, each of which lies on the next; None without it."""
    try:
        from dissect.hypervisor.disk.vdi import VDI
    except ImportError:
        return None
    files = [path.open("rb") for path in paths]
    try:
        stream: Any = None
        for file in reversed(files):
            stream = VDI(file, stream).open()
        # It reads what is no whole block of a parent from the wrong place.
        return b"".join(iter(lambda: stream.read(MIB), b""))
    finally:
        for file in files:
            file.close()


class TestVdiOverlays(OverlayConformance):
    """Differencing images on a dynamic one."""

    driver, suffix = "vdi", ".vdi"
    detaches = True

    def others(self, images: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
        found = read_by_dissect(*images)
        if found is not None:
            yield "dissect.hypervisor", found


@pytest.mark.skipif(not LONG, reason="long")
class TestVdiOverlaysOnStatic(TestVdiOverlays):
    """Differencing images on a static one."""

    base_options = {"static": True}  # noqa: RUF012


def test_dissect_reads_the_same(tmp_path: Path) -> None:
    """The comparisons with dissect.hypervisor compare something."""
    pytest.importorskip("dissect.hypervisor")
    create_image(str(tmp_path / "base.vdi"), "vdi", 3 * MIB)
    create_image(str(tmp_path / "child.vdi"), "vdi", None, {"backing_file": "base.vdi"})
    for name, start in (("base", 0), ("child", 2 * MIB + 77)):
        with open_node(str(tmp_path / f"{name}.vdi"), readonly=False) as node:
            node.pwrite(start, name.encode() * 100)
    data = read_by_dissect(tmp_path / "child.vdi", tmp_path / "base.vdi")
    assert data is not None
    assert data.startswith(b"base" * 100)
    assert data[2 * MIB + 77 :].startswith(b"child" * 100)


def test_every_field(tmp_path: Path) -> None:
    """The header is that of a differencing image whose parent is known by its UUIDs, and nothing is in it."""
    create_image(str(tmp_path / "base.vdi"), "vdi", 5 * MIB)
    create_image(str(tmp_path / "child.vdi"), "vdi", None, {"backing_file": "base.vdi"})
    below, data = (tmp_path / "base.vdi").read_bytes(), (tmp_path / "child.vdi").read_bytes()
    assert struct.unpack_from("<I", data, 76) == (4,)
    assert data[340:388] == below[340:388]
    assert struct.unpack_from("<I", data, 388) == (0,)
    assert data[424:456] == below[392:424]
    assert len({data[392:408], data[408:424], below[392:408], below[408:424]}) == 4
    assert data[512:532] == b"\xff" * 20
    assert len(data) == 1024


def test_a_larger_one(tmp_path: Path) -> None:
    """An overlay may be larger than its parent: there it is zeroes."""
    create_image(str(tmp_path / "base.vdi"), "vdi", MIB + 512)
    with open_node(str(tmp_path / "base.vdi"), readonly=False) as node:
        node.pwrite(0, b"a" * (MIB + 512))
    create_image(str(tmp_path / "child.vdi"), "vdi", 3 * MIB, {"backing_file": "base.vdi"})
    with open_node(str(tmp_path / "child.vdi"), readonly=False) as node:
        node.pwrite(2 * MIB, b"b")
        assert node.pread(0, 3 * MIB) == b"a" * (MIB + 512) + bytes(MIB - 512) + b"b" + bytes(MIB - 1)


def test_what_would_not_be_found_is_refused(tmp_path: Path) -> None:
    """A parent that is elsewhere, is called something else, or has a twin that would be taken for it."""
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    for place in (tmp_path, tmp_path / "a", below):
        create_image(str(place / "base.vdi"), "vdi", MIB)
    shutil.copy(below / "base.vdi", below / "copy.vdi")
    shutil.copy(below / "base.vdi", below / "disk.img")
    child = str(below / "child.vdi")
    for name, told in (
        ("../../base.vdi", "would not be found"),
        ("copy.vdi", r"base\.vdi' has the UUID of 'copy\.vdi'"),
        ("disk.img", "has the UUID of"),
    ):
        with pytest.raises(UsageError, match=told):
            create_image(child, "vdi", None, {"backing_file": name})
    create_image(child, "vdi", None, {"backing_file": "../base.vdi"})
    with open_node(child, gate=Gate.follow()) as node:
        assert node.backing is not None
        assert Path(node.backing.filename).samefile(tmp_path / "a" / "base.vdi")


def test_a_static_overlay_is_refused(tmp_path: Path) -> None:
    """What grows is not static."""
    create_image(str(tmp_path / "base.vdi"), "vdi", MIB)
    with pytest.raises(UsageError, match="static"):
        create_image(str(tmp_path / "child.vdi"), "vdi", None, {"backing_file": "base.vdi", "static": True})


def test_a_standalone_image_is_not_emptied(tmp_path: Path) -> None:
    """There is nothing below it that would show."""
    create_image(str(tmp_path / "base.vdi"), "vdi", MIB)
    with open_node(str(tmp_path / "base.vdi"), readonly=False) as node:
        data = random.Random(1).randbytes(MIB)
        node.pwrite(0, data)
        with node.quiesce() as driver, pytest.raises(UsageError):  # type: ignore[attr-defined]
            driver.empty()
        assert node.pread(0, MIB) == data
