"""Plugins in every state of health, as real distributions."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from vm_core.descriptors import FormatDriver
from vm_core.distributions import entry_points
from vm_core.errors import PluginError
from vm_core.hookspecs import hookimpl
from vm_core.plugins import Health, PluginEntry, PluginRegistry

GOOD = """
from vm_core.descriptors import FormatDriver
from vm_core.hookspecs import hookimpl

@hookimpl
def vm_format_drivers():
    return [FormatDriver(name="{name}", summary="a test format", implementation="{reference}", api={api})]
"""


def good(name: str, reference: str = "json:loads", api: int = 1) -> str:
    return GOOD.format(name=name, reference=reference, api=api)


def discovered(**environ: str) -> PluginRegistry:
    registry = PluginRegistry()
    registry.discover(environ)
    return registry


def entry(registry: PluginRegistry, distribution: str) -> PluginEntry:
    return next(entry for entry in registry.entries() if entry.distribution == distribution)


def test_a_good_plugin_is_listed_with_its_distribution_and_version(install: Any) -> None:
    """A healthy plugin's driver is found by name, and listed with the distribution and version that brought it."""
    install("acme-tiny", good("tiny"), version="2.5")
    registry = discovered()
    assert registry.find("format", "tiny").summary == "a test format"
    found = entry(registry, "acme-tiny")
    assert (found.kind, found.name, found.version, found.health) == ("format", "tiny", "2.5", Health.OK)


BROKEN = [
    ("import no_such_module_anywhere", "ModuleNotFoundError"),
    ("raise RuntimeError('told you\\nso')", "RuntimeError: told you so"),
    ("raise SystemExit(3)", "SystemExit"),
    ("def", "SyntaxError"),
    ("x = 1", "none of the hooks"),
    (
        "from vm_core.hookspecs import hookimpl\n@hookimpl\ndef vm_format_driver():\n    return []",
        "did you mean 'vm_format_drivers'",
    ),
    ("from vm_core.hookspecs import hookimpl\n@hookimpl\ndef vm_format_drivers(extra):\n    return []", "extra"),
    ("from vm_core.hookspecs import hookimpl\n@hookimpl\ndef vm_format_drivers():\n    return [1]", "returned int"),
    ("from vm_core.hookspecs import hookimpl\n@hookimpl\ndef vm_format_drivers():\n    return 1/0", "ZeroDivision"),
    ("from vm_core.hookspecs import hookimpl\n@hookimpl\ndef vm_format_drivers():\n    return None", "NoneType"),
]


@pytest.mark.parametrize(("source", "reason"), BROKEN)
def test_a_broken_plugin_is_listed_with_reason_and_remedy_and_others_work(
    install: Any, source: str, reason: str
) -> None:
    """However a plugin fails, it is listed as broken with the reason and the mending command, and others work."""
    install("acme-bad", source)
    install("acme-tiny", good("tiny"))
    registry = discovered()
    bad = entry(registry, "acme-bad")
    assert bad.health is Health.BROKEN
    assert reason in bad.reason
    assert "\n" not in bad.reason
    assert bad.remedy == "pip install --force-reinstall acme-bad"
    assert registry.find("format", "tiny")


def test_a_missing_requirement_is_the_remedy(install: Any) -> None:
    """A plugin whose declared requirement is absent is mended by installing that requirement."""
    install("acme-bad", "import acme_needed_thing", requires=("acme-needed-thing>=1.2,<3", "pluggy>=1"))
    assert entry(discovered(), "acme-bad").remedy == "pip install 'acme-needed-thing>=1.2,<3'"


@pytest.mark.parametrize(("api", "command"), [(2, "pip install --upgrade vm-core"), (0, "--upgrade acme-old")])
def test_another_api_version_is_refused_with_the_upgrade_to_make(install: Any, api: int, command: str) -> None:
    """A descriptor of another api version is wrong-api, and the older side is the one to upgrade."""
    install("acme-old", good("old", api=api))
    registry = discovered()
    found = entry(registry, "acme-old")
    assert found.health is Health.WRONG_API
    assert command in found.remedy
    with pytest.raises(PluginError, match="wrong-api"):
        registry.find("format", "old")
    assert "old" not in [each.name for each in registry.all("format")]


