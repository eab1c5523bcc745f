"""The conformance kit on an image written by Bochs' own tool (Debian: bximage) and on one made here by hand."""

import random
import shutil
import struct
import subprocess

from vm_core.testing.conformance import FormatConformance, Sample


def make_by_hand(path, disk, extent, written):
    """A growing image as the manual describes it: *written* maps sector numbers to their contents."""
    entries = -(-disk // extent)
    bitmap = extent // 512 // 8
    head = struct.pack("<32s16s16sII", b"Bochs Virtual HD Image", b"Redolog", b"Growing", 0x20000, 512)
    head += struct.pack("<IIIIQ", entries, bitmap, extent, 0, disk)
    catalog, extents = [0xFFFFFFFF] * entries, []
    for sector in sorted(written, reverse=True):  # the last extent first: places are not in guest order
        n = sector * 512 // extent
        if catalog[n] == 0xFFFFFFFF:
            catalog[n] = len(extents)
            extents.append((bytearray(bitmap), bytearray(extent)))
        bits, data = extents[catalog[n]]
        within = sector - n * extent // 512
        bits[within // 8] |= 1 << within % 8
        data[within * 512 : within * 512 + 512] = written[sector]
    body = b"".join(bytes(bits).ljust(-(-bitmap // 512) * 512, b"\0") + bytes(data) for bits, data in extents)
    path.write_bytes(head.ljust(512, b"\0") + struct.pack(f"<{entries}I", *catalog) + body)


class TestBochs(FormatConformance):
    """Read-only: probing, reading by model, damaged images."""

    driver = "bochs"
    metadata = 2048

    def samples(self, directory):
        chance = random.Random(5)
        disk = 3 << 20
        written = {chance.randrange(disk // 512): chance.randbytes(512) for _ in range(300)}
        data = bytearray(disk)
        for sector, contents in written.items():
            data[sector * 512 : sector * 512 + 512] = contents
        make_by_hand(directory / "hand.bochs", disk, 65536, written)
        yield Sample(directory / "hand.bochs", bytes(data))
        if shutil.which("bximage"):
            (directory / "disk.raw").write_bytes(data)
            command = [
                "bximage",
                "-q",
                "-func=convert",
                "-imgmode=growing",
                directory / "disk.raw",
                directory / "real.bochs",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            yield Sample(directory / "real.bochs", bytes(data))
