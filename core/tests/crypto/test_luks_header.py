"""The LUKS header by itself: what is refused, what a slot change leaves at every moment, the splitter."""

from __future__ import annotations

import random
import struct
import time
from typing import Any

import pytest

from vm_core.crypto import luks
from vm_core.crypto.ciphers import Suite
from vm_core.errors import ImageError, UsageError
from vm_core.testing.nodes import MemoryNode, RecordingNode
from vm_core.testing.replay import power_cuts

QUICK = luks.Settings(iter_time=1)
SECRETS = {"old": b"old one", "new": b"new one", "wrong": b"wrong"}


@pytest.fixture(scope="module")
def image() -> bytes:
    """A header with the passphrase ``old`` in slot 0 and ``new`` in slot 2."""
    node = MemoryNode()
    header, key = luks.create(node, QUICK, SECRETS["old"])
    header.add(2, key, SECRETS["new"], 1)
    node.truncate(header.payload_offset)
    return node.data()


def amend(node: Any, options: dict[str, Any], *, force: bool = False, key: str | None = "old") -> luks.Luks:
    """Change keys as a program would."""
    header = luks.Luks.read(node, "image")
    luks.amend(header, options, name="image", key_secret=key, secret=SECRETS.__getitem__, force=force)
    return header


@pytest.mark.parametrize("name", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("length", [16, 24, 32, 48, 64])
def test_splitting_is_undone_by_merging(name: str, length: int) -> None:
    """What is split comes back, and any changed bit of any stripe changes it."""
    chance = random.Random(length)
    key = chance.randbytes(length)
    material = luks.split(key, 50, name)
    assert len(material) == 50 * length
    assert luks.merge(material, 50, name) == key
    for _ in range(5):
        broken = bytearray(material)
        broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
        assert luks.merge(bytes(broken), 50, name) != key


def test_any_slot_unlocks(image: bytes) -> None:
    """Each passphrase gives the same key, any other one the peer's error."""
    header = luks.Luks.read(MemoryNode(image), "image")
    assert header.active == [0, 2]
    assert header.unlock(SECRETS["old"], "image") == header.unlock(SECRETS["new"], "image")
    with pytest.raises(ImageError, match="Invalid password, cannot unlock any keyslot"):
        header.unlock(SECRETS["wrong"], "image")


def slot(number: int, field: int) -> int:
    return 208 + 48 * number + field


def be32(value: int) -> bytes:
    return struct.pack(">I", value)


def text(value: str) -> bytes:
    return value.encode().ljust(32, b"\0")


#: Offset, bytes, QEMU's words for it.
DAMAGE = [
    (0, b"XUKS", "Volume is not in LUKS format"),
    (6, b"\0\0", "LUKS version 0 is not supported"),
    (6, b"\0\2", "LUKS version 2 is not supported"),
    (8, text("foo"), "Algorithm 'foo' with key size 32 bytes not supported"),
    (8, text("twofish"), "Algorithm 'twofish' with key size 32 bytes not supported"),
    (8, b"a" * 32, "LUKS header cipher name is not NUL terminated"),
    (40, text("xts"), "Unexpected cipher mode string format 'xts'"),
    (40, text("foo-plain"), "Cipher mode 'foo' not supported"),
    (40, text("xts-foo"), "IV generator 'foo' not supported"),
    (40, text("xts-essiv"), "Missing IV generator hash specification"),
    (40, text("xts-essiv:foo"), "Hash algorithm 'foo' not supported"),
    (40, text("xts-essiv:sha1"), "No AES cipher with key size 20 available"),
    (40, text("ctr-plain64"), "Algorithm 'aes' with key size 64 bytes not supported"),
    (40, b"x" * 32, "LUKS header cipher mode is not NUL terminated"),
    (72, text("foo"), "Hash algorithm 'foo' not supported"),
    (72, b"s" * 32, "LUKS header hash spec is not NUL terminated"),
    (104, be32(0), "LUKS payload is overlapping with the header"),
    (104, be32(8), "Keyslot 0 is overlapping with the encrypted payload"),
    (108, be32(0), "Algorithm 'aes' with key size 0 bytes not supported"),
    (108, be32(65), "Keyslots 0 and 1 are overlapping in the header"),
    (108, be32(0x7FFFFFFF), "Keyslot 0 is overlapping with the encrypted payload"),
    (164, be32(0), "LUKS key iteration count is zero"),
    (slot(0, 0), be32(5), "Keyslot 0 state (active/disable) is corrupted"),
    (slot(0, 4), be32(0), "Keyslot 0 iteration count is zero"),
    (slot(0, 40), be32(1), "Keyslot 0 is overlapping with the LUKS header"),
    (slot(1, 40), be32(9), "Keyslots 0 and 1 are overlapping in the header"),
    (slot(0, 44), be32(0xFFFFFFFF), "Keyslot 0 is corrupted (stripes -1 != 4000)"),
    (slot(1, 44), be32(5), "Keyslot 1 is corrupted (stripes 5 != 4000)"),
]


@pytest.mark.parametrize(("offset", "data", "told"), DAMAGE)
def test_damage_is_told_as_the_peer_does(image: bytes, offset: int, data: bytes, told: str) -> None:
    """A header that cannot be is refused in QEMU's words before anything is calculated."""
    damaged = image[:offset] + data + image[offset + len(data) :]
    with pytest.raises(ImageError) as caught:
        luks.Luks.read(MemoryNode(damaged), "image")
    assert caught.value.reason == told


def test_iterations_are_bounded(image: bytes) -> None:
    """Slots that ask for years of work are refused at once, by name."""
    damaged = bytearray(image)
    damaged[slot(0, 4) : slot(0, 8)] = be32(0xFFFFFFFF)
    header = luks.Luks.read(MemoryNode(bytes(damaged)), "image")
    start = time.monotonic()
    with pytest.raises(ImageError, match="LUKS keyslot 0 asks for 4294967295 iterations"):
        header.unlock(SECRETS["new"], "image")
    assert time.monotonic() - start < 1


def test_random_headers_cost_nothing(image: bytes) -> None:
    """Headers with random bytes in them open or are refused in one line, and quickly."""
    chance = random.Random(5)
    for _ in range(300):
        damaged = bytearray(image[:100_000])
        for _ in range(chance.randrange(1, 6)):
            damaged[chance.randrange(luks.LENGTH)] = chance.randrange(256)
        start = time.monotonic()
        try:
            header = luks.Luks.read(MemoryNode(bytes(damaged)), "image")
            header.info()
        except ImageError as error:
            assert "\n" not in str(error)  # noqa: PT017
        assert time.monotonic() - start < 0.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"iter-time": 10}, "Parameter 'state' is missing"),
        ({"state": "foo"}, "Parameter 'state' does not accept value 'foo'"),
        ({"state": "active"}, "'new-secret' is required to activate a keyslot"),
        (
            {"state": "active", "new-secret": "new", "old-secret": "old"},
            "'old-secret' must not be given when activating keyslots",
        ),
        (
            {"state": "active", "new-secret": "new", "keyslot": 8},
            "Invalid keyslot 8 specified, must be between 0 and 7",
        ),
        (
            {"state": "active", "new-secret": "new", "keyslot": -1},
            "Invalid keyslot 4294967295 specified, must be between 0 and 7",
        ),
        (
            {"state": "active", "new-secret": "new", "keyslot": 2},
            "Refusing to overwrite active keyslot 2 - please erase it first",
        ),
        (
            {"state": "inactive"},
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be "
            "given",
        ),
        ({"state": "inactive", "keyslot": 5}, "Given keyslot 5 is already erased (inactive) "),
        ({"state": "inactive", "new-secret": "new"}, "'new-secret' must not be given when erasing keyslots"),
        ({"state": "inactive", "iter-time": 1}, "'iter-time' must not be given when erasing keyslots"),
        ({"state": "inactive", "old-secret": "wrong"}, "No keyslots match given (old) password for erase operation"),
        (
            {"state": "inactive", "old-secret": "new", "keyslot": 0},
            "Given keyslot 0 doesn't contain the given old password for erase operation",
        ),
        (
            {"state": "active", "new-secret": "new", "iter-time": 1 << 62},
            "PBKDF iterations {} too large to scale: Numerical result out of range",
        ),
    ],
)
def test_wrong_changes_are_refused_as_by_the_peer(image: bytes, options: dict[str, Any], told: str) -> None:
    """Each change that cannot be is refused in QEMU's words, and nothing is written."""
    node = MemoryNode(image)
    with pytest.raises((UsageError, ImageError)) as caught:
        amend(node, dict(options))
    found = str(caught.value).removeprefix("image: ")
    start, _, end = told.partition("{}")
    assert found.startswith(start)
    assert found.endswith(end)
    header = luks.Luks.read(node, "image")
    assert header.unlock(SECRETS["old"], "image") == header.unlock(SECRETS["new"], "image")


