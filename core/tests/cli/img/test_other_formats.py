"""The commands that ask and resize do the same as qemu-img's on images of every installed format."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm_core.errors import PluginError
from vm_core.plugins import find

from .peer import compare, needs_peer, peer

pytestmark = needs_peer

_SECRET = "--object secret,id=s,data=abc"

#: Image, its format, how the peer makes it.
IMAGES = {
    "q.qed": ("qed", "create -q -f qed q.qed 1M"),
    "q2.qed": ("qed", "create -q -f qed -u -b q.qed -F qed q2.qed 1M"),
    "v.vmdk": ("vmdk", "create -q -f vmdk v.vmdk 1M"),
    "vf.vmdk": ("vmdk", "create -q -f vmdk -o subformat=monolithicFlat vf.vmdk 1M"),
    "vt.vmdk": ("vmdk", "create -q -f vmdk -o subformat=twoGbMaxExtentSparse vt.vmdk 1M"),
    "vs.vmdk": ("vmdk", "create -q -f vmdk -o subformat=streamOptimized vs.vmdk 1M"),
    "d.vdi": ("vdi", "create -q -f vdi d.vdi 1M"),
    "ds.vdi": ("vdi", "create -q -f vdi -o static=on ds.vdi 1M"),
    "p.vpc": ("vpc", "create -q -f vpc p.vpc 1M"),
    "pf.vpc": ("vpc", "create -q -f vpc -o subformat=fixed pf.vpc 1M"),
    "x.vhdx": ("vhdx", "create -q -f vhdx x.vhdx 1M"),
    "pa.hdd": ("parallels", "create -q -f parallels pa.hdd 1M"),
    "qc.qcow": ("qcow", "create -q -f qcow qc.qcow 1M"),
    "l.luks": ("luks", f"create -q -f luks {_SECRET} -o key-secret=s,iter-time=10 l.luks 1M"),
    "enc.qcow2": (
        "qcow2",
        f"create -q -f qcow2 {_SECRET} -o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 enc.qcow2 1M",
    ),
    "aes.qcow2": ("qcow2", f"create -q -f qcow2 {_SECRET} -o encrypt.format=aes,encrypt.key-secret=s aes.qcow2 1M"),
    "ext.qcow2": ("qcow2", "create -q -f qcow2 -o data_file=df.raw,data_file_raw=on ext.qcow2 1M"),
    "el2.qcow2": ("qcow2", "create -q -f qcow2 -o extended_l2=on,cluster_size=128k el2.qcow2 1M"),
}

#: Those that the peer writes a pattern into.
WRITTEN = ("q.qed", "v.vmdk", "vf.vmdk", "vt.vmdk", "d.vdi", "ds.vdi", "p.vpc", "pf.vpc", "x.vhdx", "pa.hdd", "qc.qcow")

COMMANDS = (
    "info {}",
    "info --output=json {}",
    "map {}",
    "map --output=json {}",
    "check {}",
    "check --output=json {}",
    "snapshot -l {}",
    "snapshot -d none {}",
    "resize -q {} 2M",
    "resize --shrink {} 512k",
    "bitmap --remove {} none",
)

#: Images with keys: encryption is opened only where data is wanted.
WITH_KEYS = (
    ("luks", f"map {_SECRET} --image-opts driver=luks,key-secret=s,file.filename=l.luks"),
    ("luks", "map l.luks"),
    ("luks", "info --image-opts driver=luks,key-secret=none,file.filename=l.luks"),
    ("luks", f"resize {_SECRET} --image-opts driver=luks,key-secret=s,file.filename=l.luks 2M"),
    ("qcow2", f"map --output=json {_SECRET} --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=enc.qcow2"),
    ("qcow2", "map --image-opts driver=qcow2,encrypt.key-secret=none,file.filename=enc.qcow2"),
    (
        "qcow2",
        "map --object secret,id=s,data=wrong --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=enc.qcow2",
    ),
)

CREATED = (
    ("qed", "-o cluster_size=4k,table_size=4 x 1M"),
    ("qed", "-b a.qcow2 -F qcow2 x"),
    ("qed", "x 9000T"),
    ("vmdk", "-o subformat=foo x 1M"),
    ("vmdk", "-o compat6=on,hwversion=5 x 1M"),
    ("vmdk", "-b a.qcow2 -F qcow2 x"),
    ("vdi", "-o static=on x 1M"),
    ("vdi", "x 9000T"),
    ("vpc", "-o subformat=fixed,force_size=on x 1M"),
    ("vpc", "-o subformat=foo x 1M"),
    ("vpc", "x 9000T"),
    ("vhdx", "-o subformat=fixed x 1M"),
    ("vhdx", "-o block_size=3 x 1M"),
    ("parallels", "-o cluster_size=64k x 1M"),
    ("qcow", "-b a.qcow2 -F qcow2 x"),
    ("luks", "x 1M"),
    ("bochs", "x 1M"),
    ("cloop", "x 1M"),
    ("dmg", "x 1M"),
)


def need(format: str) -> None:
    """Skip the test where no plugin brings *format*."""
    try:
        find("format", format)
    except PluginError:
        pytest.skip(f"{format} is not installed")


@pytest.fixture(scope="session")
def others(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an image of each format, made by the peer."""
    where = tmp_path_factory.mktemp("others")
    (where / "a.qcow2").write_bytes((base / "a.qcow2").read_bytes())
    for name, (_, line) in IMAGES.items():
        peer(line, where)
        if name in WRITTEN:
            peer(f"io: -c 'write -P 5 0 8k' -c 'write -P 6 300k 70k' {name}", where)
    return where


def only(where: Path, name: str, tmp_path: Path) -> Path:
    """A directory with the image *name* alone and what belongs to it, so that not everything is copied each time."""
    few = tmp_path / "few"
    few.mkdir()
    for path in where.iterdir():
        if path.name.startswith(name.partition(".")[0]) or path.name == "df.raw":
            (few / path.name).write_bytes(path.read_bytes())
    return few


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_do_alike(name: str, command: str, others: Path, tmp_path: Path) -> None:
    """Everything that needs no key is told, refused or done alike."""
    need(IMAGES[name][0])
    compare(command.format(name), only(others, name, tmp_path), tmp_path)


@pytest.mark.parametrize(("format", "line"), WITH_KEYS)
def test_encrypted_images_are_opened_alike(format: str, line: str, others: Path, tmp_path: Path) -> None:
    """With the key, without it, and with a wrong one."""
    need(format)
    compare(line, others, tmp_path, files=False)


@pytest.mark.parametrize(("format", "line"), CREATED)
def test_creation_is_told_alike(format: str, line: str, others: Path, tmp_path: Path) -> None:
    """What ``create`` says and refuses; the images themselves are the business of each format's own tests."""
    if format != "bochs":  # refused with and without the plugin
        need(format)
    compare(f"create -f {format} {line}", only(others, "a.qcow2", tmp_path), tmp_path, files=False)


@pytest.mark.parametrize("format", ["raw", "qcow2", "qed", "vmdk", "vdi", "vpc", "vhdx", "parallels", "luks"])
def test_create_options_are_listed_alike(format: str, others: Path, tmp_path: Path) -> None:
    """``-o help`` with and without a file, and the line of ``create`` with the defaults."""
    need(format)
    small = only(others, "a.qcow2", tmp_path)
    for line in (f"create -f {format} -o help", f"create -f {format} -o help x"):
        compare(line, small, tmp_path / str(len(line)), files=False)
