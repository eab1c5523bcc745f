"""The catalogue: drivers looked up without asking the plugins, never at the price of a wrong answer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attrs
import pytest

from vm_core import catalogue, plugins
from vm_core.errors import PluginError

from .test_health import good

PROGRAM = """
import sys
from vm_core import plugins
for kind in sys.argv[1:]:
    print(kind, *[f"{each.name}:{each.summary}" for each in plugins.drivers(kind)], sep=";")
print("attrs" in sys.modules, "pluggy" in sys.modules)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory of our own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VM_PLUGIN_CACHE", str(folder))
    monkeypatch.delenv("VM_PLUGINS", raising=False)
    monkeypatch.delenv("VM_DISABLE_PLUGINS", raising=False)
    monkeypatch.delenv("VM_STRICT_PLUGINS", raising=False)
    return folder


def start(site: Path, *kinds: str, **environ: str) -> tuple[list[str], bool]:
    """What a new program finds, and whether it had to ask the plugins."""
    environment = {**os.environ, "PYTHONPATH": str(site), **environ}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *kinds], env=environment, capture_output=True, text=True, check=True, cwd=site
    )
    *found, last = done.stdout.splitlines()
    return found, last == "True True"


def test_the_second_program_asks_no_plugin(install: Any, site: Path, cache: Path) -> None:
    """What the first program was told the second one knows, without attrs and pluggy."""
    install("acme-tiny", good("tiny"))
    kinds = ("format", "protocol", "device", "engine", "accelerator", "export")
    first, asked = start(site, *kinds)
    assert asked
    assert any("tiny:a test format" in line for line in first)
    assert start(site, *kinds) == (first, False)


def test_every_field_of_every_descriptor_comes_back(cache: Path) -> None:
    """A driver from the catalogue has the attributes of the descriptor that the registry has."""
    plugins.forget()
    try:
        registry = plugins.registry()
        catalogue.forget()
        known = catalogue.current()
        assert known is not None
        count = 0
        for descriptor, _, _ in registry.healthy():
            card = known.find(descriptor.kind, descriptor.name)
            for field in attrs.fields(type(descriptor)):
                left, right = getattr(descriptor, field.name), getattr(card, field.name)
                assert repr(_plain(left)) == repr(_plain(right)), (descriptor.name, field.name)
                count += 1
            assert card is not None
            assert card.load is not None
        assert count > 50
    finally:
        plugins.forget()


def _plain(value: Any) -> Any:
    if attrs.has(type(value)):
        return sorted(attrs.asdict(value).items())
    if hasattr(value, "__dict__") and not isinstance(value, type):
        return sorted(vars(value).items())
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return sorted(value) if isinstance(value, frozenset) else value


def test_an_install_an_uninstall_and_an_edit_are_seen(install: Any, site: Path, cache: Path) -> None:
    """Whatever changes what is installed makes the next program ask again, once."""
    info = install("acme-tiny", good("tiny"))
    start(site, "format")
    install("acme-small", good("small"))
    found, asked = start(site, "format")
    assert asked
    assert "small:a test format" in found[0]
    assert start(site, "format") == (found, False)

    (site / "acme_tiny.py").write_text(good("tiny").replace("a test format", "another one"))
    os.utime(site / "acme_tiny.py", ns=(1, 1))  # an edit need not move the clock forward
    found, asked = start(site, "format")
    assert asked
    assert "tiny:another one" in found[0]

    for file in info.iterdir():
        file.unlink()
    info.rmdir()
    found, asked = start(site, "format")
    assert asked
    assert "tiny" not in found[0]


def test_a_broken_plugin_is_still_named(install: Any, site: Path, cache: Path) -> None:
    """A driver that the catalogue does not know is asked for from the registry, whose message says what is wrong."""
    install("vm-curl", "import no_such_module_anywhere")
    start(site, "format")
    code = "from vm_core import plugins; plugins.find('protocol', 'curl')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert "needs the plugin vm" in done.stderr.replace("_", "-")
    assert "no_such_module_anywhere" in done.stderr


@pytest.mark.parametrize("content", [b"", b"\0", b"\xff" * 100, b"s\x10\0\0\0short", b"(\x02\0\0\0NN", b"i\x01\0\0\0"])
def test_a_damaged_file_is_written_anew(install: Any, site: Path, cache: Path, content: bytes) -> None:
    """Garbage in the file costs time and nothing else."""
    install("acme-tiny", good("tiny"))
    found, _ = start(site, "format")
    (file,) = cache.iterdir()
    file.write_bytes(content)
    assert start(site, "format") == (found, True)
    assert start(site, "format") == (found, False)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_a_file_that_others_may_write_is_not_taken(install: Any, site: Path, cache: Path) -> None:
    """Whoever else can write the file could name code to import: it is ignored."""
    install("acme-tiny", good("tiny"))
    found, _ = start(site, "format")
    (file,) = cache.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    file.chmod(0o666)
    assert start(site, "format") == (found, True)
    assert file.stat().st_mode & 0o777 or not file.exists()


def test_the_environment_that_chooses_plugins_is_obeyed(install: Any, site: Path, cache: Path) -> None:
    """VM_PLUGINS, VM_DISABLE_PLUGINS and VM_PLUGIN_CACHE=off: the plugins are asked, and nothing is written down."""
    install("acme-tiny", good("tiny"))
    start(site, "format")
    found, asked = start(site, "format", VM_DISABLE_PLUGINS="acme-tiny")
    assert asked
    assert "tiny" not in found[0]
    found, asked = start(site, "format", VM_PLUGINS="acme-tiny")
    assert asked
    assert "tiny" in found[0]
    assert start(site, "format", VM_PLUGIN_CACHE="off")[1]
    assert len(list(cache.iterdir())) == 1


def test_a_directory_that_cannot_be_written_is_no_error(install: Any, site: Path, cache: Path) -> None:
    """Without a place for the file, plugins are asked each time."""
    install("acme-tiny", good("tiny"))
    cache.write_text("a file where the directory should be")
    found, asked = start(site, "format")
    assert asked
    assert start(site, "format") == (found, True)


def test_a_registered_driver_is_found_although_there_is_a_catalogue(cache: Path) -> None:
    """Once a program uses the registry, its own drivers count."""
    plugins.forget()
    try:
        plugins.registry()
        plugins.forget()
        with pytest.raises(PluginError):
            plugins.find("format", "toy")
        from vm_core.testing import toy

        plugins.register(toy, "vm-toy")
        assert plugins.find("format", "toy").name == "toy"
        assert "toy" in [driver.name for driver in plugins.drivers("format")]
    finally:
        plugins.forget()
