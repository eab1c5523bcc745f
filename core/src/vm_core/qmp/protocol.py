"""QMP without I/O: bytes come in, commands come out; replies and events become bytes.

Theory of operation. A :class:`Session` is one client's connection. It begins with a greeting and accepts nothing but
``qmp_capabilities`` until that was answered; afterwards commands are answered in order, and events may stand between
answers, never inside one. A transport sends what :meth:`Session.greeting` gives, feeds what it reads to
:meth:`Session.receive`, and sends the bytes that come back.

The wire is a stream of JSON objects, one a line by habit but not by rule: :class:`Splitter` finds their ends by
counting brackets outside strings, so it does not matter how the bytes are cut. After a value that is not JSON the
stream goes on at the next line.

Source: QEMU's ``docs/interop/qmp-spec`` (QMP 2.1 and later), sections "Server Greeting", "Capabilities Negotiation",
"Issuing Commands", "Command Responses", "Asynchronous events".
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

#: A command longer than this (bytes) is refused, so that a client cannot make us hold any amount of memory.
MAX_COMMAND = 8 << 20
#: Deeper nesting than this is refused, as QEMU's parser does.
MAX_NESTING = 1024

_INTERESTING = re.compile(rb"[\"'\\{}\[\]\n]")


class QmpError(Exception):
    """The error of a command: a class of QAPI's ``QapiErrorClass`` and a sentence."""

    def __init__(self, description: str, error_class: str = "GenericError") -> None:
        super().__init__(description)
        self.description = description
        self.error_class = error_class


class Splitter:
    """Cuts a stream of bytes into the JSON texts that it is made of."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._scanned = 0
        self._depth = 0
        self._quote = 0  # the byte that opened the string we are in
        self._skipping = False  # a text that was too long is dropped to the end of its line

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Texts that *data* completes. Raises nothing: what is not JSON comes out as it is, a line at a time."""
        self._buffer += data
        start = 0
        position = self._scanned
        while match := _INTERESTING.search(self._buffer, position):
            position = match.end()
            byte = self._buffer[match.start()]
            if byte == 0x5C and self._quote:  # a backslash: the next byte means nothing
                if position == len(self._buffer):
                    position -= 1
                    break
                position += 1
            elif self._quote:
                if byte == self._quote:
                    self._quote = 0
            elif byte in b"\"'":
                self._quote = byte
            elif byte in b"{[":
                self._depth += 1
            elif byte in b"}]" and self._depth:
                self._depth -= 1
            done = not self._depth and not self._quote and byte in b"}]\n"
            if self._skipping and byte == 0x0A:
                self._skipping, self._depth, self._quote, start = False, 0, 0, position
            elif done and not self._skipping:
                text = bytes(self._buffer[start:position]).strip()
                start = position
                if text:
                    yield text
            elif byte == 0x0A and self._quote and self._depth == 0:  # an unfinished string outside any object
                text = bytes(self._buffer[start:position]).strip()
                start, self._quote = position, 0
                yield text
        else:
            position = len(self._buffer)
        del self._buffer[:start]
        self._scanned = position - start
        if self._skipping:
            self._buffer.clear()
            self._scanned = 0
        elif len(self._buffer) > MAX_COMMAND or self._depth > MAX_NESTING:
            self._buffer.clear()
            self._scanned, self._skipping = 0, True
            yield b"\xff"  # no JSON: answered with an error


class Session:
    """One client. *execute* runs a command: ``execute(name, arguments) -> return value``, or raises :class:`QmpError`.

    *exists* tells whether a command of that name is there; *version* is the ``VersionInfo`` of the greeting.
    """

    def __init__(self, execute: Callable[[str, dict[str, Any]], Any], version: dict[str, Any]) -> None:
        self._execute = execute
        self._version = version
        self._splitter = Splitter()
        #: The client has left capabilities negotiation: commands and events flow.
        self.negotiated = False

    def greeting(self) -> bytes:
        """What the server says first."""
        return encode({"QMP": {"version": self._version, "capabilities": []}})

    def receive(self, data: bytes) -> Iterator[bytes]:
        """Execute the commands that *data* completes, one by one, and give the answer to each.

        A generator, so that events a command causes can be sent where they belong: before its answer.
        """
        for text in self._splitter.feed(data):
            yield encode(self._answer(text))

    def event(self, name: str, data: dict[str, Any] | None = None, now: float | None = None) -> bytes:
        """An event of *now* (seconds since 1970, the present where None); nothing before negotiation is over."""
        if not self.negotiated:
            return b""
        seconds, microseconds = divmod(int((time.time() if now is None else now) * 1_000_000), 1_000_000)
        message: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": microseconds},
            "event": name,
        }
        if data:
            message["data"] = data
        return encode(message)

    def _answer(self, text: bytes) -> dict[str, Any]:
        reply: dict[str, Any] = {}
        try:
            command = parse(text)
            if "id" in command:
                reply["id"] = command["id"]
            name, arguments = check(command)
            reply = {"return": self._run(name, arguments), **reply}
        except QmpError as error:
            reply = {"error": {"class": error.error_class, "desc": error.description}, **reply}
        return reply

    def _run(self, name: str, arguments: dict[str, Any]) -> Any:
        if name == "qmp_capabilities":
            return self._negotiate(arguments)
        if not self.negotiated:
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound")
        return self._execute(name, arguments)

    def _negotiate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.negotiated:
            raise QmpError("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        unknown = next((name for name in arguments if name != "enable"), None)
        if unknown is not None:
            raise QmpError(f"Parameter '{unknown}' is unexpected")
        wanted = arguments.get("enable", [])
        if not isinstance(wanted, list):
            raise QmpError("Invalid parameter type for 'enable', expected: array")
        for capability in wanted:
            raise QmpError(f"Capability {capability} is not available: this server offers none")
        self.negotiated = True
        return {}


def parse(text: bytes) -> dict[str, Any]:
    """One JSON text as a command object. Single quotes are accepted around strings, as QEMU's parser does."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = json.loads(_double_quoted(text.decode()))
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise QmpError(f"JSON parse error, {reason[:1].lower()}{reason[1:]}") from None
    if not isinstance(value, dict):
        raise QmpError("QMP input must be a JSON object")
    return value


def check(command: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a command object, or the error QEMU gives for its shape."""
    for member in command:
        if member not in ("execute", "arguments", "id"):
            raise QmpError(f"QMP input member '{member}' is unexpected")
    name = command.get("execute")
    if "execute" not in command:
        raise QmpError("QMP input lacks member 'execute'")
    if not isinstance(name, str):
        raise QmpError("QMP input member 'execute' must be a string")
    arguments = command.get("arguments", {})
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object")
    return name, arguments


def encode(message: dict[str, Any]) -> bytes:
    """One message as it goes over the wire."""
    return json.dumps(message, separators=(", ", ": ")).encode() + b"\r\n"


def _double_quoted(text: str) -> str:
    """JSON with its single-quoted strings turned into double-quoted ones."""

    def requote(match: re.Match[str]) -> str:
        word = match.group()
        if word[0] == '"':
            return word
        return '"' + re.sub(r'\\\'|"', lambda m: "'" if m.group() == "\\'" else '\\"', word[1:-1]) + '"'

    return re.sub(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'', requote, text, flags=re.DOTALL)
