"""``vm-io`` and ``vm-img bench`` with these engines, beside the peer's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from aio_kit import skip_unless_supported

from vm_core.testing.iopeer import PEER_IMG, assert_same, needs_peer

NATIVE = "aio=native was specified, but it requires cache.direct=on, which was not specified."
WORK = [
    *("-c", "read -P 0 0 64k", "-c", "write -P 1 64k 128k", "-c", "writev -P 2 100k 512 1024"),
    *("-c", "aio_write -P 3 1M 64k", "-c", "aio_flush", "-c", "aio_read -P 3 1M 64k", "-c", "aio_flush"),
    *("-c", "write -f -P 4 1M 4k", "-c", "write -z 2M 64k", "-c", "discard 64k 64k", "-c", "flush"),
    *("-c", "read -v 1020k 512", "-c", "readv -P 4 1M 512 512", "-c", "read 1G 512", "-c", "write 1G 512"),
]


@needs_peer
@pytest.mark.parametrize("format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "how",
    [
        ["-i", "io_uring"],
        ["-i", "io_uring", "-n"],
        ["-k", "-n"],
        ["-i", "native", "-t", "directsync"],
        ["-i", "io_uring", "-t", "writeback"],
        ["-i", "io_uring", "-r"],
        ["-i", "threads"],
    ],
    ids=" ".join,
)
def test_vm_io(tmp_path: Path, how: list[str], format: str) -> None:
    """Commands through an engine print what the peer's print, and leave the same image."""
    if format == "qcow2":
        pytest.importorskip("vm_qcow2")
    skip_unless_supported("io_uring")
    assert_same(tmp_path, [f"create -q -f {format} a.img 4M"], [*how, "-f", format, *WORK, "a.img"])


@needs_peer
@pytest.mark.parametrize(
    "how", [["-i", "io_uring", "-n"], ["-i", "native", "-n"], ["-i", "threads", "-n"]], ids=" ".join
)
@pytest.mark.parametrize(
    "command",
    ["read -v 512 512", "read 0 1k", "read 512 513", "read 1k 1", "length", "write -P 7 512 512", "write -z 0 1k"],
)
def test_a_file_that_ends_in_a_sector(tmp_path: Path, how: list[str], command: str) -> None:
    """Its last sector is there as a whole: it reads as zeroes behind the end, and writing it makes the file longer."""
    skip_unless_supported("io_uring")
    data = bytes(range(70)) * 10
    assert_same(tmp_path, [], [*how, "-f", "raw", "-c", command, "a.img"], files={"a.img": data})


def dotted(**options: str) -> list[str]:
    return ["--image-opts", ",".join(f"{name.replace('_', '-')}={value}" for name, value in options.items())]


@needs_peer
@pytest.mark.parametrize(
    "words",
    [
        ["-i", "foo", "a.img"],
        ["-k", "-f", "raw", "a.img"],
        ["-k", "-f", "raw", "none.img"],
        ["-k", "-i", "io_uring", "-f", "raw", "a.img"],
        ["-i", "io_uring", "-k", "-f", "raw", "a.img"],
        ["-k", "-i", "threads", "-f", "raw", "a.img"],
        ["-k", "-i", "threads", "-n", "-f", "raw", "a.img"],
        ["--image-opts", "driver=file,filename=a.img,aio=foo"],
        ["--image-opts", "driver=file,filename=none.img,aio=foo"],
        ["--image-opts", "driver=file,filename=none.img,aio=native"],
        ["--image-opts", "driver=file,filename=a.img,aio=native"],
        ["--image-opts", "driver=file,filename=a.img,aio=native,cache.direct=on"],
        ["--image-opts", "driver=raw,file.filename=a.img,file.aio=io_uring,cache.direct=on"],
        ["--image-opts", "driver=raw,file.filename=a.img,file.aio=native"],
        ["--image-opts", "driver=raw,file.filename=a.img,aio=native"],
        ["-k", "--image-opts", "driver=file,filename=a.img,aio=threads"],
        ["-k", "--image-opts", "driver=raw,file.driver=file,file.filename=a.img,file.aio=threads"],
        ["-i", "io_uring", "--image-opts", "driver=raw,file.filename=a.img,file.aio=native"],
        ['json:{"driver":"raw","file":{"driver":"file","filename":"a.img","aio":"x"}}'],
    ],
    ids=" ".join,
)
def test_options(tmp_path: Path, words: list[str]) -> None:
    """Engines are asked for, and refused, as the peer has it, on the command line and in the file's options."""
    skip_unless_supported("io_uring")
    assert_same(tmp_path, ["create -q -f raw a.img 1M"], ["-c", "read -P 0 0 4k", *words])


