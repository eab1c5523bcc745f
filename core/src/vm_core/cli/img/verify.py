"""``verify``: whether an image's metadata is in order and its contents are those of a manifest; and making one."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from typing import TYPE_CHECKING, Any

from ...errors import UsageError, VmError
from .common import Failure, Tool, reason

if TYPE_CHECKING:
    from typing import IO

    from ...block.jobs.manifest import Manifest
    from ...block.jobs.verify import Verification
    from ...block.node import Node

LONG = {
    "help": "h",
    "manifest:": "m",
    "write:": "w",
    "algorithm:": "a",
    "block-size:": "b",
    "sum": "sum",
    "backing-chain": "backing-chain",
    "object:": "object",
    "image-opts": "image-opts",
    "force-share": "U",
    "output:": "output",
}

#: Statuses: it could not be done, the contents differ, the metadata is damaged.
FAILED, DIFFERENT, DAMAGED = 1, 2, 3
#: Ranges that are told, at most.
MOST = 1000
#: How a file is opened that must be new.
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)


def run(args: list[str], tool: Tool) -> int:
    """``verify [-f FMT] [-m FILE] [-w FILE] [--sum] [--backing-chain] [-p] [-q] [-U] [--output=OFMT] IMAGE``."""
    format, cache, image_opts, share, show, json = None, "writeback", False, False, False, False
    given, target, algorithm, block, total, chain = "", "", "", "", False, False
    options = tool.options(args, "hf:T:pqUm:w:a:b:", LONG)
    for key, value in options:
        match key:
            case "f":
                format = value
            case "T":
                cache = value
            case "p":
                show = True
            case "q":
                tool.quiet = True
            case "U":
                share = True
            case "m":
                given = value
            case "w":
                target = value
            case "a":
                algorithm = value
            case "b":
                block = value
            case "sum":
                total = True
            case "backing-chain":
                chain = True
            case "object":
                tool.add_object(value)
            case "image-opts":
                image_opts = True
            case "output":
                json = tool.output(value)
    if len(options.rest) != 1:
        tool.usage("Expecting one image file name")
    if given and target:
        raise Failure("--manifest compares with one and --write makes one: give one of them")
    if given and (algorithm or block):
        raise Failure("algorithm and block size are those of the manifest: give them with --write")
    if target == "-" and json:
        raise Failure("--write=- and --output=json both want standard output")
    if given == "-" and sys.stdin is None:
        raise Failure("--manifest=-: there is no standard input")
    size = tool.size(block, "block size", 1) if block else None
    manifest = _load(given) if given else None
    name = options.rest[0]
    show = show and not tool.quiet
    with ExitStack() as stack:
        node = stack.enter_context(
            tool.open(
                name,
                image_opts=image_opts,
                format=format,
                cache=tool.cache(cache, source=True),
                share=share,
                check=True,
            )
        )
        writing = _Target(target)
        stack.callback(writing.close)
        writing.check(node)
        facts: dict[str, Any] = {"filename": node.filename, "format": node.driver}
        checked = [_check(tool, one) for one in (_chain(node) if chain else [node])]
        damaged = any(one["corruptions"] or one["check-errors"] for one in checked)
        facts["checks"] = checked
        if damaged and target:
            raise Failure(f"{name}: its metadata is damaged; no manifest of it is made", DAMAGED)
        from ...block.jobs.job import Job

        result: Verification | None = None
        with tool.progress(show) as progress:
            job = Job(progress if show or tool.progress_mode == "json" else None)
            if manifest is not None:
                from ...block.jobs.verify import verify

                result = verify(node, manifest, with_sum=total, job=job)
                now = result.manifest
            else:
                from ...block.jobs.verify import make_manifest

                try:
                    now = make_manifest(node, algorithm=algorithm or "sha256", block_size=size, with_sum=total, job=job)
                except UsageError as error:
                    raise Failure(str(error)) from error
        if target:
            writing.write(now)
    _facts(facts, now, manifest, result)
    if json:
        tool.json(facts)
    else:
        _tell(tool, now, manifest, result, checked, target)
    if result is not None and result.unreadable:
        return FAILED
    if result is not None and not result.same:
        return DIFFERENT
    return DAMAGED if damaged else 0


def _load(path: str) -> Manifest:
    from ...block.jobs.manifest import Manifest

    try:
        if path == "-":
            return Manifest.read(sys.stdin.buffer)
        with open(path, "rb") as file:
            return Manifest.read(file)
    except VmError as error:
        raise Failure(f"Manifest '{path}' cannot be used: {error}") from error
    except OSError as error:
        raise Failure(f"Could not open manifest '{path}': {error.strerror}") from error


def _nameless(folder: str, mode: int) -> int:
    """A new file in *folder* without a name, which goes with its descriptor whatever happens; -1: there is no such."""
    flag = getattr(os, "O_TMPFILE", 0)
    if not flag or not os.path.exists("/proc/self/fd"):
        return -1
    try:
        return os.open(folder, flag | os.O_WRONLY | os.O_CLOEXEC, mode)
    except OSError as error:
        # What no file can be made for is told of the file with a name.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
        return -1


def _give_name(fd: int, path: str) -> int:
    """Make the open file *fd* be at *path* too. Raises FileExistsError where something is there."""
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)
    try:
        # A folder's descriptor has Python use linkat(), which follows the link in /proc to the file.
        os.link(f"/proc/self/fd/{fd}", os.path.basename(path), src_dir_fd=folder, dst_dir_fd=folder)
    finally:
        os.close(folder)
    return fd


class _Target:
    """Where a manifest is written: all of it, or nothing. It is begun before the image is read, so that what cannot be
    written is told at once."""

    def __init__(self, path: str) -> None:
        """Raises Failure. *path* is empty where none is wanted, ``-`` for standard output."""
        self._path = path
        self._final = self._partial = ""
        self._file: IO[str] | None = None
        if path and path != "-":
            with self._told():
                self._open()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise Failure(f"Could not write manifest '{self._path}': {error.strerror}") from error

    def _open(self) -> None:
        import stat

        # A link stays, and what it points to is replaced.
        final = os.path.realpath(self._path)
        mode = 0o666
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            pass
        else:
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if stat.S_ISBLK(status.st_mode):
                raise OSError(errno.EINVAL, "it is a disk of this host")
            if not stat.S_ISREG(status.st_mode) or _is_open_file(self._path) or _is_open_file(final):
                self._file = open(self._path, "w", encoding="ascii")  # noqa: SIM115 - a pipe, a terminal
                return
            mode = stat.S_IMODE(status.st_mode)
            os.close(os.open(final, os.O_WRONLY | getattr(os, "O_CLOEXEC", 0)))  # it may not be ours to replace
        self._final = final
        fd = _nameless(os.path.dirname(final), mode)
        if fd < 0:
            self._partial, fd = self._new_name(lambda path: os.open(path, _NEW, mode))
        self._file = open(fd, "w", encoding="ascii")  # noqa: SIM115
        if mode != 0o666:
            os.chmod(self._partial or fd, mode)

    def _new_name(self, make: Callable[[str], int]) -> tuple[str, int]:
        """A hidden name beside the manifest that was nobody's, and what *make* gave for it."""
        folder, name = os.path.split(self._final)
        for attempt in count():
            partial = os.path.join(folder, f".{name[:200]}.{os.getpid()}-{attempt}.part")
            with suppress(FileExistsError):
                return partial, make(partial)
        raise AssertionError

    def _enter(self, fd: int) -> None:
        """Give the written file its name, in place of another one of that name."""
        if not self._partial:
            with suppress(FileExistsError):
                _give_name(fd, self._final)
                return
            # Only a file with a name can take another's place.
            self._partial, _ = self._new_name(lambda path: _give_name(fd, path))
        os.replace(self._partial, self._final)
        self._partial = ""

    def check(self, node: Node) -> None:
        """Raise Failure where the manifest would replace *node*'s image, or one below it."""
        from ...block.medium import below

        if not self._final:
            return
        try:
            status = os.stat(self._final)
        except FileNotFoundError:
            return
        for one in below(node):
            if one.identity() == (status.st_dev, status.st_ino):
                raise Failure(f"Could not write manifest '{self._path}': it is a part of the image itself")

    def write(self, manifest: Manifest) -> None:
        """Write all of it, and make it stable."""
        if self._path == "-":
            sys.stdout.writelines(manifest.lines())
            return
        file = self._file
        if file is None:
            return
        with self._told():
            file.writelines(manifest.lines())
            file.flush()
            if self._final:
                os.fsync(file.fileno())
                self._enter(file.fileno())
                _sync_folder(os.path.dirname(self._final))
            self._file = None
            file.close()

    def close(self) -> None:
        """Leave nothing behind of what was not written."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        if self._partial:
            with suppress(OSError):
                os.unlink(self._partial)


def _is_open_file(path: str) -> bool:
    """Whether *path* is no name of its own, but that of what somebody has open: ``/dev/stdout``."""
    path = os.path.abspath(path)
    return path.startswith(("/dev/", "/proc/")) and not path.startswith("/dev/shm/")


def _sync_folder(path: str) -> None:
    """Make a new name in a directory stable, where that can be done."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _chain(node: Node) -> list[Node]:
    from ...block.jobs.commit import chain

    return chain(node)


