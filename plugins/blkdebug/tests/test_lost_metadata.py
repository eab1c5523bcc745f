"""Errors injected where a qcow2 image's metadata is written: what is told, also when it is closed, is the peer's."""

from __future__ import annotations

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from vm_core.testing.iopeer import PEER_IMG, both, needs_peer

pytestmark = [needs_peer, pytest.mark.skipif(find_spec("vm_qcow2") is None, reason="needs vm-qcow2")]

#: Event: how the image is made, what is written.
EVENTS = {
    **dict.fromkeys(
        (
            "l1_update",
            "l2_load",
            "l2_alloc_write",
            "write_aio",
            "refblock_load",
            "refblock_update_part",
            "refblock_alloc",
            "cluster_alloc",
            "pwritev",
        ),
        ("cluster_size=1k", "128k"),
    ),
    **dict.fromkeys(
        (
            "refblock_alloc_hookup",
            "refblock_alloc_write",
            "refblock_alloc_write_blocks",
            "refblock_alloc_write_table",
            "refblock_alloc_switch_table",
        ),
        ("cluster_size=512", "10M"),
    ),
    **dict.fromkeys(
        ("l1_grow_alloc_table", "l1_grow_write_table", "l1_grow_activate_table"), ("cluster_size=1k", "64k")
    ),
}


#: Flags of the write, and whether only one request fails.
WAYS = [("", "off"), ("-b ", "off"), ("", "on"), ("-b ", "on")]


@pytest.mark.parametrize(("flags", "once"), WAYS if os.environ.get("VM_LONG") else WAYS[:1])
@pytest.mark.parametrize("event", EVENTS)
def test_what_could_not_be_written_is_told(event: str, flags: str, once: str, tmp_path: Path) -> None:
    """The write fails and tables that are left over are named as by the peer; the image stays sound."""
    how, length = EVENTS[event]
    rules = f'[inject-error]\nevent = "{event}"\nerrno = "28"\nimmediately = "off"\nonce = "{once}"\n'
    peer, mine = both(
        tmp_path,
        [f"create -q -f qcow2 -o {how} t.qcow2 1G"],
        ["-t", "writethrough", "-c", f"write {flags}0 {length}", "blkdebug:rules:t.qcow2"],
        files={"rules": rules},
    )
    assert (mine.out, mine.err, mine.status) == (peer.out, peer.err, peer.status)
    check = subprocess.run([str(PEER_IMG), "check", "-q", "ours/t.qcow2"], cwd=tmp_path, timeout=60, check=False)
    assert check.returncode in (0, 3)  # leaks are harmless


def test_an_overlay_that_could_not_be_emptied_is_left(tmp_path: Path) -> None:
    """After a commit whose last step failed nothing more is written: the next one to open the overlay counts anew."""
    from vm_core.cli.img.main import main

    for event in ("l1_update", "empty_image_prepare", "reftable_update", "refblock_alloc"):
        place = tmp_path / event
        place.mkdir()
        base, top = place / "base.qcow2", place / "top.qcow2"
        made = [str(PEER_IMG), "create", "-q", "-f", "qcow2"]
        subprocess.run([*made, str(base), "64M"], check=True)
        subprocess.run([*made, "-b", str(base), "-F", "qcow2", str(top)], check=True)
        subprocess.run(["qemu-io", "-c", "write -P 5 0 64k", str(top)], check=True, capture_output=True)
        (place / "rules").write_text(f'[inject-error]\nevent = "{event}"\n')
        assert main(["commit", f"blkdebug:{place}/rules:{top}"], "qemu-img") == 1
        read = subprocess.run(
            ["qemu-io", "-c", "read -P 5 0 64k", str(top)], check=True, capture_output=True, text=True
        )
        assert "failed" not in read.stdout
        check = subprocess.run([str(PEER_IMG), "check", "-q", str(top)], timeout=60, check=False)
        assert check.returncode in (0, 3)


#: What fails from the first cluster on that is given back: all requests, or those of one kind.
KINDS = ("", 'iotype = "read"\n', 'iotype = "discard"\n', 'iotype = "write-zeroes"\n')


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", ["compat=1.1", "compat=0.10"])
def test_a_snapshot_that_is_gone_leaves_leaks_at_most(
    options: str, kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Where deleting a snapshot fails while clusters are given back, it is told in the peer's lines and order.

    The same clusters are leaked; that no space could be returned to the host is no failure at all.
    """
    from vm_core.cli.img.main import main

    results = []
    for name in ("peer", "ours"):
        place = tmp_path / name
        place.mkdir()
        image = str(place / "t.qcow2")
        subprocess.run([str(PEER_IMG), "create", "-q", "-f", "qcow2", "-o", options, image, "64M"], check=True)
        subprocess.run(["qemu-io", "-c", "write 0 64k", image], check=True, capture_output=True)
        subprocess.run([str(PEER_IMG), "snapshot", "-c", "s", image], check=True)
        (place / "rules").write_text(f'[inject-error]\nevent = "cluster_free"\nerrno = "5"\n{kind}')
        words = ["snapshot", "-d", "s", f"blkdebug:{place}/rules:{image}"]
        if name == "peer":
            done = subprocess.run([str(PEER_IMG), *words], capture_output=True, text=True, check=False)
            status, told = done.returncode, done.stderr
        else:
            status, told = main(words, "qemu-img"), capfd.readouterr().err
        check = subprocess.run([str(PEER_IMG), "check", image], capture_output=True, text=True, check=False)
        results.append((status, told, check.returncode, check.stderr))
    assert results[1] == results[0]
    assert results[0][0] == (0 if "discard" in kind or "zeroes" in kind else 1)
