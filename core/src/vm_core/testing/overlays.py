"""The tests of formats whose overlays are differencing images: they remember the parent by more than its name.

class TestTiny(OverlayConformance):
    driver, suffix = "tiny", ".tiny"

    def others(self, images):                      # what other programs read in images[0], above images[1], …
        yield "libtiny", read_by_libtiny(images)
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from vm_core import jobs
from vm_core.block.extents import walk
from vm_core.block.formatnode import FormatNode
from vm_core.block.jobs.commit import commit
from vm_core.block.node import Node
from vm_core.block.open import create_image, open_node
from vm_core.errors import ImageError, UsageError, VmError
from vm_core.plugins import find

from .nodes import MemoryNode, RecordingNode
from .replay import PowerCut, power_cuts

LONG = bool(os.environ.get("VM_LONG"))


class OverlayConformance:
    """Subclass and set :attr:`driver` and :attr:`suffix`; everything else has a default."""

    driver = ""
    suffix = ""
    #: Create options of the image at the bottom, and of those above it.
    base_options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    #: Bytes of the disk; the format may round them up.
    size = 5 << 20
    #: Moments of power cuts that are tried in the short run.
    cuts = 40
    #: An overlay can become an image without a parent.
    detaches = False

    def others(self, images: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
        """What other programs read in the first of *images*, each of which lies on the next one."""
        return iter(())

    # Helpers

    def path(self, folder: Path, name: str) -> Path:
        return folder / f"{name}{self.suffix}"

    def base(self, folder: Path, chance: random.Random, name: str = "base") -> bytearray:
        """An image without a parent in *folder*, and what is in it."""
        path = self.path(folder, name)
        create_image(str(path), self.driver, self.size, dict(self.base_options))
        with open_node(str(path), format=self.driver, readonly=False) as node:
            model = bytearray(node.size)
            for _ in range(12):
                change(node, model, chance)
        return model

    def overlay(self, folder: Path, name: str, below: str, **options: Any) -> Path:
        """An empty overlay in *folder*."""
        path = self.path(folder, name)
        recorded = {"backing_file": below + self.suffix, **self.options, **options}
        create_image(str(path), self.driver, None, recorded)
        return path

    def agree(self, folder: Path, names: Sequence[str], model: bytes | bytearray) -> None:
        """Everybody reads *model* in the first of *names*."""
        path = self.path(folder, names[0])
        with open_node(str(path), format=self.driver) as node:
            assert node.pread(0, node.size) == model
            below: Node | None = node
            for name in names:
                assert below is not None
                assert os.path.samefile(below.filename, self.path(folder, name))
                below = below.backing
            assert below is None
            for extent in walk(node):
                if extent.storage is not None:
                    assert extent.storage.pread(extent.host, extent.length) == model[extent.offset : extent.end]
        for program, found in self.others([self.path(folder, name) for name in names]):
            assert found == model, f"{program} reads something else"

    # Tests

    @pytest.mark.parametrize("seed", range(8 if LONG else 2))
    def test_three_generations_are_a_bytearray(self, tmp_path: Path, seed: int) -> None:
        """Whatever is written to the youngest of three images is there and in no other one; other programs agree."""
        chance = random.Random(seed)
        model = self.base(tmp_path, chance)
        self.overlay(tmp_path, "child", "base")
        self.agree(tmp_path, ["child", "base"], model)
        self._write(self.path(tmp_path, "child"), model, chance, 15)
        self.agree(tmp_path, ["child", "base"], model)
        middle = bytes(model)
        self.overlay(tmp_path, "leaf", "child")
        below = [self.path(tmp_path, name).read_bytes() for name in ("child", "base")]
        for _ in range(6 if LONG else 2):
            self._write(self.path(tmp_path, "leaf"), model, chance, 25)
            self.agree(tmp_path, ["leaf", "child", "base"], model)
        assert [self.path(tmp_path, name).read_bytes() for name in ("child", "base")] == below
        self.agree(tmp_path, ["child", "base"], middle)

    def _write(self, path: Path, model: bytearray, chance: random.Random, count: int) -> None:
        with open_node(str(path), format=self.driver, readonly=False) as node:
            for _ in range(count):
                change(node, model, chance)
                if chance.random() < 0.1:
                    node.flush()
            assert node.pread(0, node.size) == model

    @pytest.mark.parametrize("far", [False, True], ids=["parent", "grandparent"])
    @pytest.mark.parametrize("seed", range(4 if LONG else 1))
    def test_commit(self, tmp_path: Path, far: bool, seed: int) -> None:
        """What an overlay holds goes into an image below it, and the chain is as valid as before."""
        chance = random.Random(seed)
        model = self.base(tmp_path, chance)
        for name, below in (("child", "base"), ("leaf", "child")):
            self._write(self.overlay(tmp_path, name, below), model, chance, 12)
        with open_node(str(self.path(tmp_path, "leaf")), format=self.driver, readonly=False) as node:
            assert node.backing is not None
            commit(node, node.backing.backing if far else node.backing)
            assert node.pread(0, node.size) == model
        self.agree(tmp_path, ["leaf", "child", "base"], model)
        self.agree(tmp_path, ["base"] if far else ["child", "base"], model)
        leaf = self.path(tmp_path, "leaf")
        if not far:
            with open_node(str(leaf), format=self.driver) as node:
                assert isinstance(node, FormatNode)
                assert all(run.storage is None for run in node.map(0, node.size)), "the overlay was not emptied"
        self._write(leaf, model, chance, 12)
        self.agree(tmp_path, ["leaf", "child", "base"], model)

    @pytest.mark.parametrize("seed", range(4 if LONG else 1))
    def test_rebase(self, tmp_path: Path, seed: int) -> None:
        """An overlay can be given another parent, and shows what it did."""
        chance = random.Random(seed)
        model = self.base(tmp_path, chance)
        for name, below in (("child", "base"), ("leaf", "child")):
            self._write(self.overlay(tmp_path, name, below), model, chance, 8)
        leaf = self.path(tmp_path, "leaf")
        jobs.rebase(str(leaf), f"base{self.suffix}", backing_format=self.driver)
        self.agree(tmp_path, ["leaf", "base"], model)
        self._write(leaf, model, chance, 8)
        self.agree(tmp_path, ["leaf", "base"], model)
        if self.detaches:
            jobs.rebase(str(leaf), None)
            self.agree(tmp_path, ["leaf"], model)
        else:
            with pytest.raises(UsageError, match="has a parent"):
                jobs.rebase(str(leaf), None, unsafe=True)
        other = random.Random(seed + 1)
        self.base(tmp_path, other, "other")
        jobs.rebase(str(leaf), f"other{self.suffix}", backing_format=self.driver, unsafe=True)
        with open_node(str(leaf), format=self.driver) as node:
            assert node.backing is not None
            assert os.path.samefile(node.backing.filename, self.path(tmp_path, "other"))

    def _opened(self, image: Node, below: Node, *, readonly: bool = True) -> Node:
        return open_node({"driver": self.driver, "file": image, "backing": below}, readonly=readonly)

    def _after(self, cut: PowerCut, below: Node) -> bytes:
        """What is in the image that a power cut left, once it was opened for writing."""
        with self._opened(MemoryNode(cut.image), below, readonly=False) as node:
            return node.pread(0, node.size)

    @pytest.mark.parametrize("seed", range(6 if LONG else 1))
    def test_power_cuts(self, tmp_path: Path, seed: int) -> None:
        """Whatever a power cut leaves of an overlay opens and has every byte that was flushed and not touched since."""
        chance = random.Random(seed)
        model = self.base(tmp_path, chance)
        image = self.overlay(tmp_path, "child", "base").read_bytes()
        below = MemoryNode(bytes(model), readonly=True)
        recorder = RecordingNode(MemoryNode(image))
        node = self._opened(recorder, below, readonly=False)
        touched: list[tuple[int, int, int]] = []
        since: dict[int, int] = {}
        marks = []

        def mark() -> None:
            marks.append(bytes(model))
            recorder.mark(marks[-1])
            since[id(marks[-1])] = recorder.now()

        mark()
        for _ in range(40):
            if chance.random() < 0.3:
                node.flush()
                mark()
                continue
            moment = recorder.now()
            touched.append((moment, *change(node, model, chance)))
        node.close()
        mark()
        count = 0
        for cut in power_cuts(recorder, seed=seed, variants=3, limit=150 if LONG else min(25, self.cuts)):
            if cut.mark is None:
                continue
            count += 1
            found = self._after(cut, below)
            expected = bytearray(cut.mark)
            for moment, offset, length in touched:
                if since[id(cut.mark)] <= moment <= cut.moment:
                    expected[offset : offset + length] = found[offset : offset + length]
            assert found == expected, cut.story
        assert count > min(20, self.cuts)

    def test_power_cuts_while_it_is_emptied(self, tmp_path: Path) -> None:
        """An overlay whose data is all in the image below shows the same in every state on the way to being empty."""
        chance = random.Random(3)
        model = self.base(tmp_path, chance)
        image = self.overlay(tmp_path, "child", "base")
        self._write(image, model, chance, 20)
        below = MemoryNode(bytes(model), readonly=True)
        recorder = RecordingNode(MemoryNode(image.read_bytes()))
        node = self._opened(recorder, below, readonly=False)
        assert isinstance(node, FormatNode)
        with node.quiesce() as driver:
            driver.empty()
        self._small(node, model, chance)
        node.close()
        for cut in power_cuts(recorder, variants=6 if LONG else 4, limit=None if LONG else self.cuts):
            assert self._after(cut, below) == model, cut.story

    @staticmethod
    def _small(node: Node, model: bytes | bytearray, chance: random.Random) -> None:
        """Write what is there already."""
        for _ in range(4):
            offset = chance.randrange(len(model) - 5000)
            node.pwrite(offset, model[offset : offset + 5000])
        node.flush()

    def test_power_cuts_while_it_is_rebased(self, tmp_path: Path) -> None:
        """The parent is the former one or the new one at every moment, and the image opens."""
        chance = random.Random(4)
        model = self.base(tmp_path, chance)
        self.base(tmp_path, random.Random(4), "other")
        path = self.overlay(tmp_path, "child", "base")
        self._write(path, model, chance, 10)
        with open_node({"driver": "file", "filename": str(path)}, readonly=False) as file:
            recorder = RecordingNode(file)
            recorder.filename = str(path)
            node = self._opened(recorder, MemoryNode(bytes(model), readonly=True), readonly=False)
            assert isinstance(node, FormatNode)
            with node.quiesce() as driver:
                driver.change_backing(f"other{self.suffix}", self.driver)
                driver.flush()
            self._small(node, model, chance)
            node.close()
        seen = set()
        for cut in power_cuts(recorder, variants=5 if LONG else 3, limit=None if LONG else self.cuts):
            path.write_bytes(cut.image)
            open_node(str(path), format=self.driver, readonly=False).close()
            with open_node(str(path), format=self.driver) as node:
                assert node.backing is not None
                assert node.pread(0, node.size) == model, cut.story
                seen.add(os.path.basename(node.backing.filename))
        assert seen == {f"base{self.suffix}", f"other{self.suffix}"}

    def test_power_cuts_while_it_is_made(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before it is an empty overlay it is no image."""
        monkeypatch.chdir(tmp_path)
        model = self.base(tmp_path, random.Random(5))
        recorder = RecordingNode(MemoryNode())
        options = {"backing_file": f"base{self.suffix}", "backing_fmt": self.driver, **self.options}
        find("format", self.driver).load().create(recorder, len(model), options)
        made = 0
        for cut in power_cuts(recorder, variants=6, limit=60):
            try:
                with self._opened(MemoryNode(cut.image), MemoryNode(bytes(model), readonly=True)) as node:
                    assert node.pread(0, node.size) == model
                    made += 1
            except ImageError:
                assert cut.moment < recorder.now()
        assert made

    def test_what_cannot_be_a_parent_is_refused(self, tmp_path: Path) -> None:
        """By name, and nothing is left behind."""
        self.base(tmp_path, random.Random(1))
        (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
        child = self.path(tmp_path, "child")
        base = f"base{self.suffix}"
        for options in (
            {"backing_file": f"gone{self.suffix}"},
            {"backing_file": "disk.raw"},
            {"backing_file": "disk.raw", "backing_fmt": "raw"},
            {"backing_file": base, "size": 1 << 20},
            {"backing_file": "nbd://localhost:1/x"},
            {"backing_file": 'json:{"driver": "file", "filename": "' + str(tmp_path / base) + '"}'},
        ):
            for look in (True, False):
                given = dict(options)
                size = given.pop("size", None if look else self.size)
                with pytest.raises(VmError) as caught:
                    create_image(str(child), self.driver, size, given, check_backing=look)  # type: ignore[arg-type]
                assert str(caught.value).count("\n") <= 1
                assert not child.exists()

    def test_the_tools(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """``vm-img create -b`` needs no ``-F``; called by the peer's name it has its sentence for it."""
        from vm_core.cli.img.main import main

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["vm-img"])
        model = self.base(tmp_path, random.Random(2))
        base, child, leaf = (f"{name}{self.suffix}" for name in ("base", "child", "leaf"))

        def run(*words: str, program: str = "vm-img") -> tuple[int, str, str]:
            code = main(list(words), program)
            sys.stdout.flush()
            return code, *capfd.readouterr()

        code, out, _ = run("create", "-f", self.driver, "-b", base, child)
        assert code == 0
        assert f"fmt={self.driver}" in out
        assert f"backing_file={base} backing_fmt={self.driver}" in out
        assert run("create", "-q", "-f", self.driver, "-b", child, "-F", self.driver, leaf)[0] == 0
        code, out, _ = run("info", "--backing-chain", leaf)
        assert code == 0
        assert [line for line in out.splitlines() if line.startswith(("image:", "backing file:"))] == [
            f"image: {leaf}",
            f"backing file: {child}",
            f"image: {child}",
            f"backing file: {base}",
            f"image: {base}",
        ]
        self.agree(tmp_path, ["leaf", "child", "base"], model)
        assert "backing_file" in run("create", "-f", self.driver, "-o", "help")[1]
        for words, told in (
            (
                ["create", "-f", self.driver, "-b", base, "-F", self.driver, "new"],
                "Backing file not supported for file ",
            ),
            (["create", "-f", self.driver, "-o", f"backing_file={base}", "new"], "Invalid parameter 'backing_file'"),
            (["rebase", "-u", "-b", base, "-F", self.driver, leaf], ": Operation not supported"),
        ):
            code, _, err = run(*words, program="qemu-img")
            assert code == 1
            assert told in err
        assert "backing" not in run("create", "-f", self.driver, "-o", "help", program="qemu-img")[1]
        assert not (tmp_path / "new").exists()


def change(node: Node, model: bytearray, chance: random.Random) -> tuple[int, int]:
    """Write or zero something in *node* and *model*; returns where and how much."""
    size = len(model)
    length = min(chance.choice([1, 100, 512, 4096, 5000, 70_000, 1 << 20, chance.randrange(1, 2 << 20)]), size)
    offset = chance.randrange(size - length + 1)
    if chance.random() < 0.3:
        offset -= offset % (1 << chance.randrange(9, 21))
    what = chance.random()
    if what < 0.75:
        data = chance.randbytes(min(length, 997)) * (length // min(length, 997) + 1)
        node.pwrite(offset, data[:length])
        model[offset : offset + length] = data[:length]
    else:
        node.zero(offset, length, unmap=what < 0.87)
        model[offset : offset + length] = bytes(length)
    return offset, length
