"""ATA and ATAPI: drives as state machines without I/O, for any controller that can carry their registers.

- :class:`~.disk.AtaDisk` and :class:`~.packet.AtapiCdRom` are drives: a task file in, requests out.
- :class:`~.channel.Channel` is the parallel interface: ports, two drives, one interrupt.
- :class:`~.busmaster.BusMaster` gives a channel direct memory access.
"""

from __future__ import annotations

from .busmaster import BusMaster
from .channel import Channel, ChannelHost
from .disk import AtaDisk
from .drive import Drive, Link, Phase
from .geometry import Geometry
from .identify import Identity
from .packet import AtapiCdRom

__all__ = [
    "AtaDisk",
    "AtapiCdRom",
    "BusMaster",
    "Channel",
    "ChannelHost",
    "Drive",
    "Geometry",
    "Identity",
    "Link",
    "Phase",
]
