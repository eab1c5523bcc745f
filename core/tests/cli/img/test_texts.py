"""JSON, sizes and option words: read and written as QEMU reads and writes them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_core import jsontext, sizes
from vm_core.cli.getopt import MISSING, UNKNOWN, Getopt

from .peer import compare, needs_peer

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), 1 << 63) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(_VALUES)
def test_json_is_read_as_others_read_it(value: Any) -> None:
    """What json writes is read the same, with and without its escapes."""
    for ascii_only in (True, False):
        text = json.dumps(value, ensure_ascii=ascii_only)
        if not ascii_only and any(ord(letter) in range(0xD800, 0xE000) for letter in text):
            continue
        assert jsontext.parse(text) == value


@given(_VALUES)
def test_json_is_written_so_that_others_read_it(value: Any) -> None:
    """What is written here json reads as the same value, in both layouts."""
    if any(ord(letter) in range(0xD800, 0xE000) for letter in json.dumps(value, ensure_ascii=False)):
        return
    assert json.loads(jsontext.pretty(value)) == value
    assert json.loads(jsontext.compact(value)) == value


def test_members_come_in_qemus_order() -> None:
    """The order of members is that of QEMU's hash table, seen in what qemu-img info prints."""
    seen = [
        "backing-filename-format",
        "virtual-size",
        "filename",
        "cluster-size",
        "format",
        "actual-size",
        "format-specific",
        "full-backing-filename",
        "backing-filename",
        "dirty-flag",
    ]
    assert [name for name, _ in jsontext.ordered(dict.fromkeys(sorted(seen)))] == seen
    seen = ["compat", "compression-type", "lazy-refcounts", "bitmaps", "refcount-bits", "corrupt", "extended-l2"]
    assert [name for name, _ in jsontext.ordered(dict.fromkeys(sorted(seen)))] == seen


WRONG = [
    "",
    "{",
    "[",
    '{"a"}',
    '{"a" 1}',
    '{"a":}',
    '{"a":1 "b":2}',
    '{"a":[1 2]}',
    "nul",
    '{"a":tru}',
    '{"a":"\\x"}',
    '{"a":01}',
    "{a:1}",
    "{1:2}",
    '{"a":1,}',
    '{"a":[1,]}',
    '{"a":1,"a":2}',
    '{"a":"x',
    '{"a":@}',
    '{"a":-}',
    '{"a":1.}',
    '{"a":1e}',
    '{"a":"\\ud800"}',
    "}",
    "{]",
    "[1}",
    "1",
    '"x"',
    "null",
    '{"a":"\\q"}',
    "{} {}",
    '{"a":1}}',
    '{"driver":null}',
    '{"driver":"raw","file":null}',
    '{"a":{"b":}}',
    '{"a",}',
    "{:1}",
    '{"a"::1}',
    "[,]",
]


@needs_peer
@pytest.mark.parametrize("text", WRONG)
def test_wrong_json_is_refused_in_the_same_words(text: str, tmp_path: Path) -> None:
    """What QEMU says of a text that is no JSON, or not what it wants."""
    (tmp_path / "base").mkdir()
    compare(f"info {shlex.quote('json:' + text)}", tmp_path / "base", tmp_path, files=False)


SIZES = [
    "0",
    "1",
    "512",
    "1k",
    "1K",
    "1.5k",
    "0.7k",
    "0.6k",
    ".5k",
    "1.k",
    "1.0",
    "1.0b",
    "1.5b",
    "1.5E",
    "1.e",
    "1.5e3",
    "0x10",
    "0X10",
    "0x1.8k",
    "0x",
    "1e3",
    "1kb",
    "1b",
    "1B",
    "+1",
    "-1",
    "010",
    "1M1",
    "9E",
    "8E",
    "7E",
    "9223372036854775807",
    "9223372036854775808",
    "99999999999999999999",
    "1..5k",
    "nan",
    "inf",
    "1.999k",
    "1.99999999999999999999k",
]


@needs_peer
@pytest.mark.parametrize("text", [*SIZES, "", " 1", "1 ", "1 k"])
def test_sizes_are_read_alike(text: str, tmp_path: Path) -> None:
    """Numbers, fractions, suffixes, hexadecimal: the same bytes or the same complaint."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "r").write_bytes(bytes(4096))
    compare(f"map -f raw --output=json --start-offset={shlex.quote(text)} r", tmp_path / "base", tmp_path, files=False)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (200704, "196 KiB"),
        (1 << 20, "1 MiB"),
        (1032192, "0.984 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 62, "4 EiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    """Three digits and a binary unit, as qemu-img info has them."""
    assert sizes.human(size) == text


@pytest.mark.parametrize(
    ("words", "found", "rest"),
    [
        ("a -q b -f raw c", [("q", ""), ("f", "raw")], ["a", "b", "c"]),
        ("-qfraw a", [("q", ""), ("f", "raw")], ["a"]),
        ("--format=raw -- -q", [("f", "raw")], ["-q"]),
        ("--form raw", [("f", "raw")], []),
        ("--fo raw", [(UNKNOWN, "--fo")], ["raw"]),
        ("--force", [("force", "")], []),
        ("--forc", [(UNKNOWN, "--forc")], []),
        ("--force=1", [(UNKNOWN, "--force=1")], []),
        ("-f", [(MISSING, "-f")], []),
        ("--format", [(MISSING, "--format")], []),
        ("x -Zq", [(UNKNOWN, "x"), ("q", "")], ["x"]),
        ("-qZ", [("q", ""), (UNKNOWN, "-qZ")], []),
        ("- -q", [("q", "")], ["-"]),
    ],
)
def test_option_words(words: str, found: list[tuple[str, str]], rest: list[str]) -> None:
    """Options anywhere, in clusters, abbreviated while unique; a wrong one is named as the C library's scan has it."""
    long = {"format:": "f", "force": "force", "force-share": "U", "quiet": "q"}
    scan = Getopt(words.split(), "f:qU", long, program="create")
    assert list(scan) == found
    assert scan.rest == rest
