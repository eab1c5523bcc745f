"""LUKS version 1: the header, its key slots, the anti-forensic splitter (*LUKS On-Disk Format Specification 1.2.3*).

Theory of operation
-------------------
The data is encrypted with a random *master key*. Each of eight key slots may hold it, split into 4000 stripes of which
all are needed, encrypted with a key that PBKDF2 makes of a passphrase and the slot's salt. The header has a PBKDF2
digest of the master key, which tells whether what came out of a slot is right. Key material and data are encrypted
alike (:mod:`.ciphers`): by sectors of 512 bytes, numbered from 0 at the start of each.

Layout, as qemu-img and cryptsetup have it: the header in the first 4096 bytes, the key material of the slots behind it,
each rounded up to 4096 bytes, then the payload.

Order of writes. A slot is filled while its header says *disabled*: material, flush, the slot's fields, flush, and then
the four bytes that make it active. It is emptied the other way round, so that a slot that is said to be disabled never
holds material still: the material is overwritten with random bytes, flush, then its fields. A power cut therefore
leaves every other slot as it was, and this one active and whole, or useless.

What a header may cost. Sizes are bounded by the key's (at most 64 bytes) and the stripes, of which there must be 4000.
Iterations are 32-bit numbers that somebody else chose: opening an image calculates at most :data:`MAX_ITERATIONS` of
them, over all slots, which no slot made in earnest comes near, and refuses beyond by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ..block.structs import Record, raw, u16, u32
from ..errors import ImageError, UsageError
from .ciphers import (
    ALGORITHMS,
    FOREIGN,
    FOREIGN_MODES,
    GENERATORS,
    MODES,
    SectorCipher,
    Suite,
    check_suite,
    sector_cipher,
)
from .hashes import DIGEST_LENGTHS, check_hash, hasher, iterations_per_second, pbkdf2

MAGIC = b"LUKS\xba\xbe"
SECTOR = 512
#: What slots and payload are aligned to, which is also the space of the header, in bytes.
ALIGNMENT = 4096
SLOTS = 8
STRIPES = 4000
DIGEST_LENGTH = 20
SALT_LENGTH = 32
ACTIVE, DISABLED = 0x00AC71F3, 0x0000DEAD
#: Milliseconds that unlocking a slot should take, where nothing is said.
ITER_TIME = 2000
#: The fewest iterations for the digest of the master key and for a slot.
MIN_ITERATIONS = 1000
#: The most iterations that opening one image may cost: about a minute and a half of one processor.
MAX_ITERATIONS = 1 << 28
#: Times that erased key material is overwritten with random bytes.
ERASURES = 4
#: Where the payload may begin and end at most.
MAX_SIZE = (1 << 63) - 1

_NAMES = ("aes", "serpent", "twofish")


class Area(Protocol):
    """Where a header is: a node, or a part of one."""

    def pread(self, offset: int, length: int) -> bytes: ...

    def pwrite(self, offset: int, data: bytes) -> None: ...

    def flush(self) -> None: ...


class Slot(Record, order="big"):
    """A key slot: how the key that its material is encrypted with comes from a passphrase."""

    active: int = u32(0, default=DISABLED, doc="0x00AC71F3 in use, 0x0000DEAD free")
    iterations: int = u32(4, doc="of PBKDF2")
    salt: bytes = raw(8, SALT_LENGTH, doc="of PBKDF2")
    material_offset: int = u32(40, doc="where the key material is, in sectors")
    stripes: int = u32(44, default=STRIPES, doc="the anti-forensic stripes of the material")


class Header(Record, order="big"):
    """The partition header up to its key slots."""

    magic: bytes = raw(0, 6, default=MAGIC, doc='"LUKS\\xba\\xbe"')
    version: int = u16(6, default=1, doc="1")
    cipher_name: bytes = raw(8, 32, doc="the cipher, null-terminated")
    cipher_mode: bytes = raw(40, 32, doc="its mode and the vectors' generator, null-terminated")
    hash_spec: bytes = raw(72, 32, doc="the hash of PBKDF2 and of the splitter, null-terminated")
    payload_offset: int = u32(104, doc="where the payload is, in sectors")
    key_bytes: int = u32(108, doc="bytes of the master key")
    digest: bytes = raw(112, DIGEST_LENGTH, doc="PBKDF2 of the master key")
    digest_salt: bytes = raw(132, SALT_LENGTH, doc="the salt of that")
    digest_iterations: int = u32(164, doc="the iterations of that")
    uuid: bytes = raw(168, 40, doc="the volume's UUID as text")


#: Bytes of header and slots.
LENGTH = Header.LENGTH + SLOTS * Slot.LENGTH


class Settings(NamedTuple):
    """What a new header is made with."""

    suite: Suite = Suite()
    hash: str = "sha256"
    #: Milliseconds.
    iter_time: int = ITER_TIME


def settings(options: dict[str, Any], prefix: str = "") -> Settings:
    """Take ``cipher-alg``, ``cipher-mode``, ``ivgen-alg``, ``ivgen-hash-alg``, ``hash-alg`` and ``iter-time`` out of
    *options*, where their names begin with *prefix*. Raises UsageError."""

    def take(name: str, default: str | None, known: tuple[str, ...]) -> str | None:
        value = options.pop(prefix + name, None)
        if value is None:
            return default
        if value not in known:
            raise UsageError(f"Parameter '{name}' does not accept value '{value}'")
        return str(value)

    algorithm = take("cipher-alg", "aes-256", (*ALGORITHMS, *FOREIGN))
    mode = take("cipher-mode", "xts", (*MODES, *FOREIGN_MODES))
    generator = take("ivgen-alg", "plain64", GENERATORS)
    generator_hash = take("ivgen-hash-alg", None, tuple(DIGEST_LENGTHS))
    hash_name = take("hash-alg", "sha256", tuple(DIGEST_LENGTHS))
    iter_time = options.pop(prefix + "iter-time", None)
    assert algorithm is not None
    assert mode is not None
    assert generator is not None
    assert hash_name is not None
    generator_hash = (generator_hash or "sha256") if generator == "essiv" else None
    suite = Suite(algorithm, mode, generator, generator_hash)
    return Settings(suite, hash_name, ITER_TIME if iter_time is None else int(iter_time))


def payload_offset(suite: Suite) -> int:
    """Bytes before the payload of a new image. Raises UsageError for a suite that there cannot be."""
    return ALIGNMENT + SLOTS * _material_space(suite.key_length)


def _material_space(key_length: int) -> int:
    return -(-key_length * STRIPES // ALIGNMENT) * ALIGNMENT


class Luks:
    """A header and where it is."""

    def __init__(self, area: Area, header: Header, slots: list[Slot], suite: Suite, hash_name: str) -> None:
        self.area = area
        self.header = header
        self.slots = slots
        self.suite = suite
        self.hash = hash_name

    @property
    def payload_offset(self) -> int:
        """Bytes before the payload."""
        return int(self.header.payload_offset) * SECTOR

    # Reading

    @classmethod
    def read(cls, area: Area, name: str) -> Luks:
        """Read and check the header of the image called *name*. Raises ImageError."""
        data = area.pread(0, LENGTH)
        if data[:6] != MAGIC:
            raise ImageError(name, "Volume is not in LUKS format")
        header = Header.parse(data)
        if header.version != 1:
            raise ImageError(name, f"LUKS version {header.version} is not supported")
        slots = [Slot.parse(data, Header.LENGTH + Slot.LENGTH * number) for number in range(SLOTS)]
        cipher = _text(name, header.cipher_name, "cipher name")
        mode = _text(name, header.cipher_mode, "cipher mode")
        hash_name = _text(name, header.hash_spec, "hash spec")
        _check_layout(name, header, slots)
        suite = _parse_suite(name, cipher, mode, header.key_bytes)
        if hash_name not in DIGEST_LENGTHS:
            raise ImageError(name, f"Hash algorithm '{hash_name}' not supported")
        try:
            check_suite(suite)
        except UsageError as error:
            raise ImageError(name, str(error)) from None
        return cls(area, header, slots, suite, hash_name)

    def unlock(self, passphrase: bytes, name: str) -> bytes:
        """The master key. Raises ImageError where no slot takes the *passphrase*."""
        found = self._find(passphrase, name)
        if found is None:
            raise ImageError(name, "Invalid password, cannot unlock any keyslot")
        return found[1]

    def cipher(self, key: bytes) -> SectorCipher:
        """The cipher of the payload."""
        return sector_cipher(self.suite, key)

    def matches(self, number: int, passphrase: bytes) -> bytes | None:
        """The master key if slot *number* is active and opens with *passphrase*."""
        slot = self.slots[number]
        if slot.active != ACTIVE:
            return None
        length = int(self.header.key_bytes)
        derived = pbkdf2(self.hash, passphrase, slot.salt, slot.iterations, length)
        sectors = -(-length * STRIPES // SECTOR)
        material = bytearray(self.area.pread(slot.material_offset * SECTOR, sectors * SECTOR))
        view = memoryview(material)
        sector_cipher(self.suite, derived).decrypt(0, view, view)
        key = merge(bytes(view[: length * STRIPES]), STRIPES, self.hash)
        check = pbkdf2(self.hash, key, self.header.digest_salt, self.header.digest_iterations, DIGEST_LENGTH)
        return key if check == self.header.digest else None

    def _find(self, passphrase: bytes, name: str) -> tuple[int, bytes] | None:
        check_hash(self.hash)
        budget = MAX_ITERATIONS
        for number, slot in enumerate(self.slots):
            if slot.active != ACTIVE:
                continue
            budget = self._spend(budget, slot, number, name)
            key = self.matches(number, passphrase)
            if key is not None:
                return number, key
        return None

    def _spend(self, budget: int, slot: Slot, number: int, name: str) -> int:
        budget -= slot.iterations + self.header.digest_iterations
        if budget < 0:
            raise ImageError(
                name,
                f"LUKS keyslot {number} asks for {slot.iterations} iterations of PBKDF2 (and "
                f"{self.header.digest_iterations} for the master key): more than {MAX_ITERATIONS} an image are refused",
            )
        return budget

    def slots_matching(self, passphrase: bytes, name: str) -> list[int]:
        """The active slots that open with *passphrase*."""
        check_hash(self.hash)
        budget = MAX_ITERATIONS
        found: list[int] = []
        for number, slot in enumerate(self.slots):
            if slot.active == ACTIVE:
                budget = self._spend(budget, slot, number, name)
                if self.matches(number, passphrase) is not None:
                    found.append(number)
        return found

    @property
    def active(self) -> list[int]:
        """The slots in use."""
        return [number for number, slot in enumerate(self.slots) if slot.active == ACTIVE]

    def info(self) -> dict[str, Any]:
        """QEMU's QCryptoBlockInfoLUKS."""
        suite = self.suite
        return {
            "ivgen-alg": suite.generator,
            "hash-alg": self.hash,
            "cipher-alg": suite.algorithm,
            "uuid": self.header.uuid.split(b"\0", 1)[0].decode("utf-8", "backslashreplace"),
            **({"ivgen-hash-alg": suite.generator_hash} if suite.generator_hash else {}),
            "cipher-mode": suite.mode,
            "slots": [
                {
                    "active": True,
                    "iters": slot.iterations,
                    "key-offset": slot.material_offset * SECTOR,
                    "stripes": slot.stripes,
                }
                if slot.active == ACTIVE
                else {"active": False, "key-offset": slot.material_offset * SECTOR}
                for slot in self.slots
            ],
            "payload-offset": self.payload_offset,
            "master-key-iters": self.header.digest_iterations,
        }

    # Making

    @classmethod
    def new(cls, area: Area, chosen: Settings) -> tuple[Luks, bytes]:
        """A header without any key, and a master key for it. Raises UsageError."""
        from uuid import uuid4

        suite = chosen.suite
        check_suite(suite)
        check_hash(chosen.hash)
        length = suite.key_length
        key = os.urandom(length)
        salt = os.urandom(SALT_LENGTH)
        iterations = _iterations(chosen, length, 8)
        mode = f"{suite.mode}-{suite.generator}" + (f":{suite.generator_hash}" if suite.generator_hash else "")
        space = _material_space(length)
        header = Header(
            cipher_name=suite.algorithm.partition("-")[0].encode(),
            cipher_mode=mode.encode(),
            hash_spec=chosen.hash.encode(),
            payload_offset=payload_offset(suite) // SECTOR,
            key_bytes=length,
            digest=pbkdf2(chosen.hash, key, salt, iterations, DIGEST_LENGTH),
            digest_salt=salt,
            digest_iterations=iterations,
            uuid=str(uuid4()).encode(),
        )
        slots = [Slot(material_offset=(ALIGNMENT + space * number) // SECTOR) for number in range(SLOTS)]
        return cls(area, header, slots, suite, chosen.hash), key

    def fill(self, number: int, key: bytes, passphrase: bytes, iter_time: int) -> None:
        """Put the master *key* into slot *number*, to be opened with *passphrase*; only its material is written.

        Raises UsageError where *iter_time* asks for too much.
        """
        length = len(key)
        chosen = Settings(self.suite, self.hash, iter_time)
        slot = self.slots[number]
        iterations = _iterations(chosen, length, 2)
        salt = os.urandom(SALT_LENGTH)
        derived = pbkdf2(self.hash, passphrase, salt, iterations, length)
        material = bytearray(split(key, STRIPES, self.hash))
        material.extend(bytes(-len(material) % SECTOR))
        view = memoryview(material)
        sector_cipher(self.suite, derived).encrypt(0, view, view)
        self.area.pwrite(slot.material_offset * SECTOR, bytes(material))
        slot.salt, slot.iterations, slot.stripes = salt, iterations, STRIPES
        slot.active = ACTIVE

    def write(self) -> None:
        """Write the header with all slots' fields: what makes a new image one."""
        self.area.pwrite(0, self.header.pack() + b"".join([slot.pack() for slot in self.slots]))

    # Changing slots

    def add(self, number: int, key: bytes, passphrase: bytes, iter_time: int) -> None:
        """Fill slot *number* of an image in use, safely. One that was active is emptied first."""
        slot = self.slots[number]
        if slot.active == ACTIVE:
            self.erase(number)
        former = Slot.parse(slot.pack())
        try:
            self.fill(number, key, passphrase, iter_time)
        except BaseException:
            self.slots[number] = former
            raise
        self.area.flush()
        slot.active = DISABLED
        self._write_slot(number)
        self.area.flush()
        slot.active = ACTIVE
        at, data = slot.pack_fields("active")
        self.area.pwrite(self._slot_offset(number) + at, data)
        self.area.flush()

    def erase(self, number: int) -> None:
        """Make slot *number* useless for ever."""
        slot = self.slots[number]
        for _ in range(ERASURES):
            length = int(self.header.key_bytes) * STRIPES
            self.area.pwrite(slot.material_offset * SECTOR, os.urandom(-(-length // SECTOR) * SECTOR))
            self.area.flush()
        slot.active, slot.iterations, slot.salt = DISABLED, 0, bytes(SALT_LENGTH)
        self._write_slot(number)
        self.area.flush()

    def _slot_offset(self, number: int) -> int:
        return Header.LENGTH + Slot.LENGTH * number

    def _write_slot(self, number: int) -> None:
        self.area.pwrite(self._slot_offset(number), self.slots[number].pack())


def create(area: Area, chosen: Settings, passphrase: bytes) -> tuple[Luks, bytes]:
    """Write a new header with the *passphrase* in slot 0; returns it and the master key. Raises UsageError."""
    luks, key = Luks.new(area, chosen)
    luks.fill(0, key, passphrase, chosen.iter_time)
    area.flush()
    luks.write()
    return luks, key


def _iterations(chosen: Settings, length: int, share: int) -> int:
    """Iterations that take the chosen time divided by *share*. Raises UsageError where a header cannot say so."""
    per_second = iterations_per_second(chosen.hash, length)
    time = chosen.iter_time
    if time < 0:
        time += 1 << 64
    range_error = "Numerical result out of range"
    if time and per_second > ((1 << 64) - 1) // time:
        raise UsageError(f"PBKDF iterations {per_second} too large to scale: {range_error}")
    iterations = per_second * time // 1000 // share
    if iterations > 0xFFFFFFFF:
        raise UsageError(f"PBKDF iterations {iterations} larger than {0xFFFFFFFF}: {range_error}")
    if iterations > MAX_ITERATIONS // 2:
        raise UsageError(f"iter-time={chosen.iter_time}: {iterations} iterations are more than would be unlocked again")
    return max(iterations, MIN_ITERATIONS)


# Checks of a header


def _text(name: str, field: bytes, what: str) -> str:
    if b"\0" not in field:
        raise ImageError(name, f"LUKS header {what} is not NUL terminated")
    return field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _check_layout(name: str, header: Header, slots: list[Slot]) -> None:
    """Header, slots and payload must not overlap, and the numbers be possible."""
    payload = header.payload_offset
    if payload < ALIGNMENT // SECTOR:
        raise ImageError(name, "LUKS payload is overlapping with the header")
    if not header.digest_iterations:
        raise ImageError(name, "LUKS key iteration count is zero")
    length = -(-header.key_bytes * STRIPES // SECTOR)
    for number, slot in enumerate(slots):
        if slot.stripes != STRIPES:
            stripes = slot.stripes - (1 << 32) * (slot.stripes >> 31)
            raise ImageError(name, f"Keyslot {number} is corrupted (stripes {stripes} != {STRIPES})")
        if slot.material_offset < ALIGNMENT // SECTOR:
            raise ImageError(name, f"Keyslot {number} is overlapping with the LUKS header")
        if slot.active not in (ACTIVE, DISABLED):
            raise ImageError(name, f"Keyslot {number} state (active/disable) is corrupted")
        if slot.active == ACTIVE and not slot.iterations:
            raise ImageError(name, f"Keyslot {number} iteration count is zero")
        if slot.material_offset + length > payload:
            raise ImageError(name, f"Keyslot {number} is overlapping with the encrypted payload")
        for other in range(number + 1, SLOTS):
            begin = slots[other].material_offset
            if slot.material_offset < begin + length and begin < slot.material_offset + length:
                raise ImageError(name, f"Keyslots {number} and {other} are overlapping in the header")


def _parse_suite(name: str, cipher: str, mode_text: str, key_bytes: int) -> Suite:
    """The suite that a header names, with QEMU's words for what is wrong with it."""
    mode, dash, vectors = mode_text.partition("-")
    if not dash:
        raise ImageError(name, f"Unexpected cipher mode string format '{mode_text}'")
    generator, colon, generator_hash = vectors.partition(":")
    if mode not in (*MODES, *FOREIGN_MODES):
        raise ImageError(name, f"Cipher mode '{mode}' not supported")
    half = key_bytes // 2 if mode == "xts" else key_bytes
    algorithm = next((word for word, length in ALGORITHMS.items() if cipher == "aes" and length == half), None)
    if algorithm is None or (mode == "xts" and key_bytes % 2):
        raise ImageError(name, f"Algorithm '{cipher}' with key size {half} bytes not supported")
    if colon and generator_hash not in DIGEST_LENGTHS:
        raise ImageError(name, f"Hash algorithm '{generator_hash}' not supported")
    if generator not in GENERATORS:
        raise ImageError(name, f"IV generator '{generator}' not supported")
    if generator == "essiv" and not colon:
        raise ImageError(name, "Missing IV generator hash specification")
    if mode not in MODES:
        raise ImageError(name, f"Cipher mode '{mode}' not supported")
    return Suite(algorithm, mode, generator, generator_hash if generator == "essiv" else None)


# The anti-forensic splitter (appendix of the specification)


def split(key: bytes, stripes: int, hash_name: str) -> bytes:
    """*key* spread over *stripes* pieces of its length, all of which are needed to get it back."""
    length = len(key)
    material = os.urandom(length * (stripes - 1))
    last = int.from_bytes(_fold(material, stripes, length, hash_name), "big") ^ int.from_bytes(key, "big")
    return material + last.to_bytes(length, "big")


def merge(material: bytes, stripes: int, hash_name: str) -> bytes:
    """The key that :func:`split` spread."""
    length = len(material) // stripes
    last = int.from_bytes(material[-length:], "big")
    return (int.from_bytes(_fold(material, stripes, length, hash_name), "big") ^ last).to_bytes(length, "big")


def _fold(material: bytes, stripes: int, length: int, hash_name: str) -> bytes:
    """All stripes but the last, each mixed in and diffused."""
    size = DIGEST_LENGTHS[hash_name]
    new = hasher(hash_name)
    prefixes = [number.to_bytes(4, "big") for number in range(-(-length // size))]
    folded = bytes(length)
    for start in range(0, length * (stripes - 1), length):
        mixed = int.from_bytes(folded, "big") ^ int.from_bytes(material[start : start + length], "big")
        block = mixed.to_bytes(length, "big")
        folded = b"".join(
            [
                new(prefix + block[at : at + size]).digest()[: length - at]
                for prefix, at in zip(prefixes, range(0, length, size), strict=True)
            ]
        )
    return folded


# Changing keys (QEMU's QCryptoBlockAmendOptionsLUKS)


def amend(
    luks: Luks,
    options: dict[str, Any],
    *,
    name: str,
    key_secret: str | None,
    secret: Callable[[str], bytes],
    force: bool = False,
) -> None:
    """Do what *options* say: ``state``, ``new-secret``, ``old-secret``, ``keyslot``, ``iter-time``, ``secret``.

    *key_secret* is the id of the secret with which the image was opened, *secret* gives a passphrase by id. With
    *force* even what loses all data is done. Raises UsageError and ImageError.
    """
    given = dict(options)
    options.clear()
    state = given.pop("state", None)
    if state is None:
        raise UsageError("Parameter 'state' is missing")
    if state not in ("active", "inactive"):
        raise UsageError(f"Parameter 'state' does not accept value '{state}'")
    new, old = given.pop("new-secret", None), given.pop("old-secret", None)
    slot, iter_time = given.pop("keyslot", None), given.pop("iter-time", None)
    unlocking = given.pop("secret", None) or key_secret
    if given:
        raise UsageError(f"Parameter '{min(given)}' is unexpected")
    if state == "active":
        if new is None:
            raise UsageError("'new-secret' is required to activate a keyslot")
        if old is not None:
            raise UsageError("'old-secret' must not be given when activating keyslots")
        _activate(luks, name, slot, new, unlocking, iter_time, secret, force)
    else:
        if new is not None:
            raise UsageError("'new-secret' must not be given when erasing keyslots")
        if iter_time is not None:
            raise UsageError("'iter-time' must not be given when erasing keyslots")
        _erase(luks, name, slot, old, secret, force)


def _check_slot(slot: int) -> int:
    slot &= 0xFFFFFFFF
    if slot >= SLOTS:
        raise UsageError(f"Invalid keyslot {slot} specified, must be between 0 and {SLOTS - 1}")
    return slot


def _activate(
    luks: Luks,
    name: str,
    slot: int | None,
    new: str,
    unlocking: str | None,
    iter_time: int | None,
    secret: Callable[[str], bytes],
    force: bool,
) -> None:
    if slot is not None:
        slot = _check_slot(slot)
        if luks.slots[slot].active == ACTIVE and not force:
            raise ImageError(name, f"Refusing to overwrite active keyslot {slot} - please erase it first")
    else:
        slot = next((number for number, one in enumerate(luks.slots) if one.active != ACTIVE), None)
        if slot is None:
            raise ImageError(name, "Can't add a keyslot - all keyslots are in use")
    if unlocking is None:
        raise UsageError("Parameter 'key-secret' is required for cipher")
    old_passphrase = secret(unlocking)
    key = luks.unlock(old_passphrase, name)
    luks.add(slot, key, secret(new), ITER_TIME if iter_time is None else iter_time)


def _erase(
    luks: Luks,
    name: str,
    slot: int | None,
    old: str | None,
    secret: Callable[[str], bytes],
    force: bool,
) -> None:
    passphrase = None if old is None else secret(old)
    active = luks.active
    if slot is not None:
        slot = _check_slot(slot)
        if passphrase is not None and slot not in luks.slots_matching(passphrase, name):
            raise ImageError(name, f"Given keyslot {slot} doesn't contain the given old password for erase operation")
        if not force and slot not in active:
            raise ImageError(name, f"Given keyslot {slot} is already erased (inactive) ")
        if not force and len(active) == 1:
            raise ImageError(
                name,
                f"Attempt to erase the only active keyslot {slot} which will erase all the data in the image "
                "irreversibly - refusing operation",
            )
        luks.erase(slot)
        return
    if passphrase is None:
        raise UsageError(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be "
            "given"
        )
    matching = luks.slots_matching(passphrase, name)
    if not matching:
        raise ImageError(name, "No keyslots match given (old) password for erase operation")
    if not force and matching == active:
        raise ImageError(
            name,
            "All the active keyslots match the (old) password that was given and erasing them will erase all the data "
            "in the image irreversibly - refusing operation",
        )
    for number in matching:
        luks.erase(number)
