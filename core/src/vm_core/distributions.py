"""Which installed distributions offer entry points of a group, found fast.

``importlib.metadata.entry_points()`` imports the ``email`` package and parses every distribution's metadata, which
costs more than everything else ``vm`` does before it starts. Here each directory of ``sys.path`` is listed once and
only ``entry_points.txt`` files are read; there is no cache to be stale. Whatever is not a plain directory (zip files,
eggs, foreign finders) goes through :mod:`importlib.metadata`, so nothing it would find is missed.

The file is described in the "Entry points specification" of the Python Packaging User Guide.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class EntryPoint(NamedTuple):
    """One ``name = value`` line of a distribution in the group that was asked for."""

    name: str
    value: str
    distribution: str
    version: str


def normalize(name: str) -> str:
    """A distribution's name as comparisons want it (PEP 503): ``Vm_Qcow2`` and ``vm-qcow2`` are the same."""
    return re.sub(r"[-_.]+", "-", name).lower()


def entry_points(group: str, path: Sequence[str] | None = None) -> list[EntryPoint]:
    """Entry points of *group* along *path* (``sys.path``), in its order.

    Of a distribution found twice the first is meant, as an import would find it.
    """
    found: list[EntryPoint] = []
    seen: set[str] = set()
    foreign = [finder for finder in sys.meta_path if _is_foreign(finder)] if path is None else []
    places = sys.path if path is None else path
    for place in dict.fromkeys(places):
        directory = place or os.curdir
        plain = os.path.isdir(directory) and not directory.endswith(".egg")
        for name, version, text in _scan_directory(directory) if plain else _scan_other([place]):
            _collect(name, version, text, group, seen, found)
    if foreign:
        for name, version, text in _scan_other(None):
            _collect(name, version, text, group, seen, found)
    return found


def _collect(name: str, version: str, text: str, group: str, seen: set[str], found: list[EntryPoint]) -> None:
    key = normalize(name)
    if key in seen:
        return
    seen.add(key)
    found += [EntryPoint(entry, value, name, version) for entry, value in _parse(text, group)]


def _is_foreign(finder: object) -> bool:
    """A finder on ``sys.meta_path`` other than Python's own may know distributions that no directory shows."""
    module = getattr(finder, "__module__", "") or type(finder).__module__
    return hasattr(finder, "find_distributions") and not module.startswith(("_frozen_importlib", "importlib."))


def _scan_directory(directory: str) -> Iterator[tuple[str, str, str]]:
    """(name, version, text of entry_points.txt) of each distribution unpacked in *directory*."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return
    for entry in names:
        if entry.endswith(".egg"):
            yield from _scan_other([os.path.join(directory, entry)])
        if not entry.endswith((".dist-info", ".egg-info")):
            continue
        try:
            with open(os.path.join(directory, entry, "entry_points.txt"), encoding="utf-8", errors="replace") as file:
                text = file.read()
        except OSError:
            text = ""
        stem = entry.rpartition(".")[0]
        name, _, version = stem.partition("-")
        if text:
            name, version = _headers(os.path.join(directory, entry), name, version)
        yield name, version, text


def _headers(folder: str, name: str, version: str) -> tuple[str, str]:
    """Name and version from the metadata's head; those of the folder's name where there is none."""
    for metadata in ("METADATA", "PKG-INFO"):
        try:
            with open(os.path.join(folder, metadata), encoding="utf-8", errors="replace") as file:
                for line in file:
                    key, _, value = line.partition(":")
                    if not line.strip():
                        break
                    if key == "Name":
                        name = value.strip()
                    elif key == "Version":
                        version = value.strip()
            break
        except OSError:
            continue
    return name, version


def _scan_other(path: list[str] | None) -> Iterator[tuple[str, str, str]]:
    """The same through :mod:`importlib.metadata`, for what is not a plain directory."""
    if path is not None and not os.path.exists(path[0]):
        return
    import importlib.metadata

    everywhere = importlib.metadata.distributions
    for found in everywhere() if path is None else everywhere(path=path):
        try:
            name, version, text = found.metadata["Name"], found.version, found.read_text("entry_points.txt")
        except Exception:  # damaged metadata of some package that is no concern of ours
            continue
        if name:
            yield name, version or "", text or ""


def _parse(text: str, group: str) -> Iterator[tuple[str, str]]:
    """Lines of section *group*; the file is an INI file whose keys keep their case."""
    inside = False
    for raw in text.splitlines():
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        if line.startswith("["):
            inside = line[1:].partition("]")[0].strip() == group
        elif inside:
            name, equals, value = line.partition("=")
            if equals:
                yield name.strip(), value.partition("[")[0].strip()
