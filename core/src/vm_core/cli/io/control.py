"""The commands that steer the program and the requests on their way: breakpoints, signals, sleep, quit."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence
from time import sleep as pause
from typing import TYPE_CHECKING

from ...errors import UsageError
from .texts import BadNumberError, parse_c_number, parse_size

if TYPE_CHECKING:
    from ...block.breakpoints import Breakpoints
    from .session import Session

#: The most that a signal's number can be.
LAST_SIGNAL = 64
#: Seconds between two looks at whether a request has met its breakpoint.
LOOK = 0.001


def leave(session: Session, words: Sequence[str]) -> int:
    """``quit``."""
    session.done = True
    return 0


def abort(session: Session, words: Sequence[str]) -> int:
    """``abort``: end as a crash does, with nothing flushed, not even what was printed."""
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    os.abort()


def raise_signal(session: Session, words: Sequence[str]) -> int:
    """``sigraise``: whoever kills the program from inside still wants to see what it said before."""
    try:
        number = parse_size(words[1], session.program)
    except BadNumberError as error:
        session.out.write(f"{error}\n")
        return 1
    if number > LAST_SIGNAL:
        session.out.write(f"signal argument '{words[1]}' is too large to be a valid signal\n")
        return 1
    session.out.flush()
    if number == signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 0


def sleep(session: Session, words: Sequence[str]) -> int:
    """``sleep``: for milliseconds, while requests finish."""
    milliseconds = parse_c_number(words[1])
    if milliseconds is None or milliseconds < 0:
        session.out.write(f"{words[1]} is not a valid number\n")
        return 1
    if session.busy:
        session.queue.wait(milliseconds / 1000)
    else:
        pause(milliseconds / 1000)
    return 0


def _breakpoints(session: Session) -> Breakpoints | None:
    from ...block.breakpoints import find

    return find(session.image)


def set_break(session: Session, words: Sequence[str]) -> int:
    """``break``: stop the next request that comes to an event."""
    points = _breakpoints(session)
    code = errno.ENOTSUP
    if points is not None:
        try:
            points.set(words[1], words[2])
            return 0
        except UsageError:
            code = errno.ENOENT
    session.out.write(f"Could not set breakpoint: {os.strerror(code)}\n")
    return 1


def remove_break(session: Session, words: Sequence[str]) -> int:
    """``remove_break``: take it away; what it stopped goes on."""
    points = _breakpoints(session)
    if points is not None and points.remove(words[1]):
        session.settle()
        session.poll()
        return 0
    code = errno.ENOTSUP if points is None else errno.ENOENT
    session.out.write(f"Could not remove breakpoint {words[1]}: {os.strerror(code)}\n")
    return 1


def resume(session: Session, words: Sequence[str]) -> int:
    """``resume``: let a stopped request go on."""
    points = _breakpoints(session)
    if points is not None and points.resume(words[1]):
        return 0
    code = errno.ENOTSUP if points is None else errno.ENOENT
    session.out.write(f"Could not resume request: {os.strerror(code)}\n")
    return 1


def wait_break(session: Session, words: Sequence[str]) -> int:
    """``wait_break``: until a request has stopped at a breakpoint."""
    points = _breakpoints(session)
    if points is None:
        session.out.write(f"Could not wait for a request: {os.strerror(errno.ENOTSUP)}\n")
        return 1
    while not points.suspended(words[1]):
        if not session.busy:
            # Nothing is on its way that could ever meet it.
            session.out.write(f"Could not wait for a request: {os.strerror(errno.ENOENT)}\n")
            return 1
        session.queue.wait(LOOK)
    return 0
