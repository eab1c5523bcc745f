"""Differencing images: finding the parent by the names that the image records, and making those names."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import GateError, ImageError, UsageError

if TYPE_CHECKING:
    from .node import Node
    from .open import OpenContext

T = TypeVar("T")


def first_parent(
    names: Iterable[str],
    image: str,
    context: OpenContext,
    read: Callable[[str], T],
    check: Callable[[T, str, str], None],
) -> str:
    """The first of *names*, relative to *image*, that the gate lets through and that *read* (of a path) can look at.

    *read* raises OSError or ValueError for what is no such image; *check* (what was read, the name, the path) raises
    ImageError where it is one, and the wrong one. Where no file is there, the first of the names: opening it tells what
    is missing. Raises ImageError where there are no names, unless nothing depends on them: then they are empty.
    """
    names = list(dict.fromkeys(names))
    if context.backing_given or context.gate.closed or not context.follow_backing:
        return names[0] if names else ""
    if not names:
        raise ImageError(image, "a differencing image that names no parent: give backing.file.filename=PATH")
    refused = ""
    for reference in names:
        path = os.path.join(os.path.dirname(image), reference)
        try:
            context.gate.check(image, "backing", reference, path)
        except GateError:
            refused = refused or reference
            continue
        try:
            # A gate that follows lets anything through; a pipe would have to be waited for.
            if not _is_storage(os.stat(path).st_mode):
                continue
            found = read(path)
        except (OSError, ValueError):
            continue
        check(found, reference, path)
        return reference
    # The gate's words say more about a file that is there than that another one is missing.
    if refused and os.path.exists(os.path.join(os.path.dirname(image), refused)):
        return refused
    return names[0]


def _is_storage(mode: int) -> bool:
    return stat.S_ISREG(mode) or stat.S_ISBLK(mode)


def parent_path(reference: str, image: str) -> str:
    """Where the parent is that the user calls *reference*, from the directory of *image*. Raises UsageError.

    It has to be a file: no other name has a place in a differencing image.
    """
    from .gate import SCHEME

    if reference.startswith("file:"):
        reference = reference[5:]
    elif SCHEME.match(reference):  # json: too
        raise UsageError(f"'{reference}' is no file: a differencing image names its parent by a path")
    return os.path.join(os.path.dirname(_plain(image)), reference)


def parent_names(reference: str, image: str) -> tuple[str, str]:
    """The path of the parent *reference* of *image*, relative to the image and absolute, as Windows writes them.

    Without ``.\\`` before the relative one. Raises UsageError where they cannot be written so.
    """
    path, image = parent_path(reference, image), _plain(image)
    absolute = os.path.abspath(path)
    if os.path.isabs(reference.removeprefix("file:")):
        # Steps up lead out of the directory itself, not of a link to it.
        relative = os.path.relpath(absolute, os.path.realpath(os.path.dirname(image)))
    else:
        relative = os.path.relpath(path, os.path.dirname(image) or ".")
    for one in (relative, absolute):
        if "\\" in one:
            raise UsageError(f"'{one}' has a backslash in it, which would be taken for a separator")
        try:
            one.encode("utf-16-le")
        except UnicodeEncodeError:
            raise UsageError(f"'{one!r}' is no text: a differencing image names its parent in UTF-16") from None
    return relative.replace("/", "\\"), absolute.replace("/", "\\")


@contextmanager
def parent_image(reference: str, image: str, driver: str) -> Iterator[tuple[str, Any, int]]:
    """The parent *reference* of *image*, of the format *driver*: its path, the open driver, and its size in bytes.

    Raises ImageError.
    """
    from .formatnode import FormatNode
    from .open import open_node

    path = parent_path(reference, image)
    with open_node(
        {"driver": driver, "file": {"driver": "file", "filename": path}}, share=True, backing=False, io=False
    ) as node:
        assert isinstance(node, FormatNode)
        yield path, node.format, node.size


def recorded_parent(node: Node) -> Any:
    """The driver of an open backing image, below filters; None where there is none."""
    from .formatnode import FormatNode

    while node.transparent and "file" in node.children():
        node = node.children()["file"]
    return node.format if isinstance(node, FormatNode) else None


def _plain(name: str) -> str:
    return name[5:] if name.startswith("file:") else name
