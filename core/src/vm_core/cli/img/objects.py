"""``--object TYPE,id=ID,…``: secrets and the like, made before images are opened."""

from __future__ import annotations

from typing import Any

from ...errors import VmError
from .common import Exit, Failure, Tool, reason

#: Type → what makes one from its properties (strings, ``id`` included), as ``module:function``; and the properties.
TYPES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "secret": (
        "vm_core.crypto.secrets:add",
        (
            ("data", "string"),
            ("file", "string"),
            ("format", "QCryptoSecretFormat"),
            ("iv", "string"),
            ("keyid", "string"),
        ),
    ),
    "throttle-group": (
        "vm_filters.groups:add",
        (("limits", "ThrottleLimits"),),
    ),
}

#: Types that the peer has besides, refused by name.
_PEERS = (
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "main-loop",
    "pr-manager-helper",
    "secret_keyring",
    "thread-context",
    "tls-cipher-suites",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
)


def add(tool: Tool, text: str) -> None:
    """Make the object that *text* (``TYPE,id=ID,key=value`` or JSON) describes. Raises Failure; help ends the run."""
    from ...options import parse_json, split

    properties: dict[str, Any] = parse_json(text) if text.startswith("{") else dict(split(text, "qom-type"))
    kind = properties.pop("qom-type", None)
    if kind in ("help", "?"):
        print("List of user creatable objects:")
        for name in sorted(TYPES):
            print(f"  {name}")
        raise Exit(0)
    if kind is None:
        raise Failure("Parameter 'qom-type' is missing")
    if kind not in TYPES:
        if kind in _PEERS:
            raise Failure(f"--object {kind}: objects of this type are not supported; {', '.join(sorted(TYPES))} are")
        raise Failure(f"Parameter 'qom-type' does not accept value '{kind}'")
    where, known = TYPES[kind]
    if properties.pop("help", None) is not None:
        print(f"{kind} options:")
        for name, shape in known:
            print(f"  {name}=<{shape}>")
        raise Exit(0)
    if "id" not in properties:
        raise Failure("Parameter 'id' is missing")
    from ...references import load_reference

    try:
        make = load_reference(where)
    except ImportError:
        raise Failure(f"--object {kind}: pip install {where.partition('.')[0].replace('_', '-')}") from None
    try:
        make(properties)
    except (VmError, OSError) as error:
        raise Failure(reason(error)) from error
