"""Which serial ports, monitors and character devices a command line makes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from vm_core.chardev.mux import Channel
from vm_core.chardev.stream import Stdio
from vm_core.cli.arguments import parse
from vm_core.cli.consoles import Consoles
from vm_core.errors import UsageError


@pytest.fixture(autouse=True)
def _free_stdio() -> Iterator[None]:
    """Every test may use standard input and output anew."""
    Stdio._taken = None
    yield
    Stdio._taken = None


def shape(*words: str) -> tuple[list[str], list[str], bool]:
    """Kinds of the serial ports, of the monitors, and whether the console is on this terminal."""
    consoles = Consoles(parse(words), lambda: None)

    def kind(chardev: object) -> str:
        if isinstance(chardev, Channel):
            return f"mux of {chardev.mux.below.kind}"
        return "none" if chardev is None else str(getattr(chardev, "kind", "?"))

    serials = [kind(each) for each in consoles.serials]
    monitors = [("qmp " if each.control else "") + kind(each.chardev) for each in consoles.monitors]
    here = consoles.console_here
    consoles.close()
    return serials, monitors, here


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (["mux of stdio"], ["mux of stdio"], True)),
        ("-nographic", (["mux of stdio"], ["mux of stdio"], True)),
        ("-nodefaults", ([], [], False)),
        ("-monitor none", (["mux of stdio"], [], True)),
        ("-monitor stdio", (["null"], ["stdio"], False)),
        ("-serial stdio", (["stdio"], [], True)),
        ("-serial mon:stdio -serial null", (["mux of stdio", "null"], ["mux of stdio"], True)),
        ("-serial none", (["none"], [], False)),
        ("-nodefaults -serial mon:stdio -monitor null", (["mux of stdio"], ["mux of stdio", "null"], True)),
        ("-qmp null", (["mux of stdio"], ["mux of stdio", "qmp null"], True)),
        ("-qmp stdio", (["null"], ["qmp stdio"], False)),
        (
            "-chardev stdio,id=c,mux=on -serial chardev:c -mon chardev=c,mode=control",
            (["mux of stdio"], ["qmp mux of stdio"], True),
        ),
        ("-chardev null,id=c -mon c -serial stdio", (["stdio"], ["null"], True)),
    ],
)
def test_defaults_and_choices(words: str, expected: tuple[list[str], list[str], bool]) -> None:
    """The console and the monitor share the terminal unless one of them was put elsewhere."""
    assert shape(*words.split()) == expected


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("-serial stdio -qmp stdio", "used twice, by serial0 and qmp0"),
        ("-chardev null,id=a -chardev null,id=a", "a character device with id=a already"),
        ("-chardev null,id=a -serial chardev:a -mon a", "'a' is in use by -serial chardev:a: define it with mux=on"),
        ("-chardev null,id=a -mon a,mode=graphical", "mode=readline or mode=control"),
        ("-chardev null,id=a -mon a,pretty=on", "pretty=… is not supported"),
        ("-serial null -serial null -serial null -serial null -serial null", "a PC has 4 serial ports"),
    ],
)
def test_contradictions_are_told(words: str, part: str) -> None:
    """One device for two frontends, and modes there are not, are refused by name."""
    with pytest.raises(UsageError) as error:
        Consoles(parse(words.split()), lambda: None)
    assert part in str(error.value)
    assert Stdio._taken is None, "nothing is left taken"
