"""From a name to an open node: QEMU's ways of naming images, probing, backing chains, the gate.

A *spec* is one of

* a plain path ``disk.qcow2``, or ``file:`` and a path;
* a name with a protocol's prefix, ``nbd://host/export``;
* ``json:{"driver": "qcow2", "file": {"driver": "file", "filename": "disk.qcow2"}}``;
* QEMU's dotted options, ``driver=qcow2,file.filename=disk.qcow2,backing.driver=raw``;
* a dict of such options, nested or dotted, whose children may also be open :class:`~vm_core.block.node.Node` objects.

A child is given by its options or by the ``node-name`` of a node that is already open; such a node stays its owner's
and is not closed with the new one.

Options of every node: ``driver``, ``node-name``, ``read-only``, ``auto-read-only``, ``force-share``, ``discard``
(ignore, unmap), ``detect-zeroes`` (off, on, unmap), ``cache.direct``, ``cache.no-flush``. Of every image: ``file``,
and ``backing`` where the format has backing images: options, a node's name, ``null`` or nothing for none, ``follow``
to open what the image names as QEMU would. All other options are the driver's, checked against its descriptor.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, cast

from ..errors import GateError, ImageError, LockError, UsageError, VmError
from . import names
from .cache import WRITEBACK, CacheMode
from .format import Format
from .formatnode import FormatNode
from .gate import MAX_DEPTH, SCHEME, Gate
from .graph import DEFAULT, Graph
from .imagenode import ImageNode
from .node import Node, Protocol

if TYPE_CHECKING:
    from ..descriptors import Descriptor, Option, ProtocolDriver

Warn = Callable[[str], None]

#: Drivers on the way of every plain raw file, known here so that opening one imports no plugin.
_QUICK: dict[str, tuple[str, str, str]] = {
    "raw": ("format", "vm_core.block.raw", "RawNode"),
    "file": ("protocol", "vm_core.block.file", "FileProtocol"),
}

#: What holds the writes of ``snapshot=on``.
SNAPSHOT_FORMAT = "qcow2"

_COMMON = ("read-only", "auto-read-only", "force-share", "discard", "detect-zeroes", "cache")

_DOTTED = re.compile(r"(driver|node-name|(file|backing)(\.[A-Za-z0-9_-]+)+)=")
_ABSENT: Any = object()


class OpenContext:
    """What a driver is told when it is opened, and how it opens further nodes."""

    def __init__(
        self,
        *,
        readonly: bool = True,
        auto_readonly: bool = False,
        cache: CacheMode = WRITEBACK,
        share: bool = False,
        share_writes: bool = False,
        discard: bool = True,
        detect_zeroes: str = "off",
        gate: Gate | None = None,
        graph: Graph | None = None,
        filename: str = "",
        follow_backing: bool = True,
        warn: Warn | None = None,
        ancestors: tuple[Any, ...] = (),
        io: bool = True,
        check: bool = False,
        aio: str = "threads",
    ) -> None:
        #: No changes are wanted.
        self.readonly = readonly
        #: Where it cannot be opened for writing, read-only will do.
        self.auto_readonly = auto_readonly
        self.cache = cache
        #: Others may do with the storage what they like (``force-share=on``, ``-U``).
        self.share = share
        #: Others may write too, where no metadata of ours would suffer (``share-rw=on``).
        self.share_writes = share_writes
        #: Discards reach the storage.
        self.discard = discard
        self.detect_zeroes = detect_zeroes
        self.gate = gate or Gate.default()
        self.graph = graph if graph is not None else DEFAULT
        #: What a person calls the image, for messages; names in the image are relative to its directory.
        self.filename = filename
        #: The same, or the name of the file below it all where that is a ``json:`` name; empty where there are several.
        self.located = filename
        self.follow_backing = follow_backing
        self.warn = warn or _warn
        self.ancestors = ancestors
        #: Guest data will be read or written; without, an encrypted image opens without its key.
        self.io = io
        #: Opened to be checked or repaired: images marked as dirty or corrupt open too; nothing is mended on the way.
        self.check = check
        #: The engine that files ask for which have no option ``aio`` of their own.
        self.aio = aio
        #: The user said what the backing image is, or that there shall be none.
        self.backing_given = False
        self._file: Node | None = None
        self._explicit: dict[str, Any] = {}
        self._opened: list[Node] = []

    def child(self, **changes: Any) -> OpenContext:
        """A context for another node below this one."""
        settings: dict[str, Any] = {
            "readonly": self.readonly,
            "auto_readonly": self.auto_readonly,
            "cache": self.cache,
            "share": self.share,
            "share_writes": self.share_writes,
            "discard": self.discard,
            "gate": self.gate,
            "graph": self.graph,
            "filename": self.filename,
            "warn": self.warn,
            "ancestors": self.ancestors,
            "io": self.io,
            "aio": self.aio,
        }
        return OpenContext(**{**settings, **changes})

    def open_child(
        self,
        role: str,
        reference: str | dict[str, Any] | None,
        *,
        format: str | None = None,
        readonly: bool | None = None,
        storage: bool = False,
        beside: bool = False,
    ) -> Node:
        """Open a node that the image names, as its *role*; the gate decides.

        A child that the user gave for this role in the options is used instead, whatever *reference* says; with
        *reference* None there has to be one. *format* is what the image records of it; None: probed. With *storage* it
        is no image but bare storage, and nobody else may write to it; *beside* says that its name is a path and
        nothing else, colons or not, from the image's directory on, as QEMU takes it too. The node is closed with the
        image.
        """
        readonly = self.readonly if readonly is None else readonly
        explicit = self._explicit.pop(role, _ABSENT)
        if explicit is not _ABSENT:
            child = self.child(readonly=readonly, filename="")
            node, owned = _open_reference(explicit, child, image=not storage)
        elif reference is None:
            raise ImageError(self.filename, f"needs a {role}: give {role}.filename=… or the name of a node")
        elif storage:
            node = _follow_storage(self, role, reference, readonly, beside)
            owned = True
        else:
            node = _follow(self, role, reference, format, readonly)
            owned = True
        if owned:
            self._opened.append(node)
        if storage and not self.share and not self.share_writes:
            node.claim()
        return node

    def secret(self, identity: str) -> bytes:
        """The bytes of the secret object called *identity*. Raises UsageError."""
        from ..crypto import secrets

        return secrets.get(identity)

    def passphrase(self, identity: str) -> bytes:
        """The same, which has to be UTF-8. Raises UsageError."""
        from ..crypto import secrets

        return secrets.passphrase(identity)

    def open_given(self, role: str, given: Any, *, image: bool = False) -> Node:
        """Open a child that the user defined: options, a node's name or a node.

        Not an *image*: its format is not probed.

        Close it with the new node if :meth:`owned` says that it is owned.
        """
        with _as_image_errors(role):
            node, owned = _open_reference(given, self.child(filename=""), image=image)
        if owned:
            self._opened.append(node)
        return node

    def explicit(self, role: str) -> bool:
        """Whether the user gave a child for *role* in the options."""
        return role in self._explicit

    def open_file(self, options: dict[str, Any]) -> Node:
        """The storage below a filter or raw image, which the opener has opened already."""
        if self._file is None:
            raise UsageError("the option 'file' is missing")
        return self._file

    def owned(self, *nodes: Node) -> list[Node]:
        """Those of *nodes* that the new node shall close (the others belong to whoever opened them)."""
        return [node for node in nodes if any(node is one for one in self._opened)]


def open_node(
    spec: str | os.PathLike[str] | dict[str, Any],
    *,
    readonly: bool = True,
    cache: CacheMode = WRITEBACK,
    format: str | None = None,
    gate: Gate | None = None,
    share: bool = False,
    share_writes: bool = False,
    auto_readonly: bool = False,
    backing: bool = True,
    discard: bool = True,
    detect_zeroes: str = "off",
    graph: Graph | None = None,
    node_name: str = "",
    snapshot: bool = False,
    warn: Warn | None = None,
    io: bool = True,
    check: bool = False,
    aio: str = "threads",
) -> Node:
    """Open an image, or bare storage where the spec's driver is a protocol.

    *format* forces the image's format; None: it is probed, and a raw image is then guarded against writes that would
    make it look like another. *gate* decides about what images name (default: :meth:`Gate.default`). *share* opens
    although others write, *share_writes* lets others open for writing. Without *backing* the chain ends at the image.
    *discard* and *detect_zeroes* are the policies of the top node. *snapshot* puts changes into a temporary image that
    disappears when the node is closed. *warn* is called with a sentence where something should be said to the user.
    Without *io* no guest data will be read or written, and an encrypted image needs no key. With *check* the image is
    opened to be checked or repaired: one marked as dirty or corrupt opens too. *aio* is the engine that files ask a
    backend for unless they have an option ``aio``.

    Raises ImageError (LockError, GateError), PluginError or UsageError; nothing stays open then.
    """
    context = OpenContext(
        readonly=readonly or snapshot,
        auto_readonly=auto_readonly,
        cache=cache,
        share=share,
        share_writes=share_writes,
        discard=discard,
        detect_zeroes=detect_zeroes,
        gate=gate,
        graph=graph,
        follow_backing=backing,
        warn=warn,
        io=io,
        check=check,
        aio=aio,
    )
    options = parse_spec(spec)
    if format is not None:
        given = options.setdefault("driver", format)
        if given != format:
            raise UsageError(f"format={format} and driver={given} contradict each other")
    if node_name and not snapshot:
        options["node-name"] = node_name
    with _as_image_errors(str(options.get("filename", ""))):
        node = _open(options, context)
        if not snapshot:
            return node
        try:
            return _temporary_overlay(node, context, node_name)
        except BaseException:
            node.close()
            raise


def parse_spec(spec: str | os.PathLike[str] | dict[str, Any]) -> dict[str, Any]:
    """The options that a spec stands for, nested. Raises UsageError."""
    if isinstance(spec, dict):
        from ..options import nest

        return nest(spec)
    text = os.fspath(spec)
    if text.startswith("json:"):
        from ..options import nest, parse_json

        return nest(parse_json(text[5:]))
    if _DOTTED.match(text):
        from ..options import nest, split

        return nest(split(text))
    return {"filename": text}


def create_image(
    filename: str,
    format: str,
    size: int | None,
    options: dict[str, Any] | None = None,
    *,
    check_backing: bool = True,
    gate: Gate | None = None,
) -> None:
    """Create an image of *size* bytes, of the backing image's size where that is None, with the create *options*.

    *options* are strings or typed values, as after ``-o``. Refuses to overwrite an image that is in use. Nothing is
    left behind of a new file when it fails. Raises ImageError, PluginError or UsageError.
    """
    from .create import prepare

    new = prepare(filename, format, size, options, check_backing=check_backing, need_format=check_backing, gate=gate)
    new.create()


# From options to nodes


def _open(options: dict[str, Any], context: OpenContext, *, image: bool = True) -> Node:
    """Open a node and its backing chain: a loop over the chain, not a recursion."""
    top, pending = _open_one(options, context, image=image)
    node: Node = top
    count = 1
    try:
        while pending is not None:
            assert isinstance(node, FormatNode)
            count += 1
            if count > MAX_DEPTH:
                raise ImageError(top.filename, f"the backing chain is longer than {MAX_DEPTH} images")
            try:
                below, owned, pending = pending()
            except VmError as error:
                # QEMU says it once a level; the level itself has been told.
                if not isinstance(error, GateError) and error.peer:
                    error.put("Could not open backing file: " * (count - 2) + error.peer)
                raise
            node.set_backing(below, owned=owned)
            if node.backing_replaced:
                names.call_with_backing(node)
            node = below
    except BaseException:
        with _ignored():
            top.close()
        raise
    return top


#: Opens the next image of a chain: the node, whether it is owned, and what opens the one after it.
_Pending = Callable[[], "tuple[Node, bool, _Pending | None]"]


def _open_one(options: dict[str, Any], context: OpenContext, *, image: bool = True) -> tuple[Node, _Pending | None]:
    """Open one node with its storage; its backing image is left to the second result."""
    options = dict(options)
    name = _take_common(options, context)
    if name:
        context.graph.check(name)
    driver = options.pop("driver", None)
    if driver is not None and not isinstance(driver, str):
        raise UsageError("driver=… must be a name").put("Must specify either driver or file")
    if driver is None and not image:
        return _open_protocol(None, options, context, name), None
    if driver is not None:
        kind, implementation, descriptor = _lookup(driver)
        if kind == "protocol":
            return _open_protocol(driver, options, context, name), None
        if descriptor is not None:
            driver = descriptor.name  # it may have been called by another name
    probed = False
    try:
        file = _open_storage(options, context, driver)
        if driver is None:
            driver, probed = _probe(file), True
            kind, implementation, descriptor = _lookup(driver)
        if not context.share and (driver != "raw" or not context.share_writes):
            file.claim()
        context._file = file
        node: Node
        pending: _Pending | None
        if not context.filename:
            context.filename = file.filename
        context.located = _located(file, context.filename)
        mark = file.identity()
        if mark is not None:
            context.ancestors = (*context.ancestors, mark)
        if issubclass(implementation, Format):
            node, pending = _open_format(implementation, driver, descriptor, file, options, context)
        else:
            node, pending = _open_filter(implementation, driver, descriptor, file, options, context), None
    except BaseException:
        for one in reversed(context._opened):
            with _ignored():
                one.close()
        raise
    try:
        if isinstance(node, ImageNode):
            node.discard_unmap = context.discard
            node.detect_zeroes = context.detect_zeroes
        context.graph.add(node, name)
        if probed and driver == "raw":
            _guard_raw(node, context)
    except BaseException:
        with _ignored():
            node.close()
        raise
    return node, pending


def _open_storage(options: dict[str, Any], context: OpenContext, driver: str | None) -> Node:
    """The ``file`` child, from ``file=`` or ``filename=``."""
    given = options.pop("file", _ABSENT)
    if given is None:
        given = _ABSENT
    filename = options.pop("filename", None)
    if given is _ABSENT:
        if filename is None:
            raise UsageError(f"{driver or 'image'}: the option 'file' is missing (file.filename=PATH)").put(
                'A block device must be specified for "file"' if driver else "Must specify either driver or file"
            )
        given = {"filename": filename}
    elif filename is not None and isinstance(given, dict) and "filename" not in given:
        given = {**given, "filename": filename}
    elif filename is not None:
        raise UsageError("file and filename cannot both be given").put(
            "Cannot reference an existing block device with additional options or a new filename"
        )
    child = context.child(filename="")
    node, owned = _open_reference(given, child, image=False)
    if owned:
        context._opened.append(node)
    return node


def _open_reference(given: Any, context: OpenContext, *, image: bool) -> tuple[Node, bool]:
    """A child from options, a node's name, or a node; and whether it is the new parent's."""
    if isinstance(given, Node):
        return given, False
    if isinstance(given, str):
        if given.startswith("json:"):
            given = parse_spec(given)
        else:
            return context.graph.find(given), False
    if not isinstance(given, dict):
        raise UsageError(f"a child is options or a node's name, not {given!r}")
    return _open(given, context, image=image), True


def _open_protocol(driver: str | None, options: dict[str, Any], context: OpenContext, name: str) -> Node:
    if driver is None:
        filename = options.pop("filename", None)
        if not isinstance(filename, str):
            raise UsageError("the option 'filename' or 'driver' is missing")
        driver, parsed = _protocol_of(filename)
        options = {**parsed, **options}
    elif isinstance(options.get("filename"), str):
        filename = options.pop("filename")
        options = _joined(_lookup(driver)[1].parse_filename(filename), options)
    _, implementation, descriptor = _lookup(driver)
    given = names.defining(options, descriptor) if set(options) != {"filename"} else options.copy()
    options = _typed(driver, "protocol", options, descriptor)
    node: Node = implementation.open(options, context)
    if not node.full_options:
        node.full_options = {"driver": driver, **(given or {"filename": node.filename})}
    try:
        _refuse_rest(driver, options)
        context.graph.add(node, name)
    except BaseException:
        node.close()
        raise
    return node


def _joined(named: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The options that a file name stands for, and those given beside it, which come first."""
    joined = {**named, **given}
    for key, value in named.items():
        other = given.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            joined[key] = _joined(value, other)
    return joined


