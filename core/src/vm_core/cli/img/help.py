"""Help: one page of all commands, or one of a command. Data, and two ways to print it.

Called by the peer's name the program prints everything on one page in the peer's frame (``usage:``, ``Command
syntax:``, ``Supported formats:``), which scripts look options and formats up in.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .common import Tool


class Command(NamedTuple):
    """One subcommand: its arguments in short, what it does, its options."""

    syntax: str
    summary: str
    options: tuple[tuple[str, str], ...] = ()
    examples: tuple[str, ...] = ()


_OBJECT = ("--object TYPE,id=ID,…", "make an object first: secret,id=…,file=PATH holds a passphrase")
_IMAGE_OPTS = ("--image-opts", "FILE is a list of options: driver=qcow2,file.filename=disk.qcow2")
_FORMAT = ("-f FMT", "format of the image; recognised if not given")
_SHARE = ("-U, --force-share", "open although another program writes to the image; what is read may be inconsistent")
_QUIET = ("-q", "print nothing but errors")
_PROGRESS = ("-p", "show progress")
_CACHE = ("-t CACHE", "cache mode for what is written: writeback, none, writethrough, directsync, unsafe")
_SOURCE_CACHE = ("-T CACHE", "cache mode for what is read")
_OUTPUT = ("--output=human|json", "for people or for programs")
_CREATE_OPTIONS = ("-o NAME=VALUE,…", "options of the new image's format; -o help lists them")

COMMANDS: dict[str, Command] = {
    "amend": Command(
        "[--object objectdef] [--image-opts] [-p] [-q] [-f fmt] [-t cache] [--force] -o options filename",
        "change options of an image",
        (
            ("-o NAME=VALUE,…", "what to change; -o help lists what the format allows"),
            ("--force", "allow what cannot be undone, such as erasing the last key"),
            _FORMAT,
            _CACHE,
            _PROGRESS,
            _QUIET,
            _OBJECT,
            _IMAGE_OPTS,
        ),
        ("amend -o compat=1.1,lazy_refcounts=on disk.qcow2",),
    ),
    "bench": Command(
        "[-c count] [-d depth] [-f fmt] [--flush-interval=flush_interval] [-i aio] [-n] [--no-drain] [-o offset] "
        "[--pattern=pattern] [-q] [-s buffer_size] [-S step_size] [-t cache] [-w] [-U] filename",
        "measure requests to an image",
        (
            ("-c COUNT", "requests (75000)"),
            ("-d DEPTH", "requests in flight (64)"),
            ("-w", "write instead of read: destroys what is there"),
            ("-s SIZE", "bytes a request (4096)"),
            ("-S STEP", "bytes from one request to the next (the request's size)"),
            ("-o OFFSET", "where to begin"),
            ("--pattern=BYTE", "what to write"),
            ("--flush-interval=N", "flush after every N writes"),
            ("--no-drain", "do not wait for the requests before a flush"),
            ("-i AIO, -n", "host I/O engine: threads, io_uring or native; -n is -i native"),
            _FORMAT,
            _CACHE,
            _SHARE,
            _QUIET,
            _IMAGE_OPTS,
        ),
    ),
    "bitmap": Command(
        "(--merge SOURCE | --add | --remove | --clear | --enable | --disable)... [-b source_file [-F source_fmt]] "
        "[-g granularity] [--object objectdef] [--image-opts | -f fmt] filename bitmap",
        "manage the dirty bitmaps in an image",
        (
            ("--add, --remove", "make an empty bitmap, take one away"),
            ("--clear", "forget all bits"),
            ("--enable, --disable", "writes set bits from now on, or no longer"),
            ("--merge SOURCE", "set the bits that bitmap SOURCE has set"),
            ("-b FILE, -F FMT", "the image that SOURCE is in, and its format"),
            ("-g SIZE", "bytes that a bit of the new bitmap stands for (64k)"),
            _FORMAT,
            _OBJECT,
            _IMAGE_OPTS,
        ),
        ("bitmap --add disk.qcow2 backup0",),
    ),
    "check": Command(
        "[--object objectdef] [--image-opts] [-q] [-f fmt] [--output=ofmt] [-r [leaks | all]] [-T src_cache] [-U] "
        "filename",
        "check an image's metadata, and repair it",
        (
            ("-r leaks", "give back clusters that nothing refers to"),
            ("-r all", "repair everything; a wrong guess can make it worse: keep a copy"),
            _OUTPUT,
            _FORMAT,
            _SOURCE_CACHE,
            _SHARE,
            _QUIET,
            _OBJECT,
            _IMAGE_OPTS,
            ("status", "0: in order, 1: check failed, 2: damaged, 3: leaked clusters, 63: the format has no checks"),
        ),
    ),
    "commit": Command(
        "[--object objectdef] [--image-opts] [-q] [-f fmt] [-t cache] [-b base] [-r rate_limit] [-d] [-p] filename",
        "write an overlay's changes into its backing image",
        (
            ("-b BASE", "an image further down the chain to write to"),
            ("-d", "keep the overlay's contents (do not empty it)"),
            ("-r RATE", "bytes a second at most"),
            _FORMAT,
            _CACHE,
            _PROGRESS,
            _QUIET,
            _OBJECT,
            _IMAGE_OPTS,
        ),
    ),
    "compare": Command(
        "[--object objectdef] [--image-opts] [-f fmt] [-F fmt] [-T src_cache] [-p] [-q] [-s] [-U] filename1 filename2",
        "tell whether two images hold the same",
        (
            ("-f FMT, -F FMT", "formats of the first and of the second image"),
            ("-s", "strict: size and allocation must be the same too"),
            _SOURCE_CACHE,
            _SHARE,
            _PROGRESS,
            _QUIET,
            _OBJECT,
            _IMAGE_OPTS,
            ("status", "0: the same, 1: different, more: could not be compared"),
        ),
    ),
    "convert": Command(
        "[--object objectdef] [--image-opts] [--target-image-opts] [--target-is-zero] [--bitmaps] [-U] [-C] [-c] [-p] "
        "[-q] [-n] [-f fmt] [-t cache] [-T src_cache] [-O output_fmt] [-B backing_file [-F backing_fmt]] [-o options] "
        "[-l snapshot_param] [-S sparse_size] [-r rate_limit] [-m num_coroutines] [-W] [--salvage] filename "
        "[filename2 [...]] output_filename",
        "copy images into a new one of any format",
        (
            ("-O FMT", "format of the new image (raw)"),
            _CREATE_OPTIONS,
            ("-c", "compress"),
            ("-B FILE, -F FMT", "the new image is an overlay of FILE, of format FMT, which holds the rest"),
            ("-l SNAPSHOT", "copy a snapshot in the image: its id or name, or snapshot.id=…,snapshot.name=…"),
            ("-S SIZE", "runs of zeroes of this length are left out (4k); 0: write everything"),
            ("-n", "the target is there: do not create it"),
            ("--target-is-zero", "with -n: it reads as zeroes"),
            ("--target-image-opts", "the target is a list of options, with -n"),
            ("-C", "let the system copy where it can (copy_file_range)"),
            ("-m N, -W", "requests in flight; -W: write in any order"),
            ("-r RATE", "bytes a second at most"),
            ("--salvage", "go on after read errors; what could not be read becomes zeroes"),
            ("--bitmaps", "copy the dirty bitmaps"),
            ("--skip-broken-bitmaps", "with --bitmaps: leave inconsistent ones out"),
            _FORMAT,
            _CACHE,
            _SOURCE_CACHE,
            _SHARE,
            _PROGRESS,
            _QUIET,
            _OBJECT,
            _IMAGE_OPTS,
        ),
        (
            "convert -p -O qcow2 disk.vmdk disk.qcow2",
            "convert -c -O qcow2 -o compression_type=zstd disk.raw disk.qcow2",
        ),
    ),
    "create": Command(
        "[--object objectdef] [-q] [-f fmt] [-b backing_file [-F backing_fmt]] [-u] [-o options] filename [size]",
        "make a new image",
        (
            ("SIZE", "bytes, or with k, M, G, T, P, E behind; with -b as large as that image if not given"),
            ("-f FMT", "format of the new image (raw)"),
            ("-b FILE, -F FMT", "make an overlay of FILE, of format FMT: it holds only what differs"),
            ("-u", "do not look at the backing file"),
            _CREATE_OPTIONS,
            _QUIET,
            _OBJECT,
        ),
        ("create -f qcow2 disk.qcow2 20G", "create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2"),
    ),
    "dd": Command(
        "[--image-opts] [-U] [-f fmt] [-O output_fmt] [bs=block_size] [count=blocks] [skip=blocks] if=input of=output",
        "copy blocks of an image into a new one",
        (
            ("if=FILE, of=FILE", "from, to"),
            ("bs=SIZE", "bytes a block (512)"),
            ("count=N, skip=N", "blocks to copy, and to leave out at the beginning"),
            _FORMAT,
            ("-O FMT", "format of the new image (raw)"),
            _SHARE,
            _OBJECT,
            _IMAGE_OPTS,
        ),
    ),
    "info": Command(
        "[--object objectdef] [--image-opts] [-f fmt] [--output=ofmt] [--backing-chain] [-U] filename",
        "tell what an image is",
        (
            ("--backing-chain", "the backing images too"),
            _OUTPUT,
            _FORMAT,
            _SHARE,
            _OBJECT,
            _IMAGE_OPTS,
        ),
    ),
    "map": Command(
        "[--object objectdef] [--image-opts] [-f fmt] [--start-offset=offset] [--max-length=len] [--output=ofmt] [-U] "
        "filename",
        "tell where the bytes of an image are",
        (
            ("--start-offset=N, --max-length=N", "a part of the image"),
            _OUTPUT,
            _FORMAT,
            _SHARE,
            _OBJECT,
            _IMAGE_OPTS,
        ),
    ),
    "measure": Command(
        "[--output=ofmt] [-O output_fmt] [-o options] [--size N | [--object objectdef] [--image-opts] [-f fmt] "
        "[-l snapshot_param] filename]",
        "tell how large a file a new image would need",
        (
            ("-O FMT", "format of the new image (raw)"),
            _CREATE_OPTIONS,
            ("--size N", "an empty image of this size"),
            ("-l SNAPSHOT", "a snapshot in the image"),
            _OUTPUT,
            _FORMAT,
            _SHARE,
            _OBJECT,
            _IMAGE_OPTS,
        ),
    ),
    "snapshot": Command(
        "[--object objectdef] [--image-opts] [-U] [-q] [-l | -a snapshot | -c snapshot | -d snapshot] filename",
        "manage the snapshots in an image",
        (
            ("-l", "list them"),
            ("-c NAME", "keep the present contents as NAME"),
            ("-a NAME", "go back to a snapshot, by id or name"),
            ("-d NAME", "delete one"),
            _SHARE,
            _QUIET,
            _OBJECT,
            _IMAGE_OPTS,
        ),
    ),
    "rebase": Command(
        "[--object objectdef] [--image-opts] [-U] [-q] [-f fmt] [-t cache] [-T src_cache] [-p] [-u] -b backing_file "
        "[-F backing_fmt] filename",
        "give an image another backing image",
        (
            ("-b FILE, -F FMT", "the new backing image and its format; an empty name: none"),
            ("-u", "only record the name: for a backing image that was moved or renamed"),
            _FORMAT,
            _CACHE,
            _SOURCE_CACHE,
            _SHARE,
            _PROGRESS,
            _QUIET,
            _OBJECT,
            _IMAGE_OPTS,
        ),
    ),
    "resize": Command(
        "[--object objectdef] [--image-opts] [-f fmt] [--preallocation=prealloc] [-q] [--shrink] filename [+ | -]size",
        "make an image larger or smaller",
        (
            ("SIZE", "the new size; with + or - before it, the difference"),
            ("--shrink", "needed to make it smaller: what lies beyond the new end is lost"),
            ("--preallocation=MODE", "off, metadata, falloc or full: host space for what is gained"),
            _FORMAT,
            _QUIET,
            _OBJECT,
            _IMAGE_OPTS,
        ),
        ("resize disk.qcow2 +10G",),
    ),
}

#: What the peer does not have.
EXTRA: dict[str, Command] = {
    "compact": Command(
        "[--object objectdef] [--image-opts] [-f fmt] [-n] [-c] [-t cache] [-p] [-q] [--output=ofmt] filename "
        "[output_filename]",
        "make an image's file as small as its contents allow",
        (
            (
                "output_filename",
                "a compact copy of the same format goes there; without it the image is changed itself:",
            ),
            ("", "zeroes and free clusters are given back, what lies at the end moves into free places"),
            ("-n, --dry-run", "change nothing, tell what would be gained"),
            ("-c", "compress the copy"),
            _FORMAT,
            _CACHE,
            _PROGRESS,
            _QUIET,
            _OUTPUT,
            _OBJECT,
            _IMAGE_OPTS,
        ),
        ("compact -p disk.qcow2", "compact -n disk.qcow2"),
    ),
    "completion": Command("bash", "print a completion script", (), ("completion bash >~/.vm-img; . ~/.vm-img",)),
    "convert-inplace": Command(
        "[-f fmt] -O output_fmt [-p] [-q] filename",
        "turn QCOW2 into QED or back without copying data",
        (
            ("-O, --target-format FMT", "what it becomes: qcow2 or qed"),
            _FORMAT,
            _PROGRESS,
            _QUIET,
            (
                "",
                "New metadata is written beside the old: interrupted at any moment, the image is one or the other.",
            ),
        ),
        ("convert-inplace -O qcow2 disk.qed",),
    ),
    "verify": Command(
        "[--object objectdef] [--image-opts] [-f fmt] [-m manifest | -w manifest [-a algorithm] [-b block_size]] "
        "[--sum] [--backing-chain] [-T src_cache] [-p] [-q] [-U] [--output=ofmt] filename",
        "check metadata and contents of an image, against a manifest of what it held",
        (
            ("-m, --manifest FILE", "compare each block with this manifest (- for standard input), tell what differs"),
            (
                "-w, --write FILE",
                "write a manifest of what the guest sees (- for standard output), whatever the format",
            ),
            ("-a, --algorithm NAME", "with --write: sha256 (if nothing is said) or blake2b"),
            ("-b, --block-size SIZE", "with --write: bytes that a digest stands for, 4k to 64M (1M, more above 1 TiB)"),
            ("--sum", "also the digest of all bytes in turn, what sha256sum or b2sum gives for a raw image"),
            ("--backing-chain", "check the metadata of backing images too; their contents count anyway"),
            _FORMAT,
            _SOURCE_CACHE,
            _PROGRESS,
            _QUIET,
            _SHARE,
            _OUTPUT,
            _OBJECT,
            _IMAGE_OPTS,
            (
                "",
                "Exit status: 0 all is well, 1 it could not be done (or something cannot be read), 2 the contents "
                "differ, 3 the contents are right but the metadata is damaged. Leaked clusters are told and no error.",
            ),
        ),
        ("verify -w disk.manifest disk.qcow2", "verify -p -m disk.manifest backup.raw"),
    ),
}

_GLOBAL = (
    ("-h, --help", "this help; with a command, its own"),
    ("-V, --version", "the version"),
    ("--trust DIR", "let images name backing files in DIR, besides their own directory; may be repeated (VM_TRUST)"),
    ("--progress MODE", "text, bar, json or none instead of what suits the terminal"),
    ("-T, --trace …", "accepted as qemu-img does; there are no trace events"),
)

_WIDTH = 26


def show(tool: Tool) -> None:
    """Print the page that suits: of the command, of all, or the peer's one."""
    if tool.peer:
        text = _peer_page(tool)
    elif tool.command:
        text = _command_page(tool, tool.command)
    else:
        text = _overview(tool)
    sys.stdout.write(text)


