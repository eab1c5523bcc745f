"""What compacting has to be for formats whose data lies in units of one size: subclass :class:`CompactionTests`.

class TestCompacting(CompactionTests):
    driver = "vdi"
    cases = (({}, 1 << 20),)
    tolerated = ("ERROR: allocated blocks mismatch",)
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vm_core.block.formatnode import FormatNode
from vm_core.block.jobs import compact as jobs
from vm_core.block.jobs.compact import Compacted, compact
from vm_core.block.jobs.job import Cancelled, Job
from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.errors import UsageError

from .nodes import MemoryNode, RecordingNode
from .replay import power_cuts


class Image(NamedTuple):
    """An image in memory, and what is in it."""

    driver: str
    data: bytes
    model: bytes


def scattered(path: Path, driver: str, options: dict[str, Any], unit: int, *, units: int = 24, seed: int = 0) -> Image:
    """An image of *units* units, written in random order, of which some are zeroes by now. Made in the file *path*."""
    chance = random.Random(seed)
    create_image(str(path), driver, units * unit, dict(options), check_backing=False)
    with open_node({"driver": driver, "file.filename": str(path)}, readonly=False) as node:
        size = node.size
        model = bytearray(size)
        order = list(range(size // unit))
        chance.shuffle(order)
        for number in order[: len(order) * 5 // 6]:
            start = number * unit + chance.randrange(unit)
            data = chance.randbytes(min(chance.randrange(1, unit), size - start, 70_000))
            node.pwrite(start, data)
            model[start : start + len(data)] = data
        for number in order[: len(order) // 3]:
            node.pwrite(number * unit, bytes(min(2 * unit, size - number * unit)))
            model[number * unit : (number + 2) * unit] = bytes(min(2 * unit, size - number * unit))
    return Image(driver, path.read_bytes(), bytes(model))


def opened(image: Image, storage: Any, *, readonly: bool = True) -> FormatNode:
    """The image in *storage*."""
    node = open_node({"driver": image.driver, "file": storage}, readonly=readonly)
    assert isinstance(node, FormatNode)
    return node


def _same(node: Node, image: Image) -> bool:
    """Whether it holds what it should. Apart, since pytest takes its time to show two long strings of bytes."""
    return node.pread(0, node.size) == image.model


def faults(node: Node, tolerated: Sequence[str] = ()) -> list[str]:
    """What the driver's check finds, but for what begins with one of *tolerated*; leaks do not count."""
    assert isinstance(node, FormatNode)
    with node.quiesce() as driver:
        try:
            found = driver.check()
        except UsageError:
            return []
    told = [*found.get("messages", ()), *found.get("reports", ())]
    left = [text for text in told if not text.startswith(tuple(tolerated) or ("\0",))]
    if found.get("check-errors") or (found.get("corruptions", 0) and (left or not told)):
        return left or [str(found)]
    return []


def shrink(image: Image) -> tuple[Compacted, bytes]:
    """Compact a copy; what it came to. It is sound, holds the same, is shorter and goes on working."""
    storage = MemoryNode(image.data)
    with opened(image, MemoryNode(image.data, readonly=True)) as node:
        told = compact(node, dry_run=True)
    with opened(image, storage, readonly=False) as node:
        result = compact(node)
        assert _same(node, image), "the contents differ"
    after = storage.data()
    assert told.zeroes == result.zeroes
    assert abs(told.length_after - len(after)) <= max(len(image.data) - len(image.model), 0) + (1 << 20)
    assert len(after) == result.length_after < result.length_before
    with opened(image, storage) as node:
        assert _same(node, image), "the contents differ"
        assert not faults(node)
    model = bytearray(image.model)
    storage = MemoryNode(after)
    with opened(image, storage, readonly=False) as node:
        again = compact(node)
        assert again.moved == 0
        assert again.length_after == len(after)
        chance = random.Random(7)
        for _ in range(6):
            start = chance.randrange(len(model) - 5000)
            model[start : start + 5000] = piece = chance.randbytes(5000)
            node.pwrite(start, piece)
    with opened(image, MemoryNode(storage.data())) as node:
        assert _same(node, image._replace(model=bytes(model))), "the contents differ"
        assert not faults(node)
    return result, after


