"""Every command and option prints, returns and leaves behind what the peer's does."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm_core.testing.iopeer import PEER, assert_same, needs_peer

pytestmark = needs_peer

BASE = ("create -q -f qcow2 base.qcow2 1M", "create -q -f raw raw.img 1M")
SHORT = ("create -q -f raw odd.img 1000",)
OVERLAY = (*BASE, "create -q -f qcow2 -b base.qcow2 -F qcow2 over.qcow2 2M")

#: name: how the images are made; the words; what is typed.
SCRIPTS: dict[str, tuple[tuple[str, ...], list[str], str | None]] = {}


def script(name: str, images: tuple[str, ...], file: str | None, *commands: str, options: str = "") -> None:
    words = options.split()
    for command in commands:
        words += ["-c", command]
    if file is not None:
        words.append(file)
    SCRIPTS[name] = (images, words, None)


def typed(name: str, images: tuple[str, ...], options: str, text: str) -> None:
    SCRIPTS[name] = (images, options.split(), text)


# The program's options

for index, line in enumerate(
    (
        "-h",
        "--help",
        "-Z base.qcow2",
        "--foo base.qcow2",
        "--cm",
        "--c",
        "-c",
        "--cmd",
        "--image-opts=1 base.qcow2",
        "base.qcow2 raw.img",
        "nofile",
        "-c length nofile",
        "-f bogus base.qcow2",
        "-f qcow2 raw.img",
        "-t bogus base.qcow2",
        "-d bogus base.qcow2",
        "-i bogus base.qcow2",
        "--object bogus base.qcow2",
        "--object secret base.qcow2",
        "-U base.qcow2",
        "-U -c length base.qcow2",
        "-U -r -c length base.qcow2",
        "--image-opts -c length driver=qcow2,file.filename=base.qcow2",
        "--image-opts -f qcow2 -c length driver=qcow2,file.filename=base.qcow2",
        "--image-opts -c length base.qcow2",
        "-c length -f qcow2 base.qcow2 -r",
        'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}} -c length',
        'json:{"driver":"qcow2"} -c length',
        "-k -c length base.qcow2",
        "-i native -c length base.qcow2",
        "-i threads -c length base.qcow2",
        "-T nosuch -c length base.qcow2",
        "-f raw -c length /tmp",
        "-f raw -c length foo:bar",
        "-f raw -c length file:raw.img",
        "-f file -c length raw.img",
        "-f raw -c length host_device:raw.img",
        "-c length",
        "-c map",
        "-c close",
        "-c quit",
    )
):
    SCRIPTS[f"option-{index}"] = (BASE, line.split(" "), None)
SCRIPTS["option-empty-name"] = (BASE, ["-c", "length", ""], None)
SCRIPTS["option-empty-command"] = (BASE, ["-c", "", "-c", "   ", "base.qcow2"], None)

# Numbers

script(
    "numbers",
    BASE,
    "raw.img",
    *[
        f"alloc {text} 0"
        for text in [
            "1.5k",
            "1.5",
            "0x200",
            "010",
            "1k5",
            "1kb",
            "1K",
            "1B",
            "1b",
            "1E",
            "8E",
            "9223372036854775807",
            "9223372036854775808",
            "18446744073709551616",
            "+1",
            "0x",
            "0x1k",
            "0x1E",
            "0x1B",
            "1e3",
            ".5k",
            "1.k",
            "nan",
            "inf",
            "0.00001k",
            "0.0005k",
            "0.0004k",
            "1.0",
            "1.5b",
            "1.",
            "-1",
            "'0'",
        ]
    ],
    options="-f raw",
)
script(
    "patterns",
    BASE,
    "raw.img",
    *[
        f"write -P {text} 0 1"
        for text in ["0", "255", "256", "-1", "010", "08", "0xff", "0x100", "x", "1x", "0x", "''", "+3", "1.0", "1k"]
    ],
    options="-f raw",
)

# Words of commands

for command in [
    "abort",
    "aio_flush",
    "aio_read",
    "aio_write",
    "alloc",
    "break",
    "close",
    "discard",
    "flush",
    "help",
    "info",
    "length",
    "map",
    "open",
    "quit",
    "read",
    "readv",
    "remove_break",
    "reopen",
    "resume",
    "sigraise",
    "sleep",
    "truncate",
    "wait_break",
    "write",
    "writev",
    "nosuch",
    "?",
    "a",
    "c",
    "d",
    "f",
    "i",
    "l",
    "o",
    "q",
    "r",
    "t",
    "w",
]:
    if command not in ("abort",):
        script(f"count-{command}", BASE, "base.qcow2", command, f"{command} 1 2 3 4 5 6 7", "length")
    script(f"help-{command}", BASE, None, f"help {command}")
    if command not in ("help", "abort", "quit", "q", "sleep", "sigraise", "open", "o", "?"):
        script(f"closed-{command}", BASE, None, f"{command} 0 512", f"{command} 0", command)
script("help-all", BASE, None, "help", "?", "help 1 2")

for command in ["read", "readv", "write", "writev", "aio_read", "aio_write", "discard"]:
    script(
        f"words-{command}",
        BASE,
        "base.qcow2",
        *[
            line
            for words in (
                "x 1",
                "0 x",
                "0 -1",
                "-1 1",
                "0 3G",
                "0 2147483136",
                "1M 512",
                "1M 0",
                "1048575 2",
                "0 0",
                "3 5",
                "-Z 0 1",
                "0",
                "-q 0",
                "-C 0 512",
                "-q 0 512",
                "-qC 0 512",
                "0 512 -q",
                "-P",
                "-- 0 512",
            )
            for line in (f"{command} {words}", "aio_flush")  # requests that need no I/O finish in any order
        ],
    )
    script(f"readonly-{command}", BASE, "base.qcow2", f"{command} 0 512", f"{command} -Z 0 512", options="-r")

script(
    "read",
    BASE,
    "raw.img",
    "write -P 1 0 4k",
    "write -P 2 4k 4k",
    "read -P 1 0 4k",
    "read -P 2 0 4k",
    "read -P 1 0 8k",
    "read -P 1 -l 4k 0 8k",
    "read -P 2 -s 4k 0 8k",
    "read -P 2 -s 4k -l 1k 0 8k",
    "read -P 1 -s 4k -l 1k 0 8k",
    "read -P 1 -s 8k -l 1 0 8k",
    "read -P 1 -s 8k 0 8k",
    "read -P 1 -s 9k 0 8k",
    "read -P 1 -l 9k 0 8k",
    "read -s 1 0 8k",
    "read -l 1 0 8k",
    "read -s x -P 1 0 8k",
    "read -l x -P 1 0 8k",
    "read -p 0 8k",
    "read -a 0 8k",
    "read -v 4080 40",
    "read -v 3 5",
    "read -qv 0 16",
    "read -Cv 0 16",
    "read -P 7 -q 0 16",
    "read -P 7 -v 0 16",
    "r 0 1",
    "read -b 0 512",
    "read -b 1 512",
    "read -b 512 1",
    options="-f raw",
)
script(
    "readv",
    BASE,
    "raw.img",
    "write -P 1 0 4k",
    "readv -P 1 0 1k 3k",
    "readv -P 1 0 1k 4k",
    "readv -v 0 3 1 20",
    "readv 0 1k 0 1k",
    "readv 0 2147483136 512",
    "readv 0 2G",
    "readv 0 1k x",
    "readv -C 0 1 2 3",
    "readv 1M 1",
    options="-f raw",
)
script(
    "write",
    BASE,
    "base.qcow2",
    "write -z -P 1 0 512",
    "write -P 1 -s f 0 512",
    "write -z -s f 0 512",
    "write -c -z 0 512",
    "write -b -z 0 512",
    "write -c -f 0 512",
    "write -b -f 0 512",
    "write -u 0 512",
    "write -n 0 512",
    "write -s nofile 0 512",
    "write -s empty 0 512",
    "write -c 1 512",
    "write -c 0 1",
    "write -z 0 3G",
    "write -z 0 64k",
    "write -zu 64k 64k",
    "write -zf 128k 64k",
    "write -p 0 512",
    "w 0 1",
    "write -P 3 -P 4 0 100",
    "read -P 4 0 100",
)
script(
    "writev",
    BASE,
    "base.qcow2",
    "writev 0 512 100",
    "writev -P 5 100 0 3 4",
    "writev -f 0 70k 60k",
    "writev 0 2147483136 1",
    "writev 0 1M 1",
    "read -v 90 30",
)
script(
    "aio",
    BASE,
    "base.qcow2",
    "aio_write -P 1 0 64k",
    "aio_flush",
    "aio_write -z 64k 64k",
    "aio_flush",
    "aio_write -zu -q 64k 64k",
    "aio_write -i",
    "aio_write -i 0 1",
    "aio_read -i 0 1",
    "aio_write -z 0 1 2",
    "aio_write -u 0 1",
    "aio_read -P 1 0 64k",
    "aio_flush",
    "aio_read -P 2 0 512",
    "aio_flush",
    "aio_read -v 0 16 3",
    "aio_flush",
    "aio_read 1M 1",
    "aio_flush",
    "aio_write 1M 1",
    "aio_flush",
    "aio_write -C 0 1",
)
script(
    "discard",
    BASE,
    "base.qcow2",
    "write 0 256k",
    "discard 0 64k",
    "discard -C 64k 64k",
    "discard -q 128k 64k",
    "discard 1 3",
    "discard 1M 64k",
    "map",
)
script(
    "truncate",
    BASE,
    "base.qcow2",
    "write 0 64k",  # the peer makes an L2 table when it shrinks an image without one
    "truncate 2M",
    "length",
    "truncate x",
    "truncate 1M",
    "l",
    "truncate -m bogus 1M",
    "truncate -Z 1M",
    "truncate -m off 3M",
    "length",
)
script("truncate-raw", BASE, "raw.img", "truncate 2M", "length", "truncate -m metadata 3M", "t 512", options="-f raw")
script(
    "alloc",
    OVERLAY,
    "over.qcow2",
    "map",
    "write 0 3k",
    "write 512k 128k",
    "alloc 0",
    "alloc 0 1M",
    "alloc 0 2M",
    "alloc 0 20M",
    "alloc 64k",
    "alloc 3 5",
    "alloc 2M 1",
    "alloc 0 10E",
    "map",
)
script("raw-map", BASE, "raw.img", "map", "write 64k 64k", "map", "alloc 0 1M", options="-f raw")
script("odd-length", SHORT, "odd.img", "length", "read 990 34", "read 1000 24", "read 1024 1", "map", options="-f raw")
script("odd-write", SHORT, "odd.img", "write -P 1 990 20", "length", "write -P 2 1010 14", "map", options="-f raw")
script("info", OVERLAY, "over.qcow2", "info")
script("info-raw", BASE, "raw.img", "info", options="-f raw")
script("control", BASE, None, "sleep 1", "sleep x", "sleep 1k", "sleep 010", "sleep 0x1", "sleep -1", "sigraise x")
script("signal", BASE, "base.qcow2", "write 0 1", "sigraise 0", "sigraise 5G", "sigraise 99", "sigraise 15", "length")
script("signal-kill", BASE, "base.qcow2", "write 0 1", "sigraise 9", "length")
script("abort", BASE, "base.qcow2", "write 0 1", "abort", "length")
script("break-unsupported", BASE, "base.qcow2", "break l2_load A", "remove_break A", "resume A")
script("probe-guard", BASE, "raw.img", "write 0 512", "write -s base.qcow2 0 512")
script("snapshot", BASE, "base.qcow2", "write 0 64k", "read -P 0xcd 0 64k", options="-s")
script("writeback", BASE, "base.qcow2", "write 0 64k", "write -f 64k 64k", "flush", "f", options="-t writeback")
script("unsafe", BASE, "base.qcow2", "write 0 64k", "flush", options="-t unsafe")
script("direct", BASE, "base.qcow2", "write 0 64k", "write 70000 100", "read -v 70000 4", options="-n -m")
script(
    "open-close", BASE, "base.qcow2", "close", "length", "open raw.img", "open -f raw raw.img", "open base.qcow2", "l"
)
script(
    "open",
    BASE,
    None,
    "open nofile",
    "open",
    "open -o driver=qcow2,file.filename=base.qcow2",
    "length",
    "close",
    "open -o driver=qcow2 base.qcow2",
    "close",
    "open -r base.qcow2",
    "write 0 1",
    "close",
    "open -x",
    "open a b",
    "open -t bogus base.qcow2",
    "open -d bogus base.qcow2",
    "open -i bogus base.qcow2",
    "open -o bogus",
    "open -o x=y",
    "open -U -r base.qcow2",
    "close",
    "open -U base.qcow2",
    "open -s base.qcow2",
    "write 0 512",
    "close",
    "open -k base.qcow2",
    "open -n base.qcow2",
    "c",
)
script(
    "reopen",
    BASE,
    "base.qcow2",
    "reopen",
    "reopen -r",
    "write 0 512",
    "reopen -w",
    "write 0 512",
    "reopen -r -w",
    "reopen -c none",
    "reopen -c writeback",
    "reopen -c bogus",
    "reopen -o foo=bar",
    "reopen -o lazy-refcounts=on",
    "reopen -o driver=raw",
    "reopen -o driver=qcow2",
    "reopen -o read-only=on",
    "reopen -o lazy-refcounts=bogus",
    "reopen -Z",
    "reopen x",
    "reopen -r",
    "reopen -w -o read-only=on",
    "reopen -o cache.direct=on -c none",
    "reopen -o cache.direct=bogus",
    "reopen -o cache.foo=on",
    "reopen -o discard=bogus",
    "reopen -o discard=unmap",
    "reopen -o detect-zeroes=bogus",
    "reopen -o detect-zeroes=unmap",
    "reopen -o detect-zeroes=unmap,discard=ignore",
    "reopen -o file.filename=x",
    "reopen -o file.filename=base.qcow2",
    "reopen -o file=x",
    "reopen -o node-name=x",
    "reopen -o x",
    "reopen -o",
    "reopen -w",
    "reopen -c writethrough",
    "write 0 512",
    "flush",
)
typed("typed", BASE, "base.qcow2", "length\nread 0 512\n\nfoo\nquit\nlength\n")
typed("typed-without-end", BASE, "base.qcow2", "length\nlength")
typed("typed-nothing", BASE, "", "")
typed("typed-aio", BASE, "base.qcow2", "aio_write 0 64k\naio_flush\naio_read -P 0xcd 0 64k\naio_flush\n")
typed("typed-writes", BASE, "-t writeback base.qcow2", "".join(f"write -P {n} {n * 7}k 9k\n" for n in range(40)))


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_like_the_peer(name: str, tmp_path: Path) -> None:
    """Both print the same on both streams, end with the same status and leave the same files."""
    images, words, text = SCRIPTS[name]
    assert_same(tmp_path, images, words, typed=text, files={"empty": b""})


def test_there_is_a_peer() -> None:
    """The table is compared with something."""
    assert PEER
    assert len(SCRIPTS) > 100
