"""Sequences of commands in corners where texts, maps and allocation are easily missed: all as the peer's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from .peer import Outcome, contents, needs_peer, ours, peer, theirs

pytestmark = needs_peer


#: What the host gave to a file depends on how it was written.
_DISK_SIZE = re.compile(r"disk size: .*")


def _run(run: Callable[[list[str], Path], Outcome], lines: str, where: Path) -> list[Outcome]:
    """What each line did; one that begins with ``:`` prepares, and is the peer's."""
    done = []
    for line in map(str.strip, lines.strip().splitlines()):
        if line.startswith(":"):
            peer(line[1:], where)
        elif line.startswith("!"):
            _poke(line[1:], where)
        else:
            found = run(shlex.split(line), where).plain()
            done.append(found._replace(out=_DISK_SIZE.sub("disk size: N", found.out)))
    return done


def _poke(line: str, where: Path) -> None:
    """``NAME OFFSET HEX``: bytes written over; ``NAME SIZE``: cut or lengthened."""
    name, place, *data = line.split()
    with (where / name).open("r+b" if (where / name).exists() else "w+b") as file:
        if not data:
            file.truncate(int(place, 0))
        else:
            file.seek(int(place, 0))
            file.write(bytes.fromhex(data[0]))


def _same(lines: str, tmp_path: Path, *, files: bool = True) -> None:
    found = []
    for name, run in (("theirs", theirs), ("ours", ours)):
        where = tmp_path / name
        where.mkdir()
        found.append((_run(run, lines, where), contents(where) if files else {}))
    (expected, expected_files), (mine, my_files) = found
    assert mine == expected
    assert sorted(my_files) == sorted(expected_files)
    for name, data in expected_files.items():
        assert my_files[name] == data, name


_LONG_NAME, _LONGEST_NAME = "n" * 1030, "n" * 4095

CASES = {
    "a raw file's end within a block": """
        !r 1048575
        :io: -f raw -c "write 983040 65535" r
        !r 1048575
        map --output=json --image-opts driver=raw,file.driver=file,file.filename=r,cache.direct=on
        map --output=json --image-opts driver=raw,file.driver=file,file.filename=r,cache.direct=off
        !r 2097000
        map --output=json --image-opts driver=raw,file.driver=file,file.filename=r,cache.direct=on
    """,
    "an image that was cut off": """
        :create -q -f qcow2 t 1M
        :io: -c "write -P 5 0 256k" t
        !t 0x60000
        map t
        map --output=json t
        convert -O raw t o.raw
        compare -f qcow2 -F raw t o.raw
    """,
    "growing over a longer backing image": """
        :create -q -f qcow2 base 640k
        :io: -c "write -P 1 0 640k" base
        :create -q -f qcow2 -b base -F qcow2 t 192k
        resize t 1M
        map --output=json t
        resize t 1100k
        map --output=json t
    """,
    "growing with metadata over a longer backing image": """
        :create -q -f qcow2 base 640k
        :create -q -f qcow2 -b base -F qcow2 t 192k
        resize --preallocation=metadata t 1M
        map --output=json t
    """,
    "setting space aside from within a cluster": """
        :create -q -f qcow2 t 2048000
        resize --preallocation=full t +16K
        map --output=json t
        :create -q -f qcow2 u 2048000
        resize --preallocation=falloc u +80K
        map --output=json u
    """,
    "snapshots and data outside": """
        :create -q -f qcow2 -o data_file=d,data_file_raw=on t 1M
        snapshot -c a t
        snapshot -l t
        snapshot -a a t
        snapshot -d a t
    """,
    "snapshots that are not there": """
        :create -q -f qcow2 t 1M
        snapshot -c a t
        snapshot -a b t
        snapshot -d b t
        :bitmap --add t b0
        snapshot -a b t
        snapshot -a a t
    """,
    "bitmaps from and to images of a version without": """
        :create -q -f qcow2 -o compat=0.10 old 1M
        :create -q -f qcow2 new 1M
        :bitmap --add new b0
        convert --bitmaps -O qcow2 old t
        convert --bitmaps -n -O qcow2 new old
        convert --bitmaps -O qcow2 -o compat=0.10 new t
    """,
    "bitmaps that another program left behind": """
        :create -q -f qcow2 t 1M
        :bitmap --add t b0
        !t 88 0000000000000000
        info t
        check t
        bitmap --remove t b0
        info t
        check t
    """,
    "an L2 table between clusters, and compat=0.10": """
        :create -q -f qcow2 t 1M
        :io: -c "write 0 64k" t
        !t 0x30000 8000000000042a00
        amend -o compat=0.10 t
    """,
    "a zero cluster between clusters, and compat=0.10": """
        :create -q -f qcow2 t 1M
        :io: -c "write 0 64k" t
        !t 0x40000 8000000000052a01
        amend -o compat=0.10 t
    """,
    "a long name of a QED image's backing file": f"""
        create -f qed -u -b {_LONG_NAME} -F raw t 1M
        info t
        create -f qed u 1M
        rebase -u -b {_LONGEST_NAME} -F raw u
        info u
        rebase -u -b "" u
        info u
        create -f qed -u -b "" v 1M
    """,
    "a commit that would make another format of a raw image": """
        :create -q -f raw b 1M
        :create -q -f qcow -b b -F raw t
        :create -q -f qcow2 header 1M
        !header 1048576
        :convert -n -f raw -O qcow header t
        commit t
        info b
    """,
    "a commit empties the first QCOW format too": """
        :create -q -f raw b 1M
        :create -q -f qcow -b b -F raw t
        :io: -c "write -P 4 0 64k" t
        commit t
        map t
        map -f raw b
    """,
    "more clusters than 32 bits count": """
        :create -q -f parallels t 4503599627369984
        info t
    """,
    "no such format of a backing image": """
        create -f qcow2 -u -b b -F garbage t 1M
        create -f qed -u -b b -F garbage t 1M
        create -f vmdk -u -b b -F garbage t 1M
        create -f qcow -u -b b -F garbage t 1M
    """,
    "rebasing QED: clusters beside each other are one request": """
        :create -q -f qed old 1M
        :create -q -f qed new 1M
        :io: -c "write -P 1 0 128k" -c "write -P 1 192k 64k" old
        :io: -c "write -P 2 64k 128k" -c "write -P 1 192k 64k" new
        :create -q -f qed -b old -F qed t 1M
        rebase -b new -F qed t
        map t
    """,
}


