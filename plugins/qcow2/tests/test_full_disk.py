"""No room for what an image is to become: the sentences and exit codes of qemu-img, and what is left behind.

The disk is one in memory, in name spaces of the test's own, so no privileges are needed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.open import open_node
from vm_core.errors import ImageError
from vm_core.testing.qemu import Qemu

KIB = 1024
IMAGE = "i.qcow2"
SMALL = "create -q -f qcow2 -o cluster_size=512 i.qcow2 1M"
LARGE = "create -q -f qcow2 i.qcow2 64M"
OLD = "create -q -f qcow2 -o compat=0.10 i.qcow2 64M"


#: What runs in a name space of its own: a memory disk with the image, filled up to some bytes, a command on it.
_SCRIPT = """
place=$1 more=$2; shift 2
mkdir "$place/disk" && mount -t tmpfs none "$place/disk" || exit 99
cd "$place/disk" && { test ! -e ../i.qcow2 || cp --sparse=never ../i.qcow2 . ; } || exit 99
used=$(df -B1 --output=used . | tail -n 1)
mount -o "remount,size=$((used + more))" "$place/disk" || exit 99
"$@"
code=$?
rm -f ../i.qcow2
test ! -e i.qcow2 || cp --sparse=always i.qcow2 .. || exit 99
exit $code
"""


def limited(program: list[str], words: str, directory: Path, more: int) -> tuple[int, str, str]:
    """Run it on a disk with *more* bytes of room: exit code, output, errors without the program's name."""
    done = subprocess.run(
        ["unshare", "-r", "-m", "sh", "-c", _SCRIPT, "sh", str(directory), str(more), *program, *words.split()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip(f"no memory disk can be mounted here: {done.stderr.strip()}")
    return done.returncode, done.stdout, re.sub(r"^\S*qemu-img: ", "", done.stderr, flags=re.M)


@pytest.fixture
def ours(tmp_path: Path) -> list[str]:
    """vm-img under the peer's name."""
    link = tmp_path / "qemu-img"
    link.write_text(
        f"#!{sys.executable} -B\nimport sys\nsys.path[:0] = {sys.path!r}\n"
        "from vm_core.cli.img.main import main\nsys.exit(main())\n"
    )
    link.chmod(0o755)
    return [str(link)]


def both(
    tmp_path: Path, qemu: Qemu, ours: list[str], prepare: list[str], words: str, more: int
) -> list[tuple[int, str, str]]:
    """What the peer and vm-img do with *more* bytes of room behind the image; its own image is sound then."""
    found = []
    for name, program in (("peer", [str(qemu.img_path)]), ("ours", ours)):
        place = tmp_path / name
        place.mkdir()
        for command in prepare:
            subprocess.run([str(qemu.img_path), *command.split()], cwd=place, check=True)
        image = place / IMAGE
        size = image.stat().st_size if image.exists() else 0
        found.append(limited(program, words, place, more))
        if name == "ours" and image.exists():
            qemu.sound(image)
            if found[-1][0] and prepare:
                # A refcount table that has moved stays there.
                assert image.stat().st_size <= size + 2 * 64 * KIB
    return found


@pytest.mark.parametrize(
    ("prepare", "words", "more"),
    [
        pytest.param(prepare, words, more, id=f"{words} +{more}")
        for prepare, words, rooms in (
            ([LARGE], "amend -o refcount_bits=32 i.qcow2", (0, 64 * KIB)),
            ([SMALL], "amend -o size=64M i.qcow2", (0, 4 * KIB)),
            ([SMALL], "resize i.qcow2 64M", (0, 4 * KIB)),
            ([LARGE], "resize --preallocation=metadata i.qcow2 1G", (0, 72 * KIB)),
            ([LARGE], "resize --preallocation=falloc i.qcow2 128M", (0, 72 * KIB, 300 * KIB)),
            ([LARGE], "resize --preallocation=full i.qcow2 128M", (0, 72 * KIB, 300 * KIB)),
            ([], "create -q -f qcow2 i.qcow2 64M", (0, 72 * KIB, 140 * KIB)),
            ([], "create -q -f qcow2 -o preallocation=metadata i.qcow2 64M", (200 * KIB,)),
            ([], "create -q -f qcow2 -o preallocation=falloc i.qcow2 64M", (200 * KIB, 300 * KIB)),
            ([], "create -q -f qcow2 -o preallocation=full i.qcow2 64M", (200 * KIB, 300 * KIB)),
            ([LARGE], "snapshot -c one i.qcow2", (0, 60 * KIB)),
            ([OLD, "snapshot -c one i.qcow2"], "amend -o compat=1.1 i.qcow2", (0,)),
        )
        for more in rooms
    ],
)
def test_messages(tmp_path: Path, qemu: Qemu, ours: list[str], prepare: list[str], words: str, more: int) -> None:
    """Both say the same and end the same way; ours leaves nothing behind that somebody would have to repair."""
    peer, mine = both(tmp_path, qemu, ours, prepare, words, more)
    assert mine == peer


@pytest.mark.parametrize("words", ["bitmap --add i.qcow2 b", "bitmap --disable i.qcow2 a", "bitmap --clear i.qcow2 a"])
def test_bitmaps(tmp_path: Path, qemu: Qemu, ours: list[str], words: str) -> None:
    """A bitmap that cannot be stored is a failure, in QEMU's words; those that were there stay as they were."""
    prepare = [LARGE, "bitmap --add i.qcow2 a", "bitmap --add i.qcow2 c"]
    peer, mine = both(tmp_path, qemu, ours, prepare, words, 0)
    assert (peer[0], mine[0]) == (0, 1)
    assert all(re.search("Failed to (write|update) bitmap", said) for said in (peer[2], mine[2]))
    assert mine[2].count("\n") == 1
    data = qemu.info(tmp_path / "ours" / IMAGE)["format-specific"]["data"]
    assert [(one["name"], one["flags"]) for one in data["bitmaps"]] == [("a", ["auto"]), ("c", ["auto"])]


def test_no_room_in_the_header(tmp_path: Path, qemu: Qemu) -> None:
    """A header that outgrows its cluster is refused with the peer's words, and vm-img adds what is meant."""
    make = f"create -q -f qcow2 -o compat=0.10,cluster_size=512 -u -b {'b' * 400} -F raw i.qcow2 1M"
    subprocess.run([str(qemu.img_path), *make.split()], cwd=tmp_path, check=True)
    before = (tmp_path / IMAGE).read_bytes()
    with open_node(
        {"driver": "qcow2", "file.filename": str(tmp_path / IMAGE), "backing": None}, readonly=False
    ) as node:
        assert isinstance(node, FormatNode)
        with pytest.raises(ImageError, match="the header does not fit into its cluster any more") as caught:
            node.amend({"compat": "1.1"})
    assert caught.value.peer == "Failed to update the image header: No space left on device"
    assert (tmp_path / IMAGE).read_bytes() == before


@pytest.mark.parametrize("more", [64 * KIB, 200 * KIB])
def test_data_without_room(tmp_path: Path, qemu: Qemu, ours: list[str], more: int) -> None:
    """What a copy into an image could not write of its data takes no room any more."""
    source = "s.qcow2"
    bench = "bench -q -w --pattern=65 -s 64k -S 64k"
    prepare = [LARGE, f"create -q -f qcow2 {source} 64M", f"{bench} -c 9 {source}", f"{bench} -c 1 -o 32M {IMAGE}"]
    peer, mine = both(tmp_path, qemu, ours, prepare, f"convert -n -O qcow2 ../{source} i.qcow2", more)
    assert mine[0] == peer[0]
    assert mine[2].splitlines()[-1] == peer[2].strip()  # zeroes behind the data may have been entered already
    assert (tmp_path / "ours" / IMAGE).stat().st_size <= 6 * 64 * KIB
