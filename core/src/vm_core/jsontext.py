"""JSON as QEMU prints and reads it, without the ``json`` module: members in its order, its layout, its complaints.

QEMU keeps an object's members in a hash table of 512 chains and prints them as they lie there: chain by chain, in a
chain the one entered last first. Scripts compare such texts (``qemu-img info --output=json``, ``json:`` file names), so
the order is part of the interface. The hash is the one of the tdb database.

Reading is by RFC 8259, with strings in single quotes too and each key once in an object.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_CHAINS = 512
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\f": "\\f", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def place(name: str) -> int:
    """The chain that a member called *name* is in."""
    word = name.encode("utf-8", "surrogateescape")
    value = 0x238F13AF * len(word) + sum(byte << at * 5 % 24 for at, byte in enumerate(word))
    return (1103515243 * value + 12345 & 0xFFFFFFFF) % _CHAINS


def ordered(members: dict[str, Any]) -> list[tuple[str, Any]]:
    """The members in QEMU's order."""
    found = list(members.items())
    found.reverse()  # in one chain the last one comes first; sorting keeps that
    found.sort(key=lambda member: place(member[0]))
    return found


def quote(text: str) -> str:
    """A string with its quotes."""
    parts = ['"']
    for letter in text:
        code = ord(letter)
        if letter in _ESCAPES:
            parts.append(_ESCAPES[letter])
        elif 0x20 <= code < 0x7F:
            parts.append(letter)
        elif code > 0xFFFF:
            code -= 0x10000
            parts.append(f"\\u{0xD800 | code >> 10:04X}\\u{0xDC00 | code & 0x3FF:04X}")
        else:
            parts.append("\\uFFFD" if 0xD800 <= code < 0xE000 else f"\\u{code:04X}")
    parts.append('"')
    return "".join(parts)


def pretty(value: Any, indent: int = 0) -> str:
    """*value* over several lines, indented by four blanks a level, as ``--output=json`` prints it."""
    return _text(value, indent, "\n")


def compact(value: Any) -> str:
    """*value* on one line, as in ``json:{…}`` file names."""
    return _text(value, 0, "")


def _text(value: Any, indent: int, newline: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, float):
        return f"{value:.17g}"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, dict):
        parts = [f"{quote(name)}: {_text(member, indent + 1, newline)}" for name, member in ordered(value)]
        opening, closing = "{", "}"
    else:
        parts = [_text(member, indent + 1, newline) for member in value]
        opening, closing = "[", "]"
    if not newline:
        return f"{opening}{', '.join(parts)}{closing}"
    inner = "\n" + "    " * (indent + 1)
    return f"{opening}{','.join(inner + part for part in parts)}\n{'    ' * indent}{closing}"


class JsonError(ValueError):
    """A text is not JSON; in QEMU's words."""


