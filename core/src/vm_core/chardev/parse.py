"""Character devices from the command line: ``-chardev KIND,id=ID,…`` and the short forms of ``-serial``, ``-qmp``, …"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..descriptors import Option
from ..errors import UsageError
from ..options import split, suggest, typed
from .base import Chardev, Null

_MUX = Option("mux", "bool", "may be shared by several frontends, with Ctrl-a c between them", False)

#: What each kind takes, besides ``id``.
CHARDEV_KINDS: dict[str, tuple[str, tuple[Option, ...]]] = {
    "stdio": (
        "this terminal",
        (Option("signal", "bool", "Ctrl-C interrupts vm, and is not given to the guest", True), _MUX),
    ),
    "null": ("nowhere", (_MUX,)),
    "file": (
        "write to a file",
        (
            Option("path", "str", "the file", required=True),
            Option("append", "bool", "add to the file's end", False),
            _MUX,
        ),
    ),
    "pty": ("a new pseudo-terminal", (_MUX,)),
    "socket": (
        "a Unix or TCP socket",
        (
            Option("path", "str", "Unix socket"),
            Option("host", "str", "TCP host"),
            Option("port", "int", "TCP port"),
            Option("server", "bool", "listen (off: connect)", False),
            Option("wait", "bool", "as a server, wait for the first client before the guest starts", True),
            Option("nodelay", "bool", "send small packets at once (TCP)", True),
            _MUX,
        ),
    ),
}

_SHORT = "stdio, mon:stdio, null, none, pty, file:PATH, unix:PATH[,server=on][,wait=off], tcp:HOST:PORT[,…], chardev:ID"


def parse_options(text: str) -> dict[str, Any]:
    """``KIND,id=ID,…`` as typed options with ``backend`` and ``id``."""
    flat: dict[str, Any] = dict(split(text, "backend"))
    flat.setdefault("backend", "")
    if not flat.get("id"):
        raise UsageError(f"-chardev {text}: id=NAME is needed")
    return check(flat, f"-chardev {flat['backend']}")


def check(flat: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options of a character device with their types; ``backend`` and ``id`` stay."""
    kind = flat["backend"]
    if kind not in CHARDEV_KINDS:
        raise UsageError(f"{where}: no character device {kind!r}{suggest(kind, CHARDEV_KINDS)}")
    rest = {key: value for key, value in flat.items() if key not in ("backend", "id")}
    if kind == "socket" and "delay" in rest:
        rest["nodelay"] = "off" if rest.pop("delay") == "on" else "on"
    result = typed(rest, CHARDEV_KINDS[kind][1], where)
    if kind == "socket" and ("path" in result) == ("port" in result):
        raise UsageError(f"{where}: either path= (a Unix socket) or host= and port= (TCP) is needed")
    return {**result, "backend": kind, "id": flat["id"]}


def parse_legacy(text: str, id: str, where: str) -> dict[str, Any]:
    """A short form as typed options; ``mux`` is set for ``mon:…``. *where* begins messages: ``-serial``."""
    shared = text.startswith("mon:")
    word = text.removeprefix("mon:")
    scheme, colon, rest = word.partition(":")
    flat: dict[str, Any]
    if scheme in ("file", "unix", "tcp") and colon:
        flat = dict(split(rest, "address"))
        address = flat.pop("address", "")
        # The old spellings of wait=off and delay=off; "server" alone already means server=on.
        if scheme == "file":
            flat |= {"backend": "file", "path": address}
        elif scheme == "unix":
            flat |= {"backend": "socket", "path": address}
        else:
            host, _, port = address.rpartition(":")
            flat |= {"backend": "socket", "host": host.strip("[]"), "port": port}
        if not address:
            raise UsageError(f"{where} {text}: something is needed behind {scheme}:")
    elif scheme.partition(",")[0] in ("stdio", "null", "pty"):
        flat = dict(split(word, "backend"))
    elif scheme == "vc":
        raise UsageError(f"{where} {text}: there is no display to show it on; there is: {_SHORT}")
    else:
        raise UsageError(f"{where} {text}: not supported; there is: {_SHORT}")
    if shared:
        flat |= {"mux": "on"}
        if flat["backend"] == "stdio":
            flat.setdefault("signal", "off")
    return check({**flat, "id": id}, f"{where} {text}")


def make(options: Mapping[str, Any]) -> Chardev:
    """The character device that checked *options* describe; ``mux`` is the caller's business."""
    values = dict(options)
    kind, id = values.pop("backend"), values.pop("id")
    values.pop("mux", None)
    return _makers()[kind](id, **values)


def _makers() -> dict[str, Callable[..., Chardev]]:
    from .sockets import Socket
    from .stream import File, Pty, Stdio

    return {"stdio": Stdio, "null": Null, "file": File, "pty": Pty, "socket": Socket}
