"""One run of the program: the open image, how it was opened, and the commands that open, close and reopen it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ...errors import UsageError, VmError
from ..getopt import UNKNOWN, LibraryGetopt
from ..img.common import Failure, Tool, reason

if TYPE_CHECKING:
    from ...block.cache import CacheMode
    from ...block.node import Node
    from .aio import Queue
    from .carrier import Carrier

#: Images are as large for requests as whole sectors of this many bytes.
SECTOR = 512


class How(NamedTuple):
    """How an image is opened."""

    readonly: bool = False
    snapshot: bool = False
    copy_on_read: bool = False
    share: bool = False
    #: Host cache and flushes, as ``-t`` says; writethrough unless something else was asked for.
    direct: bool = False
    no_flush: bool = False
    writethrough: bool = True
    discard: bool = True
    aio: str = "threads"


class Session:
    """The program's state."""

    def __init__(self, program: str, path: str, out: TextIO) -> None:
        #: The name the program was called by, and the first word of its command line.
        self.program = program
        self.path = path
        self.tool = Tool(program)
        self.out = out
        self.node: Node | None = None
        self.how = How()
        #: Writes are stable when they are reported.
        self.writethrough = False
        #: ``-m``: buffers for O_DIRECT do not start where it wants them.
        self.misalign = False
        self.done = False
        #: The image has a drive of the host below it, which may be empty.
        self._removable = False
        self._queue: Queue | None = None
        self._carrier: Carrier | None = None

    @property
    def io(self) -> Node | Carrier:
        """What reads and writes go to: the image, or an engine in front of it."""
        return self._carrier or self.image

    @property
    def image(self) -> Node:
        """The open image."""
        assert self.node is not None
        return self.node

    @property
    def size(self) -> int:
        """Bytes that requests may reach: whole sectors."""
        return -(-self.image.size // SECTOR) * SECTOR

    @property
    def empty(self) -> bool:
        """Whether a drive of the host that the image needs has no medium."""
        if not self._removable:
            return False
        from ...block.medium import present

        return not present(self.image)

    @property
    def queue(self) -> Queue:
        """The asynchronous requests."""
        if self._queue is None:
            from .aio import Queue

            self._queue = Queue(self.out)
        return self._queue

    @property
    def busy(self) -> bool:
        """Whether asynchronous requests are on their way."""
        return self._queue is not None and self._queue.busy

    def settle(self) -> None:
        """Let asynchronous requests that were submitted go before what is done next."""
        if self._queue is not None and self._queue.busy:
            self._queue.settle()

    def poll(self) -> None:
        """Report asynchronous requests that have finished."""
        if self._queue is not None:
            self._queue.poll()

    def open(self, name: str | None, how: How, options: dict[str, str]) -> int:
        """Open the image *name* (None: what the *options* alone say). Returns 1 where that fails; it has been told."""
        if self.node is not None:
            self.tool.error("file open already, try 'help close'")
            return 1
        if how.share and options.get("force-share", "on") != "on":
            self.tool.error("-U conflicts with image options")
            return 1
        from ...block.medium import removable

        try:
            node = self._open_node(name, how, options)
            try:
                carrier = self._make_carrier(node)
            except BaseException:
                node.close()
                raise
        except (VmError, OSError) as error:
            device = "" if name is None else f" device {name}"
            self.tool.error(f"can't open{device}: {reason(error)}")
            return 1
        self._carrier = carrier
        self.node, self.how, self.writethrough = node, how, how.writethrough
        self._removable = removable(node)
        return 0

    def _open_node(self, name: str | None, how: How, options: dict[str, str]) -> Node:
        from ...block import notices
        from ...block.cache import CacheMode
        from ...block.open import open_node, parse_spec
        from ...options import nest

        notices.program = self.program
        spec: dict[str, Any] = nest(options)
        if name is not None:
            given = parse_spec(name)
            spec = {**given, **spec}
        elif "driver" not in spec and "file" not in spec and "filename" not in spec:
            raise UsageError("Must specify either driver or file")
        if how.share and not how.readonly:
            raise UsageError("force-share=on can only be used with read-only images")
        node = open_node(
            spec,
            readonly=how.readonly,
            cache=CacheMode(direct=how.direct, no_flush=how.no_flush, writethrough=how.writethrough),
            gate=self.tool.gate(),
            share=how.share,
            share_writes=True,
            discard=how.discard,
            snapshot=how.snapshot,
            warn=self.tool.open_warning,
            aio=how.aio,
        )
        if how.copy_on_read and node.readonly:
            node.close()
            raise UsageError("Can't use copy-on-read on read-only device")
        return node

    def _make_carrier(self, node: Node) -> Carrier | None:
        from ...block.file import engine_of

        engine = engine_of(node)
        # Test drivers stop requests on the threads that carry them out, and need to know which.
        if engine == "threads" or node.watched:
            return None
        from .carrier import Carrier

        return Carrier(node, engine)

    def close(self) -> None:
        """Finish what is on its way, and close the image."""
        if self._queue is not None:
            self._queue.flush()
        if self._carrier is not None:
            self._carrier.close()
            self._carrier = None
        node, self.node = self.node, None
        if node is not None:
            try:
                node.close()
            except (VmError, OSError) as error:
                # The peer tells of metadata that it could not write, as the driver has by now, and no more.
                if not self.tool.peer or isinstance(error, VmError):
                    self.tool.error(reason(error) if self.tool.peer else f"{node.filename}: {reason(error)}")

    def abandon(self) -> None:
        """The program ends, and the image stays as it is: nothing is waited for, written or closed."""
        self._queue = self.node = None
        if self._carrier is not None:
            self._carrier.close()
            self._carrier = None

    def end(self) -> None:
        """The program ends."""
        self.close()
        if self._queue is not None:
            self._queue.stop()


def parse_options(text: str, tool: Tool) -> dict[str, str]:
    """``key=value,…`` of ``--image-opts`` and ``-o``."""
    from ...options import pieces

    options: dict[str, str] = {}
    for piece in pieces(text):
        key, equals, value = piece.partition("=")
        if not equals and piece:
            off = key.startswith("no") and len(key) > 2
            if off:
                key = key[2:]
            value = "off" if off else "on"
            tool.warn(f"short-form boolean option '{piece}' deprecated")
            sys.stderr.write(f"Please use {key}={value} instead\n")
        if piece:
            options[key] = value
    return options


def parse_cache(text: str) -> CacheMode | None:
    """The mode that ``-t TEXT`` names; None for no such mode."""
    from ...block.cache import MODES

    return MODES.get("none" if text == "off" else text)


#: Options about opening, of the program and of the command ``open``, that both understand alike.
def take(how: How, key: str, value: str, tool: Tool) -> How | None:
    """*how* with one option more; None where its value is wrong, which has been told."""
    if key == "r":
        return how._replace(readonly=True)
    if key == "s":
        return how._replace(snapshot=True)
    if key == "C":
        return how._replace(copy_on_read=True)
    if key == "U":
        return how._replace(share=True)
    if key == "n":
        return how._replace(direct=True, writethrough=False)
    if key == "k":
        return how._replace(aio="native")
    if key == "i":
        try:
            return how._replace(aio=tool.engine(value, how.aio))
        except Failure as failure:
            tool.error(str(failure))
            return None
    if key == "t":
        cache = parse_cache(value)
        if cache is None:
            tool.error(f"Invalid cache option: {value}")
            return None
        return how._replace(direct=cache.direct, no_flush=cache.no_flush, writethrough=cache.writethrough)
    assert key == "d"
    if value not in ("off", "ignore", "on", "unmap"):
        tool.error(f"Invalid discard option: {value}")
        return None
    return how._replace(discard=value in ("on", "unmap"))


def run_open(session: Session, words: Sequence[str]) -> int:
    """The command ``open``."""
    from .commands import usage

    how: How | None = How()
    options: dict[str, str] = {}
    scan = LibraryGetopt(words, "snCro:ki:t:d:U")
    for key, value in scan:
        assert how is not None
        if key == UNKNOWN:
            return usage(session, words)
        if key == "o":
            options.update(parse_options(value, session.tool))
            continue
        how = take(how, key, value, session.tool)
        if how is None:
            return 1
    assert how is not None
    if len(scan.rest) > 1:
        return usage(session, words)
    return session.open(scan.rest[0] if scan.rest else None, how, options)


def run_close(session: Session, words: Sequence[str]) -> int:
    """The command ``close``."""
    session.close()
    return 0


def run_reopen(session: Session, words: Sequence[str]) -> int:
    """The command ``reopen``."""
    from .reopen import run

    return run(session, words)