def _open_format(
    implementation: type[Format],
    driver: str,
    descriptor: Descriptor | None,
    file: Node,
    options: dict[str, Any],
    context: OpenContext,
) -> tuple[FormatNode, _Pending | None]:
    assert descriptor is not None
    backing = options.pop("backing", _ABSENT)
    if backing is not _ABSENT and backing is not None and "backing" not in descriptor.capabilities:
        raise UsageError(f"{driver}: this format has no backing images")
    context.backing_given = backing is not _ABSENT
    given = names.defining(options, descriptor)
    options = _split_children(driver, options, descriptor, context)
    if not context.readonly and "write" not in descriptor.capabilities:
        if not context.auto_readonly:
            raise ImageError(context.filename, f"format '{driver}' can only be read: open it read-only")
        context.readonly = True
    if file.readonly and not context.readonly:
        if not context.auto_readonly:
            raise ImageError(context.filename, "the storage is read-only: open the image read-only")
        context.readonly = True
    chosen = dict(options)
    opened = implementation.open(file, options, context)
    try:
        opened.readonly = opened.readonly or context.readonly
        _refuse_rest(driver, options)
        if context._explicit:
            raise UsageError(f"{driver}: the image has no {min(context._explicit)}")
        node = FormatNode(opened, driver=driver, filename=context.filename, owned=context._opened)
        names.call(node, driver, given)
        node.remake = _remaker(implementation, descriptor, chosen, context)
    except BaseException:
        with _ignored():
            opened.close()
        raise
    reference = opened.backing_reference
    if backing is None or backing == "" or not context.follow_backing:
        if isinstance(backing, dict) and backing:
            raise UsageError("the image's backing images are not opened here").put(
                f"Block format '{driver}' does not support the option '{_leaf('backing', {'backing': backing})}'"
            )
        if context.backing_given and context.follow_backing and reference is not None:
            names.call_with_backing(node)
        return node, None
    if backing == "follow" and context.graph.get("follow") is None:
        context.gate = Gate.follow()
        backing = _ABSENT
    if backing is _ABSENT and reference is None:
        return node, None
    below = context.child(
        readonly=True, auto_readonly=False, share_writes=context.share_writes, filename="", detect_zeroes="off"
    )

    def pending() -> tuple[Node, bool, _Pending | None]:
        found, owned, more = opened_backing()
        if context.backing_given and not same_backing(found):
            node.backing_replaced = True
        return found, owned, more

    def same_backing(found: Node) -> bool:
        return reference is not None and found.filename == _resolve_name(reference.filename, context.filename)[1]

    def opened_backing() -> tuple[Node, bool, _Pending | None]:
        with _backing_errors(context.filename):
            if isinstance(backing, Node):
                return backing, False, None
            if isinstance(backing, str):
                return context.graph.find(backing), False, None
            extra = {} if backing is _ABSENT else backing
            if not isinstance(extra, dict):
                raise UsageError(f"backing: options or a node's name, not {extra!r}")
            if extra and ("file" in extra or "filename" in extra or _is_protocol(extra.get("driver"))):
                found, more = _open_one(extra, below)
                return found, True, more
            if reference is None:
                raise UsageError("the image names no backing file: give backing.file.filename=PATH").put(
                    'A block device must be specified for "file"'
                )
            found, more = _follow_one(context, "backing", reference.filename, reference.format, True, extra)
            return found, True, more

    return node, pending


