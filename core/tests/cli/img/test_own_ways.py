"""What ``vm-img`` does under its own name: advice, help, suggestions, the gate, completion, clean ends."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vm_core.cli.img import help as pages
from vm_core.cli.img import main as program

from .peer import Outcome, as_process


def run(*words: str, where: Path) -> Outcome:
    """``vm-img`` with *words*, in this process."""
    out, err = io.StringIO(), io.StringIO()
    before = Path.cwd()
    os.chdir(where)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = program.main(list(words), "vm-img")
    finally:
        os.chdir(before)
    return Outcome(code, out.getvalue(), err.getvalue())


def test_messages_begin_with_the_programs_name(tmp_path: Path) -> None:
    """A program is called what its file is called, and says so."""
    for name in ("vm-img", "qemu-img", "images"):
        found = as_process(["info", "nofile"], tmp_path, name)
        assert found.code == 1
        assert (
            found.err.splitlines()[0]
            == f"{name}: Could not open 'nofile': Could not open 'nofile': No such file or directory"
        )


def test_advice_follows_the_peers_sentence(tmp_path: Path) -> None:
    """After the sentence that scripts know comes a line that says what to do; not under the peer's name."""
    (tmp_path / "base").write_bytes(bytes(65536))
    (tmp_path / "dir").mkdir()
    cases = {
        ("info", "nofile"): "check the name",
        ("info", "dir"): "name a file",
        ("info", "-f", "rwa", "base"): "did you mean 'raw'?",
        ("create", "-f", "rwa", "x", "1M"): "did you mean 'raw'?",
        ("create", "x"): "give the size",
        ("create", "-o", "siez=1M", "x"): "did you mean 'size'?",
        ("create", "nodir/x", "1M"): "the directory exists",
        ("inf", "x"): "did you mean 'info'?",
        ("info", "--bakcing-chain", "x"): "did you mean --backing-chain?",
        ("info", "--image-opts", "driver=raw,file.filename=base,ofset=1"): "did you mean 'offset'?",
    }
    for words, advice in cases.items():
        found = run(*words, where=tmp_path)
        assert found.code == 1
        lines = found.err.splitlines()
        assert lines[0].startswith("vm-img: ")
        assert "hint" not in lines[0]
        assert any(line.startswith("vm-img: hint: ") and advice in line for line in lines[1:]), (words, found.err)
        assert "hint" not in as_process(list(words), tmp_path).err


@pytest.mark.parametrize("name", sorted(pages.COMMANDS))
def test_every_command_has_help(name: str, tmp_path: Path) -> None:
    """``COMMAND --help`` shows how the command is called, and exits with 0."""
    from importlib.util import find_spec

    if find_spec(f"vm_core.cli.img.{program.COMMANDS[name]}") is None:
        pytest.skip("not part of this version")
    for words in ((name, "--help"), (name, "-h"), (name, "x", "--help")):
        if name == "resize" and words[1] == "x":
            continue  # its last word is the size
        found = run(*words, where=tmp_path)
        assert (found.code, found.err) == (0, "")
        assert found.out.startswith(f"usage: vm-img {name} ")
        assert max(map(len, found.out.splitlines())) <= 100


def test_a_wrong_way_of_progress_harms_no_target(tmp_path: Path) -> None:
    """It is refused before the target, which was an image, is made anew."""
    (tmp_path / "source").write_bytes(b"s" * 65536)
    (tmp_path / "target").write_bytes(b"t" * 65536)
    for words in (("--progress", "loud", "convert"), ("convert", "--progress=loud")):
        found = run(*words, "-f", "raw", "-O", "raw", "source", "target", where=tmp_path)
        assert (found.code, found.err) == (1, "vm-img: --progress loud: there is: text, bar, json, none\n")
        assert (tmp_path / "target").read_bytes() == b"t" * 65536


def test_overview_names_commands_and_formats(tmp_path: Path) -> None:
    """``--help`` names every command and, as scripts expect it, the formats on one line."""
    found = run("--help", where=tmp_path)
    assert found.code == 0
    for name in pages.COMMANDS:
        assert f"\n  {name} " in found.out
    (line,) = [line for line in found.out.splitlines() if line.startswith("Supported formats: ")]
    assert {"raw", "file"} <= set(line.split(": ")[1].split())
    theirs = as_process(["--help"], tmp_path)
    assert "\nCommand syntax:\n" in theirs.out
    assert "\nSupported formats: " in theirs.out
    assert theirs.out.startswith("qemu-img version ")


def test_help_and_parser_agree(tmp_path: Path) -> None:
    """Options that a page names are taken by the command: none is unknown."""
    import re

    for name, page in pages.COMMANDS.items():
        for left, _ in page.options:
            for word in re.findall(r"(?<![\w-])--?[A-Za-z][A-Za-z-]*", left):
                found = run(name, word, where=tmp_path)
                assert f"unrecognized option '{word}'" not in found.err, name