@pytest.mark.parametrize("name", CASES)
def test_like_the_peer(name: str, tmp_path: Path) -> None:
    """All that is printed and left behind is the same."""
    for format in ("qed", "qcow", "vmdk", "parallels"):
        if f"-f {format}" in CASES[name]:
            pytest.importorskip(f"vm_{format}")
    pytest.importorskip("vm_qcow2")
    # A snapshot has its time in it; what a program leaves behind when it fails is its own.
    words = ("snapshot -c", "another format", "no such")
    _same(CASES[name], tmp_path, files=not any(word in name + CASES[name] for word in words))


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed", "vdi", "vpc", "parallels", "qcow", "luks"])
def test_an_image_that_cannot_be_made(format: str, tmp_path: Path) -> None:
    """The sentence for a target without room is each format's own."""
    if format != "raw":
        pytest.importorskip(f"vm_{format}")
    lines = f"""
        :create -q -f raw s 1M
        create -f {format} /dev/full 1M
        convert -f raw -O {format} s /dev/full
        dd -f raw -O {format} if=s of=/dev/full
        create -f {format} nodir/x 1M
    """
    _same(lines, tmp_path)


def test_a_quorums_map(tmp_path: Path) -> None:
    """Zeroes are where every child has them; data has no place, as several files hold it."""
    pytest.importorskip("vm_filters")
    children = ",".join([f"children.{n}.driver=qcow2,children.{n}.file.filename=q{n}" for n in range(3)])
    options = f"driver=quorum,vote-threshold=2,{children}"
    above = "driver=raw," + ",".join([f"file.{word}" for word in options.split(",")])
    _same(
        f"""
        :create -q -f qcow2 q0 10M
        :create -q -f qcow2 q1 10M
        :create -q -f qcow2 q2 10M
        :io: -c "write -P 0 64k 64k" -c "write -z 3M 64k" q0
        :io: -c "write -P 0 64k 192k" -c "write -z 3M 192k" q1
        :io: -c "write -P 0 64k 128k" -c "write -z 150k 10k" -c "write -P 1 3M 128k" q2
        map --output=json --image-opts {options}
        map --output=json --image-opts {above}
        map --image-opts {options}
        """,
        tmp_path,
    )