def _remaker(
    implementation: type[Format], descriptor: Descriptor, chosen: dict[str, Any], context: OpenContext
) -> Callable[[Format, dict[str, Any]], tuple[Format, Exception | None]]:
    """What opens the image once more, with changed driver options."""
    current = chosen

    def remake(old: Format, changes: dict[str, Any]) -> tuple[Format, Exception | None]:
        """Close *old* and return the image open with *changes*; where that fails open as before, and why it failed."""
        nonlocal current
        from ..options import typed

        new = typed(changes, descriptor.options, descriptor.name)
        file, children = old.file, old.children()
        context.readonly = old.readonly
        old.close()
        failure: Exception | None = None
        # What was changed before gives way where it contradicts what is changed now.
        for wanted in ({**current, **new}, {**chosen, **new}, current):
            context._explicit = dict(children)
            try:
                made = implementation.open(file, dict(wanted), context)
            except (OSError, VmError) as error:
                failure = error
            else:
                break
        else:
            assert failure is not None
            raise failure
        if wanted is current:
            return made, failure
        current = wanted
        return made, None

    return remake


def _open_filter(
    implementation: Any,
    driver: str,
    descriptor: Descriptor | None,
    file: Node,
    options: dict[str, Any],
    context: OpenContext,
) -> Node:
    """A raw image or a filter: a node that is its own implementation."""
    given = names.defining(options, descriptor or _described(driver) if options else None)
    if descriptor is not None:
        options = _split_children(driver, options, descriptor, context)
    elif options:
        options = _typed(driver, "format", options, None)
    if file.readonly and not context.readonly:
        if not context.auto_readonly:
            raise ImageError(context.filename, "the storage is read-only: open the image read-only")
        context.readonly = True
    node: Node = implementation.open(options, context)
    context._opened.clear()  # the node's now
    try:
        _refuse_rest(driver, options)
        names.call(node, driver, given)
    except BaseException:
        node.close()
        raise
    return node


