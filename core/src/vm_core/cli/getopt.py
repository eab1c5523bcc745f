"""Options as the GNU C library takes them: before, after and between operands, long ones abbreviated while unique.

The grammar is that of the C library's manual ("Parsing Program Options": getopt, getopt_long). It matters to the
letter: scripts write options behind file names, and the peer's programs tell a wrong one in two ways. qemu-img names
the word at which its scan stands, in sentences of its own; qemu-io lets the C library complain.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence

#: Keys that stand for a wrong word: no option here, and one that lacks its argument.
UNKNOWN, MISSING = "?", ":"


class Getopt:
    """A scan over *words*: iterate for ``(key, value)`` pairs, then take :attr:`rest`, the operands in order.

    *short* is getopt's own ``"hf:q"``: letters, with a colon behind one that takes an argument. *long* maps a long
    option, with a colon behind one that takes an argument, to the key that is given out for it: a short option's
    letter, or a word. *exact* are further ones that have to be written in full. Without *long* there are none, and
    hyphens are letters.

    A wrong option gives the key UNKNOWN or MISSING, with the word that the peer names for it.
    """

    def __init__(
        self,
        words: Sequence[str],
        short: str,
        long: Mapping[str, str] | None = None,
        *,
        exact: Mapping[str, str] | None = None,
        permute: bool = True,
        program: str = "",
    ) -> None:
        """*program* is the word before the first one; without *permute* the first operand ends the options."""
        self._words = words
        self._next = 0
        self._short = {letter: short[at + 1 : at + 2] == ":" for at, letter in enumerate(short) if letter != ":"}
        self._has_long = long is not None
        self._long = {name.rstrip(":"): (key, name[-1] == ":") for name, key in (long or {}).items()}
        self._exact = {name.rstrip(":"): (key, name[-1] == ":") for name, key in (exact or {}).items()}
        self._permute = permute and "POSIXLY_CORRECT" not in os.environ
        self._program = program
        #: The operands found so far; all of them after the iteration.
        self.rest: list[str] = []

    @property
    def names(self) -> list[str]:
        """Every option as it is written, for suggestions."""
        return [f"--{name}" for name in (*self._long, *self._exact)] + [f"-{letter}" for letter in self._short]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        words = self._words
        while self._next < len(words):
            word = words[self._next]
            if word == "--":
                self._next += 1
                break
            if len(word) < 2 or word[0] != "-":
                if not self._permute:
                    break
                self.rest.append(word)
                self._next += 1
            elif word[1] == "-" and self._has_long:
                yield self._take_long(word)
            else:
                yield from self._take_cluster(word)
        self.rest.extend(words[self._next :])

    def _wrong(self, key: str, word: str, complaint: str) -> tuple[str, str]:
        """What is given out for a wrong option; the peer names *word*, the C library's *complaint* is this."""
        return key, word

    def _take_long(self, word: str) -> tuple[str, str]:
        name, equals, value = word[2:].partition("=")
        self._next += 1
        found = self._long.get(name) or self._exact.get(name)
        if found is None:
            full = [each for each in self._long if each.startswith(name)]
            matches = {self._long[each] for each in full}
            if not matches:
                return self._wrong(UNKNOWN, word, f"unrecognized option '{word}'")
            if len(matches) > 1:
                choices = "".join([f" '--{each}'" for each in full])
                return self._wrong(UNKNOWN, word, f"option '{word}' is ambiguous; possibilities:{choices}")
            name, found = full[0], matches.pop()
        key, wants = found
        if equals and not wants:
            return self._wrong(UNKNOWN, word, f"option '--{name}' doesn't allow an argument")
        if equals or not wants:
            return key, value
        return self._take_argument(key, word, f"option '--{name}' requires an argument")

    def _take_cluster(self, word: str) -> Iterator[tuple[str, str]]:
        """The letters of ``-qf raw``."""
        # While letters are left the peer's scan has not moved on: it names the word before.
        before = self.rest[-1] if self.rest else self._words[self._next - 1] if self._next else self._program
        self._next += 1
        for at in range(1, len(word)):
            letter, last = word[at], at + 1 == len(word)
            wants = self._short.get(letter)
            if wants is None:
                yield self._wrong(UNKNOWN, word if last else before, f"invalid option -- '{letter}'")
            elif not wants:
                yield letter, ""
            elif last:
                yield self._take_argument(letter, word, f"option requires an argument -- '{letter}'")
            else:
                yield letter, word[at + 1 :]
                return

    def _take_argument(self, key: str, word: str, complaint: str) -> tuple[str, str]:
        if self._next >= len(self._words):
            return self._wrong(MISSING, word, complaint)
        self._next += 1
        return key, self._words[self._next - 1]


class LibraryGetopt(Getopt):
    """The same, with the complaints of the C library on standard error; every wrong option gives the key UNKNOWN then.

    The first of the *words* is the program's or command's name, with which they begin.
    """

    def __init__(self, words: Sequence[str], short: str, long: Mapping[str, str] | None = None) -> None:
        super().__init__(words[1:], short, long)
        self._name = words[0]

    def _wrong(self, key: str, word: str, complaint: str) -> tuple[str, str]:
        sys.stderr.write(f"{self._name}: {complaint}\n")
        return UNKNOWN, ""