def test_two_plugins_of_one_name_are_both_in_conflict_until_one_is_named(install: Any) -> None:
    """Of two distributions with one driver name neither is used silently; ``dist:name`` chooses."""
    install("acme-one", good("twin", "json:loads"))
    install("acme-two", good("twin", "json:dumps"))
    registry = discovered()
    assert {entry(registry, name).health for name in ("acme-one", "acme-two")} == {Health.CONFLICT}
    with pytest.raises(PluginError, match="acme-one and acme-two: write acme-one:twin or acme-two:twin"):
        registry.find("format", "twin")
    assert registry.find("format", "Acme_Two:twin").implementation == "json:dumps"
    assert "acme-two" in entry(registry, "acme-one").reason
    assert "twin" not in [each.name for each in registry.all("format")]


def test_disabling_one_side_resolves_a_conflict(install: Any) -> None:
    """VM_DISABLE_PLUGINS takes a plugin out, which is listed so, and ends a conflict."""
    install("acme-one", good("twin", "json:loads"))
    install("acme-two", good("twin", "json:dumps"))
    registry = discovered(VM_DISABLE_PLUGINS="acme-one")
    assert registry.find("format", "twin").implementation == "json:dumps"
    assert entry(registry, "acme-one").health is Health.DISABLED


def test_the_allow_list_disables_all_but_core_and_the_named(install: Any) -> None:
    """VM_PLUGINS loads what it names and core; everything else is disabled, without being imported."""
    install("acme-one", good("one"))
    install("acme-boom", "open('/nonexistent/boom')")
    registry = discovered(VM_PLUGINS="acme_one, acme-absent")
    assert registry.find("format", "one")
    assert entry(registry, "acme-boom").health is Health.DISABLED
    absent = entry(registry, "acme-absent")
    assert (absent.health, absent.remedy) == (Health.BROKEN, "pip install acme-absent")
    assert all(e.health is not Health.DISABLED for e in registry.entries() if e.distribution == "vm-core")


def test_an_absent_driver_names_the_distribution_to_install() -> None:
    """A driver of this project that is not installed is answered with the pip command that brings it."""
    registry = PluginRegistry()
    with pytest.raises(PluginError, match="format 'qcow2' is not installed: pip install vm-qcow2"):
        registry.find("format", "qcow2")
    with pytest.raises(PluginError, match="protocol 'rbd' is not installed: pip install vm-ceph"):
        registry.find("protocol", "rbd")


def test_an_absent_driver_of_a_broken_plugin_tells_what_is_wrong(install: Any) -> None:
    """Where the plugin that would bring the driver is there but broken, its reason and remedy are told."""
    install("vm-curl", "import no_such_module_anywhere")
    with pytest.raises(PluginError, match=r"needs the plugin vm-curl, which is broken: .*no_such_module_anywhere.*pip"):
        discovered().find("protocol", "curl")


def test_an_unknown_name_is_answered_with_the_close_match(install: Any) -> None:
    """A misspelt driver gets the closest installed name and the list."""
    install("acme-tiny", good("tiny"))
    with pytest.raises(PluginError, match="no format 'tinny'; did you mean 'tiny'"):
        discovered().find("format", "tinny")


def test_strict_health_raises_and_verify_finds_unimportable_implementations(install: Any) -> None:
    """verify() finds implementations that cannot be imported, and require_health() makes any ill health an error."""
    install("acme-lazy", good("lazy", "acme_lazy:Absent"))
    registry = discovered()
    assert entry(registry, "acme-lazy").health is Health.OK
    registry.verify()
    assert entry(registry, "acme-lazy").health is Health.BROKEN
    with pytest.raises(PluginError, match="VM_STRICT_PLUGINS"):
        registry.require_health()