# What images name


def _follow(
    context: OpenContext, role: str, reference: str | dict[str, Any], format: str | None, readonly: bool
) -> Node:
    node, pending = _follow_one(context, role, reference, format, readonly, {})
    if pending is not None:
        assert isinstance(node, FormatNode)
        try:
            current: Node = node
            for _ in range(MAX_DEPTH):
                if pending is None:
                    return node
                below, owned, pending = pending()
                assert isinstance(current, FormatNode)
                current.set_backing(below, owned=owned)
                current = below
            raise ImageError(node.filename, f"the backing chain is longer than {MAX_DEPTH} images")
        except BaseException:
            with _ignored():
                node.close()
            raise
    return node


def _follow_one(
    context: OpenContext,
    role: str,
    reference: str | dict[str, Any],
    format: str | None,
    readonly: bool,
    extra: dict[str, Any],
) -> tuple[Node, _Pending | None]:
    """Open what an image names, with the user's *extra* options, if the gate agrees."""
    if len(context.ancestors) > MAX_DEPTH:
        raise ImageError(context.filename, f"the backing chain is longer than {MAX_DEPTH} images")
    if isinstance(reference, dict):
        import json

        shown, options, path = "json:" + json.dumps(reference), dict(reference), None
    else:
        shown = reference
        options, path = _resolve_name(reference, context.filename)
    raw_allowed = context.gate.check(context.filename, role, shown, path)
    if path is not None:
        _check_loop(context, role, path)
        options["file"] = {"driver": "file" if _is_plain(path) else _local_protocol(path), "filename": path}
    child = context.child(
        readonly=readonly, auto_readonly=context.auto_readonly and not readonly, filename="", detect_zeroes="off"
    )
    driver = extra.get("driver") or format
    if driver:
        if _is_protocol(driver):
            raise ImageError(context.filename, f"{role} '{shown}': {driver} is no image format")
        options["driver"] = driver
    options.update(extra)
    node, pending = _open_one(options, child)
    try:
        if not driver and not raw_allowed and node.driver == "raw":
            raise context.gate.refuse_raw(context.filename, role, shown)
        mark = node.identity()
        if mark is not None and mark in context.ancestors:
            raise _loop(context, role, shown)
    except BaseException:
        with _ignored():
            node.close()
        raise
    return node, pending


