"""Creating images: options looked up and checked, the backing image looked at, then file and format made.

Two steps, so that a program can say in between what it is about to make:

    new = prepare("disk.qcow2", "qcow2", 10 << 30, {"cluster_size": "2M"})
    print(new.describe())  # fmt=qcow2 cluster_size=2097152 …
    new.create()

The options that an image takes are its format's, then the protocol's (``nocow`` of a file) that the format does not
have itself. Checks, their order and their wording are those of ``qemu-img create``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..errors import ImageError, LockError, PluginError, UsageError, VmError
from .gate import SCHEME

if TYPE_CHECKING:
    from ..descriptors import FormatDriver, Option
    from .gate import Gate

TOO_LARGE = "The image size is too large for file format '{}'"


class MissingBackingFormatError(UsageError):
    """A backing file was named without its format."""


class NewImage:
    """An image that can be made: every option has been understood."""

    def __init__(
        self,
        filename: str,
        format: str,
        driver: FormatDriver,
        protocol: str,
        target: dict[str, Any],
        known: Sequence[Option],
    ) -> None:
        self.filename = filename
        self.format = format
        self._driver = driver
        self._protocol = protocol
        self._target = target
        self._known = known
        #: Option → typed value.
        self.values: dict[str, Any] = {}
        #: Option → the value as it was written, where that is what people see.
        self._written: dict[str, str] = {}

    def describe(self) -> str:
        """The format and its options with their values, as ``qemu-img create`` prints them."""
        parts = [f"fmt={self.format}"]
        for option in self._known:
            value = self.values.get(option.name)
            if value is None:
                value = option.default
            if value is None:
                continue
            if isinstance(value, bool):
                value = self._written.get(option.name) or ("on" if value else "off")
            parts.append(f"{option.name}={str(value).replace(',', ',,')}")
        return " ".join(parts)

    def create(self) -> None:
        """Make the image. Of a new file nothing is left behind where it fails.

        Raises ImageError (LockError where somebody has it open), UsageError.
        """
        from .open import OpenContext, _as_image_errors, _lookup, _open

        self._check_choices()
        protocol = _lookup(self._protocol)[1]
        options = dict(self.values)
        size = options.pop("size")
        own = {option.name for option in self._driver.create_options} | {"preallocation"}
        target = {**self._target, **{name: options.pop(name) for name in list(options) if name not in own}}
        protocol.create(dict(target), 0)
        try:
            with _as_image_errors(self.filename):
                file = _open({"driver": self._protocol, **self._target}, OpenContext(readonly=False))
            driver = self._driver.load()
            try:
                driver.create(file, size, options)
            except BaseException as error:
                with suppress(OSError, VmError):
                    file.close()
                if isinstance(error, OSError) and not isinstance(error, VmError):
                    told = getattr(driver, "create_failure", "{}")  # some formats are nodes of their own
                    raise ImageError(self.filename, told.format(error.strerror or error)) from error
                raise
            file.close()
            # Left over it was the protocol's, for a file that had no bytes yet.
            options.pop("preallocation", None)
            if options:
                raise UsageError(f"Format driver '{self.format}' does not know the option {min(options)!r}")
        except BaseException as error:
            if self._protocol == "file" and not isinstance(error, LockError):
                with suppress(OSError):
                    os.unlink(self._target["filename"])
            if isinstance(error, OSError) and not isinstance(error, VmError):
                raise ImageError(self.filename, error.strerror or str(error)) from error
            raise

    def _check_choices(self) -> None:
        """What the peer finds only when it makes the image."""
        from .format import Format

        backing_format = self.values.get("backing_fmt")
        if backing_format is not None:
            if self.values.get("backing_file") is None:
                raise UsageError("Backing format cannot be used without backing file")
            if not _is_format(backing_format):
                told = getattr(self._driver.load(), "backing_format_failure", Format.backing_format_failure)
                raise UsageError(told.format(backing_format))
        for option in self._known:
            value = self.values.get(option.name)
            if option.type != "enum" or value is None or value in option.choices:
                continue
            name = option.name.rpartition(".")[2].replace("_", "-")
            told = f"Parameter '{name}' does not accept value '{value}'"
            if name == "preallocation" and value == "metadata":
                told = f"Unsupported preallocation mode: {value}"
            raise UsageError(f"{told}: there is {', '.join(option.choices)}").put(told)


def create_options(driver: FormatDriver, protocol: Any, *, peer: bool = False) -> list[Option]:
    """What can be given when an image of *driver* is made through *protocol*, in the order in which it is told.

    *peer*: in a program that stands in for QEMU's, with the options that QEMU has.
    """
    options = [option for option in driver.create_options if not (peer and option.ours)]
    names = {option.name for option in options}
    options += [option for option in protocol.create_options if option.name not in names]
    return options


def find_drivers(filename: str, format: str) -> tuple[FormatDriver, str, Any, dict[str, Any]]:
    """The format's driver, and the protocol of *filename*: name, descriptor, what the name says. Raises UsageError."""
    from ..plugins import find
    from .open import _protocol_of

    try:
        driver: Any = find("format", format)
    except PluginError as error:
        try:
            driver = find("protocol", format)
        except PluginError:
            from ..known_drivers import READ_ONLY_FORMATS

            if format in READ_ONLY_FORMATS:
                raise UsageError(f"Format driver '{format}' does not support image creation") from None
            raise error.put(f"Unknown file format '{format}'") from None
    protocol, target = _protocol_of(filename)
    descriptor: Any = find("protocol", protocol)
    if "create" not in driver.capabilities:
        raise UsageError(f"Format driver '{format}' does not support image creation")
    if "create" not in descriptor.capabilities:
        raise UsageError(f"Protocol driver '{protocol}' does not support image creation")
    return driver, protocol, descriptor, target


