"""The conformance kit: the toy format passes it, and broken formats do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from vm_core.block.mapping import Allocation, Mapping
from vm_core.block.node import Node
from vm_core.testing import conformance, toy
from vm_core.testing.conformance import FormatConformance
from vm_core.testing.nodes import MemoryNode

pytestmark = pytest.mark.usefixtures("toy_driver")


class TestToy(FormatConformance):
    """The format of core's own tests."""

    driver = "toy"
    size = 300 * 1024 + 512
    create_options = ({}, {"cluster_size": 512}, {"cluster_size": 65536})
    rounds = 60
    cuts = 40
    header = 24
    metadata = 8192


class Kit(FormatConformance):
    """The same, run by hand against a driver that a test has broken."""

    __test__ = False
    driver = "toy"
    size = 300 * 1024
    rounds = 60
    header = 24


def broken_flush(self: toy.Toy) -> None:
    """Writes the table and forgets to flush it."""
    for index in sorted(self._dirty):
        self.file.pwrite(toy.SECTOR + index * 8, self._table[index].to_bytes(8, "little"))
    self._dirty.clear()
    self._free.extend(self._released)
    self._released.clear()


def early_reuse(self: toy.Toy, index: int, entry: int) -> None:
    """Gives a cluster away before the table on disk has let go of it."""
    former = self._table[index]
    if former > toy.ZERO:
        self._free.append(former & ~toy.INVERTED)
    self._table[index] = entry
    self._dirty.add(index)


def forgetful_abort(self: toy.Toy, allocations: Sequence[Allocation]) -> None:
    """Takes data that was not written for written."""
    self.commit(allocations)


def wrong_map(self: toy.Toy, offset: int, length: int) -> list[Mapping]:
    """Ignores the offset within a cluster."""
    return [run._replace(host=run.host - run.offset % self.cluster_size) for run in original_map(self, offset, length)]


def endless_map(self: toy.Toy, offset: int, length: int) -> Any:
    """Never ends."""
    while True:
        pass


def greedy_open(cls: type[toy.Toy], file: Node, options: dict[str, Any], context: Any) -> toy.Toy:
    """Believes the size in the header."""
    size = int.from_bytes(file.pread(8, 8), "little")
    list(range(min(size // 512, 1 << 26)))
    return original_open(file, options, context)


original_map = toy.Toy.map
original_open = toy.Toy.open


@pytest.mark.parametrize(
    ("method", "replacement", "test"),
    [
        ("flush", broken_flush, "test_power_cuts_lose_nothing_flushed"),
        ("_set", early_reuse, "test_power_cuts_lose_nothing_flushed"),
        ("abort", forgetful_abort, "test_survives_errors_of_the_storage"),
        ("map", wrong_map, "test_reads_what_is_there"),
        ("map", endless_map, "test_flipped_bits_are_one_error"),
        ("open", classmethod(greedy_open), "test_extreme_header_fields_are_one_error"),
    ],
)
def test_the_kit_finds(
    method: str, replacement: Any, test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each kind of mistake that a driver can make fails the test made for it."""
    monkeypatch.setattr(conformance, "TIME_LIMIT", 0.5)
    kit = Kit()
    getattr(kit, test)(tmp_path)
    if method == "map" and replacement is endless_map:
        file = kit.make({})
        kit.images = lambda directory, chance: iter([(file.data(), b"", {})])  # type: ignore[method-assign]
    monkeypatch.setattr(toy.Toy, method, replacement)
    with pytest.raises(AssertionError):
        getattr(kit, test)(tmp_path)


def test_samples_are_enough_for_a_reader(tmp_path: Path) -> None:
    """A read-only driver is tested with images from elsewhere."""

    class Reader(Kit):
        def can(self, capability: str) -> bool:
            return False

        def samples(self, directory: Path) -> list[conformance.Sample]:
            file = MemoryNode()
            toy.Toy.create(file, 8192, {})
            path = directory / "sample"
            path.write_bytes(file.data())
            return [conformance.Sample(path, bytes(8192))]

    kit = Reader()
    kit.test_reads_what_is_there(tmp_path)
    kit.test_probe_knows_its_own(tmp_path)
    kit.test_truncated_images_are_one_error(tmp_path)