def test_the_last_key_is_kept_unless_forced(image: bytes) -> None:
    """The only active slot is not erased by number or passphrase, but with force it is."""
    node = MemoryNode(image)
    amend(node, {"state": "inactive", "keyslot": 0})
    with pytest.raises(ImageError, match="Attempt to erase the only active keyslot 2"):
        amend(node, {"state": "inactive", "keyslot": 2}, key="new")
    with pytest.raises(ImageError, match="All the active keyslots match"):
        amend(node, {"state": "inactive", "old-secret": "new"}, key="new")
    amend(node, {"state": "inactive", "old-secret": "new"}, key="new", force=True)
    assert luks.Luks.read(node, "image").active == []


def test_eight_slots_are_all_there_are(image: bytes) -> None:
    """Slots are filled from the first free one on; then the peer's error."""
    node = MemoryNode(image)
    for _ in range(6):
        amend(node, {"state": "active", "new-secret": "new", "iter-time": 1})
    assert luks.Luks.read(node, "image").active == list(range(8))
    with pytest.raises(ImageError, match="Can't add a keyslot - all keyslots are in use"):
        amend(node, {"state": "active", "new-secret": "new", "iter-time": 1})


def test_erased_material_is_gone(image: bytes) -> None:
    """After erasing, the former header does not open with that passphrase any more: its material is overwritten."""
    node = MemoryNode(image)
    amend(node, {"state": "inactive", "keyslot": 0}, key="new")
    node.pwrite(0, image[: luks.LENGTH])
    header = luks.Luks.read(node, "image")
    assert header.active == [0, 2]
    with pytest.raises(ImageError, match="Invalid password"):
        header.unlock(SECRETS["old"], "image")
    header.unlock(SECRETS["new"], "image")


