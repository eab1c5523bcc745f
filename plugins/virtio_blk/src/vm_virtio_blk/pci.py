"""virtio-blk as a PCI function: ids, options and life cycle around :class:`~.device.VirtioBlk`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vm_core.devices.virtio.pci import VirtioPci
from vm_core.errors import UsageError
from vm_core.options import parse_bool, parse_int, parse_size

from .config import SECTOR
from .device import Settings, VirtioBlk

if TYPE_CHECKING:
    from vm_core.block.backend import BlockBackend
    from vm_core.devices.bus import Bus
    from vm_core.machine.machine import Machine

AUTO_QUEUES = 0xFFFF
MAX_QUEUES = 1024
MAX_BLOCK_SIZE = 2 << 20


class VirtioBlkPci(VirtioPci):
    """``virtio-blk-pci``: a transitional function unless one of the interfaces is turned off."""

    driver = "virtio-blk-pci"
    transitional_id = 0x1001
    #: Mass storage, SCSI: what drivers and firmware look for behind this device type.
    class_code = 0x010000

    virtio: VirtioBlk

    def __init__(self, id: str, options: dict[str, Any], backend: BlockBackend | None = None) -> None:
        super().__init__(id, options, backend)
        name = self.driver

        def number(option: str, default: int, low: int, high: int) -> int:
            value = parse_int(options.pop(option, default), f"{name}: {option}")
            if not low <= value <= high:
                raise UsageError(f"{name}: {option}={value}: {low} to {high} are possible")
            return value

        def switch(option: str, default: bool) -> bool:
            return parse_bool(options.pop(option, default), f"{name}: {option}")

        def size(option: str, default: int = 0) -> int:
            return parse_size(options.pop(option, default), f"{name}: {option}")

        def block_size(option: str) -> int:
            value = size(option) or SECTOR
            if not SECTOR <= value <= MAX_BLOCK_SIZE or value & (value - 1):
                raise UsageError(f"{name}: {option}={value}: a power of two from 512 to 2M is needed")
            return value

        bootindex = options.pop("bootindex", None)
        self.bootindex: int | None = None if bootindex is None else parse_int(bootindex, f"{name}: bootindex")
        serial = str(options.pop("serial", ""))
        logical = block_size("logical_block_size")
        physical = block_size("physical_block_size") if "physical_block_size" in options else logical
        if physical < logical:
            raise UsageError(f"{name}: physical_block_size={physical} is below logical_block_size={logical}")
        granularity = size("discard_granularity") if "discard_granularity" in options else None
        if granularity is not None and granularity % logical:
            raise UsageError(
                f"{name}: discard_granularity={granularity} is no multiple of logical_block_size={logical}"
            )
        min_io, opt_io = size("min_io_size"), size("opt_io_size")
        if min_io % logical or opt_io % logical or min_io // logical > 0xFFFF or opt_io // logical > 0xFFFFFFFF:
            raise UsageError(
                f"{name}: min_io_size={min_io} and opt_io_size={opt_io} must be multiples of"
                f" logical_block_size={logical}, the first at most 65535 of it"
            )
        cyls, heads, secs = number("cyls", 0, 0, 65535), number("heads", 0, 0, 255), number("secs", 0, 0, 255)
        if bool(cyls) != bool(heads) or bool(cyls) != bool(secs):
            raise UsageError(f"{name}: cyls, heads and secs go together")
        write_cache = str(options.pop("write-cache", "auto"))
        self._write_cache = None if write_cache == "auto" else parse_bool(write_cache, f"{name}: write-cache")
        queues = parse_int(options.pop("num-queues", AUTO_QUEUES), f"{name}: num-queues")
        if queues != AUTO_QUEUES and not 1 <= queues <= MAX_QUEUES:
            raise UsageError(f"{name}: num-queues={queues}: 1 to {MAX_QUEUES} are possible")
        adjust = switch("seg-max-adjust", True)
        self._queues = queues
        self.settings = Settings(
            serial=serial,
            logical_block_size=logical,
            physical_block_size=physical,
            min_io_size=min_io,
            opt_io_size=opt_io,
            discard_granularity=granularity,
            cyls=cyls,
            heads=heads,
            secs=secs,
            queue_size=self.queue_size,
            # Header and status take two descriptors of every request; at least one is left for data.
            seg_max=max(1, self.queue_size - 2) if adjust else 126,
            config_wce=switch("config-wce", True),
            discard=switch("discard", True),
            write_zeroes=switch("write-zeroes", True),
            max_discard_sectors=number("max-discard-sectors", 4194303, 1, 4194303),
            max_write_zeroes_sectors=number("max-write-zeroes-sectors", 4194303, 1, 4194303),
            report_discard_granularity=switch("report-discard-granularity", True),
            request_merging=switch("request-merging", True),
            ring_features=self.ring_features,
        )

    def make_virtio(self, machine: Machine) -> VirtioBlk:
        import attrs

        backend = self.need_backend()
        if self._write_cache is not None:
            backend.write_cache = self._write_cache
        queues = self._queues
        if queues == AUTO_QUEUES:
            queues = min(max(1, machine.cpu_count), MAX_QUEUES)
        return VirtioBlk(backend, attrs.evolve(self.settings, num_queues=queues))

    def realize(self, machine: Machine, bus: Bus, address: str | None) -> None:
        super().realize(machine, bus, address)
        backend = self.need_backend()
        backend.set_completion_sink(self.completed)
        backend.on_resize.append(self._resized)

    def unrealize(self) -> None:
        self.need_backend().on_resize.remove(self._resized)
        super().unrealize()

    def _resized(self, size: int) -> None:
        """The backend's size changed, on any thread."""
        self.call_soon(self._tell_size)

    def _tell_size(self) -> None:
        with self.lock:
            self.virtio.resized()

    def describe(self) -> str:
        kinds = {(True, True): "transitional", (True, False): "modern", (False, True): "legacy"}
        return f"virtio-blk ({kinds[self.modern_interface, self.legacy_interface]})"


class TransitionalVirtioBlkPci(VirtioBlkPci):
    """``virtio-blk-pci-transitional``: both interfaces, whatever the slot."""

    driver = "virtio-blk-pci-transitional"
    fixed_interfaces = "transitional"


class ModernVirtioBlkPci(VirtioBlkPci):
    """``virtio-blk-pci-non-transitional``: the modern interface alone."""

    driver = "virtio-blk-pci-non-transitional"
    fixed_interfaces = "modern"
