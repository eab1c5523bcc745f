"""Compressed loop images, read side by side with qemu-img."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from vm_cloop.plugin import MAGIC
from vm_core.block.open import open_node
from vm_core.errors import ImageError
from vm_core.testing.conformance import FormatConformance, Sample


def cloop(data: bytes, block: int) -> bytes:
    """An image of *data*, padded to whole blocks."""
    pieces = [zlib.compress(data[at : at + block].ljust(block, b"\0")) for at in range(0, len(data), block)]
    offset = 136 + 8 * (len(pieces) + 1)
    table = b""
    for piece in [*pieces, b""]:
        table += struct.pack(">Q", offset)
        offset += len(piece)
    return MAGIC.ljust(128, b"\0") + struct.pack(">II", block, len(pieces)) + table + b"".join(pieces)


class TestCloop(FormatConformance):
    """The kit, with qemu-img as the oracle."""

    driver = "cloop"
    header = 136
    rounds = int(os.environ.get("VM_FUZZ_ROUNDS", "60"))

    def samples(self, directory: Path) -> Iterable[Sample]:
        chance = random.Random(2)
        for block in (512, 65536, 196608):
            data = b"".join(chance.choice([bytes(3000), chance.randbytes(100) * 30]) for _ in range(300))
            path = directory / f"{block}.cloop"
            path.write_bytes(cloop(data, block))
            yield Sample(path, data.ljust(-(-len(data) // block) * block, b"\0"))

    def oracle_read(self, path: Path) -> bytes | None:
        if not shutil.which("qemu-img"):
            assert not os.environ.get("VM_TEST_STRICT"), "qemu-img is missing"
            return None
        raw = path.with_suffix(".oracle")
        subprocess.run(["qemu-img", "convert", "-f", "cloop", "-O", "raw", path, raw], check=True)
        return raw.read_bytes()


DAMAGE = [
    (128, struct.pack(">I", 513), "block_size 513 must be a multiple of 512"),
    (128, bytes(4), "block_size cannot be zero"),
    (128, struct.pack(">I", 0xFFFFFE00), "block_size 4294966784 must be 64 MB or less"),
    (132, b"\xff" * 4, "n_blocks 4294967295 must be 536870911 or less"),
    (132, struct.pack(">I", (512 << 20) // 8), "image requires too many offsets, try increasing block size"),
    (144, b"\xff" * 8, "invalid compressed block size at index 1, image file is corrupt"),
    (144, bytes(8), "offsets not monotonically increasing at index 1, image file is corrupt"),
]


@pytest.mark.parametrize(("offset", "data", "text"), DAMAGE)
def test_damage_is_told_in_the_peers_words(tmp_path: Path, offset: int, data: bytes, text: str) -> None:
    """Both programs refuse the same damage with the same sentence."""
    image = bytearray(cloop(bytes(5000), 512))
    image[offset : offset + len(data)] = data
    path = tmp_path / "damaged.cloop"
    path.write_bytes(image)
    with pytest.raises(ImageError) as caught:
        open_node(str(path), format="cloop")
    assert caught.value.reason == text
    if shutil.which("qemu-img"):
        done = subprocess.run(["qemu-img", "info", "-f", "cloop", path], capture_output=True, text=True)
        assert text in done.stderr
