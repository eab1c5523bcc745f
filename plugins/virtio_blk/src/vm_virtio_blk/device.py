"""The virtio block device, whatever transport carries it.

Theory of operation. A batch of chains is parsed into :class:`~.request.BlkRequest` objects, which are requests of the
block layer; those that need the backend go to it in one call. Each comes back through its ``done``, waits for the rest
of its batch, and has its status byte written and its chain given back under the lock.

The write cache (virtio 1.2, 5.2.5 and 5.2.6.2). A driver that negotiated CONFIG_WCE switches it in the configuration.
One that knows FLUSH but not CONFIG_WCE gets the cache as the user set it. One that knows neither could not make
anything durable: for it every write is written through.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, cast

import attrs

from vm_core.block.request import Op, Request
from vm_core.devices.virtio.chain import Chain, RingError
from vm_core.devices.virtio.device import VirtioDevice, Virtqueue

from . import config
from .config import SECTOR
from .merge import merge
from .request import BlkRequest, Limits, Status, Type

if TYPE_CHECKING:
    from vm_core.block.backend import BlockBackend


@attrs.frozen(kw_only=True)
class Settings:
    """What the user chose about a device. Sizes are bytes unless named sectors; 0 cylinders: compute a geometry."""

    serial: str = ""
    logical_block_size: int = SECTOR
    physical_block_size: int = SECTOR
    min_io_size: int = 0
    opt_io_size: int = 0
    discard_granularity: int | None = None
    cyls: int = 0
    heads: int = 0
    secs: int = 0
    num_queues: int = 1
    queue_size: int = 256
    seg_max: int = 254
    config_wce: bool = True
    discard: bool = True
    write_zeroes: bool = True
    max_discard_sectors: int = 4194303
    max_write_zeroes_sectors: int = 4194303
    report_discard_granularity: bool = True
    request_merging: bool = True
    #: Ring and transport features.
    ring_features: int = 0


class VirtioBlk(VirtioDevice):
    """A disk in front of *backend*."""

    type_id = 2

    def __init__(self, backend: BlockBackend, settings: Settings) -> None:
        self.backend = backend
        self.settings = settings
        super().__init__(settings.num_queues, settings.queue_size, self._features())
        self._initial_write_cache = backend.write_cache
        self.medium_changed()

    def _features(self) -> int:
        settings = self.settings
        writable = not self.backend.readonly
        chosen = {
            config.SEG_MAX: True,
            config.GEOMETRY: True,
            config.RO: not writable,
            config.BLK_SIZE: True,
            config.FLUSH: True,
            config.TOPOLOGY: True,
            config.CONFIG_WCE: settings.config_wce,
            config.MQ: settings.num_queues > 1,
            config.DISCARD: settings.discard and writable,
            config.WRITE_ZEROES: settings.write_zeroes and writable,
        }
        return settings.ring_features | sum(feature.mask for feature, on in chosen.items() if on)

    # Configuration.

    def medium_changed(self) -> None:
        """The backend's size may be another: compute limits and configuration. Lock held once the machine runs."""
        settings = self.settings
        sectors = self.backend.size // SECTOR
        block = settings.logical_block_size
        self.limits = Limits(
            size=sectors * SECTOR,
            block_size=block,
            readonly=self.backend.readonly,
            discard=settings.discard,
            write_zeroes=settings.write_zeroes,
            max_discard_sectors=settings.max_discard_sectors,
            max_write_zeroes_sectors=settings.max_write_zeroes_sectors,
        )
        granularity = block
        if settings.discard_granularity is not None and settings.report_discard_granularity:
            granularity = settings.discard_granularity or block
        cylinders, heads, secs = self._geometry(sectors)
        self._config = {
            "capacity": sectors,
            "seg_max": settings.seg_max,
            "cylinders": cylinders,
            "heads": heads,
            "sectors": secs,
            "blk_size": block,
            "physical_block_exp": (settings.physical_block_size // block).bit_length() - 1,
            "min_io_size": settings.min_io_size // block,
            "opt_io_size": settings.opt_io_size // block,
            "num_queues": settings.num_queues,
        }
        if self.features & config.DISCARD.mask:
            self._config["max_discard_sectors"] = settings.max_discard_sectors
            self._config["max_discard_seg"] = 1
            self._config["discard_sector_alignment"] = granularity // SECTOR
        if self.features & config.WRITE_ZEROES.mask:
            self._config["max_write_zeroes_sectors"] = settings.max_write_zeroes_sectors
            self._config["max_write_zeroes_seg"] = 1
            self._config["write_zeroes_may_unmap"] = 1

    def _geometry(self, sectors: int) -> tuple[int, int, int]:
        """Cylinders, heads and sectors: the user's, or the 16 by 63 that every BIOS can translate."""
        settings = self.settings
        if settings.cyls:
            return settings.cyls, settings.heads, settings.secs
        # A track is whole blocks.
        block = settings.logical_block_size // SECTOR
        return max(2, min(sectors // (16 * 63), 16383)), 16, max(1, 63 // block * block) & 0xFF

    def resized(self) -> None:
        """The medium has grown or shrunk: tell the driver. Lock held."""
        self.medium_changed()
        self.config_changed()

    @property
    def config_size(self) -> int:
        """Bytes of configuration: as far as the fields that some offered feature makes valid."""
        return (
            config.CONFIG_SIZE
            if self.features & (config.DISCARD.mask | config.WRITE_ZEROES.mask)
            else config.DISCARD_FIELDS
        )

    def read_config(self, offset: int, size: int) -> int:
        data = config.pack({**self._config, "writeback": int(self.backend.write_cache)})
        return int.from_bytes(data[offset : offset + size], "little")

    def write_config(self, offset: int, size: int, value: int) -> None:
        if offset == config.WRITEBACK and self.has(config.CONFIG_WCE) and not self.backend.readonly:
            self._set_write_cache(bool(value & 1))

    # Life of the device.

    def accept_features(self, features: int) -> bool:
        if features & config.CONFIG_WCE.mask and not features & config.FLUSH.mask:
            # It must find writeback at 0 (5.2.5.2), readable from here on.
            self._set_write_cache(False)
        return True

    def driver_ready(self) -> None:
        if not self.has(config.FLUSH) and not self.has(config.CONFIG_WCE):
            self._set_write_cache(False)

    def on_reset(self) -> None:
        self._set_write_cache(self._initial_write_cache)

    def _set_write_cache(self, enabled: bool) -> None:
        """Switch without waiting for the host; the flush that goes with it is nobody's request."""
        if enabled != self.backend.write_cache:
            self.backend.set_write_cache(enabled)

    def drain(self) -> None:
        self.backend.drain()
        # Those that wait for a retry would write to guest memory then.
        self.backend.cancel_stopped()

    # Requests.

    def handle(self, queue: Virtqueue, chains: list[Chain]) -> None:
        limits = self.limits
        done = self._request_done
        batch: list[Request] = []
        for i, chain in enumerate(chains):
            try:
                request = BlkRequest.parse(chain, limits, done)
            except RingError as e:
                with self.transport.lock:
                    self.fail(f"queue {queue.index}: {e}")
                for dropped in chains[i:]:
                    self.complete(dropped, None)
                break
            if request.answer is None:
                batch.append(request)
            else:
                self.complete(chain, request)
        if len(batch) > 1 and self.settings.request_merging:
            batch = merge(batch, self._merged_done)
        if batch:
            self.backend.submit(batch)

    def _merged_done(self, merged: Request) -> None:
        """A merged request came back. If it failed, its parts are tried one by one: some of them may be good."""
        parts: list[Request] = merged.opaque
        if merged.status:
            self.backend.submit(parts)
        else:
            for part in parts:
                self._request_done(cast(BlkRequest, part))

    def _request_done(self, request: BlkRequest) -> None:
        self.complete(request.chain, request)

    def respond(self, chain: Chain, response: Any) -> int:
        request: BlkRequest | None = response
        if request is None:
            return 0
        answer = request.answer
        if answer is None:
            if request.status == 0:
                answer = Status.OK
            else:
                answer = Status.UNSUPP if request.status == errno.ENOTSUP else Status.IOERR
                if request.op is Op.READ:
                    request.written = 0
        elif request.type == Type.GET_ID:
            request.fill_id(self.settings.serial.encode("utf-8", "replace"))
        request.status_byte[0] = answer
        return request.written
