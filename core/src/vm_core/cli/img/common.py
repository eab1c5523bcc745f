"""What the subcommands of ``vm-img`` share: options, opening, messages, progress.

A subcommand is a module of this package with ``def run(args: list[str], tool: Tool) -> int`` (the exit status), named
in ``main.COMMANDS`` and imported only when used. A typical one::

    LONG = {"help": "h", "object:": "object", "image-opts": "image-opts", "force-share": "U", "output:": "output"}

    def run(args: list[str], tool: Tool) -> int:
        fmt, image_opts, share = None, False, False
        options = tool.options(args, "hf:U", LONG)
        for key, value in options:              # -h, wrong options and missing arguments end the program in here
            if key == "f":
                fmt = value
            elif key == "image-opts":
                image_opts = True
            elif key == "U":
                share = True
            elif key == "object":
                tool.add_object(value)          # as the peer does: while options are read
        if len(options.rest) != 1:
            tool.usage("Expecting one image file name")
        with tool.open(options.rest[0], image_opts=image_opts, format=fmt, share=share) as node:
            ...
        return 0

* ``tool.error(text)`` prints ``PROG: text`` on standard error; ``tool.warn`` with ``warning:``; ``tool.say`` prints on
  standard output unless ``tool.quiet`` (``-q``) is set.
* ``raise Failure(text, code=1)`` ends the program with ``PROG: text``; any VmError or OSError that escapes is told the
  same way, by the peer's words where it has any (:func:`reason`).
* ``tool.open(name, …)`` opens as the peer does and raises Failure ``Could not open 'NAME': REASON``.
* ``tool.cache(text, source=False)`` is ``-t``/``-T``.
* ``with tool.progress(enabled) as progress: progress(done, total)`` is ``-p``.
* ``tool.target(path)`` guards a file that is being made: a failure or Ctrl-C removes it, or names it.
* ``tool.json(value)`` prints JSON as the peer lays it out.

Standard output stays buffered until the end, like the peer's, so that both streams mix in the same order.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from ...errors import GateError, UsageError, VmError
from ..getopt import MISSING, UNKNOWN, Getopt

if TYPE_CHECKING:
    from ...block.cache import CacheMode
    from ...block.gate import Gate
    from ...block.node import Node
    from .progress import Progress


INT64_MAX = (1 << 63) - 1


class Exit(Exception):  # noqa: N818
    """The program is to end with this status; everything has been said."""

    def __init__(self, code: int = 1) -> None:
        super().__init__(code)
        self.code = code


class Failure(VmError):  # noqa: N818
    """The program is to end with ``PROG: text``."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.code = code


def reason(error: BaseException) -> str:
    """An error in the peer's words where it has some."""
    if isinstance(error, VmError):
        return error.peer or str(error)
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)


class Options:
    """The options of a subcommand, one ``(key, value)`` after the other; then :attr:`rest`, the operands.

    Help and wrong options end the program in the iteration.
    """

    def __init__(self, tool: Tool, scan: Getopt) -> None:
        self._tool = tool
        self._scan = scan

    def __iter__(self) -> Iterator[tuple[str, str]]:
        tool = self._tool
        for key, value in self._scan:
            if key == UNKNOWN:
                tool.usage(f"unrecognized option '{value}'", hint=self._suggest(value))
            if key == MISSING:
                tool.usage(f"missing argument for option '{value}'")
            if key == "h":
                from .help import show

                show(tool)
                raise Exit(0)
            if key == "trust":
                tool.trust.append(value)
            elif key == "progress":
                tool.choose_progress(value)
            else:
                yield key, value

    def _suggest(self, word: str) -> str:
        if self._tool.peer or not word.startswith("--"):
            return ""
        import difflib

        close = difflib.get_close_matches(word.partition("=")[0], self._scan.names, 1)
        return f"did you mean {close[0]}?" if close else ""

    @property
    def rest(self) -> list[str]:
        return self._scan.rest


#: Options that every subcommand of ``vm-img`` takes and the peer has not.
_EXTRA = {"trust:": "trust", "progress:": "progress"}


