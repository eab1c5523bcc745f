"""The gate: which files an image may make us open.

An image names other files: its backing image, data files, extents. Whoever wrote the image chose those names, so
following them blindly hands the host's files to a guest (CVE-2024-32498 and its many relatives). What the *user* names,
on the command line or in options, never passes here; what only an *image* names always does.

The default lets through a regular file in the directory of the image that names it, or below, after all links are
resolved, and only if its format is recorded in the image or it probes as something other than raw: a file whose format
is a guess, and whose guess is "just bytes", could be any file. Devices, other protocols and ``json:`` definitions are
refused. ``--trust DIR`` and the environment variable ``VM_TRUST`` (a path list) name directories that are followed into
as well; ``backing=follow`` opens one image as QEMU would.
"""

from __future__ import annotations

import os
import re
import stat

from ..errors import GateError

#: A name that begins so names a protocol: as in QEMU whatever stands before a colon that comes before any slash. On
#: Windows one letter is a drive.
SCHEME = re.compile(r"^([^/:]*):" if os.sep == "/" else r"^([A-Za-z][A-Za-z0-9_.+-]+):")

#: Images in a chain, at most.
MAX_DEPTH = 200


class Gate:
    """A policy for implicit opens."""

    def __init__(self, *, trust: tuple[str, ...] = (), follow: bool = False, closed: bool = False) -> None:
        """*trust* are directories; *follow* lets everything through, *closed* nothing."""
        self.trust = tuple(os.path.realpath(directory) for directory in trust if directory)
        self.following = follow
        self.closed = closed

    @classmethod
    def default(cls, *trust: str) -> Gate:
        """The policy described above, with the directories *trust* and those of ``VM_TRUST``."""
        inherited = os.environ.get("VM_TRUST", "")
        return cls(trust=(*trust, *inherited.split(os.pathsep)))

    @classmethod
    def follow(cls) -> Gate:
        """Open whatever an image names, as QEMU does. Loops and endless chains are still refused."""
        return cls(follow=True)

    @classmethod
    def none(cls) -> Gate:
        """Open nothing that an image names."""
        return cls(closed=True)

    def check(self, image: str, role: str, reference: str, path: str | None) -> bool:
        """Let the open of *reference* (at *path*, None where that is no plain file name) through, or raise GateError.

        *image* names it, as its *role* (``backing``, ``data-file``). Returns whether the file's format may turn out to
        be raw by probing.
        """
        if self.following:
            return True
        what = "backing file" if role == "backing" else role
        if self.closed:
            raise GateError(image, f"{what} '{reference}' is not opened: opening what images name is switched off")
        follow = "backing=follow (follow=on in the API) opens it" if role != "backing" else "backing=follow opens it"
        if path is None:
            kind = "a json: definition" if reference.startswith("json:") else "not a plain file"
            raise GateError(image, f"{what} '{reference}' is {kind}, which an image may not name by itself; {follow}")
        real = os.path.realpath(path)
        trusted = _inside(real, self.trust)
        own = os.path.realpath(os.path.dirname(image) or ".")
        if not trusted and not _inside(real, (own,)):
            raise GateError(
                image,
                f"{what} '{reference}' lies outside the image's own directory and is not opened; "
                f"--trust {os.path.dirname(real)} (or VM_TRUST) allows that directory, {follow}",
            )
        try:
            mode = os.stat(real).st_mode
        except OSError:
            return trusted  # the open that follows tells what is wrong
        if not stat.S_ISREG(mode):
            raise GateError(image, f"{what} '{reference}' is not a regular file; {follow}")
        return trusted

    def refuse_raw(self, image: str, role: str, reference: str) -> GateError:
        """The error for a file whose format is not recorded and that probes as raw."""
        what = "backing file" if role == "backing" else role
        return GateError(
            image,
            f"{what} '{reference}' looks raw and its format is not recorded, so it could be any file; "
            f"{role}.driver=raw says that it is raw, backing=follow opens it",
        )


def _inside(path: str, directories: tuple[str, ...]) -> bool:
    return any(path.startswith(directory.rstrip(os.sep) + os.sep) for directory in directories)
