"""Manifests are read from any text without harm, whatever its size, and say what they held."""

from __future__ import annotations

import io
import json
import random
import tracemalloc
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from vm_core.block.jobs import manifest as module
from vm_core.block.jobs.manifest import Manifest, ManifestError
from vm_core.block.jobs.verify import Range, make_manifest, verify
from vm_core.block.raw import RawNode
from vm_core.testing.nodes import MemoryNode

K = 1024


def raw(data: bytes | bytearray) -> RawNode:
    return RawNode(MemoryNode(data))


def made(blocks: int = 40, algorithm: str = "sha256", *, chance: random.Random | None = None) -> Manifest:
    chance = chance or random.Random(3)
    data = b"".join(chance.choice([bytes(4096), chance.randbytes(4096)]) for _ in range(blocks))
    return make_manifest(raw(data), block_size=4096, algorithm=algorithm, with_sum=True)


class Dribbling(io.BytesIO):
    """Gives few bytes at a time."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(7, size or 0) if size != -1 else 7)


@pytest.mark.parametrize("algorithm", ["sha256", "blake2b"])
@pytest.mark.parametrize("seed", range(10))
def test_any_layout(seed: int, algorithm: str) -> None:
    """Members in any order, on one line or indented, read in pieces of any size: the same manifest."""
    chance = random.Random(seed)
    manifest = made(chance.randrange(0, 60), algorithm, chance=chance)
    value = json.loads("".join(manifest.lines()))
    members = list(value.items())
    chance.shuffle(members)
    members.insert(chance.randrange(len(members)), ("comment", 'a "word", [another] and \\ more'))
    for options in ({}, {"indent": 3}, {"separators": (",", ":")}, {"sort_keys": True}):
        text = json.dumps(dict(members), **options).encode()  # type: ignore[arg-type]
        assert Manifest.parse(text) == manifest
        assert Manifest.read(Dribbling(text)) == manifest
    upper = json.dumps({**value, "sum": value["sum"].upper(), "digest": value["digest"].upper()})
    assert Manifest.parse(upper) == manifest


@pytest.mark.parametrize("seed", range(40))
def test_damaged_texts(seed: int) -> None:
    """Whatever bytes are changed, left out or put in: it is refused with one short line, or says the same as before."""
    chance = random.Random(seed)
    manifest = made(8)
    text = "".join(manifest.lines()).encode()
    for _ in range(150):
        data = bytearray(text)
        at = chance.randrange(len(data))
        action = chance.randrange(4)
        if action == 0:
            data[at] = chance.randrange(256)
        elif action == 1:
            del data[at : at + chance.randrange(1, 40)]
        elif action == 2:
            data[at:at] = chance.choice(
                [b"[", b"]", b"{", b'"', b",", b"null", b"\\", b"0", b"\0", b"1e999", b"\xff\xfe"]
            )
        else:
            del data[at:]
        told = ""
        try:
            found = Manifest.parse(bytes(data))
        except ManifestError as error:
            told = str(error)
        assert "\n" not in told
        assert len(told) < 200
        if told:
            continue
        # Sizes and the sum are not in the digest.
        assert (found.digests, found.algorithm) == (manifest.digests, manifest.algorithm)


class Endless(io.RawIOBase):
    """A text that goes on with *piece* until *size* bytes were read."""

    def __init__(self, start: bytes, piece: bytes, size: int) -> None:
        self.left = size
        self._start, self._piece = start, piece * (1 + (1 << 20) // len(piece))
        self.taken = 0

    def read(self, size: int = -1) -> bytes:
        data = (self._start + self._piece)[: min(size, self.left)]
        self._start = b""
        self.left -= len(data)
        self.taken += len(data)
        return data


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b"\0"),
        (b"", b" "),
        (b"", b"["),
        (b"", b'{"a":'),
        (b'{"kind": "', b"x"),
        (b'{"version": ', b"1"),
        (b'{"version": "', b"\\n"),
        (b"{", b'"a": 1, '),
        (b'{"other": [', b"[],"),
        (b'{"blocks": [', b"[],"),
        (b'{"blocks": [', b"0.5,"),
        (b'{"blocks": [', b" "),
        (b'{"blocks": [', b'"'),
        (b'{"blocks": ["', b"a"),
        (b'{"blocks": [null', b"  ,null"),
        (b'{"blocks": [', b'"' + b"ab" * 32 + b'",\n'),
    ],
    ids=lambda value: value[:12],
)
def test_memory_and_time_are_bounded(start: bytes, piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of gigabytes that is no manifest, or has too many blocks, costs a few megabytes and ends soon."""
    monkeypatch.setattr(module, "MOST", 20000)
    monkeypatch.setattr(module, "MOST_BYTES", 64 << 20)
    file = Endless(start, piece, 8 << 30)
    begun = monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(ManifestError) as caught:
            Manifest.read(file)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 200
    assert peak < 16 << 20
    assert file.taken <= (64 << 20) + (2 << 20)
    assert monotonic() - begun < 30


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    value = json.loads("".join(made(5).lines()))
    change(value)
    return json.dumps(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "it ends too early"),
        ("{}", "kind"),
        ("nothing", "does not begin with {"),
        ('{"kind" "x"}', ": is missing"),
        ('{"kind": "x" "y": 1}', ", or } is missing"),
        ("{1: 2}", "name is missing"),
        ('{"kind": truth}', "no JSON"),
        ('{"kind": 1, "kind": 2}', "twice"),
        ('{"x": {}}', "neither a text nor a number"),
        (edited(lambda value: None) + "{", "more behind it"),
        (edited(lambda value: value.update(version="9" * 200)), r"version '9+… is not known"),
        (edited(lambda value: value.update(version="9" * 600)), "longer than 256 bytes"),
        (edited(lambda value: value.update(algorithm="blake2b")), "digests of 32 bytes; those of blake2b have 64"),
        (edited(lambda value: value["blocks"].append("ab" * 64)), "block 5"),
        (edited(lambda value: value["blocks"].__setitem__(0, "00" * 32)), "block 0 .* nothing but zeroes"),
        (edited(lambda value: value["blocks"].__setitem__(0, "ab " * 21 + "a")), "block 0"),
        (edited(lambda value: value["blocks"].__setitem__(0, "\N{DIGIT ONE}\N{FULLWIDTH DIGIT ONE}" * 32)), "block 0"),
        (edited(lambda value: value.update(sum="zz" * 32)), "sum"),
        (edited(lambda value: value.update(digest=None)), "changed or damaged"),
        (edited(lambda value: value.update({"virtual-size": 1e4})), "virtual-size"),
        (edited(lambda value: value.update({"virtual-size": float("nan")})), "virtual-size"),
        (edited(lambda value: value.update({"block-size": 1 << 62})), "power of two"),
    ],
)
def test_what_is_wrong_is_told(text: str, words: str) -> None:
    """One sentence that names it."""
    with pytest.raises(ManifestError, match=words) as caught:
        Manifest.parse(text)
    assert "\n" not in str(caught.value)


def test_grown_image() -> None:
    """Of an image that has grown, the former end within a block is compared for what it was, not for what came behind
    it; a change of it is found."""
    chance = random.Random(1)
    for tail in (chance.randbytes(5000), bytes(5000)):
        data = chance.randbytes(8 * 4096) + tail
        manifest = make_manifest(raw(data), block_size=4096)
        grown = verify(raw(data + b"new" * 3000), manifest)
        assert grown.resized
        assert not grown.differences
        changed = bytearray(data)
        changed[-1] ^= 1
        grown = verify(raw(changed + b"new" * 3000), manifest)
        assert grown.differences == [Range(9 * 4096, 5000 - 4096)]
