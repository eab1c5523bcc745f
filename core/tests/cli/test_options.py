"""QEMU's option grammar, compared with QEMU's own tools where they show how they understood."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_core.descriptors import Option
from vm_core.errors import UsageError
from vm_core.options import describe, nest, parse, parse_bool, parse_int, parse_size, pieces, split, typed

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


@pytest.mark.parametrize(
    ("text", "implied", "expected"),
    [
        ("file=a,,b.img,if=virtio", None, {"file": "a,b.img", "if": "virtio"}),
        ("ide-hd,drive=d0", "driver", {"driver": "ide-hd", "drive": "d0"}),
        ("driver=ide-hd", "driver", {"driver": "ide-hd"}),
        ("share,nosnapshot,x=1", None, {"share": "on", "snapshot": "off", "x": "1"}),
        ("opt=a=b,c=", None, {"opt": "a=b", "c": ""}),
        ("a=1,a=2", None, {"a": "2"}),
        ("a=,,,b=2", None, {"a": ",", "b": "2"}),
        ("", "driver", {}),
        ("no", "driver", {"driver": "no"}),
        ("x=1,no", None, {"x": "1", "no": "on"}),
    ],
)
def test_flat_options(text: str, implied: str | None, expected: dict[str, str]) -> None:
    """Commas doubled are commas, first pieces have an implied key, bare words are on and no-words off."""
    assert split(text, implied) == expected


@given(st.dictionaries(st.from_regex(r"[a-z][a-z0-9.-]{0,8}", fullmatch=True), st.text(), max_size=6))
def test_any_value_survives_when_its_commas_are_doubled(values: dict[str, str]) -> None:
    """Writing values with doubled commas and splitting them gives them back, whatever they hold."""
    text = ",".join(f"{key}={value.replace(',', ',,')}" for key, value in values.items())
    assert split(text) == values


@given(st.text(alphabet="a=,.", max_size=12))
def test_pieces_lose_nothing(text: str) -> None:
    """Joining the pieces with their commas doubled is the text again, as the grammar reads it."""
    assert pieces(",".join(piece.replace(",", ",,") for piece in pieces(text))) == pieces(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "driver=qcow2,file.driver=file,file.filename=x",
            {"driver": "qcow2", "file": {"driver": "file", "filename": "x"}},
        ),
        ("a.0=x,a.1.b=y", {"a": ["x", {"b": "y"}]}),
        ("a.1=y,a.0=x", {"a": ["x", "y"]}),
        ('{"driver":"raw","n":[1,{"b":true}]}', {"driver": "raw", "n": [1, {"b": True}]}),
    ],
)
def test_nested_options(text: str, expected: dict[str, Any]) -> None:
    """Dots make dicts, numbers make lists in their order, and JSON is taken as it is."""
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a=1,a.b=2", "value and members"),
        ("a.b=2,a=1", "value and members"),
        ("a.0=1,a.2=1", "a.1 is missing"),
        ("a.0=1,a.b=1", "all numbered or all named"),
        ("a..b=1", "name on both sides"),
        ("=1", "no name before"),
        ("{nonsense", "not JSON"),
        ("{" * 100_000, "not JSON"),
    ],
)
def test_malformed_options_are_named(text: str, part: str) -> None:
    """What contradicts itself is refused in a sentence that says where."""
    with pytest.raises(UsageError, match=part):
        parse(text)


SIZES = ["512", "1k", "1K", "64M", "1.5M", "0.5k", "2G", "0x200", "1b", "3T", "10kk", "k", "-1", "", "1.5", "1e3", "x"]


@needs_qemu_img
@pytest.mark.parametrize("text", SIZES)
def test_sizes_mean_what_qemu_img_takes_them_for(text: str, tmp_path: Path) -> None:
    """Every size is read as qemu-img reads it, or refused as it refuses it."""
    image = tmp_path / "x"
    theirs = subprocess.run(["qemu-img", "create", "-q", "-f", "raw", "--", image, text], capture_output=True)
    if theirs.returncode == 0:
        # raw images are made of whole sectors
        assert -(-parse_size(text) // 512) * 512 == image.stat().st_size
    else:
        with pytest.raises(UsageError):
            parse_size(text)


@needs_qemu_img
@pytest.mark.parametrize("name", ["a,b", "a,,b", "a=b", ",", "a.b"])
def test_file_names_with_commas_mean_what_qemu_img_takes_them_for(name: str, tmp_path: Path) -> None:
    """A name with commas, doubled, names the same file in qemu-img's --image-opts and here."""
    (tmp_path / name).write_bytes(bytes(1024))
    text = f"driver=raw,file.filename={name.replace(',', ',,')}"
    shown = subprocess.run(
        ["qemu-img", "info", "--output=json", "--image-opts", text], cwd=tmp_path, capture_output=True, check=True
    )
    theirs = json.loads(shown.stdout)["filename"]
    assert parse(text)["file"]["filename"] == theirs == name


OPTIONS = (
    Option("size", "size", "how large", default="64k"),
    Option("lazy", "bool", "later", default=False),
    Option("mode", "enum", "which", choices=("fast", "slow")),
    Option("path", "str", "where", required=True),
    Option("count", "int", "how many"),
)


def test_values_get_their_declared_types() -> None:
    """Strings become the types that the descriptor declares."""
    given_values = {"size": "64k", "lazy": "on", "mode": "fast", "path": "/x", "count": "0x10"}
    assert typed(given_values, OPTIONS, "-x") == {
        "size": 65536,
        "lazy": True,
        "mode": "fast",
        "path": "/x",
        "count": 16,
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"path": "x", "sise": "1"}, "-x: no option 'sise'; did you mean 'size'? There is: count, lazy, mode, path"),
        ({"size": "1"}, "-x: path=… is needed: where"),
        ({"path": "x", "mode": "medium"}, "-x: mode=medium: one of fast, slow is needed"),
        ({"path": "x", "lazy": "maybe"}, "-x: lazy=maybe: 'on' or 'off' is needed"),
        ({"path": "x", "count": "1.5"}, "-x: count=1.5: a whole number is needed"),
        ({"path": "x", "size": "1X"}, "-x: size=1X: a size is needed"),
    ],
)
def test_wrong_values_are_told_with_what_is_right(values: dict[str, str], message: str) -> None:
    """Unknown names get the close match and the list; wrong values are told what is needed."""
    with pytest.raises(UsageError) as error:
        typed(values, OPTIONS, "-x")
    assert str(error.value).startswith(message)


def test_help_lines_show_type_help_and_default() -> None:
    """The help of options is made from their descriptors."""
    assert describe(OPTIONS)[0] == "  count=<num>     how many"
    assert describe(OPTIONS)[1] == "  lazy=on|off     later (default: off)"


def test_json_values_pass_the_parsers() -> None:
    """Values that JSON typed already are taken as they are."""
    assert parse_bool(True) is True
    assert parse_size(5) == 5
    for wrong in (-1, 1 << 63):  # as a JSON number
        with pytest.raises(UsageError):
            parse_size(wrong)
    assert parse_int(7) == 7
    assert nest({"a": {"b": 1}, "a.c": 2}) == {"a": {"b": 1, "c": 2}}
