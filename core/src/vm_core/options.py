"""QEMU's option grammar, and options typed by their descriptors.

Theory of operation. A command line's ``key=value,key2=value2`` becomes a flat dict in two steps that stand apart:
:func:`split` (pure text) and :func:`nest` (dotted keys become dicts and lists). :func:`typed` then turns the strings
into what :class:`~vm_core.descriptors.Option` says, and refuses unknown names with the closest match.

The grammar is that of QEMU's manual page and of ``docs/devel/qapi-code-gen`` ("keyval"):

* ``,,`` inside a value is one comma; ``=`` is free inside values;
* the first piece may leave out its key where the option has an implied one: ``-device NAME,…``, ``-accel NAME``;
* a bare ``word`` is ``word=on`` and a bare ``noword`` is ``word=off``;
* ``a.b=1`` is ``{"a": {"b": 1}}``, ``a.0=x,a.1=y`` is ``{"a": ["x", "y"]}``;
* where QEMU takes JSON, a value that starts with ``{`` is JSON.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .errors import UsageError

if TYPE_CHECKING:
    from .descriptors import Option

_BOTH = "Cannot reference an existing block device with additional options or a new filename"
_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a "no such thing" message: the close match, and all there is where that is short.

    >>> suggest("qcow3", ["raw", "qcow2"])
    "; did you mean 'qcow2'? There is: qcow2, raw"
    """
    import difflib

    names = sorted(set(known))
    close = difflib.get_close_matches(word, names, 1)
    text = f"; did you mean {close[0]!r}?" if close else ""
    if names:
        text += f"{' There is' if close else '; there is'}: {', '.join(names)}"
    else:
        text += "; there is none"
    return text


def pieces(text: str) -> list[str]:
    """*text* cut at its commas; doubled ones become one comma in the piece."""
    found: list[str] = []
    current = ""
    position = 0
    while True:
        comma = text.find(",", position)
        if comma < 0:
            found.append(current + text[position:])
            return found
        current += text[position:comma]
        if text.startswith(",,", comma):
            current += ","
            position = comma + 2
        else:
            found.append(current)
            current, position = "", comma + 1


