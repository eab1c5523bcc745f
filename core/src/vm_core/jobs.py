"""Work on whole images, for programs: convert, compare, commit, rebase, measure, compact, verify.

    vm_core.convert("disk.qcow2", "disk.raw")
    vm_core.convert("disk.raw", "disk.qcow2", format="qcow2", compressed=True, cluster_size="128k")
    if not vm_core.compare("a.qcow2", "b.raw").difference: ...
    vm_core.commit("overlay.qcow2")
    vm_core.rebase("overlay.qcow2", "other.qcow2", backing_format="qcow2")
    vm_core.measure("disk.raw", format="qcow2")["required"]
    vm_core.compact("disk.qcow2").after
    held = vm_core.manifest("disk.qcow2")
    if not vm_core.verify("backup.raw", held).same: ...

Images are given by path (or any other spelling that :func:`vm_core.open` takes) or as an open :class:`vm_core.Image`,
which stays open. *progress* is called with (bytes done, all bytes) from the work's own threads, one call at a time. To
be able to stop the work, make a :class:`vm_core.Job` and pass it instead: its ``cancel()`` may be called from
anywhere, and the work raises :class:`vm_core.Cancelled`; so does Ctrl-C raise KeyboardInterrupt. Of a new image that
could not be finished nothing is left.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .block.cache import CacheMode
from .block.formatnode import FormatNode
from .block.jobs.compact import Compacted
from .block.jobs.compare import Comparison
from .block.jobs.convert import SPARSE, ConvertOptions
from .block.jobs.job import Job
from .block.node import Node, sectors_up
from .block.open import create_image, open_node
from .errors import UsageError
from .image import Image

if TYPE_CHECKING:
    from .block.format import Progress
    from .block.gate import Gate
    from .block.jobs.manifest import Manifest
    from .block.jobs.verify import Verification

Spec = str | os.PathLike[str] | dict[str, Any] | Image


def convert(
    source: Spec | Sequence[Spec],
    target: str | os.PathLike[str] | Image,
    *,
    format: str = "raw",
    source_format: str | None = None,
    backing: str | os.PathLike[str] | None = None,
    backing_format: str | None = None,
    compressed: bool = False,
    sparse: int | str = SPARSE,
    workers: int = 8,
    salvage: bool = False,
    cache: str = "writeback",
    gate: Gate | None = None,
    progress: Progress | None = None,
    job: Job | None = None,
    **options: Any,
) -> None:
    """Copy *source* (several images: one behind the other) into a new image *target* of *format*.

    The other *options* are the format's create options. With *backing* the target holds only what differs from that
    image, which the source has too. *compressed* where the format can. Runs of zeroes of at least *sparse* bytes
    become holes (0: none). *salvage* makes zeroes of what cannot be read. An open Image as *target* is written from its
    beginning on; it is at least as large. Raises VmError (CopyError where data could not be moved), OSError.
    """
    if isinstance(sparse, str):
        from .options import parse_size

        sparse = parse_size(sparse, "sparse")
    with ExitStack() as stack:
        several = isinstance(source, Sequence) and not isinstance(source, str)
        specs: Sequence[Spec] = source if several else [source]  # type: ignore[assignment,list-item]
        nodes = [stack.enter_context(_opened(spec, format=source_format, gate=gate)) for spec in specs]
        how = ConvertOptions(sparse=sparse, workers=workers, compressed=compressed, salvage=salvage)
        if isinstance(target, Image):
            if options or backing:
                raise UsageError(f"{min(options, default='backing')}=… belongs to creating an image: give a path")
            _convert(nodes, target.node, how._replace(zero_init=False), _job(job, progress))
            return
        path = os.fspath(target)
        if backing is not None:
            options["backing_file"] = os.fspath(backing)
            options["backing_fmt"] = backing_format

        fresh = not os.path.lexists(path)
        try:
            size = sum(sectors_up(node.size) for node in nodes)
            create_image(path, format, size, options, check_backing=False, gate=gate)
            mode = CacheMode.parse(cache)
            with open_node(path, readonly=False, format=format, cache=mode, gate=gate) as node:
                below = -1 if backing is None else node.backing.size if node.backing is not None else 0
                _convert(nodes, node, how._replace(backing=below), _job(job, progress))
                node.flush()
        except BaseException:
            if fresh:
                with suppress(OSError):
                    os.unlink(path)
            raise


def _convert(nodes: list[Node], target: Node, options: ConvertOptions, job: Job) -> None:
    from .block.jobs.convert import convert

    if options.compressed:
        from .plugins import find

        if "compress" not in find("format", target.driver).capabilities:
            raise UsageError(f"format '{target.driver}' has no compressed images")
    if target.size < sum(node.size for node in nodes):
        raise UsageError(f"{target.filename} is smaller than what is to be copied into it")
    convert(nodes, target, options, job=job)


def compare(
    first: Spec,
    second: Spec,
    *,
    strict: bool = False,
    first_format: str | None = None,
    second_format: str | None = None,
    gate: Gate | None = None,
    progress: Progress | None = None,
    job: Job | None = None,
) -> Comparison:
    """Compare what two images hold; the result's ``difference`` is None where it is the same.

    The longer of two must have zeroes where the other ends. *strict*: sizes and allocation must be equal too.
    """
    from .block.jobs.compare import compare

    with _opened(first, format=first_format, gate=gate) as one, _opened(second, format=second_format, gate=gate) as two:
        return compare(one, two, strict=strict, job=_job(job, progress))


def commit(
    image: Spec,
    base: str | None = None,
    *,
    keep: bool = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
    job: Job | None = None,
) -> None:
    """Write what the overlay *image* holds into its backing image, and empty the overlay unless *keep*.

    *base* is the file of a backing image further down: what lies between goes there too, and the overlay is kept.
    """
    from .block.jobs.commit import chain, commit

    with _opened(image, gate=gate, write=True) as node:
        target = None
        if base is not None:
            below = chain(node)[1:]
            target = next((one for one in below if one.filename == base or _same_file(one.filename, base)), None)
            if target is None:
                raise UsageError(f"'{base}' is not in the backing chain of '{node.filename}'")
        commit(node, target, keep=keep, job=_job(job, progress))


def _same_file(one: str, two: str) -> bool:
    try:
        return os.path.samefile(one, two)
    except OSError:
        return False


def rebase(
    image: Spec,
    backing: str | os.PathLike[str] | None,
    *,
    backing_format: str | None = None,
    unsafe: bool = False,
    compressed: bool = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
    job: Job | None = None,
) -> None:
    """Give *image* another *backing* image (None: none; its name relative to the image's directory), keeping what it
    holds. *unsafe* only changes the name: what the image holds changes if the two differ.
    """
    from .block.gate import SCHEME
    from .block.jobs.rebase import rebase

    name = None if backing is None else os.fspath(backing)
    if name is not None and not backing_format:
        raise UsageError("a backing image needs its format: give backing_format=")
    with ExitStack() as stack:
        node = stack.enter_context(_opened(image, gate=gate, write=True, backing=not unsafe))
        if not isinstance(node, FormatNode):
            raise UsageError(f"format '{node.driver}' has no backing images")
        if not unsafe:
            new = None
            if name is not None:
                path = name if SCHEME.match(name) else os.path.join(os.path.dirname(node.filename), name)
                new = stack.enter_context(open_node(path, format=backing_format, gate=gate))
            rebase(node, new, compressed=compressed, job=_job(job, progress))
        with node.quiesce() as driver:
            driver.change_backing(name, backing_format if name is not None else None)
            driver.flush()


def measure(
    source: Spec | None = None,
    *,
    size: int | str | None = None,
    format: str = "raw",
    source_format: str | None = None,
    gate: Gate | None = None,
    **options: Any,
) -> dict[str, int]:
    """Bytes that a new image of *format* takes: ``required`` and ``fully-allocated``, and ``bitmaps`` where it has any.

    For the data of *source*, or for an empty image of *size* bytes. The other *options* are create options.
    """
    from .block.jobs.measure import measure
    from .options import parse_size, typed
    from .plugins import find

    if (source is None) == (size is None):
        raise UsageError("measure: either a source or a size is needed")
    driver = find("format", format)
    given = typed(options, driver.create_options, f"Format driver '{format}'")  # type: ignore[attr-defined]
    if source is None:
        assert size is not None
        return measure(driver, parse_size(size), None, given)
    with _opened(source, format=source_format, gate=gate) as node:
        return measure(driver, node.size, node, given)


def compact(
    image: Spec,
    *,
    format: str | None = None,
    dry_run: bool = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
    job: Job | None = None,
) -> Compacted:
    """Give back the host space that *image* holds for nothing, and let its file end as early as possible.

    Zeroes and free clusters are given back, what lies at the end moves into free places (where the format's driver does
    that). It holds what it held at every moment; nobody else writes to it meanwhile. *dry_run* only tells what there is
    to gain. An image whose metadata is damaged is refused.
    """
    from .block.jobs.compact import compact

    with _opened(image, format=format, gate=gate, write=not dry_run) as node:
        return compact(node, job=_job(job, progress), dry_run=dry_run)


def manifest(
    image: Spec,
    *,
    format: str | None = None,
    algorithm: str = "sha256",
    block_size: int | str | None = None,
    with_sum: bool = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
    job: Job | None = None,
) -> Manifest:
    """What *image* holds, by a digest for each block of *block_size* bytes (None: by the image's size).

    Its ``lines()`` are the JSON that ``vm-img verify --write`` writes, ``Manifest.parse`` reads that. *with_sum*: also
    the digest of all bytes in turn. Raises CopyError where something cannot be read.
    """
    from .block.jobs.verify import make_manifest
    from .options import parse_size

    size = parse_size(block_size, "block_size") if isinstance(block_size, str) else block_size
    with _opened(image, format=format, gate=gate) as node:
        return make_manifest(node, algorithm=algorithm, block_size=size, with_sum=with_sum, job=_job(job, progress))


def verify(
    image: Spec,
    manifest: Manifest,
    *,
    format: str | None = None,
    with_sum: bool = False,
    gate: Gate | None = None,
    progress: Progress | None = None,
    job: Job | None = None,
) -> Verification:
    """Compare what *image* holds with a *manifest*; the result's ``same`` says whether it is that, and what differs."""
    from .block.jobs.verify import verify

    with _opened(image, format=format, gate=gate) as node:
        return verify(node, manifest, with_sum=with_sum, job=_job(job, progress))


def _job(job: Job | None, progress: Progress | None) -> Job:
    if job is not None and progress is not None:
        raise UsageError("give progress to the Job")
    return job or Job(progress)


@contextmanager
def _opened(
    spec: Spec, *, format: str | None = None, gate: Gate | None = None, write: bool = False, backing: bool = True
) -> Iterator[Node]:
    """An image that is open already, or one that is opened for as long as this takes."""
    if isinstance(spec, Image):
        yield spec.node
    else:
        with open_node(spec, readonly=not write, format=format, gate=gate, backing=backing) as node:
            yield node