def _overview(tool: Tool) -> str:
    lines = [
        f"usage: {tool.program} [options] COMMAND [arguments]",
        "",
        "Makes, converts, checks and changes images of virtual disks; takes what qemu-img takes.",
        "",
        "Commands:",
        *_table((name, command.summary) for name, command in sorted({**COMMANDS, **_extra()}.items())),
        "",
        "Options:",
        *_table(_GLOBAL),
        "",
        f"'{tool.program} COMMAND --help' explains a command,",
        f"'{tool.program} create -f FORMAT -o help' a format's options.",
        "",
        f"Supported formats: {_formats()}",
    ]
    return "\n".join(lines) + "\n"


def _extra() -> dict[str, Command]:
    """Those of :data:`EXTRA` that this version has."""
    from importlib.util import find_spec

    from . import main

    there = [name for name, module in main.EXTRA.items() if find_spec(f"{__package__}.{module}")]
    return {name: EXTRA.get(name, Command("", "see its help")) for name in there}


def _command_page(tool: Tool, name: str) -> str:
    command = COMMANDS.get(name) or EXTRA[name]
    lines = [
        *_usage(f"usage: {tool.program} {name}", command.syntax),
        "",
        f"{command.summary[0].upper()}{command.summary[1:]}.",
    ]
    if command.options:
        lines += ["", *_table(command.options)]
    if command.examples:
        lines += ["", "Examples:", *(f"  {tool.program} {example}" for example in command.examples)]
    return "\n".join(lines) + "\n"


