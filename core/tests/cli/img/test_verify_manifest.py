"""``vm-img verify -w`` and ``-m``: a manifest is written whole or not at all, and never over what is something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from vm_core.block.jobs.manifest import Manifest
from vm_core.cli.img import verify as command

from .peer import as_process, needs_peer, peer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A raw image of some blocks."""
    (tmp_path / "disk").write_bytes(os.urandom(100_000) + bytes(3 << 20))
    return tmp_path


def vm_img(folder: Path, *words: str) -> tuple[int, str, str]:
    return tuple(as_process(list(words), folder, "vm-img"))  # type: ignore[return-value]


def one_line(err: str) -> bool:
    """Whether one line tells what is wrong; what to do about it may follow."""
    first, *others = err.splitlines()
    return first.startswith("vm-img: ") and all(line.startswith("vm-img: hint: ") for line in others)


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_write_and_compare(folder: Path) -> None:
    """What was written is read again, also by way of standard output and input and of a pipe."""
    code, _, err = vm_img(folder, "verify", "-f", "raw", "-w", "m", "disk")
    assert (code, err) == (0, "")
    assert left(folder) == {"disk", "m"}
    text = (folder / "m").read_text()
    assert json.loads(text)["virtual-size"] == (folder / "disk").stat().st_size
    assert vm_img(folder, "verify", "-f", "raw", "-w", "-", "disk")[1] == text
    assert vm_img(folder, "verify", "-f", "raw", "-w", "/dev/stdout", "disk")[1].startswith(text)
    start = "import sys; from vm_core.cli.img.main import main; sys.exit(main(program='vm-img'))"
    done = subprocess.run(
        [sys.executable, "-c", start, "verify", "-f", "raw", "-m", "-", "disk"],
        cwd=folder,
        input=text.encode(),
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, b"The image holds what the manifest says.\n")
    os.mkfifo(folder / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((folder / "pipe").read_text()))
    reader.start()
    assert vm_img(folder, "verify", "-f", "raw", "-w", "pipe", "disk")[0] == 0
    reader.join(20)
    assert got == [text]
    assert (folder / "pipe").is_fifo()


def test_dev_null_stays_what_it_is(folder: Path) -> None:
    """A device is written to and not replaced by a file, whoever is asking."""
    assert vm_img(folder, "verify", "-f", "raw", "-w", "/dev/null", "disk")[0] == 0
    assert Path("/dev/null").is_char_device()


def test_links_and_modes_stay(folder: Path) -> None:
    """A link goes on being one, and what it points to keeps its mode."""
    (folder / "real").write_text("old")
    (folder / "real").chmod(0o640)
    (folder / "link").symlink_to("real")
    assert vm_img(folder, "verify", "-f", "raw", "-w", "link", "disk")[0] == 0
    assert (folder / "link").is_symlink()
    assert (folder / "real").stat().st_mode & 0o777 == 0o640
    Manifest.parse((folder / "real").read_text())
    assert left(folder) == {"disk", "link", "real"}
    (folder / "dangling").symlink_to("new")
    assert vm_img(folder, "verify", "-f", "raw", "-w", "dangling", "disk")[0] == 0
    Manifest.parse((folder / "new").read_text())