def _follow_storage(
    context: OpenContext, role: str, reference: str | dict[str, Any], readonly: bool, beside: bool
) -> Node:
    """Open bare storage that an image names, if the gate agrees."""
    if isinstance(reference, dict):
        import json

        shown, options, path = "json:" + json.dumps(reference), dict(reference), None
    else:
        shown = reference
        if beside:
            options, path = {}, os.path.join(os.path.dirname(context.located), reference)
            if path.startswith("file:"):
                path = f"./{path}"  # the driver would take that for the prefix
        else:
            # QEMU takes such names as relative to where it runs; here they are relative to the image, like all others.
            options, path = _resolve_name(reference, "" if context.gate.following else context.located)
    context.gate.check(context.located, role, shown, path)
    if path is not None:
        _check_loop(context, role, path)
        options = {"driver": "file" if _is_plain(path) else _local_protocol(path), "filename": path}
    return _open(options, context.child(readonly=readonly, filename="", detect_zeroes="off"), image=False)


def _located(node: Node, filename: str) -> str:
    """The file that a name leads to: names in the image are relative to where that is."""
    while filename.startswith("json:"):
        below = list(node.children().values())
        if len(below) != 1:
            return ""
        node = below[0]
        filename = node.filename
    return filename


def create_storage(filename: str, size: int = 0) -> Node:
    """Make bare storage called *filename*, of *size* bytes that read as zeroes, and open it. Raises ImageError."""
    protocol, target = _protocol_of(filename)
    _lookup(protocol)[1].create(dict(target), size)
    return _open({"driver": protocol, **target}, OpenContext(readonly=False), image=False)