def survive(
    image: Image,
    *,
    portion: int,
    tolerated: Sequence[str] = (),
    limit: int | None = 40,
    judge: Callable[[bytes], None] | None = None,
) -> None:
    """Compact it in portions of *portion* bytes, and cut the power at every moment.

    *judge* gets some of the images that are left.
    """
    former, jobs.PORTION = jobs.PORTION, portion
    try:
        recorder = RecordingNode(MemoryNode(image.data))
        with opened(image, recorder, readonly=False) as node:
            result = compact(node, workers=1)
        assert result.moved, result
    finally:
        jobs.PORTION = former
    count = 0
    for cut in power_cuts(recorder, seed=9, variants=3, limit=limit):
        count += 1
        # For writing, so that a log is replayed; what is written then is not looked at.
        with opened(image, MemoryNode(cut.image), readonly=False) as node:
            assert _same(node, image), cut.story
            assert not faults(node, tolerated), cut.story
        if judge is not None and count % 30 == 1:
            judge(cut.image)
    assert count > 20


class _Stop(Job):
    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def check(self) -> None:
        self.looks -= 1
        if self.looks < 0:
            self.cancel()
        super().check()


def stop(image: Image, *, portion: int) -> None:
    """Cancel it at many of the moments where that is possible: the image is as sound as before, and holds the same."""
    former, jobs.PORTION = jobs.PORTION, portion
    try:
        for looks in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144):
            storage = MemoryNode(image.data)
            with opened(image, storage, readonly=False) as node:
                try:
                    compact(node, job=_Stop(looks), workers=1)
                except Cancelled:
                    stopped = True
                else:
                    stopped = False
            with opened(image, MemoryNode(storage.data())) as node:
                assert _same(node, image), "the contents differ"
                assert not faults(node)
            if not stopped:
                assert looks > 2
                return
    finally:
        jobs.PORTION = former
    raise AssertionError("it never ends")


def judge(driver: str, path: Path, data: bytes, model: bytes, *, check: bool = True, repair: bool = False) -> None:
    """The peer reads *model* from the image *data*, put at *path*, and with *check* finds nothing wrong with it.

    With *repair* it may mend the image before: it wants a log to be replayed before it reads anything.
    """
    from .qemu import Qemu

    qemu = Qemu(driver)
    path.write_bytes(data)
    raw = path.with_suffix(".raw")
    raw.write_bytes(model)
    if repair:
        qemu.run("check", "-q", "-r", "all", path)
    done = qemu.run("compare", "-f", driver, "-F", "raw", path, raw)
    assert done.returncode == 0, done.stdout + done.stderr
    if check:
        done = qemu.run("check", "-f", driver, path)
        assert done.returncode in (0, 63), done.stdout + done.stderr


class CompactionTests:
    """Three tests of a driver, on images of random contents, with the peer as a judge."""

    driver: str = ""
    #: Create options, and how large a unit is then.
    cases: Sequence[tuple[dict[str, Any], int]] = ()
    #: How many of them suffer power cuts.
    cut: int | None = None
    #: Beginnings of what the driver's check may say after a power cut.
    tolerated: Sequence[str] = ()
    #: The peer has to mend an image before it reads it after a power cut: it has a log.
    repair: bool = False
    #: Units of the image that is stopped at.
    stop_units: int = 12

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Each test with each of its cases."""
        if "case" in metafunc.fixturenames:
            cases = self.cases[: self.cut] if metafunc.function.__name__ == "test_power_cuts" else self.cases
            metafunc.parametrize("case", cases, ids=[str(options) for options, _ in cases])
        if "seed" in metafunc.fixturenames:
            metafunc.parametrize("seed", range(3))

    def test_shorter(self, tmp_path: Path, case: tuple[dict[str, Any], int], seed: int) -> None:
        """The file gets shorter, and holds the same for the peer too, which finds nothing wrong."""
        options, unit = case
        image = scattered(tmp_path / "made", self.driver, options, unit, seed=seed)
        result, after = shrink(image)
        assert result.moved is not None
        assert result.length_before - result.length_after >= unit * 4
        judge(self.driver, tmp_path / "image", after, image.model)

    def test_power_cuts(self, tmp_path: Path, case: tuple[dict[str, Any], int]) -> None:
        """At every write the image opens, is sound, and holds the same."""
        options, unit = case
        image = scattered(tmp_path / "made", self.driver, options, unit, units=14, seed=5)
        path = tmp_path / "cut"
        survive(
            image,
            portion=3 * unit,
            tolerated=self.tolerated,
            judge=lambda data: judge(self.driver, path, data, image.model, check=False, repair=self.repair),
        )

    def test_stopping(self, tmp_path: Path) -> None:
        """Wherever it is stopped, the image is sound."""
        options, unit = self.cases[0]
        image = scattered(tmp_path / "made", self.driver, options, unit, units=self.stop_units, seed=3)
        stop(image, portion=2 * unit)
