"""What a user sees when something is missing or wrong: one line, status 1, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def vm(*words: str, environ: dict[str, str] | None = None, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run ``vm`` as a program of its own."""
    return subprocess.run(
        [sys.executable, "-m", "vm_core.cli.vm", *words],
        env={**os.environ, **(environ or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        **more,
    )


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line a failed run wrote."""
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("vm: ")
    return lines[0]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("-drive if=none,file=absent.img", "absent.img': No such file or directory"),
        ("-drive if=none,file=plain.img,format=nosuch", "no format 'nosuch'"),
        ("-drive if=none,file=plain.img,aio=nosuch", "no engine 'nosuch'; there is: "),
        ("-drive if=none,file=nbd://localhost/x,format=raw", "pip install vm-nbd"),
        ("-drive if=none,file=sheepdog:x,format=raw", "pip install vm-sheepdog"),
        ("-drive if=none,file=plain.img,format=raw,nosuch=1", "no option 'nosuch'"),
        ("-drive if=nosuch,file=plain.img", "no interface 'nosuch'; there is: none"),
        ("-device nosuch", "no device 'nosuch'"),
        ("-device scsi-hd,drive=x", "device 'scsi-hd' is not installed: pip install vm-virtio-scsi"),
        ("-blockdev driver=raw,file.filename=plain.img", "node-name=NAME is needed"),
        ("-machine q35", "-machine q35: no such board; there is: pc"),
        ("-M pc,usb=on", "-M usb=… is not supported"),
        ("-m lots", "-m size=lots: a size is needed"),
        ("-m 1k", "at least 1M is needed"),
        ("-smp 0", "a number from 1 to 255 is needed"),
        ("-boot x", "'x' is none of a, b, c, d, n"),
        ("-rtc base=yesterday", "utc, localtime or a date"),
        ("-display gtk", "there is no display"),
        ("-append x", "-append is for a kernel: add -kernel FILE"),
        ("-serial udp:1", "not supported; there is: stdio"),
        ("-serial chardev:x", "no character device 'x'"),
        ("-serial stdio -monitor stdio", "stdio is used twice, by serial0 and monitor0: use mon:stdio"),
        ("-mon x", "no character device 'x'"),
        ("--status loud", "one of auto, rich, plain, off"),
        ("--list-plugins everything", "no kind 'everything'"),
        ("--completion fish", "there is: bash"),
    ],
)
def test_one_line_that_says_what_to_do(words: str, part: str, tmp_path: Path) -> None:
    """Each mistake is one line that names it and says what there is."""
    (tmp_path / "plain.img").write_bytes(bytes(65536))
    assert part in complaint(vm(*words.split(), cwd=tmp_path))


def test_a_directory_is_no_image(tmp_path: Path) -> None:
    """A directory given as a disk is told so."""
    assert "directory" in complaint(vm("-drive", f"if=none,file={tmp_path},format=raw")).lower()


def test_an_image_in_use_is_told(tmp_path: Path) -> None:
    """An image that another process has locked for writing is refused with a question about that process."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(65536))
    holder = (
        "import sys; from vm_core.block.open import open_node; "
        "node = open_node(sys.argv[1], readonly=False, format='raw'); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "open\n"
        told = complaint(vm("-drive", f"if=none,file={image},format=raw"))
        other.communicate("")
    assert "lock" in told
    assert "another process" in told


def test_a_missing_plugin_names_what_to_install(tmp_path: Path) -> None:
    """Without frontends for disks, an image asks for the plugin that brings one."""
    (tmp_path / "disk.img").write_bytes(bytes(65536))
    told = complaint(vm("disk.img", environ={"VM_DISABLE_PLUGINS": "vm-ide"}, cwd=tmp_path))
    assert "vm-ide" in told
    assert "VM_DISABLE_PLUGINS" in told or "pip install" in told


def test_a_broken_and_two_equal_plugins_are_told(tmp_path: Path) -> None:
    """A broken plugin is told with its remedy where it is needed; of two equal ones the user chooses."""
    good = (
        "from vm_core.descriptors import FormatDriver\nfrom vm_core.hookspecs import hookimpl\n@hookimpl\n"
        "def vm_format_drivers():\n    return [FormatDriver(name='twin', summary='', implementation='json:loads')]\n"
    )
    for name, source in (("vm-vmdk", "import no_such_module"), ("acme-one", good), ("acme-two", good)):
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[vm_core]\n{module} = {module}\n")
    (tmp_path / "disk.img").write_bytes(bytes(65536))
    environ = {"PYTHONPATH": str(tmp_path)}
    told = complaint(vm("-drive", "if=none,file=disk.img,format=vmdk", environ=environ, cwd=tmp_path))
    assert "vm-vmdk, which is broken: ModuleNotFoundError: No module named 'no_such_module'; pip install" in told
    told = complaint(vm("-drive", "if=none,file=disk.img,format=twin", environ=environ, cwd=tmp_path))
    assert "is brought by acme-one and acme-two: write acme-one:twin or acme-two:twin" in told
    device = good.replace("FormatDriver", "DeviceFrontend").replace("format_drivers", "device_frontends")
    for module in ("acme_one", "acme_two"):
        (tmp_path / f"{module}.py").write_text(device.replace("'json:loads'", "'json:loads', interfaces=('twin',)"))
    told = complaint(vm("-drive", "if=twin,file=disk.img", environ=environ, cwd=tmp_path))
    assert "if=twin needs 'twin' of acme-one, which is in conflict: acme-two brings" in told
    assert "VM_DISABLE_PLUGINS=acme-one" in told
    for module in ("acme_one", "acme_two"):
        (tmp_path / f"{module}.py").write_text(good)
    listed = vm("--list-plugins", "format", "--json", environ=environ)
    assert listed.returncode == 0
    health = {(entry["distribution"], entry["health"]) for entry in json.loads(listed.stdout)}
    assert {("vm-vmdk", "broken"), ("acme-one", "conflict"), ("acme-two", "conflict")} <= health
    assert all(entry["remedy"] for entry in json.loads(listed.stdout) if entry["health"] != "ok")
    strict = vm("--list-plugins", environ={**environ, "VM_STRICT_PLUGINS": "1"})
    assert strict.returncode == 1
    assert "acme-one" in strict.stdout
    assert "VM_STRICT_PLUGINS is set" in strict.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("-version", ["vm-core "]),
        ("--version", ["vm-core "]),
        ("-h", ["usage: vm", "-drive", "-device"]),
        ("-drive help", ["cache=", "if=", "threads"]),
        ("-drive file=x,help", ["cache="]),
        ("-machine help", ["pc"]),
        ("-M help", ["pc"]),
        ("-chardev help", ["socket", "path="]),
        ("-boot help", ["order="]),
        ("-blockdev help", ["raw", "file"]),
        ("-blockdev raw,help", ["offset=<size>"]),
        ("-accel help", ["Accelerators"]),
        ("-device help", ["evices"]),
        ("--list-plugins", ["KIND", "vm-core", "raw"]),
        ("--list-plugins formats", ["raw"]),
        ("--list-plugins --verify", ["raw"]),
        ("--completion bash", ["complete -o filenames -F _vm vm"]),
    ],
)
def test_questions_are_answered_on_standard_output(words: str, parts: list[str]) -> None:
    """Help, listings and versions go to standard output with status 0."""
    result = vm(*words.split())
    assert (result.returncode, result.stderr) == (0, "")
    for part in parts:
        assert part in result.stdout


def test_a_reader_that_leaves_is_no_error() -> None:
    """``vm -h | head -1`` ends quietly."""
    command = f"{sys.executable} -m vm_core.cli.vm -h | head -c 5"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("usage", "")


def test_the_completion_script_completes() -> None:
    """Bash completes options and values from the script, behind commas too."""
    script = (
        f"source <({sys.executable} -m vm_core.cli.vm --completion bash)\n"
        "ask() { COMP_WORDS=(vm \"$@\"); COMP_CWORD=$#; _vm; echo \"${COMPREPLY[@]}\"; }\n"
        "compopt() { :; }\n"
        "ask -nog; ask -drive cac; ask -drive if=none,format=ra; ask --list-plugins prot\n"
    )  # fmt: skip
    result = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines() == [
        "-nographic",
        "cache.direct= cache.no-flush= cache.writeback= cache= "
        "cache=none cache=unsafe cache=writeback cache=writethrough",
        "if=none,format=raw",
        "protocol",
    ], result.stderr