@needs_peer
def test_the_image_itself_is_not_overwritten(folder: Path) -> None:
    """Not by its name, not by a link to it, and neither are images below it."""
    peer("create -q -f qcow2 -b disk -F raw top", folder)
    os.link(folder / "disk", folder / "hard")
    (folder / "soft").symlink_to("top")
    before = {name: (folder / name).read_bytes() for name in left(folder)}
    for target in ("top", "soft", "disk", "hard", "./disk"):
        code, _, err = vm_img(folder, "verify", "-w", target, "top")
        assert code == 1
        assert err == f"vm-img: Could not write manifest '{target}': it is a part of the image itself\n"
    assert {name: (folder / name).read_bytes() for name in left(folder)} == before


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (".", "Could not write manifest '.': Is a directory"),
        ("no/where", "Could not write manifest 'no/where': No such file or directory"),
        ("disk/x", "Could not write manifest 'disk/x': Not a directory"),
        ("loop", "Could not write manifest 'loop': Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is_read(
    folder: Path, target: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody waits for hours to hear that a directory is not there."""
    from vm_core.block.jobs import verify as job
    from vm_core.cli.img.main import main

    (folder / "loop").symlink_to("loop")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(job, "make_manifest", lambda *_, **__: pytest.fail("the image was read"))
    before = left(folder)
    assert main(["verify", "-f", "raw", "-w", target, "disk"], "vm-img") == 1
    err = capsys.readouterr().err
    assert said in err
    assert one_line(err)
    assert left(folder) == before


def test_a_long_name(folder: Path) -> None:
    """A name as long as names can be is no problem."""
    assert vm_img(folder, "verify", "-f", "raw", "-w", "m" * 255, "disk")[0] == 0
    assert left(folder) == {"disk", "m" * 255}


@pytest.mark.parametrize("moment", ["hashing", "writing", "renaming"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")], ids=["ctrl-c", "full"])
def test_interrupted(
    folder: Path, moment: str, error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whenever it ends: the former manifest is there as it was, and nothing else."""
    from vm_core.block.jobs import verify as job
    from vm_core.cli.img.main import main

    def fail(*_: object, **__: object) -> None:
        raise error

    (folder / "m").write_text("former")
    monkeypatch.chdir(folder)
    if moment == "hashing":
        monkeypatch.setattr(job, "make_manifest", fail)
    elif moment == "writing":
        lines = Manifest.lines

        def some(self: Manifest) -> object:
            yield from list(lines(self))[:2]
            fail()

        monkeypatch.setattr(Manifest, "lines", some)
    else:
        monkeypatch.setattr(command.os, "replace", fail)
    code = main(["verify", "-f", "raw", "-b", "4k", "-w", "m", "disk"], "vm-img")
    assert code == (130 if error is KeyboardInterrupt else 1)
    assert (folder / "m").read_text() == "former"
    assert left(folder) == {"disk", "m"}
    err = capsys.readouterr().err
    if error is not KeyboardInterrupt and moment != "hashing":
        assert err.startswith("vm-img: Could not write manifest 'm': No space left on device\n")
        assert one_line(err)


_KILLED = """
import os, signal, sys
from vm_core.cli.img import verify
from vm_core.cli.img.main import main
from vm_core.block.jobs import verify as job
die = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "hashing":
    job.make_manifest = die
else:
    verify.os.fsync = die
sys.exit(main(sys.argv[2:], program="vm-img"))
"""


@pytest.mark.parametrize("moment", ["hashing", "writing"])
@pytest.mark.parametrize("old", [False, True])
def test_killed(folder: Path, moment: str, old: bool) -> None:
    """Whoever is killed at work leaves nothing behind, where the file system has files without names."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_WRONLY))
    except (OSError, AttributeError):
        pytest.skip("no files without names here")
    if old:
        (folder / "m").write_text("old")
    words = [sys.executable, "-c", _KILLED, moment, "verify", "-f", "raw", "-w", "m", "disk"]
    assert subprocess.run(words, cwd=folder, timeout=60).returncode == -9
    assert left(folder) == ({"disk", "m"} if old else {"disk"})
    assert not old or (folder / "m").read_text() == "old"


def test_without_nameless_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no files without names, a hidden one is renamed."""
    monkeypatch.setattr(command, "_nameless", lambda folder, mode: -1)
    assert vm_img(folder, "verify", "-f", "raw", "-w", "m", "disk")[0] == 0
    assert vm_img(folder, "verify", "-f", "raw", "-w", "m", "disk")[0] == 0
    assert left(folder) == {"disk", "m"}


def test_full_standard_output(folder: Path) -> None:
    """A manifest that does not fit where it goes is an error, told in a line."""
    start = "import sys; from vm_core.cli.img.main import main; sys.exit(main(program='vm-img'))"
    for target in ("-", "/dev/full"):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [sys.executable, "-c", start, "verify", "-f", "raw", "-b", "4k", "-w", target, "disk"],
                cwd=folder,
                stdout=full,
                stderr=subprocess.PIPE,
                timeout=60,
            )
        assert done.returncode == 1
        assert b"No space left on device" in done.stderr
        assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "Could not open manifest 'none': No such file or directory"),
        (".", "Could not open manifest '.': Is a directory"),
        ("disk", "Manifest 'disk' cannot be used: not a manifest: "),
        ("/dev/zero", "Manifest '/dev/zero' cannot be used: not a manifest: "),
        ("/dev/null", "Manifest '/dev/null' cannot be used: not a manifest: it ends too early (at byte 0)"),
    ],
)
def test_what_is_no_manifest(folder: Path, name: str, said: str) -> None:
    """One sentence, at once, whatever it is."""
    code, out, err = vm_img(folder, "verify", "-f", "raw", "-m", name, "disk")
    assert code == 1
    assert err.startswith(f"vm-img: {said}")
    assert one_line(err)
    assert out == ""


def test_a_sum_that_the_manifest_has_not(folder: Path) -> None:
    """Who asks for the sum is told that there is none to compare it with."""
    assert vm_img(folder, "verify", "-f", "raw", "-w", "m", "disk")[0] == 0
    code, out, _ = vm_img(folder, "verify", "-f", "raw", "--sum", "-m", "m", "disk")
    assert code == 0
    assert "with which the manifest has nothing to compare" in out