def test_images_outside_the_directory_are_not_followed(tmp_path: Path, base: Path) -> None:
    """What only an image names is opened in its own directory alone; --trust, VM_TRUST, the peer's name change that."""
    words = ["map", "sub/up.qcow2"]
    refused = run(*words, where=base)
    assert refused.code == 1
    assert "lies outside the image's own directory" in refused.err
    assert "--trust" in refused.err
    for place in ((), ("map",)):
        rest = [word for word in words if word not in place]
        assert run(*place, "--trust", str(base), *rest, where=base).code == 0
    assert as_process(words, base, "vm-img", VM_TRUST=str(base)).code == 0
    assert as_process(words, base, "qemu-img").code == 0
    assert run("info", "--backing-chain", "sub/up.qcow2", where=base).code == 1
    assert run("info", "sub/up.qcow2", where=base).code == 0


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """An image that does not fit is removed again; the error names the cause and what to do."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    start = "import sys; from vm_core.cli.img.main import main; sys.exit(main(program='vm-img'))"
    words = ["create", "-f", "raw", "-o", "preallocation=full", "x", "64M"]
    done = subprocess.run(
        [sys.executable, "-c", start, *words],
        cwd=tmp_path,
        capture_output=True,
        preexec_fn=limit,
        timeout=60,
        text=True,
    )
    assert done.returncode == 1
    assert "vm-img: x: " in done.stderr
    assert "File too large" in done.stderr
    assert "vm-img: hint: " in done.stderr
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("code", "advice"), [(errno.EACCES, "see its owner and mode"), (errno.EROFS, "mounted read-only")]
)
def test_a_target_that_cannot_be_written_is_told(
    code: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target that may not be written gives the peer's sentence and advice."""
    (tmp_path / "x").write_bytes(bytes(512))
    real = os.open

    def refuse(path: str, flags: int, *rest: int) -> int:
        if path == "x" and flags & os.O_RDWR:
            raise OSError(code, os.strerror(code), path)
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    found = run("resize", "-f", "raw", "x", "1M", where=tmp_path)
    assert found.code == 1
    first, second = found.err.splitlines()
    assert first == f"vm-img: Could not open 'x': Could not open 'x': {os.strerror(code)}"
    assert second.startswith("vm-img: hint: ")
    assert advice in second


def test_interrupt_ends_quietly(tmp_path: Path) -> None:
    """Ctrl-C gives status 130, no traceback, and no half-made file."""
    start = (
        "import sys, vm_core.block.raw as raw\n"
        "real = raw.RawNode.create\n"
        "def slow(file, size, options):\n"
        "    import time\n"
        "    file.truncate(size)\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(60)\n"
        "raw.RawNode.create = slow\n"
        "from vm_core.cli.img.main import main\n"
        "sys.exit(main(program='vm-img'))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start, "create", "-q", "x", "1M"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists()


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, base: Path) -> None:
    """``vm-img … | head -1`` ends without a word."""
    start = "import sys; from vm_core.cli.img.main import main; sys.exit(main(program='vm-img'))"
    process = subprocess.Popen(
        [sys.executable, "-c", start, "--help"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read()
    process.wait(timeout=30)
    assert err == b""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("vm-img inf", {"info"}),
        ("vm-img info --back", {"--backing-chain"}),
        ("vm-img create -f ra", {"raw"}),
        ("vm-img check -r ", {"leaks", "all"}),
        ("vm-img info --output j", {"json"}),
        ("vm-img --progress j", {"json"}),
        ("vm-img convert-inplace -O ", {"qcow2", "qed"}),
        ("vm-img info --output=j", {"--output=json"}),
        ("vm-img resize --preallocation=f", {"--preallocation=falloc", "--preallocation=full"}),
        ("vm-img verify -a b", {"blake2b"}),
        ("vm-img verify --algorithm=b", {"--algorithm=blake2b"}),
        ("vm-img convert-inplace -", {"--help", "--progress", "--target-format", "--trust", "-O", "-f", "-p", "-q"}),
        ("vm-img st", set()),
        ("vm-img create -f raw -o s", {"size="}),
        ("vm-img create -f qcow2 -o clu", {"cluster_size="}),
        ("vm-img create -f qcow2 -o cluster_size=64k,pre", {"cluster_size=64k,preallocation="}),
        ("vm-img create -f qcow2 -o preallocation=f", {"preallocation=falloc", "preallocation=full"}),
        ("vm-img convert -O qcow2 -o size=1M,lazy_refcounts=", {f"size=1M,lazy_refcounts={w}" for w in ("on", "off")}),
        ("vm-img convert -O clo", set()),
        ("vm-img info -f ra", {"raw"}),
    ],
)
def test_completion(words: str, expected: set[str], tmp_path: Path) -> None:
    """The script that ``completion bash`` prints completes commands, options, formats and values."""
    if "qcow2" in words:
        pytest.importorskip("vm_qcow2")
    script = run("completion", "bash", where=tmp_path)
    assert script.code == 0
    line = words.split(" ")
    code = script.out + (
        f"\nCOMP_WORDS=({' '.join(repr(word) for word in line)}); COMP_CWORD={len(line) - 1}\n"
        '_vm_img 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, timeout=30, cwd=tmp_path, check=True)
    assert set(done.stdout.split()) == expected


def test_start_up_imports_little(base: Path) -> None:
    """``info`` imports neither attrs nor pluggy, rich, asyncio, argparse or json, nor other formats' code."""
    heavy = (
        "attr",
        "attrs",
        "pluggy",
        "rich",
        "asyncio",
        "argparse",
        "json",
        "difflib",
        "cryptography",
        "numpy",
        "typing_extensions",
    )
    start = (
        "import sys\nfrom vm_core.cli.img.main import main\n"
        "main(['info', 'a.qcow2'], 'vm-img')\n"
        f"print([name for name in {heavy!r} if name in sys.modules], file=sys.stderr)\n"
    )
    for _ in range(2):  # the first run may write the plugins down
        done = subprocess.run([sys.executable, "-c", start], cwd=base, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == "[]\n"
