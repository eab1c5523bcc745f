"""MSI-X vectors by eventfd, on an accelerator that offers it and on one that does not."""

from __future__ import annotations

import os

import pytest

from vm_core.devices.msixroutes import MsixRoutes
from vm_core.machine.accel import Accelerator

pytestmark = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="eventfds are Linux's")


class Offering(Accelerator):
    """Binds eventfds, *room* of them."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.bound: dict[int, tuple[int, int]] = {}

    availability = create_vcpu = memory_changed = None  # type: ignore[assignment]

    def bind_msi(self, fd: int, address: int, data: int) -> bool:
        if len(self.bound) >= self.room:
            return False
        self.bound[fd] = (address, data)
        return True

    def unbind_msi(self, fd: int) -> None:
        del self.bound[fd]


def test_a_vector_is_bound_once_and_signalled_each_time() -> None:
    """The first signal binds an eventfd to the message, each one writes it."""
    accel = Offering(8)
    routes = MsixRoutes(accel)
    assert routes.signal(3, 0xFEE00000, 0x41)
    assert routes.signal(3, 0xFEE00000, 0x41)
    ((fd, message),) = accel.bound.items()
    assert message == (0xFEE00000, 0x41)
    assert os.eventfd_read(fd) == 2
    routes.forget()


def test_a_changed_vector_is_bound_anew() -> None:
    """After forget() the vector's next message is the one it has then, and the old eventfd is closed."""
    accel = Offering(8)
    routes = MsixRoutes(accel)
    routes.signal(0, 0xFEE00000, 0x41)
    routes.signal(1, 0xFEE00000, 0x42)
    (old, _) = accel.bound
    routes.forget(0)
    routes.forget(7)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(old)
    routes.signal(0, 0xFEE01000, 0x51)
    assert set(accel.bound.values()) == {(0xFEE00000, 0x42), (0xFEE01000, 0x51)}
    routes.forget()
    assert not accel.bound


def test_without_an_offer_the_caller_sends_the_message_itself() -> None:
    """On an accelerator that binds nothing, has no room, or is none, signal() says no."""
    assert not MsixRoutes(None).signal(0, 0xFEE00000, 0x41)
    accel = Offering(1)
    full = MsixRoutes(accel)
    assert full.signal(0, 0xFEE00000, 0x41)
    assert not full.signal(1, 0xFEE00000, 0x42)
    assert full.signal(0, 0xFEE00000, 0x41)
    full.forget()
    assert not accel.bound
