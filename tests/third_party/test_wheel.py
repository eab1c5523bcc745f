"""A third party's plugin, built as a wheel and installed beside core's wheel, works like one of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vmtest import ROOT, program, run


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with core and the example plugin, both from wheels."""
    work = tmp_path_factory.mktemp("third-party")
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        work,
        ROOT / "core",
        ROOT / "examples/vm-bochs",
        timeout=300,
    )
    run(sys.executable, "-m", "venv", work / "venv")
    wheels = sorted(work.glob("*.whl"))
    assert len(wheels) == 2
    run(work / "venv/bin/python", "-m", "pip", "install", "-q", *wheels, "pytest", "hypothesis", timeout=300)
    return work / "venv"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A raw image and the same as a growing image, written by Bochs' own tool."""
    work = tmp_path_factory.mktemp("bochs")
    raw, growing = work / "disk.raw", work / "disk.bochs"
    with raw.open("wb") as f:
        f.truncate(2 << 20)
        for sector in (0, 1, 5, 63, 64, 2047, 4095):
            f.seek(sector * 512)
            f.write(bytes([sector % 251 + 1]) * 512)
    run(program("bximage", "bximage"), "-q", "-func=convert", "-imgmode=growing", raw, growing)
    return raw, growing


def test_listed_with_its_distribution(venv: Path) -> None:
    """`vm --list-plugins` shows the driver, whose it is, and that it is healthy."""
    plugins = json.loads(run(venv / "bin/vm", "--list-plugins", "--json"))
    entry = next(p for p in plugins if p["kind"] == "format" and p["name"] == "bochs")
    assert entry["distribution"] == "vm-bochs"
    assert entry["version"] == "1.0"
    assert entry["health"] == "ok"


def test_reads_what_the_real_tool_wrote(venv: Path, images: tuple[Path, Path]) -> None:
    """A growing image is probed, and reads like the raw image it was made from."""
    raw, growing = images
    script = """
import sys, vm_core
image = vm_core.open(sys.argv[1])
print(image.format)
sys.exit(image.read(image.size) != open(sys.argv[2], "rb").read())
"""
    assert run(venv / "bin/python", "-c", script, growing, raw).strip() == "bochs"


def test_writing_is_refused_in_a_line(venv: Path, images: tuple[Path, Path]) -> None:
    """The driver implements no writing: opening for it says so by name."""
    script = (
        "import sys, vm_core\ntry: vm_core.open(sys.argv[1], 'r+')\nexcept vm_core.VmError as e: print(e); sys.exit(3)"
    )
    result = subprocess.run([venv / "bin/python", "-c", script, images[1]], capture_output=True, text=True, check=False)
    assert result.returncode == 3, result.stderr
    assert "bochs" in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_passes_the_conformance_kit(venv: Path) -> None:
    """The example's own tests, which are the kit, pass in that environment."""
    run(
        venv / "bin/python",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        ROOT / "examples/vm-bochs/tests",
        cwd=ROOT / "examples/vm-bochs",
        timeout=300,
    )
