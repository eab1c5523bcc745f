"""What to do about an error, where the peer's sentence tells only what is wrong."""

from __future__ import annotations

import errno

from ...errors import ImageError, LockError, PluginError, UsageError, VmError


def advise(error: BaseException) -> str:
    """One sentence; empty where nothing can be added."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, LockError):
            return "stop the program that uses the image; to look at it all the same, use -U (--force-share)"
        if isinstance(cause, PluginError) and cause.peer:
            if cause.peer.startswith("Unknown file format"):
                from .createopts import creatable

                return creatable(cause)
            return str(cause)
        if isinstance(cause, OSError) and cause.errno is not None:
            found = _SYSTEM.get(cause.errno)
            if found:
                return found
    text = " ".join([str(error), *(getattr(cause, "peer", "") for cause in causes)])
    for words, advice in _WORDS:
        if words in text:
            return advice
    for cause in causes:
        if isinstance(cause, UsageError | ImageError) and cause.peer and "\n" not in str(cause):
            told, shown = str(cause), cause.peer
            if told.startswith(shown):
                return told[len(shown) :].lstrip(":; ")
            if shown not in told and len(told) < 400:
                return told
    return ""


#: What the system's errors ask for.
_SYSTEM = {
    errno.ENOSPC: "the disk is full: make room, or choose another place",
    errno.EDQUOT: "your quota is used up: make room, or choose another place",
    errno.EROFS: "the file system is mounted read-only: choose another place",
    errno.EFBIG: "the file system (or ulimit -f) allows no file of this size",
}

#: Words of messages, the most telling first.
_WORDS = (
    (
        "Could not open backing file",
        "the image needs its backing file: bring it back, or name another with rebase -u -b",
    ),
    (
        "Could not open backing image",
        "the file behind -b is looked for beside the new image; -u creates without looking",
    ),
    ("Failed to load snapshot", "snapshot -l lists the snapshots that there are"),
    ("snapshot not found", "snapshot -l lists the snapshots that there are"),
    ("Could not create snapshot", ""),
    ("No such file or directory", "check the name, and for a new image that the directory exists"),
    ("Permission denied", "you may not do that with this file: see its owner and mode with ls -l"),
    ("Read-only file system", "the file system is mounted read-only: choose another place"),
    ("No space left on device", "the disk is full: make room, or choose another place"),
    ("Is a directory", "name a file in that directory"),
    ("to be a regular file", "name a file; a device is opened as host_device:PATH"),
    ("Image is not in", "leave out -f to have the format recognised, or name the one that it has"),
    ("Unknown file format", "vm --list-plugins format tells what there is"),
    ("needs a size parameter", "give the size behind the file name: 10G"),
)


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, innermost first."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and len(found) < 20:
        if isinstance(current, VmError | OSError):
            found.append(current)
        current = current.__cause__ or current.__context__
    return found[::-1]
