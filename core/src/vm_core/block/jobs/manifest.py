"""Manifests: what an image held, block by block, as JSON.

A manifest has the virtual size and a digest for each block of what the guest sees; a block of zeroes has ``null``.
``digest`` is the digest of all blocks' digests, one behind the other, with zeroes in the place of those that are not
there, so digests that were changed or damaged are noticed. ``sum`` is the digest of the image's bytes themselves.

Reading takes members in any order and layout, but no others than texts, numbers and words beside ``blocks``. It goes
through the text once, in pieces, and keeps the digests alone: whatever a file holds, it costs no more than its digests.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import UsageError, VmError

if TYPE_CHECKING:
    from typing import BinaryIO

#: Bytes of a digest by the names of the algorithms.
ALGORITHMS = {"sha256": 32, "blake2b": 64}
#: What a block has, at least and at most.
LEAST_BLOCK, MOST_BLOCK = 4096, 64 << 20
#: A manifest has this many blocks at most.
MOST = 1 << 22
#: And its text this many bytes: blanks may be as long as all the rest.
MOST_BYTES = 1 << 30
#: What a manifest says that it is.
KIND, VERSION = "vm-img manifest", 1
#: Bytes that are read at a time.
STEP = 1 << 20
#: Bytes of a name, a text or a number.
LONGEST = 256

_BLANKS = b" \t\r\n"
_GAP = re.compile(rb"[ \t\r\n]*")
_TOKEN = re.compile(rb'[{}\[\]:,]|"(?:[^"\\\x00-\x1f]|\\.){0,%d}"|[-+.0-9A-Za-z]{1,%d}' % (LONGEST, LONGEST))


class ManifestError(VmError):
    """A manifest is not one, or not whole."""


class Manifest(NamedTuple):
    """What an image held."""

    size: int
    block_size: int
    algorithm: str
    #: The digests of all blocks one behind the other, zeroes for blocks of zeroes.
    digests: bytes
    #: For each block whether it has a digest.
    present: bytes
    #: The digest of the bytes themselves, in hexadecimal; empty if it was not made.
    sum: str = ""

    @property
    def digest(self) -> str:
        """The digest of the digests."""
        return hashlib.new(self.algorithm, self.digests).hexdigest()

    def at(self, block: int) -> bytes:
        """The digest of one block, empty for zeroes."""
        width = ALGORITHMS[self.algorithm]
        return self.digests[block * width : block * width + width] if self.present[block] else b""

    def lines(self) -> Iterator[str]:
        """The manifest as JSON, in pieces."""
        import json

        head = {
            "kind": KIND,
            "version": VERSION,
            "virtual-size": self.size,
            "block-size": self.block_size,
            "algorithm": self.algorithm,
            "digest": self.digest,
        }
        if self.sum:
            head["sum"] = self.sum
        yield "{\n" + "".join(f'  "{name}": {json.dumps(value)},\n' for name, value in head.items())
        count = len(self.present)
        yield '  "blocks": ['
        for block in range(count):
            text = f'"{self.at(block).hex()}"' if self.present[block] else "null"
            yield f"\n    {text}{',' if block + 1 < count else ''}"
        yield "\n  ]\n}\n"

    @classmethod
    def parse(cls, data: bytes | str) -> Manifest:
        """The manifest in *data*. Raises ManifestError, with what is wrong."""
        from io import BytesIO

        return cls.read(BytesIO(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data))

    @classmethod
    def read(cls, file: BinaryIO) -> Manifest:
        """The manifest in *file*, from where it stands to its end. Raises ManifestError, OSError."""
        return _made(_Text(file).members())


def count_blocks(size: int, block_size: int) -> int:
    """How many blocks there are. Raises UsageError."""
    if not LEAST_BLOCK <= block_size <= MOST_BLOCK or block_size & block_size - 1:
        raise UsageError(
            f"a block size of {block_size} bytes is not possible: a power of two from {LEAST_BLOCK} to {MOST_BLOCK} is"
        )
    count = -(-size // block_size)
    if count > MOST:
        raise UsageError(f"{size} bytes have {count} blocks of {block_size} bytes; at most {MOST} are possible")
    return count


class _Blocks(NamedTuple):
    """The member ``blocks``: the *width* of its digests in bytes is 0 where there are none."""

    width: int
    digests: bytearray
    present: bytearray


class _Text:
    """The text of a manifest."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._data = b""
        #: Where *_data* begins in the file, and how far in it we are.
        self._start = self._at = 0
        self._ended = False

    def members(self) -> dict[str, Any]:
        """The members of the one object that it is."""
        if self._token() != b"{":
            raise self._error("it does not begin with {")
        members: dict[str, Any] = {}
        token = self._token()
        while token != b"}":
            if members:
                if token != b",":
                    raise self._error(", or } is missing")
                token = self._token()
            name = self._scalar(token)
            if not isinstance(name, str):
                raise self._error("a member's name is missing")
            if name in members:
                raise self._error(f'"{_short(name)}" is there twice')
            if self._token() != b":":
                raise self._error(": is missing")
            members[name] = self._value(name)
            token = self._token()
        if self._token(end=True):
            raise self._error("there is more behind it")
        return members

    def _value(self, name: str) -> Any:
        token = self._token()
        if token == b"[" and name == "blocks":
            return self._blocks()
        if token in (b"[", b"{"):
            raise self._error(f'"{_short(name)}" is neither a text nor a number')
        return self._scalar(token)

    def _scalar(self, token: bytes) -> Any:
        import json

        try:
            return json.loads(token)
        except ValueError:
            raise self._error("this is no JSON") from None

    def _blocks(self) -> _Blocks:
        """The digests. No comma and no bracket is part of one, so the text is cut there."""
        found = _Blocks(0, bytearray(), bytearray())
        last = False
        while not last:
            close = self._data.find(b"]", self._at)
            stop = close if close >= 0 else self._data.rfind(b",", self._at)
            if stop < 0:
                if len(self._data) - self._at > LONGEST + STEP or not self._fill():
                    raise self._error("its blocks do not end")
                continue
            last = close >= 0
            part = self._data[self._at : stop]
            if not (last and not found.present and not part.strip(_BLANKS)):  # the empty list
                found = self._digests(part, found)
            self._at = stop + 1
        return found

    def _digests(self, part: bytes, found: _Blocks) -> _Blocks:
        width, digests, present = found
        empty = bytes(width)
        for text in part.split(b","):
            text = text.strip(_BLANKS)
            number = len(present)
            if number == MOST:
                raise self._error(f"it has more than {MOST} blocks")
            if text == b"null":
                present.append(0)
                digests += empty
                continue
            digest = b""
            if text[:1] == text[-1:] == b'"' and len(text) <= LONGEST:
                try:
                    digest = bytes.fromhex(text[1:-1].decode("ascii"))
                except ValueError:
                    digest = b""
            if not width and len(digest) in ALGORITHMS.values():
                width = len(digest)
                empty = bytes(width)
                digests += empty * number
            if not width or len(digest) != width or len(text) != 2 * width + 2:
                raise ManifestError(f"block {number} is neither null nor a digest in hexadecimal like others")
            if digest == empty:
                raise ManifestError(f"block {number} is no digest: it is nothing but zeroes")
            present.append(1)
            digests += digest
        return _Blocks(width, digests, present)

    def _token(self, *, end: bool = False) -> bytes:
        """The next token; nothing at the *end* of the text, which is an error elsewhere."""
        while True:
            data = self._data
            gap = _GAP.match(data, self._at)
            assert gap is not None
            self._at = at = gap.end()
            found = _TOKEN.match(data, at)
            # What reaches to the end of what was read may go on.
            if found is not None and (found.end() < len(data) or self._ended):
                self._at = found.end()
                return found.group()
            if len(data) - at > 2 * LONGEST + 2:
                raise self._error(f"this is no JSON, or longer than {LONGEST} bytes")
            if not self._fill():
                if end and self._at == len(self._data):
                    return b""
                raise self._error("this is no JSON" if self._at < len(self._data) else "it ends too early")

    def _fill(self) -> bool:
        """Read on. False: there is no more."""
        if self._ended:
            return False
        more = self._file.read(STEP)
        self._ended = not more
        self._start += self._at
        self._data = self._data[self._at :] + more
        self._at = 0
        if self._start + len(self._data) > MOST_BYTES:
            raise ManifestError(f"it has more than {MOST_BYTES} bytes")
        # At the end once more, as what was read may be whole now.
        return bool(more) or bool(self._data)

    def _error(self, what: str) -> ManifestError:
        return ManifestError(f"not a manifest: {what} (at byte {self._start + self._at})")


