"""QMP without I/O: any cut of the bytes gives the same conversation, and the conversation is QEMU's."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.qmp import protocol
from vm_core.qmp.protocol import QmpError, Session, Splitter

VERSION = {"qemu": {"major": 1, "minor": 2, "micro": 3}, "package": "test"}


def execute(name: str, arguments: dict[str, Any]) -> Any:
    if name == "echo":
        return arguments
    raise QmpError(f"The command {name} has not been found", "CommandNotFound")


def talk(chunks: Iterable[bytes]) -> list[dict[str, Any]]:
    """Feed *chunks* to a new session and return its answers."""
    session = Session(execute, VERSION)
    return [json.loads(reply) for chunk in chunks for reply in session.receive(chunk)]


CONVERSATION = (
    b'{"execute":"echo"}\n'
    b'{"execute": "qmp_capabilities", "id": [1, {"a": "}"}]}\r\n'
    b'hello "world\n'
    b'{"execute":"echo","arguments":{"text":"\\"}{\\\\","n":1}}{"execute":"echo","id":"\\u00e9\xc3\xa9"}'
    b"[1,2]\n"
    b"{'execute':'echo','arguments':{'q':'it\\'s \"quoted\"'}}\n"
    b'{"execute":1}{"foo":1}{"arguments":{},"id":7}{"execute":"echo","arguments":[]}\n'
    b'{"execute":"echo",}\n\n  \n'
    b'{"execute":"absent"}\n'
)


def test_the_conversation_is_answered_in_order() -> None:
    """Commands before negotiation, ids, garbage, several objects a line and single quotes are answered in order."""
    answers = talk([CONVERSATION])
    assert [
        answer["return"] if "return" in answer else (answer["error"]["class"], answer["error"]["desc"])
        for answer in answers
    ] == [
        ("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'"),
        {},
        ("GenericError", "JSON parse error, expecting value"),
        {"text": '"}{\\', "n": 1},
        {},
        ("GenericError", "QMP input must be a JSON object"),
        {"q": 'it\'s "quoted"'},
        ("GenericError", "QMP input member 'execute' must be a string"),
        ("GenericError", "QMP input member 'foo' is unexpected"),
        ("GenericError", "QMP input lacks member 'execute'"),
        ("GenericError", "QMP input member 'arguments' must be an object"),
        ("GenericError", answers[11]["error"]["desc"]),
        ("CommandNotFound", "The command absent has not been found"),
    ]
    assert answers[1]["id"] == [1, {"a": "}"}]
    assert answers[4]["id"] == "éé"
    assert answers[9]["id"] == 7


@given(st.lists(st.integers(0, len(CONVERSATION)), max_size=20).map(sorted))
def test_any_cut_of_the_bytes_gives_the_same_answers(cuts: list[int]) -> None:
    """How the stream is cut into reads does not change a single answer."""
    edges = [0, *cuts, len(CONVERSATION)]
    chunks = [CONVERSATION[start:end] for start, end in itertools.pairwise(edges)]
    assert talk(chunks) == talk([CONVERSATION])


@given(st.lists(st.binary(max_size=40), max_size=8))
@settings(max_examples=300)
def test_garbage_never_stops_the_session(chunks: list[bytes]) -> None:
    """Any bytes at all are answered with well-formed objects, and nothing is raised."""
    session = Session(execute, VERSION)
    for chunk in chunks:
        for reply in session.receive(chunk):
            assert set(json.loads(reply)) <= {"error", "return", "id"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.lists(json_values, max_size=5), st.booleans(), st.integers(1, 7))
def test_ids_come_back_as_they_were(ids: list[Any], pretty: bool, step: int) -> None:
    """Whatever JSON an id is, and however the command is laid out, it comes back unchanged."""
    sent = [{"execute": "qmp_capabilities"}, *({"execute": "echo", "id": each} for each in ids)]
    text = b"".join(json.dumps(each, indent=2 if pretty else None).encode() for each in sent)
    answers = talk(text[at : at + step] for at in range(0, len(text), step))
    assert [answer["id"] for answer in answers[1:]] == ids


def test_a_command_without_end_is_refused_with_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that never ends is dropped at the limit, answered once, and the next line is heard."""
    monkeypatch.setattr(protocol, "MAX_COMMAND", 1000)
    splitter = Splitter()
    texts = [text for _ in range(5000) for text in splitter.feed(b'{"x": [')]
    assert texts == [b"\xff"]
    assert len(splitter._buffer) <= 1007
    assert list(splitter.feed(b'\n{"a":1}')) == [b'{"a":1}']


def test_deep_nesting_is_refused() -> None:
    """Brackets nested beyond the limit give an error and not a crash."""
    session = Session(execute, VERSION)
    session.negotiated = True
    (reply,) = session.receive(b"[" * 5000)
    assert b"JSON parse error" in reply


def test_events_wait_for_negotiation_and_carry_their_time() -> None:
    """No event is sent before negotiation; afterwards it has seconds and microseconds, and data only if any."""
    session = Session(execute, VERSION)
    assert session.event("STOP") == b""
    list(session.receive(b'{"execute":"qmp_capabilities"}'))
    assert json.loads(session.event("STOP", {}, 12.345678)) == {
        "timestamp": {"seconds": 12, "microseconds": 345678},
        "event": "STOP",
    }
    assert json.loads(session.event("RESET", {"guest": True}))["data"] == {"guest": True}


def test_capabilities_that_are_not_offered_are_refused() -> None:
    """Asking for a capability that the greeting does not list is an error, and negotiation goes on."""
    session = Session(execute, VERSION)
    replies = session.receive(b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}')
    assert b"error" in next(iter(replies))
    assert not session.negotiated


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="qemu-system-x86_64 is not installed")
def test_errors_are_those_of_a_real_qemu() -> None:
    """The classes of all errors, and the sentences of those that are not about JSON, are QEMU's."""
    lines = [
        b'{"execute":"query-status"}',
        b'{"execute":"qmp_capabilities","id":[1]}',
        b'{"execute":"qmp_capabilities"}',
        b"hello",
        b"[1]",
        b'{"execute":1}',
        b'{"foo":1}',
        b'{"execute":"echo","foo":1}',
        b'{"execute":"stop","arguments":1}',
        b"{'execute':'no-such-command','id':'x'}",
        b'{"execute":"no-such-command",}',
        b'{"arguments":{}, "id": 7}',
    ]
    qemu = subprocess.run(
        ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-machine", "none", "-S", "-qmp", "stdio"],
        input=b"\n".join([*lines, b'{"execute":"quit"}\n']),
        capture_output=True,
        timeout=60,
    )
    theirs = [json.loads(line) for line in qemu.stdout.splitlines()]
    theirs = [each for each in theirs[1:] if "event" not in each][: len(lines)]
    ours = talk(line + b"\n" for line in lines)
    for line, mine, its in zip(lines, ours, theirs, strict=True):
        assert mine.keys() == its.keys(), line
        assert mine.get("id") == its.get("id")
        if "error" in its:
            assert mine["error"]["class"] == its["error"]["class"]
            if "JSON parse" not in its["error"]["desc"]:
                assert mine["error"]["desc"] == its["error"]["desc"]
            else:
                assert mine["error"]["desc"].startswith("JSON parse error, ")
