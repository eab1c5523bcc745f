"""Secrets, as ``--object secret`` makes them."""

from __future__ import annotations

import base64
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from vm_core.crypto import secrets
from vm_core.errors import UsageError

KEY = base64.b64encode(bytes(32)).decode()
IV = base64.b64encode(bytes(16)).decode()
NAME = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."


@pytest.fixture(autouse=True)
def _empty() -> Iterator[None]:
    secrets.clear()
    yield
    secrets.clear()


def encrypted(text: bytes, padding: int | None = None) -> str:
    """*text*, padded, encrypted with :data:`KEY` and :data:`IV`, in base64."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    length = 16 - len(text) % 16
    data = text + bytes([length if padding is None else padding]) * length
    return base64.b64encode(Cipher(algorithms.AES(bytes(32)), modes.CBC(bytes(16))).encryptor().update(data)).decode()


def test_data_is_what_was_given() -> None:
    """Inline bytes are taken as they are, in UTF-8, or decoded from base64."""
    secrets.add({"id": "a", "data": "pässword"})
    secrets.add({"id": "b", "data": "YWJj", "format": "base64"})
    assert secrets.get("a") == "pässword".encode()
    assert secrets.get("b") == b"abc"


def test_files_are_read_whole(tmp_path: Path) -> None:
    """A file's bytes are the secret, its last newline among them; base64 may have newlines."""
    (tmp_path / "raw").write_bytes(b"abc\n")
    (tmp_path / "encoded").write_bytes(b"YW\nJj\n")
    secrets.add({"id": "a", "file": str(tmp_path / "raw")})
    secrets.add({"id": "b", "file": str(tmp_path / "encoded"), "format": "base64"})
    assert secrets.get("a") == b"abc\n"
    assert secrets.get("b") == b"abc"


def test_a_secret_may_be_encrypted_with_another() -> None:
    """``keyid`` and ``iv`` decrypt AES-256-CBC with PKCS#7 padding."""
    secrets.add({"id": "key", "data": KEY, "format": "base64"})
    secrets.add({"id": "a", "data": encrypted(b"passphrase"), "format": "base64", "keyid": "key", "iv": IV})
    assert secrets.get("a") == b"passphrase"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"id": "s"}, "Either 'file' or 'data' must be provided"),
        ({"id": "s", "data": "a", "file": "b"}, "'file' and 'data' are mutually exclusive"),
        ({"data": "x"}, "Parameter 'id' is missing"),
        ({"id": "1s", "data": "a"}, f"Parameter 'id' expects an identifier\n{NAME}"),
        ({"id": "s", "data": "YW!j", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"id": "s", "data": "a", "keyid": "nx"}, "No secret with id 'nx'"),
        ({"id": "s", "data": "a", "keyid": "short", "iv": IV}, "Key should be 32 bytes in length"),
        ({"id": "s", "data": "a", "keyid": "key"}, "IV is required to decrypt secret"),
        ({"id": "s", "data": "a", "keyid": "key", "iv": "AAAA"}, "IV should be 16 bytes in length not 3"),
        ({"id": "s", "data": "abc", "keyid": "key", "iv": IV}, "Length 3 must be a multiple of block size 16"),
        (
            {"id": "s", "data": encrypted(b"x", 17), "format": "base64", "keyid": "key", "iv": IV},
            "Incorrect number of padding bytes (17) found on decrypted data",
        ),
        (
            {"id": "s", "file": "/nonexistent"},
            "Unable to read /nonexistent: Failed to open file “/nonexistent”: No such file or directory",
        ),
        ({"id": "s", "file": "/"}, "Unable to read /: Error reading file “/”: Is a directory"),
        ({"id": "s", "data": "a", "format": "hex"}, "Parameter 'format' does not accept value 'hex'"),
        ({"id": "s", "data": "a", "foo": "1"}, "Parameter 'foo' is unexpected"),
        ({"id": "s", "data": "a", "loaded": "on"}, "Property 'secret.loaded' is not writable"),
        ({"id": "key", "data": "x"}, "attempt to add duplicate property 'key' to object (type 'container')"),
    ],
)
def test_errors_are_the_peers(given: dict[str, str], told: str, qemu_img: str | None) -> None:
    """Each wrong property is refused in QEMU's words, which QEMU itself says of the same properties."""
    first = {"id": "key", "format": "base64", "data": KEY}, {"id": "short", "data": "x"}
    for one in first:
        secrets.add(one)
    with pytest.raises(UsageError) as caught:
        secrets.add(given)
    assert str(caught.value) == told
    if qemu_img is not None:
        objects = [
            word
            for one in (*first, given)
            for word in ("--object", "secret," + ",".join(f"{key}={value}" for key, value in one.items()))
        ]
        done = subprocess.run([qemu_img, "info", *objects, "none"], capture_output=True, text=True)
        assert done.stderr == f"qemu-img: {told}\n"


def test_passphrases_are_text() -> None:
    """Bytes that are no UTF-8 are refused where a passphrase is wanted."""
    secrets.add({"id": "s", "data": base64.b64encode(b"\xff\xfe").decode(), "format": "base64"})
    with pytest.raises(UsageError, match="Data from secret s is not valid UTF-8"):
        secrets.passphrase("s")


def test_other_objects_are_no_secrets() -> None:
    """An id that another kind of object has says so."""
    secrets.reserve("t")
    with pytest.raises(UsageError, match="Object with id 't' is not a secret"):
        secrets.get("t")
