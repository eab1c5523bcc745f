"""Errors that a user, an image or a plugin can cause.

Every error that should reach a person as one line derives from :class:`VmError`; programs print ``str(error)`` and
exit. Anything else that escapes is a bug in this project and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self


class VmError(Exception):
    """A failure to be told in one line, without a traceback."""

    #: How QEMU's tools put it, for programs that stand in for them; empty where that is ``str()``.
    peer: str = ""

    def put(self, peer: str) -> Self:
        """Set :attr:`peer`; for ``raise UsageError("…").put("…")``."""
        self.peer = peer
        return self


class FatalError(Exception):
    """Something was found after which no request is to be carried out any more: images have to stay as they are now.

    Filters that compare images raise it. A program prints ``str()``, nothing before or after it, and exits with status
    1. This is no VmError and no OSError, since whoever handles those goes on with the next request or command.
    """


class UsageError(VmError):
    """The command line or an option is wrong; the message names it and says what is accepted."""


class PluginError(VmError):
    """A plugin is absent, broken, in conflict or of another api version; the message says what mends it."""


class ImageError(VmError):
    """An image is malformed, unsupported or refused. ``str()`` reads ``NAME: REASON``."""

    def __init__(self, name: str, reason: str, *, peer: str = "") -> None:
        """*peer* is how QEMU's tools put it, for programs that stand in for them, where that is not *reason*."""
        super().__init__(f"{name}: {reason}" if name else reason)
        self.name = name
        self.reason = reason
        self.peer = peer or reason


class GateError(ImageError):
    """An implicit open (backing file, data file, extent) was refused; the message names the option that allows it."""


class LockError(ImageError):
    """An image is in use by another process."""


class BlockError(OSError):
    """A failed request on a node, with an errno. Raised by nodes; turned into a device status by a frontend."""

    @classmethod
    def of(cls, code: int, text: str = "") -> BlockError:
        """Make one from an ``errno`` constant, with the system's words where *text* is empty."""
        return cls(code, text or os.strerror(code))

    @property
    def code(self) -> int:
        """The errno, EIO where none was given."""
        return self.errno or errno.EIO