def bench(*words: str, cwd: Path, program: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [program or str(Path(sys.executable).with_name("vm-img")), "bench", *words]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def timeless(text: str) -> str:
    return re.sub(r"in \d+\.\d+ seconds", "in T seconds", text).replace("qemu-img:", "vm-img:")


@needs_peer
@pytest.mark.parametrize(
    "words",
    [
        ["-c", "500", "-d", "1"],
        ["-c", "500", "-i", "io_uring"],
        ["-c", "500", "-n", "-t", "none"],
        ["-c", "500", "-i", "native", "-t", "none", "-s", "64k", "-S", "4k", "-o", "8k"],
        ["-c", "100", "-i", "io_uring", "-w", "--pattern", "7", "-d", "16", "--flush-interval", "20"],
        ["-c", "100", "-w", "--pattern", "7", "-d", "16", "--flush-interval", "20", "--no-drain"],
        ["-c", "7", "-i", "io_uring", "-w", "-o", "512", "-s", "100", "-t", "none", "-d", "1"],
        ["-c", "0", "-i", "io_uring"],
        ["-c", "3", "-i", "io_uring", "-o", "2M"],
        ["-c", "3", "-d", "1", "-i", "io_uring", "-s", "2M"],
        ["-n"],
        ["-i", "native"],
        ["-i", "x"],
        ["-n", "-i", "io_uring"],
        ["-n", "-i", "threads"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_bench(tmp_path: Path, words: list[str], format: str) -> None:
    """``bench`` says what the peer says, ends as it does, and leaves the same image."""
    if format == "qcow2":
        pytest.importorskip("vm_qcow2")
    skip_unless_supported("io_uring")
    assert PEER_IMG is not None
    found = []
    for program in (PEER_IMG, ""):
        subprocess.run([PEER_IMG, "create", "-q", "-f", format, "a.img", "1M"], cwd=tmp_path, check=True)
        done = bench(*words, "-f", format, "a.img", cwd=tmp_path, program=program)
        found.append((done.returncode, timeless(done.stdout), timeless(done.stderr), (tmp_path / "a.img").read_bytes()))
    assert found[0] == found[1]


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C ends ``bench`` at once, with everything in flight come home and the image in order."""
    skip_unless_supported("io_uring")
    (tmp_path / "a.img").write_bytes(bytes(1 << 20))
    for aio in ("threads", "io_uring", "native"):
        command = [str(Path(sys.executable).with_name("vm-img")), "bench", "-c", "100000000", "-w", "-f", "raw"]
        command += ["-t", "none", "-i", aio, str(tmp_path / "a.img")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        if "O_DIRECT" in errors:
            pytest.skip("the file system of the tests has no O_DIRECT")
        assert process.returncode == 130, (aio, errors)
        assert "Traceback" not in errors


def test_not_installed(tmp_path: Path) -> None:
    """Without this plugin its engines are refused by name, with what brings them."""
    (tmp_path / "a.img").write_bytes(bytes(1 << 20))
    program = str(Path(sys.executable).with_name("vm-img"))
    for aio in ("io_uring", "native"):
        done = bench("-i", aio, "-f", "raw", "a.img", cwd=tmp_path, program=program, VM_DISABLE_PLUGINS="vm-aio")
        assert done.returncode == 1
        assert f"engine '{aio}' needs the plugin vm-aio" in done.stderr


def test_nothing_is_imported_unasked(tmp_path: Path) -> None:
    """Tools that use no engine do not import one, nor ctypes."""
    (tmp_path / "a.img").write_bytes(bytes(1 << 20))
    code = """
import sys
from vm_core.cli.io.main import main
main(["-f", "raw", "-c", "read -q 0 512", sys.argv[1]], "vm-io")
print(*[name for name in ("vm_aio", "vm_core.block.backend", "vm_core.block.passage", "ctypes") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.img"], capture_output=True, text=True, check=True, timeout=60
    )
    assert "vm_aio" not in done.stdout
    assert "backend" not in done.stdout
