"""JSON as QEMU prints it, without the ``json`` module: members in its order, its escapes, its layout.

QEMU keeps an object's members in a hash table of 512 chains and prints them as they lie there: chain by chain, in a
chain the one entered last first. Scripts compare such texts (``qemu-img info --output=json``, ``json:`` file names), so
the order is part of the interface. The hash is the one of the tdb database.
"""

from __future__ import annotations

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
    return sorted(reversed(members.items()), key=lambda member: place(member[0]))


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