@pytest.mark.parametrize(
    ("options", "force", "survivor"),
    [
        ({"state": "active", "new-secret": "new", "iter-time": 1}, False, "old"),
        ({"state": "active", "new-secret": "new", "iter-time": 1, "keyslot": 6}, False, "old"),
        ({"state": "active", "new-secret": "wrong", "iter-time": 1, "keyslot": 2}, True, "old"),
        ({"state": "inactive", "keyslot": 0}, False, "new"),
        ({"state": "inactive", "old-secret": "old"}, False, "new"),
    ],
    ids=["add", "add across two sectors", "replace", "erase by number", "erase by passphrase"],
)
def test_power_cuts_leave_the_other_keys(image: bytes, options: dict[str, Any], force: bool, survivor: str) -> None:
    """At every moment of a change the header is sound, and the slots that are not concerned still open."""
    recorder = RecordingNode(MemoryNode(image))
    key = luks.Luks.read(MemoryNode(image), "image").unlock(SECRETS[survivor], "image")
    amend(recorder, dict(options), force=force)
    count = 0
    for cut in power_cuts(recorder, seed=2, variants=5):
        count += 1
        header = luks.Luks.read(MemoryNode(cut.image), "image")
        assert header.unlock(SECRETS[survivor], "image") == key, cut.story
        for number, one in enumerate(header.slots):
            # Whatever says that it is free holds nothing that a former header could open.
            if one.active != luks.ACTIVE and number in (0, 2):
                one.active = luks.ACTIVE
                former = luks.Slot.parse(image, 208 + 48 * number)
                one.salt, one.iterations = former.salt, former.iterations
                assert header.matches(number, SECRETS["old" if number == 0 else "new"]) is None, cut.story
    assert count > 10


def test_a_new_header_is_none_before_it_is_whole() -> None:
    """While a header is being made the storage opens with its passphrase, or is no LUKS image at all."""
    recorder = RecordingNode(MemoryNode(bytes(3 << 20)))
    luks.create(recorder, QUICK, b"secret")
    recorder.flush()
    opened = refused = 0
    for cut in power_cuts(recorder, seed=3, variants=6):
        try:
            header = luks.Luks.read(MemoryNode(cut.image), "image")
        except ImageError:
            refused += 1
            continue
        header.unlock(b"secret", "image")
        opened += 1
    assert opened
    assert refused


def test_iteration_time_is_kept() -> None:
    """Twice the time is about twice the iterations, and never fewer than a thousand."""
    suite = Suite()
    few, many = (luks._iterations(luks.Settings(suite, "sha256", time), 64, 2) for time in (500, 1000))
    assert 1.9 < many / few < 2.1
    assert luks._iterations(luks.Settings(suite, "sha256", 0), 64, 2) == luks.MIN_ITERATIONS
