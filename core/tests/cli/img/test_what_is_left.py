"""What is left when a command cannot be finished, and what is said of it."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from vm_core.block import host_device
from vm_core.block.jobs.job import Job
from vm_core.block.node import Buffer
from vm_core.block.raw import RawNode
from vm_core.block.resize import grow_allocated
from vm_core.cli.img import commit, rebase
from vm_core.cli.img.common import Tool
from vm_core.cli.img.main import main
from vm_core.errors import BlockError, UsageError
from vm_core.testing.nodes import FailingNode, MemoryNode

from .peer import needs_peer, ours, peer

START = "import sys; from vm_core.cli.img.main import main; sys.exit(main(program=sys.argv.pop(1)))"


def limited(folder: Path, kilobytes: int, *words: str, program: str = "vm-img") -> tuple[int, str]:
    """Status and error output with files of at most so many kilobytes: a disk that gets full, for whom it may be."""
    line = ["bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "bash", sys.executable, "-c", START, program, *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(b"s" * (4 << 20))
    (tmp_path / "old").write_bytes(b"o" * (1 << 20))
    return tmp_path


@pytest.mark.parametrize("words", [["convert", "-f", "raw"], ["dd", "-f", "raw"]], ids=lambda words: words[0])
def test_new_files_go_and_old_ones_are_named(words: list[str], folder: Path) -> None:
    """A new file that could not be finished is removed; what was there and was overwritten is named as incomplete, and
    what could not even be begun is as it was."""

    def line(format: str, target: str) -> list[str]:
        return [*words, "-O", format, *(["if=source", f"of={target}"] if words[0] == "dd" else ["source", target])]

    code, err = limited(folder, 2048, *line("raw", "new"))
    assert (code, "File too large" in err, "not complete" in err) == (1, True, False)
    assert not (folder / "new").exists()
    code, err = limited(folder, 2048, *line("raw", "old"))
    assert (code, "File too large" in err) == (1, True)
    assert "vm-img: hint: what 'old' was before is gone\n" in err or (folder / "old").read_bytes() == b"o" * (1 << 20)
    (folder / "old").write_bytes(b"o" * (1 << 20))
    pytest.importorskip("vm_qcow2")
    code, err = limited(folder, 2048, *line("qcow2", "new"))
    assert (code, "File too large" in err, "not complete" in err) == (1, True, False)
    assert not (folder / "new").exists()
    code, err = limited(folder, 2048, *line("qcow2", "old"))
    assert code == 1
    assert "vm-img: hint: 'old' is not complete now\n" in err
    assert (folder / "source").read_bytes() == b"s" * (4 << 20)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("source", "write"),
        (".", "Is a directory"),
        ("old/x", "Not a directory"),
    ],
)
def test_what_was_not_touched_is_not_called_incomplete(target: str, said: str, folder: Path) -> None:
    """Where the target was refused before anything was written, nobody is frightened."""
    code, err = limited(folder, 1 << 20, "convert", "-f", "raw", "-O", "raw", "source", target)
    assert code == 1
    assert said in err
    assert "not complete" not in err
    assert (folder / "source").read_bytes() == b"s" * (4 << 20)
    assert (folder / "old").read_bytes() == b"o" * (1 << 20)


def test_a_target_that_was_there_before(folder: Path) -> None:
    """``convert -n`` that fails says that the target is not complete."""
    (folder / "ready").touch()
    with (folder / "ready").open("r+b") as file:
        file.truncate(4 << 20)
    code, err = limited(folder, 2048, "convert", "-n", "-f", "raw", "-O", "raw", "source", "ready")
    assert code == 1
    assert err.endswith("vm-img: hint: 'ready' is not complete now\n")


@needs_peer
def test_rebase_and_commit(folder: Path) -> None:
    """They leave images that are as good as before, say so, and can be run again."""
    pytest.importorskip("vm_qcow2")
    for name in ("source", "old"):
        (folder / name).chmod(0o644)
    peer("create -q -f qcow2 -b source -F raw top", folder)
    peer("convert -O raw top before", folder)
    code, err = limited(folder, 2048, "rebase", "-b", "", "top")
    assert code == 1
    assert "vm-img: Error while writing to COW image: File too large\n" in err
    assert err.endswith("the image has its former backing file and the same contents: the same command goes on\n")
    peer("convert -O raw top after", folder)
    assert (folder / "before").read_bytes() == (folder / "after").read_bytes()
    assert limited(folder, 1 << 20, "rebase", "-b", "", "top") == (0, "")
    peer("create -q -f qcow2 base 4M", folder)
    peer("create -q -f qcow2 -b base -F qcow2 over", folder)
    peer("io: -c 'write -P 7 0 4M' over", folder)
    code, err = limited(folder, 2048, "commit", "over")
    assert code == 1
    assert err.endswith("vm-img: hint: the overlay is as it was: the same command goes on\n")
    assert limited(folder, 1 << 20, "commit", "over") == (0, "")
    peer("io: -c 'read -P 7 0 4M' base", folder)


@pytest.mark.parametrize("words", [["commit", "top"], ["rebase", "-b", "", "top"]])
def test_an_interrupted_job_tells_what_it_left(
    words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle: the image holds what it held, that is said, and the same command ends the work."""
    pytest.importorskip("vm_qcow2")
    peer("create -q -f qcow2 base 4M", folder)
    peer("io: -c 'write -P 5 0 4M' base", folder)
    peer("create -q -f qcow2 -b base -F qcow2 top", folder)
    peer("io: -c 'write -P 7 0 1M' top", folder)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    tool = Tool("vm-img")
    run = {"commit": commit, "rebase": rebase}[words[0]].run
    with monkeypatch.context() as patched:
        patched.setattr(Job, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(words[1:], tool)
    tool.conclude()
    assert capfd.readouterr().err.endswith("the same command goes on\n")
    peer("io: -c 'read -P 7 0 1M' -c 'read -P 5 1M 3M' top", folder)
    assert main(words) == 0
    peer("check -q top", folder)
    peer("io: -c 'read -P 7 0 1M' -c 'read -P 5 1M 3M' top", folder)


class Full(FailingNode):
    """A file whose disk is full."""

    def reserve(self, offset: int, length: int, *, full: bool = False) -> None:
        super().zero(offset, length // 2)  # some of it was there
        raise BlockError.of(errno.ENOSPC)

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        super().read(offset, buffers)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("full", "Could not write zeros for preallocation: No space left on device"),
        ("falloc", "Could not preallocate new data: No space left on device"),
    ],
)
def test_growing_is_taken_back(mode: str, said: str) -> None:
    """A raw image that could not get all of its space has its former size."""
    file = MemoryNode(b"x" * 4096)
    node = RawNode(Full(file, lambda operation, offset, length: 0))
    with pytest.raises(BlockError, match=said):
        grow_allocated(node, 65536, mode)
    assert (node.size, file.size) == (4096, 4096)
    assert node.pread(0, 4096) == b"x" * 4096