def test_rebasing_compresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``rebase -c`` writes whole compressed clusters, and the image shows what it did."""
    from vm_core.cli.img.main import main

    pytest.importorskip("vm_qcow2")
    peer("create -q -f qcow2 old 4M", tmp_path)
    peer('io: -c "write -P 1 0 3M" -c "write -P 2 65000 1000" old', tmp_path)
    peer("create -q -f qcow2 new 2M", tmp_path)
    peer('io: -c "write -P 3 1M 512k" new', tmp_path)
    peer("create -q -f qcow2 -b old -F qcow2 t 4M", tmp_path)
    peer('io: -c "write -P 4 100k 8k" t', tmp_path)
    peer("convert -O raw t before.raw", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["rebase", "-c", "-b", "new", "-F", "qcow2", "t"], "vm-img") == 0
    peer("convert -O raw t after.raw", tmp_path)
    assert (tmp_path / "after.raw").read_bytes() == (tmp_path / "before.raw").read_bytes()
    told = theirs(["check", "t"], tmp_path)
    assert told.code == 0
    # 3 MiB of the old image, less the two clusters that the overlay had itself.
    compressed = re.search(r"([\d.]+)% compressed clusters", told.out)
    assert compressed is not None
    assert float(compressed[1]) > 80
    assert (tmp_path / "t").stat().st_size < 1 << 20


@pytest.mark.parametrize("how", ["cluster_size=64k", "extended_l2=on"])
def test_rebasing_compresses_between_runs_of_any_length(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``rebase -c`` where data of the backing images, or of the overlay's subclusters, begins within clusters."""
    from vm_core.cli.img.main import main

    pytest.importorskip("vm_qcow2")
    peer("create -q -f raw old 1M", tmp_path)
    peer('io: -f raw -c "write -P 1 36k 8k" -c "write -P 4 200k 4k" -c "write -P 5 640k 100k" old', tmp_path)
    peer("create -q -f raw new 1M", tmp_path)
    peer('io: -f raw -c "write -P 3 300k 4k" new', tmp_path)
    peer(f"create -q -f qcow2 -o {how} -b old -F raw t", tmp_path)
    peer('io: -c "write -P 9 512k 4k" -c "write -P 8 644k 4k" -c "write -P 8 702k 2k" t', tmp_path)
    peer("convert -O raw t before.raw", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["rebase", "-c", "-b", "new", "-F", "raw", "t"], "vm-img") == 0
    peer("convert -O raw t after.raw", tmp_path)
    assert (tmp_path / "after.raw").read_bytes() == (tmp_path / "before.raw").read_bytes()
    assert theirs(["check", "t"], tmp_path).code == 0


def test_a_drive_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``host_cdrom`` reads what disc is in the drive, notices another one, and says where there is none."""
    import errno

    from vm_core.block import host_cdrom
    from vm_core.block.open import open_node
    from vm_core.errors import BlockError, ImageError

    disc = tmp_path / "disc"
    disc.write_bytes(b"1" * 4096)
    state: list[int | None] = [1]
    monkeypatch.setattr(host_cdrom, "drive_status", lambda fd: state[0])
    monkeypatch.setattr(host_cdrom.HostCdromProtocol, "_check_type", classmethod(lambda cls, fd, filename: None))
    with open_node({"driver": "host_cdrom", "filename": str(disc)}) as node:
        assert not node.present
        with pytest.raises(BlockError) as caught:
            node.pread(0, 16)
        assert caught.value.errno == errno.ENOMEDIUM
        state[0] = host_cdrom.CDS_DISC_OK
        assert node.present
        assert node.size == 4096
        assert node.pread(4094, 4) == b"11\0\0"
        state[0] = 1
        assert not node.present
        assert not node.host_spans(0, 512, [], [], write=False, stable=False)
        disc.write_bytes(b"2" * 8192)
        state[0] = host_cdrom.CDS_DISC_OK
        assert node.size == 8192
        assert node.pread(8190, 2) == b"22"
    monkeypatch.undo()
    with pytest.raises(ImageError, match="a character or block device"):
        open_node({"driver": "host_cdrom", "filename": str(disc)})


@pytest.fixture
def empty_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What looks like a drive of the host without a disc, and like 1 MiB to the kernel; and an image above it."""
    from vm_core.block import host_cdrom

    drive = tmp_path / "drive"
    drive.write_bytes(bytes(1 << 20))
    monkeypatch.setattr(host_cdrom, "drive_status", lambda fd: 1)
    monkeypatch.setattr(host_cdrom.HostCdromProtocol, "_check_type", classmethod(lambda cls, fd, filename: None))
    monkeypatch.setattr(host_cdrom.HostCdromProtocol, "create", classmethod(lambda cls, options, size: None))
    return drive


