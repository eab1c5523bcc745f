"""Choosing an accelerator: the first of those wanted that works here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import PluginError, UsageError, VmError
from ..options import suggest
from .config import AccelConfig

if TYPE_CHECKING:
    from .accel import Accelerator
    from .machine import Machine

#: Without a wish: the first one at the processor's own speed only.
DEFAULT_FAST, DEFAULT_SLOW = "kvm", "unicorn"


def choose(machine: Machine, wanted: Sequence[AccelConfig]) -> Accelerator:
    """Make the accelerator for *machine*. Raises VmError that says of each one why not."""
    from ..plugins import registry

    if not wanted:
        wanted = [AccelConfig(DEFAULT_FAST), AccelConfig(DEFAULT_SLOW)]
        fast_only = {DEFAULT_FAST}
    else:
        fast_only = set()
    refused: list[str] = []
    for config in wanted:
        try:
            descriptor = registry().find("accelerator", config.name)
        except PluginError as error:
            if len(wanted) == 1:
                raise
            refused.append(str(error))
            continue
        implementation: type[Accelerator] = descriptor.load()
        available = implementation.availability()
        if not available.ok:
            refused.append(f"{config.name}: {available.reason}")
            continue
        if config.name in fast_only and not available.hardware_speed:
            refused.append(
                f"{config.name}: {available.reason or 'not at hardware speed here'} (-accel kvm uses it anyway)"
            )
            continue
        options = dict(config.options)
        try:
            accelerator = implementation(machine, options)
        except UsageError:
            raise  # an option is wrong: another accelerator would not mend that
        except VmError as error:
            refused.append(f"{config.name}: {error}")
            continue
        if options:
            accelerator.close()
            known = [option.name for option in descriptor.options]
            raise UsageError(f"-accel {config.name}: no option {min(options)!r}{suggest(min(options), known)}")
        return accelerator
    raise VmError(f"no accelerator works here: {'; '.join(refused)}")
