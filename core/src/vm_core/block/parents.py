"""Finding the parent of a differencing image by the names that the image records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

from ..errors import GateError, ImageError

if TYPE_CHECKING:
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
    is missing. Raises ImageError where there are no names.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise ImageError(image, "a differencing image that names no parent: give backing.file.filename=PATH")
    if context.backing_given or context.gate.closed or not context.follow_backing:
        return names[0]
    refused = ""
    for reference in names:
        path = os.path.join(os.path.dirname(image), reference)
        try:
            context.gate.check(image, "backing", reference, path)
        except GateError:
            refused = refused or reference
            continue
        try:
            found = read(path)
        except (OSError, ValueError):
            continue
        check(found, reference, path)
        return reference
    # The gate's words say more about a file that is there than that another one is missing.
    if refused and os.path.exists(os.path.join(os.path.dirname(image), refused)):
        return refused
    return names[0]