def _resolve_name(reference: str, image: str) -> tuple[dict[str, Any], str | None]:
    """A name in an image as options, or as a path where it is one. Relative paths start at the image's directory."""
    if reference.startswith("json:"):
        return parse_spec(reference), None
    if reference.startswith("file:"):
        reference = reference[5:]
    elif SCHEME.match(reference):
        return {"filename": reference}, None
    path = os.path.join(os.path.dirname(image), reference)
    return {}, path


def _check_loop(context: OpenContext, role: str, path: str) -> None:
    """Before the open, since our own lock on the image would be the first thing in the way."""
    try:
        status = os.stat(path)
    except OSError:
        return
    if (status.st_dev, status.st_ino) in context.ancestors:
        raise _loop(context, role, path)


def _loop(context: OpenContext, role: str, name: str) -> ImageError:
    what = "backing file" if role == "backing" else role
    return ImageError(context.filename, f"{what} '{name}' leads back to an image above it: the chain is a loop")


# Small parts


def _take_common(options: dict[str, Any], context: OpenContext) -> str:
    """Take the options that every node has out of *options* into *context*; returns the node's name."""
    name = str(options.pop("node-name", None) or "")
    if not any(key in options for key in _COMMON):
        return name
    from ..options import parse_bool

    def take(key: str) -> bool | None:
        return parse_bool(options.pop(key), key) if key in options else None

    readonly = take("read-only")
    if readonly is not None:
        context.readonly = readonly
    automatic = take("auto-read-only")
    if automatic is not None:
        context.auto_readonly = automatic
    share = take("force-share")
    if share is not None:
        context.share = share
    if "discard" in options:
        word = options.pop("discard")
        if word not in ("ignore", "off", "unmap", "on"):
            raise UsageError(f"discard={word}: one of ignore, unmap is needed").put("Invalid discard option")
        context.discard = word in ("unmap", "on")
    if "detect-zeroes" in options:
        word = options.pop("detect-zeroes")
        if word not in ("off", "on", "unmap"):
            raise UsageError(f"detect-zeroes={word}: one of off, on, unmap is needed").put(
                f"invalid parameter value: {word}"
            )
        context.detect_zeroes = word
    if "cache" in options:
        cache = options.pop("cache")
        if not isinstance(cache, dict):
            raise UsageError("cache: give cache.direct=on|off or cache.no-flush=on|off")
        for key, value in cache.items():
            field = {"direct": "direct", "no-flush": "no_flush"}.get(key)
            if field is None:
                raise UsageError(f"cache.{key}: there are cache.direct and cache.no-flush")
            context.cache = context.cache._replace(**{field: parse_bool(value, f"cache.{key}")})
    return name


