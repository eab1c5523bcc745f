"""What is told of damaged images, and what is left of them: the peer's words, in its order, and the peer's bytes."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vm_core.block import notices
from vm_core.block.open import open_node
from vm_core.errors import VmError
from vm_core.testing.qemu import Qemu
from vm_qcow2.image import Qcow2


def u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def u64(*values: int) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)


#: Offset in the header and what is put there.
HEADERS: dict[str, tuple[int, bytes]] = {
    "version 4": (4, u32(4)),
    "clusters of 256 bytes": (20, u32(8)),
    "clusters of 4 MiB": (20, u32(22)),
    "short header": (100, u32(96)),
    "long header": (100, u32(0x10001)),
    "backing name past the cluster": (8, u64(0x10001)),
    "backing name of 1024 bytes": (8, u64(600) + u32(1024)),
    "unknown feature": (72, u64(1 << 63)),
    "compression without type": (72, u64(8)),
    "compression type without bit": (104, b"\1"),
    "unknown compression": (104, b"\2"),
    "wide refcounts": (96, u32(7)),
    "encryption method 3": (32, u32(3)),
    "data file": (72, u64(4)),
    "large refcount table": (56, u32(0x7FFFFFFF)),
    "no refcount table": (56, u32(0)),
    "unaligned refcount table": (48, u64(0x1234)),
    "far refcount table": (48, u64(0xFFFF_FFFF_FFFF_0000)),
    "large L1 table": (36, u32(0x7FFFFFFF)),
    "L1 table a little too large": (36, u32(0x400001)),
    "no L1 table": (36, u32(0)),
    "unaligned L1 table": (40, u64(0x1234)),
    "size beyond the L1 table": (24, u64(1 << 40)),
    "huge size": (24, u64(1 << 63)),
    "many snapshots": (60, u32(0x7FFFFFFF)),
    "one snapshot too many": (60, u32(65537)),
    "unaligned snapshots": (60, u32(1) + u64(0x1234)),
    "far snapshots": (60, u32(1) + u64(0x7FFF_FFFF_FFFF_0000)),
    "endless extension": (112, u32(0x12345678, 0x7FFFFFFF)),
    "extension past the cluster": (112, u32(0x12345678, 0xFFF1)),
    "long format name": (112, u32(0xE2792ACA, 20)),
    "raw data without data file": (88, u64(2)),
}


def put(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("name", HEADERS)
def test_header_that_cannot_be(tmp_path: Path, qemu: Qemu, name: str) -> None:
    """Each field is refused with the sentence that qemu-io has for it."""
    path = tmp_path / "disk.qcow2"
    qemu.create(path, 64 << 20)
    put(path, *HEADERS[name])
    done = subprocess.run(
        [str(qemu.io_path), "-r", "-f", "qcow2", "-c", "quit", str(path)], capture_output=True, text=True, timeout=60
    )
    told = (done.stdout + done.stderr).strip().splitlines()
    assert told, "the peer opens it"
    with pytest.raises(VmError) as caught:
        open_node(str(path), format="qcow2").close()
    assert caught.value.peer == told[0].split(f"{path}: ", 1)[1]
    assert "\n" not in str(caught.value)


def word(path: Path, offset: int) -> int:
    with path.open("rb") as file:
        file.seek(offset)
        return int(struct.unpack(">Q", file.read(8))[0])


def l2(path: Path) -> int:
    return word(path, word(path, 40)) & 0x00FF_FFFF_FFFF_FE00


def block(path: Path) -> int:
    return word(path, word(path, 48))


#: Of an image with clusters of 64 KiB: header 0, refcount table 1, block 2, L1 3, L2 4, data from 5 on.
DAMAGES: dict[str, Callable[[Path], None]] = {
    "a refcount too high": lambda p: put(p, block(p) + 2 * 7, b"\0\5"),
    "a refcount of zero": lambda p: put(p, block(p) + 2 * 8, b"\0\0"),
    "all refcounts zero": lambda p: put(p, block(p), bytes(200)),
    "COPIED missing in L2": lambda p: put(p, l2(p) + 8, u64(word(p, l2(p) + 8) & ~(1 << 63))),
    "COPIED missing in L1": lambda p: put(p, word(p, 40), u64(l2(p))),
    "a data cluster used twice": lambda p: put(p, l2(p), u64(word(p, l2(p) + 8))),
    "data on the refcount block": lambda p: put(p, l2(p), u64(1 << 63 | block(p))),
    "no refcount block": lambda p: put(p, word(p, 48), bytes(8)),
    "unaligned refcount block": lambda p: put(p, word(p, 48), u64(block(p) + 512)),
    "reserved bits of the refcount table": lambda p: put(p, word(p, 48), u64(block(p) | 7)),
    "a second block outside": lambda p: put(p, word(p, 48) + 8, u64(1 << 30)),
    "no refcount table": lambda p: put(p, 56, u32(0)),
    "unaligned data": lambda p: put(p, l2(p), u64(word(p, l2(p)) + 0x200)),
    "unaligned zeroes": lambda p: put(p, l2(p), u64(word(p, l2(p)) + 0x201)),
    "reserved bits in L2": lambda p: put(p, l2(p), u64(word(p, l2(p)) | 1 << 60)),
    "reserved bits in L1": lambda p: put(p, word(p, 40), u64(word(p, word(p, 40)) | 1 << 60)),
    "data outside": lambda p: put(p, l2(p), u64(1 << 63 | 1 << 40)),
    "L2 on L1": lambda p: put(p, word(p, 40), u64(1 << 63 | word(p, 40))),
    "compressed and COPIED": lambda p: put(p, l2(p) + 8 * 80, u64(3 << 62 | 5 << 54 | 0x60000)),
}


def lines_of(run: Callable[[], object]) -> list[str]:
    """What is told while *run* runs, and what it returned as messages."""
    said: list[str] = []
    notices.sink = said.append
    try:
        result = run()
    finally:
        notices.sink = None
    return said + (list(result["messages"]) if isinstance(result, dict) else [])


@pytest.mark.parametrize("repair", ["", "leaks", "all"])
@pytest.mark.parametrize("name", DAMAGES)
def test_check_tells_and_does_what_the_peer_does(tmp_path: Path, qemu: Qemu, name: str, repair: str) -> None:
    """Every line and every count of a check is the peer's; what it repairs has the peer's bytes afterwards."""
    theirs, mine = tmp_path / "theirs.qcow2", tmp_path / "mine.qcow2"
    qemu.create(theirs, 16 << 20)
    qemu.io(theirs, "write -P 7 0 1M", "write -P 8 3M 100k", "write -P 9 2M 1M")
    DAMAGES[name](theirs)
    shutil.copy(theirs, mine)
    words = ["-r", repair] if repair else []
    done = subprocess.run(
        [str(qemu.img_path), "check", "-f", "qcow2", *words, str(theirs)], capture_output=True, text=True, timeout=60
    )
    told = [line for line in done.stderr.splitlines() if line and not line.startswith("qemu-img:")]
    found: list[str] = []
    storage = open_node({"driver": "file", "filename": str(mine)}, readonly=not repair)
    image = Qcow2(storage, str(mine), readonly=not repair, check=True)
    failed = False
    try:
        result: dict[str, object] = {}

        def first() -> object:
            result.update(image.check(repair=repair))
            return result

        found += lines_of(first)
        if result.get("corruptions-fixed") or result.get("leaks-fixed"):
            found += lines_of(image.check)
    except OSError:
        failed = True
    finally:
        if not image.failed:
            image.close()
        storage.close()
    if failed:
        assert "Check failed" in done.stderr
        return
    if any("Marking image as corrupt" in line for line in told):
        # The peer gave up over its own new refcount blocks.
        qemu.sound(mine)
        return
    assert found == told
    assert mine.read_bytes().rstrip(b"\0") == theirs.read_bytes().rstrip(b"\0")