class Tool:
    """One run of the program."""

    def __init__(self, program: str) -> None:
        #: The name the program was called by: what messages begin with.
        self.program = program
        #: Called by the peer's name: follow backing files and speak as it does, and add nothing.
        self.peer = program.startswith("qemu-")
        #: The subcommand.
        self.command = ""
        #: ``-q``: nothing but errors. To be set by the subcommand.
        self.quiet = False
        #: ``--trust DIR``: directories that images may name files in.
        self.trust: list[str] = []
        #: ``--progress MODE``: text, bar, json or none; empty: by the terminal.
        self.progress_mode = ""
        self._afterwards: list[str] = []

    # Words

    def options(self, args: list[str], short: str, long: Mapping[str, str]) -> Options:
        """Scan *args*: *short* and *long* as for :class:`~.getopt.Getopt`."""
        extra = None if self.peer else _EXTRA
        return Options(self, Getopt(args, short, long, exact=extra, program=self.command or self.program))

    def choose_progress(self, mode: str) -> None:
        """``--progress MODE``. Raises Failure where there is no such mode: before anything is done, so to no target."""
        from .progress import MODES

        if mode not in MODES:
            raise Failure(f"--progress {mode}: there is: {', '.join(MODES)}")
        self.progress_mode = mode

    def error(self, text: str, *, end: str = "\n") -> None:
        """Print ``PROG: text`` on standard error."""
        sys.stderr.write(f"{self.program}: {text}{end}")

    def tell(self, error: BaseException) -> None:
        """Print what ended the program: what a driver has to say before it, the error, what to do about it."""
        for note in _notes(error):
            self.error(note)
        self.error(_sentence(error) if self.peer else _named(error, self.command))
        if not self.peer:
            self.hint(advice(error))
        self.conclude()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """An error of the body ends the program, and is told before images are closed, which may find more to say."""
        try:
            yield
        except (VmError, OSError) as error:
            if os.environ.get("VM_DEBUG"):
                raise
            self.tell(error)
            raise Exit(error.code if isinstance(error, Failure) else 1) from error

    def conclude(self) -> None:
        """Say what :meth:`afterwards` was told."""
        for text in self._afterwards:
            self.hint(text)
        self._afterwards.clear()

    def afterwards(self, text: str) -> None:
        """A hint to be given behind the error that ends the program: what is left, and how to go on."""
        self._afterwards.append(text)

    def warn(self, text: str) -> None:
        """Print ``PROG: warning: text`` on standard error."""
        self.error(f"warning: {text}")

    def hint(self, text: str) -> None:
        """What to do about an error; not where the peer's own output is expected."""
        if text and not self.peer:
            sys.stderr.write(f"{self.program}: hint: {text}\n")

    def usage(self, text: str, *, hint: str = "") -> NoReturn:
        """End because the command line is wrong."""
        self.error(text)
        self.hint(hint)
        command = "" if self.peer or not self.command else f" {self.command}"
        sys.stderr.write(f"Try '{self.program}{command} --help' for more information\n")
        raise Exit(1)

    def say(self, text: str) -> None:
        """Print a line unless ``-q`` was given."""
        if not self.quiet:
            sys.stdout.write(text + "\n")

    def json(self, value: Any) -> None:
        """Print *value* as the peer lays JSON out."""
        from ...jsontext import pretty

        sys.stdout.write(pretty(value) + "\n")

    # Opening

    def gate(self) -> Gate:
        """What images may name: as the peer where called by its name."""
        from ...block.gate import Gate

        return Gate.follow() if self.peer else Gate.default(*self.trust)

    def open(
        self,
        name: str,
        *,
        image_opts: bool = False,
        format: str | None = None,
        write: bool = False,
        cache: CacheMode | None = None,
        share: bool = False,
        backing: bool = True,
        check: bool = False,
        exclusive: bool = False,
        options: dict[str, Any] | None = None,
        **more: Any,
    ) -> Node:
        """Open the image *name* (with *image_opts* its options) as the peer does.

        *write* for writing, *share* is ``-U``, without *backing* the chain ends at the image, *check* opens damaged
        images too, *exclusive* lets nobody else write to it even if it is raw (convert). *options* are the driver's,
        beside a plain *name*. Raises Failure.
        """
        from ...block import notices
        from ...block.cache import WRITEBACK
        from ...block.open import open_node

        notices.program = self.program

        if image_opts and format:
            raise Failure("--image-opts and --format are mutually exclusive")
        shown = name
        try:
            spec: str | dict[str, Any] = name if name.startswith("json:") else {"filename": name}
            if image_opts:
                spec = self._image_opts(name)
            if options:
                spec = {"filename": name, **options}
            if isinstance(spec, dict) and share:
                if spec.get("force-share", "on") not in ("on", True):
                    raise Failure("--force-share/-U conflicts with image options")
                spec["force-share"] = "on"
            return open_node(
                spec,
                readonly=not write,
                cache=cache or WRITEBACK,
                format=format,
                gate=self.gate(),
                share=share,
                share_writes=not exclusive,
                backing=backing,
                check=check,
                warn=self.open_warning,
                **more,
            )
        except Failure:
            raise
        except (VmError, OSError) as error:
            raise OpenFailure(f"Could not open '{shown}': {reason(error)}", error) from error

    def _image_opts(self, text: str) -> dict[str, Any]:
        from ...options import nest, split

        first = text.partition(",")[0]
        given = split(text if first.partition("=")[0] else text[len(first) + 1 :], "file")
        options = nest(given)
        driver = options.get("driver")
        if "file" not in options and (driver is None or "filename" in options):
            # As the peer has it, a file name alone names nothing.
            if driver is None:
                raise UsageError("Must specify either driver or file")
            from ...plugins import drivers

            if any(driver == one.name for one in drivers("format")):
                raise UsageError('A block device must be specified for "file"')
        return options

    def open_warning(self, text: str) -> None:
        """What a driver says when an image is opened. The peer tells it even with ``-q``."""
        if text.startswith("WARNING: "):
            sys.stderr.write(text + "\n")
        else:
            # Where a hint follows the sentence, the peer does not end its line.
            sys.stderr.write(f"{self.program}: warning: {text}" + ("" if self.peer and "\n" in text else "\n"))

    def cache(self, text: str, *, source: bool = False) -> CacheMode:
        """The cache mode of ``-t`` (or ``-T``, *source*). Raises Failure."""
        from ...block.cache import CacheMode

        try:
            return CacheMode.parse("none" if text == "off" else text)
        except UsageError:
            raise Failure(f"Invalid {'source ' if source else ''}cache option: {text}") from None

    def engine(self, text: str, former: str = "threads") -> str:
        """The host-I/O engine of ``-i``, after *former* was asked for. Raises Failure.

        As in the peer ``native`` stands whatever follows, and ``threads`` undoes nothing.
        """
        if text not in ("threads", "native", "io_uring") and (self.peer or not self._has_engine(text)):
            raise Failure(f"Invalid aio option: {text}")
        return former if text == "threads" or former == "native" else text

    def _has_engine(self, name: str) -> bool:
        """Whether some other plugin brings an engine of that name."""
        from ...plugins import drivers

        return any(name == one.name for one in drivers("engine"))

    def output(self, text: str) -> bool:
        """Whether ``--output=`` asks for JSON. Raises Failure."""
        if text not in ("json", "human"):
            raise Failure("--output must be used with human or json as argument.")
        return text == "json"

    def add_object(self, text: str) -> None:
        """``--object secret,id=…``. Raises Failure."""
        from .objects import add

        add(self, text)

    # Sizes

    def size(self, text: str, name: str, low: int = 0, high: int = INT64_MAX) -> int:
        """A size that the option called *name* in the peer's complaints is given, from *low* to *high*."""
        from ... import sizes as numbers

        try:
            value = numbers.parse(text)
        except numbers.NotANumberError:
            self.error(f"Invalid {name} specified. You may use k, M, G, T, P or E suffixes for")
            self.error("kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.")
            raise Exit(1) from None
        except numbers.OutOfRangeError:
            value = -1
        if not low <= value <= high:
            if high == INT64_MAX and low > 0:
                raise Failure(f"Invalid {name} specified. Must be at least {low}.")
            raise Failure(f"Invalid {name} specified. Must be between {low} and {high}.")
        return value

    # Long work

    def progress(self, enabled: bool, step: float = 1.0) -> Progress:
        """``-p``: a context manager to call with what is done and what there is; *step* per cent are worth telling."""
        from .progress import make

        return make(self, enabled, step)

    @contextmanager
    def target(self, path: str) -> Iterator[Target]:
        """The file at *path* is being made: unless the body gets to its end, or keeps it, it is removed.

        What existed before stays; if it was changed by then, that is told.
        """
        target = Target(path)
        try:
            yield target
        except BaseException:
            if target.existed and not os.path.lexists(path):
                self.afterwards(f"what '{path}' was before is gone")
            elif not target.kept and os.path.lexists(path):
                if target.existed:
                    if target.changed():
                        self.afterwards(f"'{path}' is not complete now")
                else:
                    try:
                        os.unlink(path)
                    except OSError:
                        self.afterwards(f"'{path}' is not complete and could not be removed")
            raise