def test_an_unimportable_implementation_is_one_line_when_used(install: Any) -> None:
    """Using a driver whose implementation cannot be imported raises PluginError with a remedy."""
    install("acme-lazy", good("lazy", "no_such_module_anywhere:X"))
    with pytest.raises(PluginError, match=r"format 'lazy'.*is broken.*no_such_module_anywhere"):
        discovered().find("format", "lazy").load()


def test_strict_mode_ends_the_program_in_one_line(install: Any, site: Path) -> None:
    """With VM_STRICT_PLUGINS=1 a broken plugin is fatal to programs that use the registry."""
    install("acme-bad", "import no_such_module_anywhere")
    code = "from vm_core.plugins import registry; registry()"
    environ = {**os.environ, "PYTHONPATH": str(site), "VM_PLUGINS": "acme-bad"}
    relaxed = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    strict = subprocess.run(
        [sys.executable, "-c", code], env={**environ, "VM_STRICT_PLUGINS": "1"}, capture_output=True, text=True
    )
    assert relaxed.returncode == 0, relaxed.stderr
    assert strict.returncode != 0
    assert "PluginError: VM_STRICT_PLUGINS is set and plugin 'acme_bad' of acme-bad is broken" in strict.stderr


def test_a_program_registers_and_takes_back_its_own_driver() -> None:
    """register() adds an embedding program's drivers, unregister() takes them out; broken ones are refused."""

    class Mine:
        @hookimpl
        def vm_format_drivers(self) -> list[FormatDriver]:
            return [FormatDriver(name="mine", summary="", implementation="json:loads", aliases=("my",))]

    class Bad:
        @hookimpl
        def vm_format_drivers(self) -> list[int]:
            return [1]

    registry, mine = PluginRegistry(), Mine()
    registry.register(mine, "my-program")
    assert registry.find("format", "my").name == "mine"
    assert registry.find("format", "my-program:mine").name == "mine"
    registry.unregister(mine)
    with pytest.raises(PluginError):
        registry.find("format", "mine")
    with pytest.raises(PluginError, match="broken"):
        registry.register(Bad())


def test_a_driver_described_twice_by_one_plugin_is_broken(install: Any) -> None:
    """One plugin that describes a name twice is told so; the first description is used."""
    source = good("one").replace("return [", "return 2 * [")
    install("acme-double", source)
    registry = discovered()
    assert [e.health for e in registry.entries() if e.distribution == "acme-double"].count(Health.BROKEN) == 1
    assert registry.find("format", "one")


def test_the_fast_scan_finds_what_importlib_finds() -> None:
    """On this environment's own sys.path, for several groups, the scan agrees with importlib.metadata."""
    for group in ("vm_core", "console_scripts", "pytest11", "distutils.commands"):
        ours = {(e.name, e.value) for e in entry_points(group)}
        assert ours == {(e.name, e.value) for e in importlib.metadata.entry_points(group=group)}


def test_distributions_in_zip_files_and_shadowed_ones(install: Any, site: Path, tmp_path: Path) -> None:
    """A distribution in a zip file counts, and of one installed twice only the first on sys.path."""
    install("acme-tiny", good("tiny"), version="1.0")
    archive = tmp_path / "more.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name, version in (("acme_tiny", "9.9"), ("acme_zip", "3")):
            file.writestr(f"{name}-{version}.dist-info/METADATA", f"Name: {name}\nVersion: {version}\n\n")
            file.writestr(f"{name}-{version}.dist-info/entry_points.txt", f"[vm_core]\n{name}={name}\n")
    found = entry_points("vm_core", [str(site), str(archive), str(tmp_path / "absent")])
    assert [(e.distribution, e.version) for e in found] == [("acme-tiny", "1.0"), ("acme_zip", "3")]