def _usage(start: str, syntax: str) -> list[str]:
    """The line of usage, broken between options, never within one's brackets."""
    import re

    words = re.findall(r"(?:\[(?:[^][]|\[[^][]*\])*\]|\S)+", syntax)
    lines = [start]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > 88 and lines != [start]:
            lines.append(f"          {word}")
        else:
            lines[-1] += f" {word}"
    return lines


def _table(rows: object) -> list[str]:
    import textwrap

    lines = []
    for left, right in rows:  # type: ignore[attr-defined]
        first, *more = textwrap.wrap(right, 90 - _WIDTH) or [""]
        if len(left) > _WIDTH - 3:
            lines.append(f"  {left}")
            more.insert(0, first)
        else:
            lines.append(f"  {left:<{_WIDTH - 2}}{first}")
        lines += [" " * _WIDTH + line for line in more]
    return lines


def _peer_page(tool: Tool) -> str:
    from .main import version_text

    lines = [
        version_text(tool),
        f"usage: {tool.program} [standard options] command [command options]",
        "disk image utility, a stand-in for QEMU's",
        "",
        "    '-h', '--help'       display this help and exit",
        "    '-V', '--version'    output version information and exit",
        "    '-T', '--trace'      accepted; there are no trace events",
        "",
        "Command syntax:",
        *(f"  {name} {command.syntax}" for name, command in COMMANDS.items()),
        "",
        "Command parameters:",
    ]
    for name, command in COMMANDS.items():
        lines += [f"  {name}: {command.summary}", *(f"    '{left}' {right}" for left, right in command.options)]
    lines += ["", f"Supported formats: {_formats()}"]
    return "\n".join(lines) + "\n"


def _formats() -> str:
    from ...plugins import drivers

    return " ".join(sorted({driver.name for kind in ("format", "protocol") for driver in drivers(kind)}))
