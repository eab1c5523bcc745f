"""Apple disk images, read side by side with qemu-img."""

from __future__ import annotations

import bz2
import lzma
import os
import plistlib
import random
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from vm_core.block.open import open_node
from vm_core.errors import ImageError
from vm_core.testing.conformance import FormatConformance, Sample
from vm_dmg import adc

ZERO, RAW, IGNORE, ADC, ZLIB, BZIP, LZFSE, LZMA = 0, 1, 2, *range(0x80000004, 0x80000009)


def literals(data: bytes) -> bytes:
    """*data* in ADC without any back reference."""
    pieces = [data[at : at + 128] for at in range(0, len(data), 128)]
    return b"".join(bytes([0x80 | len(piece) - 1]) + piece for piece in pieces)


PACK: dict[int, Callable[[bytes], bytes]] = {
    RAW: bytes,
    ADC: literals,
    ZLIB: zlib.compress,
    BZIP: bz2.compress,
    LZMA: lzma.compress,
}


def dmg(partitions: list[list[tuple[int, bytes]]], base: int = 0) -> bytes:
    """An image of partitions of (chunk type, its bytes), each a whole number of sectors; *base* bytes lie before it."""
    body = bytearray(base)
    blkx = []
    sector = 0
    for chunks in partitions:
        start, entries = sector, b""
        for kind, data in chunks:
            stored = PACK[kind](data) if kind in PACK else b""
            entries += struct.pack(">IIQQQQ", kind, 0, sector - start, len(data) // 512, len(body) - base, len(stored))
            body += stored
            sector += len(data) // 512
        entries += struct.pack(">IIQQQQ", 0xFFFFFFFF, 0, sector - start, 0, len(body) - base, 0)
        head = struct.pack(">4sIQQQII", b"mish", 1, start, sector - start, 0, 0, 0).ljust(200, b"\0")
        blkx.append(
            {"Data": head + struct.pack(">I", len(chunks) + 1) + entries, "ID": "0", "Name": "", "Attributes": ""}
        )
    plist = plistlib.dumps({"resource-fork": {"blkx": blkx}})
    where = len(body)
    koly = struct.pack(">4sIIIQQQQQII", b"koly", 4, 512, 1, 0, base, where - base, 0, 0, 1, 1).ljust(216, b"\0")
    koly += struct.pack(">QQ", where, len(plist))
    return bytes(body) + plist + koly.ljust(492, b"\0") + struct.pack(">Q", sector) + bytes(12)


class TestDmg(FormatConformance):
    """The kit, with qemu-img as the oracle where it can read the image."""

    driver = "dmg"
    rounds = int(os.environ.get("VM_FUZZ_ROUNDS", "60"))

    def samples(self, directory: Path) -> Iterable[Sample]:
        chance = random.Random(8)
        for name, kinds in {"zlib": (ZERO, RAW, IGNORE, ZLIB), "more": (ZERO, RAW, ADC, ZLIB, BZIP, LZMA)}.items():
            model = b""
            partitions = []
            for _ in range(3):
                chunks = []
                for _ in range(12):
                    kind = chance.choice(kinds)
                    sectors = chance.choice([1, 8, 100, 512])
                    data = bytes(sectors * 512) if kind in (ZERO, IGNORE) else chance.randbytes(64) * (sectors * 8)
                    model += data
                    chunks.append((kind, data))
                partitions.append(chunks)
            path = directory / f"{name}.dmg"
            path.write_bytes(dmg(partitions))
            yield Sample(path, model)

    def oracle_read(self, path: Path) -> bytes | None:
        if not shutil.which("qemu-img"):
            assert not os.environ.get("VM_TEST_STRICT"), "qemu-img is missing"
            return None
        if path.stem != "zlib":
            return None  # it has neither ADC nor LZMA
        raw = path.with_suffix(".oracle")
        subprocess.run(["qemu-img", "convert", "-f", "dmg", "-O", "raw", path, raw], check=True)
        return raw.read_bytes()


@pytest.mark.skipif(not shutil.which("qemu-img"), reason="qemu-img is not installed")
def test_our_maker_of_images_is_believed_by_qemu_img(tmp_path: Path) -> None:
    """What the tests take for a dmg with zlib and raw chunks qemu-img reads too."""
    data = random.Random(1).randbytes(512 * 40)
    path = tmp_path / "a.dmg"
    path.write_bytes(dmg([[(RAW, data[:5120]), (ZLIB, data[5120:])]]))
    subprocess.run(["qemu-img", "convert", "-f", "dmg", "-O", "raw", path, tmp_path / "raw"], check=True)
    assert (tmp_path / "raw").read_bytes() == data


def test_adc_by_hand() -> None:
    """Literals, both kinds of back references, and an overlapping one."""
    assert adc.decompress(bytes([0x83]) + b"abcd" + bytes([0b000001_00, 3]), 8) == b"abcdabcd"
    assert adc.decompress(bytes([0x80]) + b"x" + bytes([0x40 | 6, 0, 0]), 11) == b"x" * 11
    for broken in (b"", bytes([0x80]) + b"x" + bytes([4, 9]), bytes([0x80]) + b"x"):
        with pytest.raises(ValueError, match=r"back reference|instead of"):
            adc.decompress(broken, 4)


def _refused(path: Path, image: bytes) -> str:
    path.write_bytes(image)
    with pytest.raises(ImageError) as caught:
        open_node(str(path), format="dmg")
    return caught.value.reason


def test_what_is_not_supported_is_refused_by_name(tmp_path: Path) -> None:
    """LZFSE, split images, overlapping chunks, tables and chunks outside the file: one sentence each."""
    path = tmp_path / "a.dmg"
    good = dmg([[(ZLIB, bytes(5120)), (RAW, bytes(512))]])
    assert "LZFSE are not supported" in _refused(path, dmg([[(LZFSE, bytes(512))]]))
    trailer = len(good) - 512
    split = good[: trailer + 60] + struct.pack(">I", 3) + good[trailer + 64 :]
    assert "split into 3 files" in _refused(path, split)
    assert "trailer" in _refused(path, good[:-512])
    outside = good[: trailer + 216] + b"\x7f" + good[trailer + 217 :]
    assert "property list at 0x7f" in _refused(path, outside)
    two = dmg([[(ZLIB, bytes(5120))], [(RAW, bytes(512))]])
    mish = plistlib.loads(two[two.index(b"<?xml") : -512])
    second = bytearray(mish["resource-fork"]["blkx"][1]["Data"])
    second[8:16] = bytes(8)
    mish["resource-fork"]["blkx"][1]["Data"] = bytes(second)
    text = plistlib.dumps(mish)
    koly = bytearray(two[-512:])
    koly[224:232] = struct.pack(">Q", len(text))
    assert "overlap" in _refused(path, two[: two.index(b"<?xml")] + text + koly)
