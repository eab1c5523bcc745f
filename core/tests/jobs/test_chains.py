"""Commit and rebase: what a chain holds stays what it was."""

from __future__ import annotations

import random

import pytest

from vm_core.block.formatnode import FormatNode
from vm_core.block.jobs.commit import chain, commit
from vm_core.block.jobs.rebase import rebase
from vm_core.block.node import Node
from vm_core.block.raw import RawNode
from vm_core.errors import ImageError
from vm_core.testing.nodes import MemoryNode

from .kit import K, contents, scribble, toy


def make_chain(chance: random.Random, *sizes: int) -> tuple[list[FormatNode], bytearray]:
    """Images above each other, the last on top, and what the top one shows."""
    images: list[FormatNode] = []
    model = bytearray()
    for size in sizes:
        model = model[:size].ljust(size, b"\0")
        images.append(toy(size, backing=images[-1] if images else None))
        scribble(chance, images[-1], model, 12)
    return images, model


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "sizes", [(256 * K, 256 * K, 256 * K), (64 * K, 300 * K, 6000 * K), (512 * K, 256 * K, 300 * K)]
)
def test_commit_moves_everything_down(seed: int, sizes: tuple[int, ...]) -> None:
    """After a commit the base alone shows what the chain showed, and grew to its size."""
    (base, _, top), model = make_chain(random.Random(seed), *sizes)
    commit(top, base, keep=True)
    assert base.size >= len(model)
    assert contents(base)[: len(model)] == model
    assert contents(top) == model


def test_commit_into_raw() -> None:
    """The base may be of any format."""
    base = RawNode(MemoryNode(b"b" * 100 * K))
    top = toy(150 * K, backing=base)
    top.pwrite(90 * K, b"t" * 20 * K)
    expected = contents(top)
    commit(top, keep=True)
    assert contents(base) == expected


def test_commit_needs_a_backing_image() -> None:
    """Without one it is refused with a sentence."""
    with pytest.raises(ImageError, match="Image does not have a backing file"):
        commit(toy(K))


def test_a_format_that_cannot_be_emptied_keeps_its_data() -> None:
    """The data is in the base then, and the overlay still shows it."""
    (base, top), model = make_chain(random.Random(1), 64 * K, 64 * K)
    commit(top)
    assert contents(base) == contents(top) == model


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("sizes", [(256 * K, 256 * K), (64 * K, 300 * K), (500 * K, 100 * K), (0, 256 * K)])
def test_rebase_changes_nothing(seed: int, sizes: tuple[int, int]) -> None:
    """Above another backing image, longer, shorter or none, the image shows what it showed."""
    chance = random.Random(seed)
    (_, image), model = make_chain(chance, 256 * K, 256 * K)
    new: Node | None = None
    if sizes[0]:
        (_, new), _ = make_chain(chance, *sizes)
    rebase(image, new)
    image.set_backing(new)
    assert contents(image) == model


def test_rebase_onto_the_same_writes_nothing() -> None:
    """What both chains hold at one place is neither read nor written."""
    (_, image), model = make_chain(random.Random(5), 256 * K, 256 * K)
    before = image.allocated()
    rebase(image, image.backing)
    assert image.allocated() == before
    assert contents(image) == model


def test_chain_lists_images_from_the_top() -> None:
    """The chain is the image, its backing image, and so on."""
    images, _ = make_chain(random.Random(1), K, K, K)
    assert chain(images[-1]) == images[::-1]