def _lookup(driver: str) -> tuple[str, Any, Descriptor | None]:
    """Kind, implementation and descriptor (None for the quick ones) of a driver. Raises PluginError."""
    quick = _QUICK.get(driver)
    if quick is not None:
        kind, module, attribute = quick
        from importlib import import_module

        return kind, getattr(import_module(module), attribute), None
    from ..errors import PluginError
    from ..plugins import find

    try:
        descriptor = find("format", driver)
    except PluginError as as_format:
        try:
            descriptor = find("protocol", driver)
        except PluginError as as_protocol:
            # Of the two complaints, the one that knows what to do.
            told = as_protocol if "not installed" in str(as_protocol) else as_format
            raise told.put(f"Unknown driver '{driver}'") from None
    return descriptor.kind, descriptor.load(), descriptor


def _described(driver: str) -> Descriptor:
    from ..plugins import find

    return find("format", driver)


def _is_protocol(driver: Any) -> bool:
    return isinstance(driver, str) and _lookup(driver)[0] == "protocol"


def _typed(driver: str, kind: str, options: dict[str, Any], descriptor: Descriptor | None) -> dict[str, Any]:
    """The driver's options with the types that its descriptor gives them. Raises UsageError."""
    if descriptor is None:
        if set(options) == {"filename"} and isinstance(options["filename"], str):
            return options
        from ..plugins import find

        descriptor = find(kind, driver)
    return _checked(driver, kind, options, descriptor.options)


def _checked(driver: str, kind: str, options: dict[str, Any], known: Sequence[Option]) -> dict[str, Any]:
    """*options* as the types that the driver declares, in QEMU's words where one is wrong. Raises UsageError."""
    from ..options import typed

    try:
        return typed(options, known, driver)
    except UsageError as error:
        if not error.peer:
            names = [option.name for option in known]
            if "filename" in names and "filename" not in options:
                error.put(f"The '{driver}' block driver requires a file name")
            unknown = next((name for name in options if name not in names), None)
            if unknown is not None:
                error.put(
                    f"Block protocol '{driver}' doesn't support the option '{_leaf(unknown, options)}'"
                    if kind == "protocol"
                    else f"Block format '{driver}' does not support the option '{_leaf(unknown, options)}'"
                )
        raise


def _leaf(name: str, options: dict[str, Any]) -> str:
    """The dotted name of the first option below *name*."""
    value = options[name]
    while isinstance(value, dict) and value:
        inner = next(iter(value))
        name, value = f"{name}.{inner}", value[inner]
    return name


def _split_children(
    driver: str, options: dict[str, Any], descriptor: Descriptor, context: OpenContext
) -> dict[str, Any]:
    """Move options that are children to the context, and check the others."""
    children: list[Option] = [option for option in descriptor.options if option.type == "node"]
    for option in children:
        if option.name in options:
            context._explicit[option.name] = options.pop(option.name)
    return _checked(driver, "format", options, [option for option in descriptor.options if option.type != "node"])


def _refuse_rest(driver: str, options: dict[str, Any]) -> None:
    if options:
        raise UsageError(f"{driver}: the option {min(options)!r} is unknown")


def _probe(file: Node) -> str:
    from ..errors import PluginError
    from ..plugins import find
    from .probe import probe

    if not file.present:  # nothing to look at, and nothing in it
        return "raw"
    try:
        name = probe(file)
    except OSError as error:
        told = error.strerror or str(error)
        raise ImageError("", f"Could not read image for determining its format: {told}") from error
    try:
        find("format", name)
    except PluginError as error:
        raise ImageError(file.filename, f"a {name} image: {error}; format=raw takes it for raw bytes") from error
    return name


def _guard_raw(node: Node, context: OpenContext) -> None:
    from .raw import RawNode

    if not isinstance(node, RawNode):
        return
    if not node.readonly:
        context.warn(
            f"WARNING: Image format was not specified for '{node.filename}' and probing guessed raw.\n"
            "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will "
            "be restricted.\n"
            "         Specify the 'raw' format explicitly to remove the restrictions."
        )

    def guess(head: bytes, tail: bytes) -> str:
        from .probe import guess

        return guess(head, tail, node.size, node.filename)

    node.guard(guess)