def _check(tool: Tool, node: Node) -> dict[str, Any]:
    """The format's own check of one image: how much was found. Formats without one have nothing to tell."""
    from ...block.formatnode import FormatNode
    from ...plugins import find

    told: dict[str, Any] = {"filename": node.filename, "format": node.driver, "check-errors": 0, "corruptions": 0,
                            "leaks": 0}  # fmt: skip
    if not isinstance(node, FormatNode) or "check" not in find("format", node.driver).capabilities:
        return told
    try:
        with node.quiesce() as format:
            found = dict(format.check())
    except UsageError:
        return told
    except (VmError, OSError) as error:
        tool.error(f"{node.filename}: {reason(error)}")
        return told | {"check-errors": 1}
    for line in (*found.get("messages", ()), *found.get("reports", ())):
        sys.stderr.write(f"{line}\n")
    return told | {name: found.get(name, 0) for name in ("check-errors", "corruptions", "leaks")}


def _facts(facts: dict[str, Any], now: Manifest, manifest: Manifest | None, result: Verification | None) -> None:
    facts["virtual-size"] = now.size
    facts["algorithm"] = now.algorithm
    facts["block-size"] = now.block_size
    facts["digest"] = now.digest
    if now.sum:
        facts["sum"] = now.sum
    if manifest is None or result is None:
        return
    facts["same"] = result.same
    facts["manifest-virtual-size"] = manifest.size
    facts["manifest-digest"] = manifest.digest
    facts["differing-ranges"] = len(result.differences)
    facts["differing-bytes"] = sum(one.length for one in result.differences)
    facts["differences"] = [{"offset": one.offset, "length": one.length} for one in result.differences[:MOST]]
    facts["unreadable"] = [
        {"offset": one.offset, "length": one.length, "error": one.reason} for one in result.unreadable[:MOST]
    ]