def prepare(
    filename: str,
    format: str,
    size: int | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    backing: str | None = None,
    backing_format: str | None = None,
    check_backing: bool = True,
    need_format: bool = True,
    gate: Gate | None = None,
    peer: bool = False,
) -> NewImage:
    """Check everything about an image of *size* bytes (None: that of *options* or of the backing image).

    *options* are strings as after ``-o``, or typed values; *backing* and *backing_format* go before those among them.
    Without *check_backing* the backing image is not looked at, without *need_format* its format may be left out then.
    *peer*: only what QEMU has (see :func:`create_options`). Raises UsageError, PluginError, ImageError.
    """
    driver, protocol, descriptor, target = find_drivers(filename, format)
    known = create_options(driver, descriptor, peer=peer)
    names = {option.name: option for option in known}
    new = NewImage(filename, format, driver, protocol, target, known)
    for name, value in _flat(options or {}):
        option = names.get(name)
        if option is None:
            from ..options import suggest

            raise UsageError(f"Invalid parameter '{name}'{suggest(name, names)}").put(f"Invalid parameter '{name}'")
        if value is not None:
            new.values[name] = _typed(option, value)
            new._written[name] = str(value)
    if size is not None:
        new.values["size"] = size
    if backing is not None:
        if "backing_file" not in names:
            raise UsageError(f"Backing file not supported for file format '{format}'")
        new.values["backing_file"] = backing
    if backing_format is not None:
        if "backing_fmt" not in names:
            raise UsageError(f"Backing file format not supported for file format '{format}'")
        new.values["backing_fmt"] = backing_format
    _check_backing(new, check_backing, need_format, gate)
    size = new.values.get("size")
    if size is None:
        raise UsageError("Image creation needs a size parameter")
    if not 0 <= size < 1 << 63:
        raise UsageError("Invalid image size specified")
    return new


def _check_backing(new: NewImage, look: bool, need_format: bool, gate: Gate | None) -> None:
    """Look at the backing image, whose size is the new one's where none was given."""
    backing, format = new.values.get("backing_file"), new.values.get("backing_fmt")
    if backing is None:
        return
    if format is None:
        # Where there is only one that it can have, nobody has to say so.
        choices = next((option.choices for option in new._known if option.name == "backing_fmt"), ())
        if len(choices) == 1:
            format = new.values["backing_fmt"] = choices[0]
    if not backing:
        raise UsageError("Expected backing file name, got empty string")
    if backing == new.filename:
        raise UsageError("Error: Trying to create an image with the same filename as the backing file")
    missing = "Backing file specified without backing format"
    if not look:
        if not format and need_format:
            raise UsageError(f"{missing}: give backing_fmt (-F)").put(missing)
        return
    from .node import sectors_up
    from .open import open_node

    try:
        node = open_node(backing_path(backing, new.filename), format=format, share=True, gate=gate, io=False)
    except VmError as error:
        raise ImageError(
            "", f"{error} (backing image)", peer=f"{error.peer or error}\nCould not open backing image."
        ) from error
    with node:
        if not format:
            raise MissingBackingFormatError(f"{missing} (-F): it looks like {node.driver}").put(
                f"{missing}\nDetected format of {node.driver}."
            )
        if new.values.get("size") is None:
            new.values["size"] = sectors_up(node.size)


def _is_format(name: str) -> bool:
    """Whether there is such a format or protocol, installed or not."""
    from ..known_drivers import KNOWN_DRIVERS
    from ..plugins import drivers

    known = {*KNOWN_DRIVERS["format"], *KNOWN_DRIVERS["protocol"]}
    return name in known or any(name == one.name for kind in ("format", "protocol") for one in drivers(kind))


def backing_path(name: str, image: str) -> str:
    """What the backing file *name* is, named in or for *image*."""
    if SCHEME.match(name) or name.startswith("/"):
        return name
    if image.startswith("file:"):
        image = image[5:]
    directory = image[: image.rfind("/") + 1]
    return directory + name


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options with dotted names, from nested ones too."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _typed(option: Option, value: Any) -> Any:
    """*value* as *option* declares it. Raises UsageError."""
    from ..options import parse_bool, parse_int, parse_size

    if option.type == "bool":
        return parse_bool(value, option.name)
    if option.type == "size":
        return parse_size(value, option.name)
    if option.type == "int":
        return parse_int(value, option.name)
    return value
