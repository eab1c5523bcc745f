"""States of a machine and reasons for its end, with QEMU's words (QAPI ``RunState``, ``ShutdownCause``)."""

from __future__ import annotations

from enum import StrEnum


class RunState(StrEnum):
    """What a machine is doing; ``query-status`` shows the value."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    SHUTDOWN = "shutdown"
    IO_ERROR = "io-error"
    INTERNAL_ERROR = "internal-error"


class ExitReason(StrEnum):
    """Why a machine ended."""

    #: The guest switched the power off.
    GUEST_SHUTDOWN = "guest-shutdown"
    #: The guest reset the machine, under -no-reboot.
    GUEST_RESET = "guest-reset"
    #: The machine was reset from outside, under -no-reboot.
    HOST_QMP_SYSTEM_RESET = "host-qmp-system-reset"
    #: A program asked through QMP, or a person with Ctrl-a x.
    HOST_QMP_QUIT = "host-qmp-quit"
    #: SIGINT, SIGTERM or SIGHUP.
    HOST_SIGNAL = "host-signal"
    #: The accelerator or a device could not go on.
    INTERNAL_ERROR = "internal-error"

    @property
    def guest(self) -> bool:
        """The guest wanted it."""
        return self in (ExitReason.GUEST_SHUTDOWN, ExitReason.GUEST_RESET)