def _protocol_of(filename: str) -> tuple[str, dict[str, Any]]:
    """The protocol driver that a file name names, and its options. Raises PluginError where it is absent."""
    if filename.startswith("file:"):
        path = filename[5:]
        if SCHEME.match(path):
            path = f"./{path}"  # so that it is a path wherever it is read again
        return ("file" if _is_plain(path) else _local_protocol(path)), {"filename": path}
    match = SCHEME.match(filename)
    if match is None:
        return ("file" if _is_plain(filename) else _local_protocol(filename)), {"filename": filename}
    from ..errors import PluginError
    from ..plugins import drivers, find

    scheme = match[1]
    for driver in cast("list[ProtocolDriver]", drivers("protocol")):
        if scheme in driver.prefixes or scheme == driver.name:
            return driver.name, driver.load().parse_filename(filename)
    try:
        found = find("protocol", scheme.partition("+")[0])
    except PluginError as error:
        if os.path.exists(filename):
            raise UsageError(f"'{filename}' reads as protocol {scheme!r}: write ./{filename} for the file").put(
                f"Unknown protocol '{scheme}'"
            ) from None
        raise PluginError(f"Unknown protocol '{scheme}': {error}").put(f"Unknown protocol '{scheme}'") from None
    return found.name, found.load().parse_filename(filename)


def _is_plain(path: str) -> bool:
    """Whether *path* is a regular file, or nothing yet."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return True


def _local_protocol(path: str) -> str:
    """The protocol driver that makes the highest claim to a path that is no regular file."""
    from ..plugins import drivers

    best, name = 0, "file"
    for driver in drivers("protocol"):
        if "local" in driver.capabilities:
            claim: int = driver.load().claims(path)
            if claim > best:
                best, name = claim, driver.name
    return name


def _temporary_overlay(node: Node, context: OpenContext, node_name: str) -> Node:
    """An image in $TMPDIR on top of *node*, without a name from the start, gone when closed."""
    import tempfile

    from ..errors import PluginError

    try:
        _lookup(SNAPSHOT_FORMAT)
    except PluginError as error:
        raise PluginError(f"snapshot=on keeps its changes in a {SNAPSHOT_FORMAT} image: {error}") from None
    handle, path = tempfile.mkstemp(prefix="vm-", suffix=f".{SNAPSHOT_FORMAT}")
    os.close(handle)
    try:
        recorded = {"backing_file": os.path.abspath(node.filename), "backing_fmt": node.driver}
        create_image(path, SNAPSHOT_FORMAT, node.size, recorded, check_backing=False)
        below = context.child(readonly=False, cache=context.cache._replace(no_flush=True), filename="")
        below.detect_zeroes = context.detect_zeroes
        overlay, _ = _open_one(
            {
                "driver": SNAPSHOT_FORMAT,
                "file": {"driver": "file", "filename": path},
                "backing": "",
                "node-name": node_name,
            },
            below,
        )
    finally:
        with _ignored():
            os.unlink(path)
    assert isinstance(overlay, FormatNode)
    overlay.set_backing(node)
    overlay.filename = node.filename
    return overlay


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@contextmanager
def _ignored() -> Iterator[None]:
    """Clearing up after a failure: the failure is what will be told."""
    with suppress(OSError, VmError):
        yield


@contextmanager
def _as_image_errors(name: str) -> Iterator[None]:
    """I/O errors while opening, as one sentence about the image."""
    try:
        yield
    except OSError as error:
        raise ImageError("", f"Could not open '{name}': {error.strerror or error}") from error
    except RecursionError:
        raise ImageError(name, "nodes are nested too deeply") from None


@contextmanager
def _backing_errors(image: str) -> Iterator[None]:
    """Errors of a backing image, with the image that wanted it."""
    try:
        yield
    except GateError:
        raise
    except LockError as error:
        raise LockError(
            image, f"Could not open backing file: {error}", peer=f"Could not open backing file: {error.peer}"
        ) from error
    except VmError as error:
        if isinstance(error, ImageError) and error.name == image:
            raise
        raise ImageError(
            image,
            f"Could not open backing file: {error}",
            peer=f"Could not open backing file: {error.peer or error}",
        ) from error
    except OSError as error:
        raise ImageError(image, f"Could not open backing file: {error.strerror or error}") from error


def protocols(nodes: Sequence[Node]) -> list[Protocol]:
    """The protocol nodes at the bottom of *nodes*, each once."""
    found: dict[int, Protocol] = {}
    todo = list(nodes)
    seen: set[int] = set()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, Protocol):
            found[id(node)] = node
        todo.extend(node.children().values())
    return list(found.values())
