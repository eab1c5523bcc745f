"""The command line's words, and the drives they make."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from vm_core.cli.arguments import ARGUMENTS, parse, usage
from vm_core.cli.drives import DriveSpec, cache_mode_switches, drive_specs, parse_drive
from vm_core.errors import UsageError


def specs(*words: str) -> list[DriveSpec]:
    return drive_specs(parse(words))


def test_one_dash_two_dashes_and_aliases_are_the_same() -> None:
    """-machine, --machine and -M are one option; values may follow an equals sign after two dashes."""
    for words in (["-machine", "pc"], ["--machine", "pc"], ["-M", "pc"], ["--machine=pc"]):
        assert parse(words).value("machine") == "pc"


def test_options_keep_their_order_and_the_last_single_value_holds() -> None:
    """Repeated options keep their order, and of those that hold one value the last one counts."""
    line = parse(["-m", "64", "-device", "a", "-m", "128", "-device", "b"])
    assert line.value("m") == "128"
    assert [given.value for given in line.all("device")] == ["a", "b"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-driv", "x"], "-driv: no such option; did you mean -drive? vm -h lists them"),
        (["-vnc", ":1"], "-vnc is not supported: there is no display"),
        (["-m"], "-m: [size=]MEGABYTES is needed behind it"),
        (["-S=1"], "-S: this option takes no value"),
    ],
)
def test_what_is_no_option_is_refused_by_name(words: list[str], message: str) -> None:
    """Unknown, unsupported and incomplete options are named, with what to do."""
    with pytest.raises(UsageError) as error:
        parse(words)
    assert str(error.value).startswith(message)


def test_an_optional_value_is_taken_unless_an_option_follows() -> None:
    """--list-plugins takes a kind if one follows."""
    assert parse(["--list-plugins", "format", "--json"]).value("list-plugins") == "format"
    assert parse(["--list-plugins", "--json"]).value("list-plugins") == ""


def test_usage_names_every_option() -> None:
    """The help text has a line for every option of the table."""
    text = usage()
    for argument in ARGUMENTS:
        assert f"-{argument.name}" in text
    assert max(map(len, text.splitlines())) <= 120


def test_a_plain_word_is_the_first_disk() -> None:
    """``vm disk.qcow2`` is ``vm -hda disk.qcow2``."""
    (spec,) = specs("disk.qcow2")
    assert (spec.file, spec.interface, spec.index, spec.id) == ("disk.qcow2", "ide", 0, "ide0-hd0")


PLACES = [
    ("-hda a -hdb b -hdd d -cdrom c", ["ide0-hd0", "ide0-hd1", "ide1-hd1", "ide1-cd0"]),
    ("-drive file=a -drive file=b,if=virtio -drive file=c,if=virtio", ["ide0-hd0", "virtio0", "virtio1"]),
    ("-drive file=a,index=1 -drive file=b", ["ide0-hd1", "ide0-hd0"]),
    ("-drive file=a,bus=1,unit=1 -drive file=b", ["ide1-hd1", "ide0-hd0"]),
    ("-drive file=a,media=cdrom -drive file=b", ["ide0-cd0", "ide0-hd1"]),
    ("-drive file=a -hda b", ["ide0-hd1", "ide0-hd0"]),
    ("-drive file=a,if=none,id=x -drive file=b,if=none", ["x", "none1"]),
]


@pytest.mark.parametrize(("words", "ids"), PLACES)
def test_drives_get_the_places_and_names_of_qemu(words: str, ids: list[str]) -> None:
    """Index, bus, unit and the default id are settled as QEMU settles them."""
    assert [spec.id for spec in specs(*words.split())] == ids


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed")
@pytest.mark.parametrize("words", [words for words, _ in PLACES if "-drive file=a -hda b" not in words])
def test_drives_are_called_what_a_real_qemu_calls_them(words: str, tmp_path: Path) -> None:
    """query-block of a real QEMU with the same words shows the same names for the same files."""
    for name in "abcd":
        (tmp_path / name).write_bytes(bytes(65536))
    script = b'{"execute":"qmp_capabilities"}{"execute":"query-block"}{"execute":"quit"}'
    command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio", *words.split()]
    shown = subprocess.run(command, cwd=tmp_path, input=script, capture_output=True, timeout=60)
    answers = [json.loads(line) for line in shown.stdout.splitlines()]
    blocks = next(answer["return"] for answer in answers if isinstance(answer.get("return"), list))
    theirs = {block["device"]: block["inserted"]["file"] for block in blocks if "inserted" in block}
    assert theirs == {spec.id: spec.file for spec in specs(*words.split())}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("-drive file=a,index=0 -hda b", "ide drive 0 is taken by -drive file=a,index=0"),
        ("-drive file=a,id=x -drive file=b,id=x", "id=x is taken by -drive file=a,id=x"),
        ("-drive file=a,bus=0,unit=2", "unit 2 is too big: a ide bus has 2"),
        ("-drive file=a,index=1,unit=0", "either index= or bus= and unit="),
        ("-drive if=virtio", "file=IMAGE is needed"),
        ("-drive file=a,cache=fast", "one of none, writeback, writethrough, directsync, unsafe"),
        ("-drive file=a,copy-on-read=on", "there is no copy-on-read"),
        ("-drive file=a,bps_rd=5", "there is no throttling"),
        ("-drive file=a,index=-1", "counts from 0"),
    ],
)
def test_drives_that_contradict_are_refused(words: str, part: str) -> None:
    """Places taken twice, ids used twice, and options that are not there are told by name."""
    with pytest.raises(UsageError) as error:
        specs(*words.split())
    assert part in str(error.value)


def test_driver_options_are_nested_and_kept() -> None:
    """Dotted options of a -drive belong to the block drivers and are handed on nested."""
    spec = parse_drive("file=a,,b.img,format=qcow2,file.locking=off,lazy-refcounts=on,cache=none")
    assert spec.file == "a,b.img"
    assert spec.driver_options == {"file": {"locking": "off"}, "lazy-refcounts": "on"}


@pytest.mark.parametrize(
    ("text", "direct", "no_flush", "writethrough"),
    [
        ("cache=none", True, False, False),
        ("cache=unsafe", False, True, False),
        ("cache=directsync", True, False, True),
        ("cache.direct=on,cache.writeback=off", True, False, True),
        ("cache=none,cache.direct=off,cache.no-flush=on", False, True, False),
    ],
)
def test_cache_switches_override_the_mode(text: str, direct: bool, no_flush: bool, writethrough: bool) -> None:
    """cache.… switches change single properties of the cache= mode."""
    assert cache_mode_switches(parse_drive(f"file=a,{text}")) == {
        "direct": direct,
        "no_flush": no_flush,
        "writethrough": writethrough,
    }