def _made(value: dict[str, Any]) -> Manifest:
    """The manifest that has these members."""
    if value.get("kind") != KIND:
        raise ManifestError(f"not a manifest: its \"kind\" is not '{KIND}'")
    if value.get("version") != VERSION:
        raise ManifestError(f"version {_short(value.get('version'))} is not known; {VERSION} is")
    size, block_size = _number(value, "virtual-size"), _number(value, "block-size")
    algorithm = value.get("algorithm")
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise ManifestError(f"algorithm {_short(algorithm)} is not known; there is: {', '.join(ALGORITHMS)}")
    try:
        count = count_blocks(size, block_size)
    except UsageError as error:
        raise ManifestError(str(error)) from None
    width, blocks = ALGORITHMS[algorithm], value.get("blocks")
    if not isinstance(blocks, _Blocks) or len(blocks.present) != count:
        has = len(blocks.present) if isinstance(blocks, _Blocks) else "no"
        raise ManifestError(f"it has {has} blocks; an image of {size} bytes has {count}")
    if blocks.width not in (0, width):
        raise ManifestError(f"its blocks have digests of {blocks.width} bytes; those of {algorithm} have {width}")
    digests = bytes(blocks.digests if blocks.width else count * width)
    total = value.get("sum", "")
    if not isinstance(total, str) or (total and not re.fullmatch(f"[0-9A-Fa-f]{{{2 * width}}}", total)):
        raise ManifestError(f'its "sum" is no digest of {width} bytes in hexadecimal')
    found = Manifest(size, block_size, algorithm, digests, bytes(blocks.present), total.lower())
    digest = value.get("digest")
    if not isinstance(digest, str) or digest.lower() != found.digest:
        raise ManifestError('it was changed or damaged: its digests are not those of which its "digest" was made')
    return found


def _number(value: dict[str, Any], name: str) -> int:
    found = value.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < 1 << 63:
        raise ManifestError(f'its "{name}" is no number of bytes')
    return found


def _short(value: object) -> str:
    """*value* in a message: on one line, and not long."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"
