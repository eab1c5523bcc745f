"""The commands: their names, arguments and short help, and the functions that carry them out.

A function gets the session and the words of the line, the command's name first. It returns 0, or 1 where the program's
exit status should tell of a failure. It is named by reference and imported when it is first used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .session import Session

Function = Callable[["Session", Sequence[str]], int]


class Command(NamedTuple):
    """One command."""

    name: str
    alias: str
    #: ``module:function`` of this package.
    function: str
    #: Fewest and most arguments; -1: any number.
    least: int
    most: int
    arguments: str
    summary: str
    #: Runs without an open file.
    closed: bool = False
    #: Changes the image: the node must be writable.
    writes: bool = False


COMMANDS: tuple[Command, ...] = (
    Command("abort", "", "control:abort", 0, 0, "", "simulate a program crash using abort(3)", closed=True),
    Command("aio_flush", "", "transfer:aio_flush", 0, 0, "", "completes all outstanding aio requests"),
    Command(
        "aio_read",
        "",
        "transfer:aio_read",
        2,
        -1,
        "[-Ciqv] [-P pattern] off len [len..]",
        "asynchronously reads a number of bytes",
    ),
    Command(
        "aio_write",
        "",
        "transfer:aio_write",
        2,
        -1,
        "[-Cfiquz] [-P pattern] off len [len..]",
        "asynchronously writes a number of bytes",
        writes=True,
    ),
    Command("alloc", "a", "look:alloc", 1, 2, "offset [count]", "checks if offset is allocated in the file"),
    Command(
        "break",
        "",
        "control:set_break",
        2,
        2,
        "event tag",
        "sets a breakpoint on event and tags the stopped request as tag",
    ),
    Command("close", "c", "session:run_close", 0, 0, "", "close the current open file"),
    Command(
        "discard",
        "d",
        "transfer:discard",
        2,
        -1,
        "[-Cq] off len",
        "discards a number of bytes at a specified offset",
        writes=True,
    ),
    Command("flush", "f", "transfer:flush", 0, 0, "", "flush all in-core file state to disk"),
    Command("help", "?", "help:run", 0, 1, "[command]", "help for one or all commands", closed=True),
    Command("info", "i", "look:info", 0, 0, "", "prints information about the current file"),
    Command("length", "l", "look:length", 0, 0, "", "gets the length of the current file"),
    Command("map", "", "look:show_map", 0, 0, "", "prints the allocated areas of a file"),
    Command(
        "open",
        "o",
        "session:run_open",
        1,
        -1,
        "[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
        "open the file specified by path",
        closed=True,
    ),
    Command("quit", "q", "control:leave", 0, -1, "", "exit the program", closed=True),
    Command(
        "read",
        "r",
        "transfer:read",
        2,
        -1,
        "[-abCqv] [-P pattern [-s off] [-l len]] off len",
        "reads a number of bytes at a specified offset",
    ),
    Command(
        "readv",
        "",
        "transfer:readv",
        2,
        -1,
        "[-Cqv] [-P pattern] off len [len..]",
        "reads a number of bytes at a specified offset",
    ),
    Command("remove_break", "", "control:remove_break", 1, 1, "tag", "remove a breakpoint by tag"),
    Command(
        "reopen",
        "",
        "session:run_reopen",
        0,
        -1,
        "[(-r|-w)] [-c cache] [-o options]",
        "reopens an image with new options",
    ),
    Command("resume", "", "control:resume", 1, 1, "tag", "resumes the request tagged as tag"),
    Command("sigraise", "", "control:raise_signal", 1, 1, "signal", "raises a signal", closed=True),
    Command("sleep", "", "control:sleep", 1, 1, "", "waits for the given value in milliseconds", closed=True),
    Command(
        "truncate",
        "t",
        "transfer:truncate",
        1,
        3,
        "[-m prealloc_mode] off",
        "truncates the current file at the given offset",
        writes=True,
    ),
    Command("wait_break", "", "control:wait_break", 1, 1, "tag", "waits for the suspension of a request"),
    Command(
        "write",
        "w",
        "transfer:write",
        2,
        -1,
        "[-bcCfnquz] [-P pattern | -s source_file] off len",
        "writes a number of bytes at a specified offset",
        writes=True,
    ),
    Command(
        "writev",
        "",
        "transfer:writev",
        2,
        -1,
        "[-Cfq] [-P pattern] off len [len..]",
        "writes a number of bytes at a specified offset",
        writes=True,
    ),
)


def find(word: str) -> Command | None:
    """The command that *word* names, by name or alias."""
    for command in COMMANDS:
        if word in (command.name, command.alias):
            return command
    return None


def one_line(command: Command, name: str = "") -> str:
    """A command's line in the list of all; *name* is how it was asked for."""
    # The peer prints a blank more where its table has an empty string of arguments.
    arguments = f"{command.arguments} " if command.arguments else " " if command.name == "map" else ""
    return f"{name or command.name} {arguments}-- {command.summary}\n"


def run(session: Session, line: str) -> int:
    """Carry out one line; returns 1 where it failed."""
    words = [word for word in line.split(" ") if word]
    if not words:
        return 0
    command = find(words[0])
    if command is None:
        sys.stderr.write(f'command "{words[0]}" not found\n')
        return 1
    if not command.closed and session.node is None:
        sys.stderr.write("no file open, try 'help open'\n")
        return 1
    count = len(words) - 1
    if count < command.least or 0 <= command.most < count:
        if command.most < 0:
            wanted = f"at least {command.least}"
        elif command.least == command.most:
            wanted = str(command.least)
        else:
            wanted = f"between {command.least} and {command.most}"
        sys.stderr.write(f"bad argument count {count} to {words[0]}, expected {wanted} arguments\n")
        return 1
    if command.writes and session.image.readonly and not session.empty:
        session.tool.error("Block node is read-only")
        return 1
    module, _, name = command.function.partition(":")
    function: Function = getattr(import_module(f"{__package__}.{module}"), name)
    return function(session, words)


def usage(session: Session, words: Sequence[str]) -> int:
    """The command was given wrong words: show its line. Returns the failure."""
    command = find(words[0])
    assert command is not None
    session.out.write(one_line(command))
    return 1