class Target:
    """A file that is being made, see :meth:`Tool.target`."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.existed = os.path.lexists(path)
        #: A failure leaves it as it is.
        self.kept = False
        #: It has been made, and is being filled: to be set.
        self.begun = False
        self._before = self._facts()

    def _facts(self) -> tuple[int, ...]:
        try:
            status = os.stat(self.path)
        except OSError:
            return ()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def changed(self) -> bool:
        """Whether what existed is not what it was (a device tells nothing of its own)."""
        return self.begun or self._before != self._facts()


class OpenFailure(Failure):
    """An image could not be opened; *error* says why in full."""

    def __init__(self, text: str, error: BaseException) -> None:
        super().__init__(text)
        self.error = error


def _notes(error: BaseException) -> list[str]:
    """What a driver added to an error that is to be told before it."""
    found: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        found = [*getattr(cause, "__notes__", ()), *found]
        cause = cause.__cause__
    return found


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and not isinstance(error, VmError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return reason(error) or type(error).__name__


def _named(error: BaseException, command: str) -> str:
    """The sentence; where it is nothing but the system's word for an error, with the subcommand in front."""
    text = _sentence(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno and text == os.strerror(cause.errno):
            return f"{command or 'error'}: {text}"
        cause = cause.__cause__
    return text


def need_medium(node: Node, told: str, *, why: bool = True) -> None:
    """Raise Failure with *told*, and the reason behind it (*why*), where a drive of the host below *node* is empty."""
    from ...block.medium import need

    try:
        need(node)
    except OSError as error:
        raise Failure(f"{told}: {reason(error)}" if why else told) from None


def advice(error: BaseException) -> str:
    """What to do about an error of opening or writing, where the peer's sentence does not tell."""
    cause = error.error if isinstance(error, OpenFailure) else error
    if isinstance(cause, GateError):
        return ""
    from .advice import advise

    return advise(cause)