def _tell(
    tool: Tool,
    now: Manifest,
    manifest: Manifest | None,
    result: Verification | None,
    checked: list[dict[str, Any]],
    target: str,
) -> None:
    if target == "-":
        return
    for one in checked:
        if one["corruptions"] or one["check-errors"]:
            tool.say(f"{one['filename']}: metadata is damaged: {one['corruptions'] + one['check-errors']} errors")
        elif one["leaks"]:
            tool.say(f"{one['filename']}: {one['leaks']} leaked clusters, which do no harm")
    if manifest is None or result is None:
        tool.say(f"digest: {now.digest} ({now.algorithm}, blocks of {now.block_size} bytes)")
        if now.sum:
            tool.say(f"sum: {now.sum}")
        return
    if result.resized:
        tool.say(f"Size differs: {now.size} bytes instead of {manifest.size}")
    _tell_ranges(tool, "Content differs", [f"offset {one.offset}, length {one.length}" for one in result.differences])
    _tell_ranges(
        tool, "Cannot be read", [f"offset {one.offset}, length {one.length}: {one.reason}" for one in result.unreadable]
    )
    if result.sum_differs:
        tool.say(f"Sum differs: {now.sum} instead of {manifest.sum}")
    elif now.sum and not manifest.sum:
        tool.say(f"sum: {now.sum}, with which the manifest has nothing to compare")
    if result.same:
        tool.say("The image holds what the manifest says.")


def _tell_ranges(tool: Tool, what: str, lines: list[str]) -> None:
    for line in lines[:MOST]:
        tool.say(f"{what}: {line}")
    if len(lines) > MOST:
        tool.say(f"{what}: {len(lines) - MOST} more ranges")
