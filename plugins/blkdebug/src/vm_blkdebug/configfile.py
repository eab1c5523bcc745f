"""Rules from a configuration file: sections ``[inject-error]`` and ``[set-state]`` of lines ``name = "value"``.

The syntax is that of QEMU's ``-readconfig``: a line each, comments begin with ``#``.
"""

from __future__ import annotations

import re

from vm_core.errors import ImageError

from .rules import SECTIONS, Rule, make

_SECTION = re.compile(r'\[([^\]\s"]+)(?:\s+"[^"]*")?\]')
_VALUE = re.compile(r'\s*(\S{1,63})(?:\s*=\s*"([^"]{1,1023}))?')

#: A longer file is no configuration file.
MAX_LENGTH = 1 << 20


def read(path: str) -> list[Rule]:
    """The rules of the file at *path*. Raises ImageError."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read(MAX_LENGTH + 1)
    except OSError as error:
        raise ImageError("", f"Could not read blkdebug config file: {error.strerror}") from None
    if len(text) > MAX_LENGTH:
        raise ImageError("", "Could not read blkdebug config file: File too large")
    return parse(text)


def parse(text: str) -> list[Rule]:
    """The rules that *text* describes. Raises ImageError."""
    sections: list[tuple[str, dict[str, str]]] = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        header = _SECTION.match(line)
        if line.startswith("[") and (header is None or header[1] not in SECTIONS):
            raise ImageError("", f"There is no option group '{header[1] if header else line[1:]}'")
        if header is not None:
            sections.append((header[1], {}))
            continue
        if not sections:
            raise ImageError("", "no group defined")
        found = _VALUE.match(line)
        if found is not None:
            sections[-1][1][found[1]] = found[2] or ""
    for name, values in sections:
        unknown = next((key for key in values if key not in SECTIONS[name]), None)
        if unknown is not None:
            raise ImageError("", f"Invalid parameter '{unknown}'")
    return [make(name, values) for name, values in sections]
