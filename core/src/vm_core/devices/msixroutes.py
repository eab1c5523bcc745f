"""MSI-X vectors that an accelerator delivers when an eventfd is signalled (irqfd).

A vector gets its eventfd when it is first used, and loses it when the guest changes or masks it. On accelerators that
offer no such thing, nothing is ever routed and the message is sent as a write.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..machine.accel import Accelerator


class MsixRoutes:
    """The eventfds of one function's vectors on *accelerator*. Called with the device lock held."""

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._accelerator = accelerator
        # Hosts without eventfds have no accelerator that could wait for one.
        self._offered = accelerator is not None and hasattr(os, "eventfd")
        self._fds: dict[int, int] = {}

    def signal(self, vector: int, address: int, data: int) -> bool:
        """Deliver *vector*, whose message is *data* written to *address*; False: not by an eventfd."""
        fd = self._fds.get(vector)
        if fd is None:
            if self._accelerator is None or not self._offered:
                return False
            fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            if not self._accelerator.bind_msi(fd, address, data):
                os.close(fd)
                self._offered = False
                return False
            self._fds[vector] = fd
        os.eventfd_write(fd, 1)
        return True

    def forget(self, vector: int | None = None) -> None:
        """*vector* (None: every one) has another message now, or is masked."""
        for known in list(self._fds) if vector is None else [vector]:
            fd = self._fds.pop(known, None)
            if fd is not None and self._accelerator is not None:
                self._accelerator.unbind_msi(fd)
                os.close(fd)