_SPACE = " \t\r\n"
_WORDS = {"true": True, "false": False, "null": None}
_DEPTH = 1024
_UNESCAPED = {'"': '"', "'": "'", "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_MARKS = "{}[],:"

#: A token: what it is (one of the marks, or "string", "number", "word") and its text.
_Token = tuple[str, str]


def parse(text: str) -> Any:
    """The value that *text* is. Raises JsonError."""
    tokens = list(_tokens(text))
    depth, end = 0, len(tokens)
    for at, (kind, _) in enumerate(tokens):
        depth += (kind in "{[") - (kind in "}]")
        if depth > _DEPTH:
            raise JsonError("JSON nesting depth limit exceeded")
        if depth <= 0:
            end = at + 1
            break
    if not tokens:
        raise JsonError("Expecting a JSON value")
    value, used = _value(tokens, 0, end)
    if used < len(tokens):
        raise JsonError("Expecting at most one JSON value")
    return value


def _tokens(text: str) -> Iterator[_Token]:
    at, length = 0, len(text)
    while at < length:
        letter = text[at]
        start = at
        at += 1
        if letter in _SPACE:
            continue
        if letter in _MARKS:
            yield letter, letter
        elif letter in "\"'":
            while True:
                if at >= length or text[at] < " ":
                    raise _stray(text[start:at])
                at += 1
                if text[at - 1] == letter:
                    break
                if text[at - 1] == "\\":
                    at += 1
            yield "string", text[start:at]
        elif letter in "-0123456789":
            at = _number(text, start)
            yield "number", text[start:at]
        elif "a" <= letter <= "z":
            while at < length and "a" <= text[at] <= "z":
                at += 1
            yield "word", text[start:at]
        else:
            raise _stray(letter)


def _number(text: str, start: int) -> int:
    """The end of the number at *start*."""
    at = start + (text[start] == "-")

    def digits(at: int) -> int:
        if not text[at : at + 1].isdecimal():
            raise _stray(text[start : at + 1])
        while text[at : at + 1].isdecimal():
            at += 1
        return at

    first = at
    at = digits(at)
    if text[first] == "0" and at > first + 1:
        raise _stray(text[start : first + 2])
    if text[at : at + 1] == ".":
        at = digits(at + 1)
    if text[at : at + 1] in ("e", "E"):
        at = digits(at + 1 + (text[at + 1 : at + 2] in ("+", "-")))
    return at


def _value(tokens: list[_Token], at: int, end: int) -> tuple[Any, int]:
    """The value that begins at token *at*, and the token after it."""
    kind, text = _token(tokens, at, end)
    at += 1
    if kind == "string":
        return _unquote(text), at
    if kind == "number":
        return (int(text) if text.lstrip("-").isdecimal() else float(text)), at
    if kind == "word":
        if text not in _WORDS:
            raise _wrong(f"invalid keyword '{text}'")
        return _WORDS[text], at
    if kind == "[":
        items: list[Any] = []
        if _token(tokens, at, end)[0] == "]":
            return items, at + 1
        while True:
            item, at = _value(tokens, at, end)
            items.append(item)
            kind = _token(tokens, at, end)[0]
            at += 1
            if kind == "]":
                return items, at
            if kind != ",":
                raise _wrong("expected separator in list")
    if kind == "{":
        members: dict[str, Any] = {}
        if _token(tokens, at, end)[0] == "}":
            return members, at + 1
        while True:
            key, at = _value(tokens, at, end)
            if not isinstance(key, str):
                raise _wrong("key is not a string in object")
            if _token(tokens, at, end)[0] != ":":
                raise _wrong("missing : in object pair")
            value, at = _value(tokens, at + 1, end)
            if key in members:
                raise _wrong("duplicate key")
            members[key] = value
            kind = _token(tokens, at, end)[0]
            at += 1
            if kind == "}":
                return members, at
            if kind != ",":
                raise _wrong("expected separator in dict")
    raise _wrong("expecting value")


def _token(tokens: list[_Token], at: int, end: int) -> _Token:
    if at >= end:
        raise _wrong("premature EOI")
    return tokens[at]


def _unquote(text: str) -> str:
    parts: list[str] = []
    at, end = 1, len(text) - 1
    while at < end:
        stop = text.find("\\", at, end)
        if stop < 0:
            parts.append(text[at:end])
            break
        parts.append(text[at:stop])
        letter = text[stop + 1]
        at = stop + 2
        if letter == "u":
            code = _code(text, at)
            at += 4
            if 0xD800 <= code < 0xDC00 and text[at : at + 2] == "\\u":
                low = _code(text, at + 2)
                if not 0xDC00 <= low < 0xE000:
                    raise _wrong(f"\\u{text[at - 4 : at]} is not a valid Unicode character")
                code = 0x10000 + (code - 0xD800 << 10) + low - 0xDC00
                at += 6
            elif 0xD800 <= code < 0xE000:
                raise _wrong(f"\\u{text[at - 4 : at]} is not a valid Unicode character")
            parts.append(chr(code))
        elif letter in _UNESCAPED:
            parts.append(_UNESCAPED[letter])
        else:
            raise _wrong("invalid escape sequence in string")
    return "".join(parts)


def _code(text: str, at: int) -> int:
    digits = text[at : at + 4]
    if len(digits) < 4 or digits.strip("0123456789abcdefABCDEF"):
        raise _wrong(f"\\u{digits} is not a valid Unicode character")
    return int(digits, 16)


def _wrong(what: str) -> JsonError:
    return JsonError(f"JSON parse error, {what}")


def _stray(what: str) -> JsonError:
    return _wrong(f"stray '{what}'")