def test_devices_are_not_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither made larger nor, as if something had been done, smaller: in the peer's words."""
    (tmp_path / "device").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(host_device, "_device_size", lambda fd: 1 << 20)
    monkeypatch.setattr(host_device.HostDeviceProtocol, "_check_type", classmethod(lambda cls, fd, filename: None))
    words = ["--image-opts", f"driver=raw,file.driver=host_device,file.filename={tmp_path}/device"]
    for size in ("4M", "512k"):
        found = ours(["resize", "--shrink", *words, size], tmp_path)
        assert (found.code, found.err) == (1, "qemu-img: Cannot resize device files\n")
    assert ours(["resize", *words, "1M"], tmp_path).code == 0
    found = ours(["resize", "--preallocation=full", *words, "4M"], tmp_path)
    assert found.err == "qemu-img: Preallocation mode 'full' unsupported for this non-regular file\n"
    with pytest.raises(UsageError, match="shrinking"):
        grow_allocated(RawNode(MemoryNode(bytes(8192))), 4096, "full")


def test_bare_words_of_the_system_say_what_failed(folder: Path) -> None:
    """An error that is nothing but the system's word is told with the subcommand; under the peer's name it is not."""
    for program, said in (("vm-img", "vm-img: resize: File too large\n"), ("qemu-img", "qemu-img: File too large\n")):
        _, err = limited(folder, 2048, "resize", "-f", "raw", "old", "100M", program=program)
        assert err.startswith(said)


def test_a_file_that_was_there_and_is_gone(folder: Path) -> None:
    """Making an image over a file empties it first; where that then fails it is said that the file is gone."""
    code, err = limited(folder, 2048, "create", "-f", "raw", "old", "100M")
    assert code == 1
    assert (folder / "old").exists() is ("vm-img: hint: what 'old' was before is gone\n" not in err)
    code, err = limited(folder, 2048, "create", "-f", "raw", "new", "100M")
    assert (code, "is gone" in err, (folder / "new").exists()) == (1, False, False)