def split(text: str, implied: str | None = None) -> dict[str, str]:
    """``key=value,…`` as a flat dict in order; of a key given twice the last value holds, as in QEMU.

    *implied* is the key of a first piece without ``=``. Raises UsageError for an empty key.
    """
    result: dict[str, str] = {}
    for number, piece in enumerate(pieces(text)):
        key, equals, value = piece.partition("=")
        if not equals:
            if number == 0 and implied is not None:
                if piece:
                    result[implied] = piece
                continue
            if not piece:
                continue
            if key.startswith("no") and len(key) > 2:
                key, value = key[2:], "off"
            else:
                value = "on"
        if not key:
            raise UsageError(f"option {piece!r} has no name before '=': write NAME=VALUE (and ',,' for a comma)").put(
                "Invalid parameter ''"
            )
        result[key] = value
    return result


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as dicts, and dicts whose keys are 0, 1, 2, … as lists.

    Raises UsageError where a key is given both a value and members, or a list has gaps.
    """
    root: dict[str, Any] = {}
    for key, value in _members(flat):
        parts = key.split(".")
        if not all(parts):
            raise UsageError(f"option {key!r}: a dot needs a name on both sides")
        here = root
        for depth, part in enumerate(parts[:-1]):
            below = here.setdefault(part, {})
            if not isinstance(below, dict):
                taken = ".".join(parts[: depth + 1])
                raise UsageError(f"option {taken!r} is given a value and members ({key}): give one of them").put(_BOTH)
            here = below
        if isinstance(here.get(parts[-1]), dict) and not isinstance(value, dict):
            raise UsageError(f"option {key!r} is given a value and members: give one of them").put(_BOTH)
        here[parts[-1]] = value
    return {key: _lists(value, key) for key, value in root.items()}


def _members(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of *options*, those within dicts and lists of dicts as well: both notations may mix."""
    for key, value in options.items():
        if isinstance(value, dict) and value:
            yield from _members(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(member, dict) for member in value):
            yield from _members({str(number): member for number, member in enumerate(value)}, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _lists(value: Any, path: str) -> Any:
    """*value* with dicts of numbered members turned into lists, below *path*."""
    if not isinstance(value, dict) or not value:
        return value
    members = {key: _lists(member, f"{path}.{key}") for key, member in value.items()}
    numbers = [key.isdigit() for key in members]
    if not any(numbers):
        return members
    if not all(numbers):
        raise UsageError(f"option {path!r}: members are either all numbered or all named")
    order = {int(key): member for key, member in members.items()}
    missing = next((n for n in range(len(order)) if n not in order), None)
    if missing is not None:
        raise UsageError(f"option {path!r}: member {path}.{missing} is missing")
    return [order[n] for n in range(len(order))]


def parse(text: str, implied: str | None = None) -> dict[str, Any]:
    """*text* as nested options: a JSON object where it starts with ``{``, else QEMU's dotted form."""
    if text.lstrip().startswith("{"):
        return parse_json(text)
    return nest(split(text, implied))


def parse_json(text: str) -> dict[str, Any]:
    """A JSON object. Raises UsageError that tells where it is wrong."""
    from .jsontext import JsonError, parse

    try:
        value = parse(text)
    except (JsonError, RecursionError) as error:
        told = str(error) or "JSON nesting depth limit exceeded"
        raise UsageError(f"not JSON: {told}").put(f"Could not parse the JSON options: {told}") from None
    if not isinstance(value, dict):
        raise UsageError(f"a JSON object {{…}} is needed, not {type(value).__name__}").put("Invalid JSON object given")
    return value


def parse_bool(text: str | bool, name: str = "value") -> bool:
    """on/off, yes/no, true/false, y/n."""
    if isinstance(text, bool):
        return text
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise UsageError(f"{name}={text}: 'on' or 'off' is needed").put(
        f"Parameter '{_parameter(name)}' expects 'on' or 'off'"
    )


def _parameter(name: str) -> str:
    """The option's own name behind what messages begin with."""
    return name.rpartition(": ")[2]


def parse_size(text: str | int, name: str = "size", default_suffix: str = "") -> int:
    """Bytes from ``512``, ``64k``, ``1.5G``, ``0x200``; *default_suffix* holds for a number without one.

    Raises UsageError. See :func:`vm_core.sizes.parse`.
    """
    if isinstance(text, int):
        if 0 <= text < 1 << 63:
            return text
        text = str(text)
    from .sizes import NotANumberError, OutOfRangeError, parse

    try:
        value = parse(text, default_suffix.lower() or "b")
    except NotANumberError:
        raise UsageError(f"{name}={text}: a size is needed: a number with k, M, G, T, P or E behind it").put(
            f"Parameter '{_parameter(name)}' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively."
        ) from None
    except OutOfRangeError:
        raise UsageError(f"{name}={text}: at most {(1 << 64) - 1} bytes are possible").put(
            f"Value '{text}' is out of range for parameter '{_parameter(name)}'"
        ) from None
    if value >= 1 << 63:
        raise UsageError(f"{name}={text}: at most {(1 << 63) - 1} bytes are possible").put(
            f"Value '{text}' is out of range for parameter '{_parameter(name)}'"
        )
    return value


def parse_int(text: str | int, name: str = "value") -> int:
    """A whole number, decimal or 0x…."""
    if not isinstance(text, str):
        return int(text)
    try:
        return int(text, 0) if str(text).lower().lstrip("+-").startswith("0x") else int(text)
    except ValueError:
        raise UsageError(f"{name}={text}: a whole number is needed").put(
            f"Parameter '{_parameter(name)}' expects a number"
        ) from None


def typed(values: Mapping[str, Any], options: Sequence[Option], where: str) -> dict[str, Any]:
    """*values* as the types that *options* declare. *where* begins the messages: ``-device ide-hd``.

    An option with dots in its name is given as a member of nested dicts or by that name. Defaults are not filled in.
    Raises UsageError for unknown names, wrong values and required options left out.
    """
    known = {option.name: option for option in options}
    result: dict[str, Any] = {}
    for name, value in _flat(values, known):
        option = known.get(name)
        if option is None:
            raise UsageError(f"{where}: no option {name!r}{suggest(name, known)}")
        result[name] = convert(value, option, where)
    for option in options:
        if option.required and option.name not in result:
            raise UsageError(f"{where}: {option.name}=… is needed: {option.help}")
    return result


def _flat(values: Mapping[str, Any], known: Mapping[str, Option]) -> list[tuple[str, Any]]:
    """Names and values, with the members of a dict under dotted names where such options are *known*."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict) and any(one.startswith(f"{name}.") for one in known):
            members = {f"{name}.{key}": member for key, member in value.items()}
            found += _flat(members, known)
        else:
            found.append((name, value))
    return found


def convert(value: Any, option: Option, where: str) -> Any:
    """One *value* as *option* declares it."""
    name = f"{where}: {option.name}"
    if isinstance(value, (dict, list)) and option.type in ("bool", "size", "int", "enum"):
        raise UsageError(f"{name}: one value is needed, not members")
    if option.type == "bool":
        return parse_bool(value, name)
    if option.type == "size":
        return parse_size(value, name)
    if option.type == "int":
        return parse_int(value, name)
    if option.type == "enum" and value not in option.choices:
        raise UsageError(f"{name}={value}: one of {', '.join(option.choices)} is needed")
    return value


def describe(options: Sequence[Option]) -> list[str]:
    """Lines for ``NAME,help``: name, type, help and default, aligned."""
    shapes = {option.name: _shape(option) for option in options}
    left = max((len(f"{name}={shape}") for name, shape in shapes.items()), default=0)
    return [
        f"  {f'{option.name}={shapes[option.name]}':<{min(left, 34)}}  {option.help}{_default(option)}"
        for option in sorted(options, key=lambda option: option.name)
    ]


def _shape(option: Option) -> str:
    if option.type == "enum":
        return "|".join(option.choices)
    return {"bool": "on|off", "size": "<size>", "int": "<num>", "node": "<node>"}.get(option.type, "<str>")


def _default(option: Option) -> str:
    if option.required:
        return " (required)"
    if option.default is None or "(default" in option.help:  # the help says it better
        return ""
    shown = ("off", "on")[option.default] if isinstance(option.default, bool) else option.default
    return f" (default: {shown})"
