"""Debian's i386 kernel reads, writes and syncs disks on every interface in every cache mode; the peers agree after."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from vmtest import LONG, program, run
from vmtest.guest import Guest
from vmtest.linux import APPEND, LinuxParts

FILES = 24

SCRIPT = """
d=/dev/vda; [ -b $d ] || d=/dev/sda
dmesg | grep -o 'UDMA/[0-9]* \\|MWDMA[0-9]' | head -1
mount -t ext4 $d /mnt && echo MOUNTED || echo NOT-MOUNTED
cd /mnt && sha256sum -c -s sums && echo SUMS-GOOD || echo SUMS-BAD
mkdir out && i=0
while [ $i -lt 40 ]; do
  dd if=/dev/urandom of=out/f$i bs=1024 count=$((1 + i * 7)) 2>/dev/null; i=$((i+1))
done
rm data/f0 data/f1
sync
sha256sum out/* > /tmp/sums && cp /tmp/sums out/sums && sync && cat /tmp/sums && echo WRITTEN
cd / && umount /mnt && echo UNMOUNTED
poweroff -f
"""


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ext4 image made by mkfs.ext4 with random files and their checksums."""
    work = tmp_path_factory.mktemp("ext4")
    tree = work / "tree"
    (tree / "data").mkdir(parents=True)
    source = random.Random(20111)
    lines = []
    for n in range(FILES):
        data = source.randbytes(source.choice((0, 1, 4095, 65536, 300_001)))
        (tree / f"data/f{n}").write_bytes(data)
        lines.append(f"{hashlib.sha256(data).hexdigest()}  data/f{n}\n")
    (tree / "sums").write_text("".join(lines))
    image = work / "ext4.raw"
    with image.open("wb") as f:
        f.truncate(48 << 20)
    run(program("mkfs.ext4", "e2fsprogs"), "-q", "-F", "-d", tree, image)
    return image


SHORT = [("ide", "none", "threads"), ("virtio", "writeback", "io_uring")]
ALL = [
    (bus, cache, engine)
    for bus in ("ide", "virtio")
    for cache in ("none", "writethrough", "writeback", "unsafe", "directsync")
    for engine in ("threads", "io_uring", "native")
    if engine != "native" or cache in ("none", "directsync")
]


def engine_or_threads(name: str) -> str:
    """The engine, or threads where the kernel (a container's filter, often) forbids it."""
    from vm_core.block.backend import BlockBackend
    from vm_core.errors import UsageError

    backend = BlockBackend(None, engine=name)
    try:
        backend.start()
    except UsageError:
        return "threads"
    finally:
        backend.close()
    return name


@pytest.mark.parametrize(("bus", "cache", "engine"), ALL if LONG else SHORT)
def test_linux_reads_and_writes(
    linux: LinuxParts, ext4: Path, tmp_path: Path, bus: str, cache: str, engine: str
) -> None:
    """The guest verifies files made by mkfs.ext4, writes its own, and qemu-img and e2fsck agree with what it wrote."""
    disk = tmp_path / "disk.qcow2"
    qemu_img = program("qemu-img", "qemu-utils")
    run(qemu_img, "convert", "-f", "raw", "-O", "qcow2", ext4, disk)
    initrd = tmp_path / "initrd.img"
    initrd.write_bytes(linux.initrd(SCRIPT))
    with Guest(
        *("-accel", "unicorn", "-m", "192", "-kernel", str(linux.kernel), "-initrd", str(initrd), "-append", APPEND),
        *("-drive", f"file={disk},format=qcow2,if={bus},cache={cache},aio={engine_or_threads(engine)}"),
    ) as guest:  # fmt: skip
        if bus == "ide":
            guest.expect(r"UDMA/\d+|MWDMA\d", 240)
        guest.expect(r"MOUNTED", 240)
        guest.expect(r"SUMS-GOOD", 120)
        sums = guest.expect(r"((?:[0-9a-f]{64}  out/f\d+\r?\n)+)WRITTEN", 120)[1].decode()
        guest.expect(r"UNMOUNTED", 60)
        assert guest.wait(60) == 0, guest.report()
    run(qemu_img, "check", disk)
    after = tmp_path / "after.raw"
    run(qemu_img, "convert", "-O", "raw", disk, after)
    run(qemu_img, "compare", disk, after)
    run(program("e2fsck", "e2fsprogs"), "-fn", after)
    for line in sums.split("\n"):
        if line.strip():
            digest, name = line.split()
            copy = tmp_path / "file"
            run(program("debugfs", "e2fsprogs"), "-R", f"dump {name} {copy}", after)
            assert hashlib.sha256(copy.read_bytes()).hexdigest() == digest, name
    listing = run(program("debugfs", "e2fsprogs"), "-R", "ls data", after)
    assert " f2 " in listing
    assert " f0 " not in listing


def test_whole_chain_from_one_qcow2(linux: LinuxParts, tmp_path: Path) -> None:
    """SeaBIOS, GRUB and Linux all come from one bootable qcow2 disk, as on a real machine."""
    import disk as disk_builder

    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    initrd = linux.initrd(
        "mount -t ext4 /dev/vda1 /mnt && ls /mnt/boot && echo CHAIN-COMPLETE; umount /mnt; poweroff -f"
    )
    disk_builder.build_bootable(tmp_path, linux.kernel, initrd, raw, size=32 << 20, append=APPEND)
    run(program("qemu-img", "qemu-utils"), "convert", "-f", "raw", "-O", "qcow2", raw, image)
    with Guest("-accel", "unicorn", "-m", "192", "-drive", f"file={image},format=qcow2,if=virtio") as guest:
        guest.expect(r"CHAIN-COMPLETE", 240)
        assert guest.wait(60) == 0, guest.report()
