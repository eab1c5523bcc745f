"""Tiny real distributions, written to a directory as pip would unpack them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Install = Callable[..., Path]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory on sys.path, as site-packages is."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if (folder / f"{name}.py").exists()]:
        del sys.modules[name]


@pytest.fixture
def install(site: Path) -> Install:
    """``install(dist, module source)``: unpack a distribution with one entry point in the group vm_core."""

    def unpack(
        dist: str, source: str, *, version: str = "1.0", requires: tuple[str, ...] = (), entry: str = ""
    ) -> Path:
        module = dist.replace("-", "_")
        (site / f"{module}.py").write_text(source)
        info = site / f"{module}-{version}.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {each}\n" for each in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\n{needs}\nText: no\n")
        (info / "entry_points.txt").write_text(
            f"[console_scripts]\nx = y:z\n\n[vm_core]\n{entry or module} = {module}\n\n[other]\na = b\n"
        )
        return info

    return unpack
