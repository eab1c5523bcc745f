"""The contract with plugin authors, on one page.

A plugin is a distribution with one entry point in the group ``vm_core``::

    [project.entry-points.vm_core]
    qcow2 = "vm_qcow2.plugin"

The module it names implements any of the hooks below with :data:`hookimpl` and returns descriptors (see
:mod:`vm_core.descriptors`). It should import nothing else: implementations are named by reference and are imported
when they are first used.

    from vm_core.hookspecs import hookimpl
    from vm_core.descriptors import FormatDriver, Signature

    @hookimpl
    def vm_format_drivers():
        return [FormatDriver(name="tiny", summary="…", implementation="vm_tiny.format:Tiny",
                             signatures=(Signature(0, b"TINY"),))]
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from .descriptors import (
    AcceleratorDriver,
    BlockEngine,
    DeviceFrontend,
    ExportDriver,
    FormatDriver,
    ProtocolDriver,
)

#: The entry-point group, and pluggy's project name.
PROJECT = "vm_core"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def vm_device_frontends() -> Iterable[DeviceFrontend]:
    """Device models that a guest sees: ``-device NAME``, ``-drive if=``."""
    raise NotImplementedError


@hookspec
def vm_block_engines() -> Iterable[BlockEngine]:
    """Host-I/O engines under a block backend: ``-drive aio=``."""
    raise NotImplementedError


@hookspec
def vm_format_drivers() -> Iterable[FormatDriver]:
    """Image formats and filters: ``-drive format=``."""
    raise NotImplementedError


@hookspec
def vm_protocol_drivers() -> Iterable[ProtocolDriver]:
    """Host storage: ``-drive file=``."""
    raise NotImplementedError


@hookspec
def vm_accelerators() -> Iterable[AcceleratorDriver]:
    """What executes guest instructions: ``-accel``."""
    raise NotImplementedError


@hookspec
def vm_exports() -> Iterable[ExportDriver]:
    """What serves a block node to other programs."""
    raise NotImplementedError
