"""Secrets: what ``--object secret,id=…`` gives, and what options such as ``key-secret`` name by id.

Behaviour and wording are those of QEMU's ``secret`` objects (its manual, section *Secret objects*): the bytes are given
inline or in a file, as they are or in base64, in clear or encrypted (AES-256-CBC, PKCS#7 padding) with another secret.

    secrets.add({"id": "sec0", "file": "passphrase.txt"})
    secrets.add({"id": "key", "data": "…44 characters…", "format": "base64"})
    secrets.add({"id": "sec1", "data": "…", "keyid": "key", "iv": "…24 characters…", "format": "base64"})
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from ..errors import UsageError

#: The properties of a secret object, as ``--object secret,help`` lists them.
PROPERTIES = ("data", "file", "format", "iv", "keyid")

_IDENTIFIER = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\n")
_KEY_LENGTH, _BLOCK = 32, 16

_store: dict[str, bytes] = {}
#: Ids of objects of other kinds, to tell "no such object" from "not a secret".
_others: set[str] = set()


def add(properties: Mapping[str, str]) -> None:
    """Make the secret that the *properties* describe (``qom-type`` may be among them). Raises UsageError."""
    given = {name: value for name, value in properties.items() if name != "qom-type"}
    identity = given.pop("id", None)
    if identity is None:
        raise UsageError("Parameter 'id' is missing")
    for name, value in given.items():
        if name in (*PROPERTIES, "loaded") and not isinstance(value, str):
            raise UsageError(f"Invalid parameter type for '{name}', expected: string")
    loaded = given.pop("loaded", None)
    if loaded not in (None, "on", "off", "yes", "no", "true", "false", "y", "n"):
        raise UsageError("Parameter 'loaded' expects 'on' or 'off'")
    encoding = given.get("format", "raw")
    if encoding not in ("raw", "base64"):
        raise UsageError(f"Parameter 'format' does not accept value '{encoding}'")
    for name in given:
        if name not in PROPERTIES:
            raise UsageError(f"Parameter '{name}' is unexpected")
    if not isinstance(identity, str) or not _IDENTIFIER.match(identity):
        raise UsageError(
            "Parameter 'id' expects an identifier\n"
            "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
        )
    if loaded is not None:
        raise UsageError("Property 'secret.loaded' is not writable")
    if identity in _store or identity in _others:
        raise UsageError(f"attempt to add duplicate property '{identity}' to object (type 'container')")
    data = _load(given)
    if "keyid" in given:
        data = _decrypt(data, get(given["keyid"]), given.get("iv"), encoding)
    elif encoding == "base64":
        data = _from_base64(data)
    _store[identity] = data


def get(identity: str) -> bytes:
    """The bytes of the secret called *identity*. Raises UsageError."""
    found = _store.get(identity)
    if found is None:
        if identity in _others:
            raise UsageError(f"Object with id '{identity}' is not a secret")
        raise UsageError(f"No secret with id '{identity}'")
    return found


def passphrase(identity: str) -> bytes:
    """The same, for passphrases, which have to be UTF-8. Raises UsageError."""
    return as_passphrase(get(identity), identity)


def as_passphrase(data: bytes, identity: str) -> bytes:
    """*data*, the bytes of secret *identity*, where it is UTF-8 text. Raises UsageError."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"Data from secret {identity} is not valid UTF-8") from None
    return data


def reserve(identity: str) -> None:
    """Another kind of object has the id *identity*."""
    _others.add(identity)


def remove(identity: str) -> None:
    """Forget a secret. Raises UsageError where there is none."""
    get(identity)
    del _store[identity]


def clear() -> None:
    """Forget all of them."""
    _store.clear()
    _others.clear()


def _load(given: Mapping[str, str]) -> bytes:
    """The bytes as given, still encoded."""
    if "file" in given and "data" in given:
        raise UsageError("'file' and 'data' are mutually exclusive")
    if "data" in given:
        return given["data"].encode("utf-8", "surrogateescape")
    if "file" not in given:
        raise UsageError("Either 'file' or 'data' must be provided")
    path = given["file"]
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except OSError as error:
        what = "Error reading file" if os.path.isdir(path) else "Failed to open file"
        raise UsageError(f"Unable to read {path}: {what} “{path}”: {error.strerror}") from None


def _from_base64(data: bytes) -> bytes:
    """*data* decoded; an unfinished last group of four characters is dropped, and decoding goes on after padding."""
    import binascii

    if not _BASE64.issuperset(data):
        raise UsageError("Base64 data contains invalid characters")
    text = data.replace(b"\n", b"")
    result = bytearray()
    for start in range(0, len(text) - 3, 4):
        group = text[start : start + 4]
        padding = 2 if group[2:3] == b"=" else 1 if group[3:4] == b"=" else 0
        result += binascii.a2b_base64(group.replace(b"=", b"A"))[: 3 - padding]
    return bytes(result)


def _decrypt(data: bytes, key: bytes, vector: str | None, encoding: str) -> bytes:
    """*data* in clear, with the master *key* and the initialisation *vector* in base64."""
    if len(key) != _KEY_LENGTH:
        raise UsageError(f"Key should be {_KEY_LENGTH} bytes in length")
    if vector is None:
        raise UsageError("IV is required to decrypt secret")
    iv = _from_base64(vector.encode("utf-8", "surrogateescape"))
    if len(iv) != _BLOCK:
        raise UsageError(f"IV should be {_BLOCK} bytes in length not {len(iv)}")
    if encoding == "base64":
        data = _from_base64(data)
    if len(data) % _BLOCK:
        raise UsageError(f"Length {len(data)} must be a multiple of block size {_BLOCK}")
    if not data:
        return b""
    from .library import aes, modes

    clear = aes(key, modes().CBC(iv)).decryptor().update(data)
    padding = clear[-1]
    if padding > _BLOCK:
        raise UsageError(f"Incorrect number of padding bytes ({padding}) found on decrypted data")
    return clear[: len(clear) - padding]
