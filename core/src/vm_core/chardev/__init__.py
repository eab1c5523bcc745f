"""Character devices: where a serial port, a monitor or a QMP server sends and receives its bytes."""

from .base import Chardev, Null
from .parse import CHARDEV_KINDS, make, parse_legacy, parse_options

__all__ = ["CHARDEV_KINDS", "Chardev", "Null", "make", "parse_legacy", "parse_options"]