#: Command lines on such a drive, what is printed, and the exit status: as qemu-img 7.2 has them on a drive whose ioctl
#: CDROM_DRIVE_STATUS says that it is empty.
EMPTY = [
    ("info {raw}", "virtual size: 1 MiB (1048576 bytes)", 0),
    ("info {probed}", "file format: raw", 0),
    ("map {raw}", "qemu-img: Failed to get size for '{raw}'\n", 1),
    ("convert {raw} out", "qemu-img: Could not get size of {raw}: No medium found\n", 1),
    ("convert -n --target-image-opts other {raw}", "qemu-img: unable to get output image length: No medium found\n", 1),
    ("compare {raw} {other}", "qemu-img: Can't get size of {raw}: No medium found\n", 4),
    ("compare {other} {raw}", "qemu-img: Can't get size of {raw}: No medium found\n", 4),
    ("resize {raw} +1M", "qemu-img: Failed to inquire current image length: No medium found\n", 1),
    ("bench -c 1 {raw}", "", 1),
    ("check {raw}", "qemu-img: This image format does not support checks\n", 63),
    ("snapshot -l {raw}", "", 0),
    ("dd if={raw} of=out bs=512", "qemu-img: Failed to get size for '{raw}'\n", 1),
    ("rebase -b '' {raw}", "qemu-img: Could not get size of '{raw}': No medium found\n", 1),
]


@pytest.mark.parametrize(("line", "told", "code"), EMPTY, ids=[line for line, _, _ in EMPTY])
def test_an_empty_drive(line: str, told: str, code: int, empty_drive: Path) -> None:
    """Where the peer says that there is no medium, so does this program; it is no image of 0 bytes."""
    names = {
        "probed": f"file.driver=host_cdrom,file.filename={empty_drive}",
        "raw": f"driver=raw,file.driver=host_cdrom,file.filename={empty_drive}",
        "other": "driver=raw,file.driver=file,file.filename=other",
    }
    (empty_drive.parent / "other").write_bytes(bytes(1 << 20))
    first, *rest = shlex.split(line.format(**names))
    words = rest if "--target-image-opts" in rest else ["--image-opts", *rest]
    found = ours([first, *words], empty_drive.parent)
    assert found.code == code
    if code:
        assert found.err == told.format(**names)
    else:
        assert told in found.out
    assert not (empty_drive.parent / "out").exists()


def test_an_empty_drive_below_an_image(empty_drive: Path) -> None:
    """What needs the drive as its backing image needs the medium."""
    from vm_core.block import medium
    from vm_core.block.open import open_node

    with open_node({"driver": "raw", "file": {"driver": "file", "filename": str(empty_drive)}}) as node:
        assert medium.present(node)
        assert not medium.removable(node)
    below = {"driver": "raw", "size": 512, "file": {"driver": "host_cdrom", "filename": str(empty_drive)}}
    with open_node({"driver": "raw", "file": below}) as node:
        assert medium.removable(node)
        assert not medium.present(node)
        with pytest.raises(OSError, match="No medium found"):
            medium.need(node)


def test_vm_io_on_an_empty_drive(empty_drive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that touches the medium says that there is none."""
    from vm_core.cli.io.main import main

    lines = ["length", "map", "read 0 512", "readv 0 512", "write 0 512", "write -z 0 512", "discard 0 512"]
    lines += ["truncate 1M", "aio_read 0 512", "aio_flush", "aio_write 0 512", "aio_flush", "info", "alloc 0 512"]
    options = f"driver=raw,file.driver=host_cdrom,file.filename={empty_drive}"
    words = [word for line in lines for word in ("-c", line)]
    assert main(["--image-opts", *words, options], "qemu-io") == 1
    found = capsys.readouterr()
    none = "No medium found"
    assert found.out.splitlines() == [
        f"getlength: {none}",
        f"read failed: {none}",
        f"readv failed: {none}",
        f"write failed: {none}",
        f"write failed: {none}",
        f"discard failed: {none}",
        f"readv failed: {none}",
        f"aio_write failed: {none}",
        "format name: raw",
        "512/512 bytes allocated at offset 0 bytes",
    ]
    assert found.err == f"qemu-io: Failed to query image length: {none}\nqemu-io: No medium inserted\n"


@pytest.mark.parametrize("driver", ["host_device", "host_cdrom"])
def test_what_is_no_device_is_refused_alike(driver: str, tmp_path: Path) -> None:
    """The sentences for directories, files and a drive without a disc."""
    _same(
        f"""
        !file 4096
        info --image-opts driver=raw,file.driver={driver},file.filename=file
        info --image-opts driver=raw,file.driver={driver},file.filename=.
        info --image-opts driver=raw,file.driver={driver},file.filename=/dev/null
        create -f raw {driver}:/dev/null 1M
        create -f raw {driver}:file 1M
        """,
        tmp_path,
    )
