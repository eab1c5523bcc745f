"""Options as the GNU C library takes them: before, after and between operands, long ones abbreviated while unique.

The grammar is that of the C library's manual ("Parsing Program Options": getopt, getopt_long). It matters to the
letter: scripts write options behind file names, and the peer names a wrong one by the word at which its scan stands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

#: Keys that stand for a wrong word: no option here, and one that lacks its argument.
UNKNOWN, MISSING = "?", ":"


class Getopt:
    """A scan over *words*: iterate for ``(key, value)`` pairs, then take :attr:`rest`, the operands in order.

    *short* is getopt's own ``"hf:q"``: letters, with a colon behind one that takes an argument. *long* maps a long
    option, with a colon behind one that takes an argument, to the key that is given out for it: a short option's
    letter, or a word. *exact* are further ones that have to be written in full.

    A wrong option gives the key UNKNOWN or MISSING, with the word that the peer names for it.
    """

    def __init__(
        self,
        words: Sequence[str],
        short: str,
        long: Mapping[str, str],
        *,
        exact: Mapping[str, str] | None = None,
        permute: bool = True,
        program: str = "",
    ) -> None:
        """*program* is the word before the first one; without *permute* the first operand ends the options."""
        self._words = words
        self._next = 0
        self._short = {letter: short[at + 1 : at + 2] == ":" for at, letter in enumerate(short) if letter != ":"}
        self._long = {name.rstrip(":"): (key, name[-1] == ":") for name, key in long.items()}
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
            elif word[1] == "-":
                yield self._take_long(word)
            else:
                yield from self._take_cluster(word)
        self.rest.extend(words[self._next :])

    def _take_long(self, word: str) -> tuple[str, str]:
        name, equals, value = word[2:].partition("=")
        self._next += 1
        found = self._long.get(name) or self._exact.get(name)
        if found is None:
            matches = {each for full, each in self._long.items() if full.startswith(name)}
            if len(matches) != 1:
                return UNKNOWN, word
            found = matches.pop()
        key, wants = found
        if not wants:
            return (UNKNOWN, word) if equals else (key, "")
        return (key, value) if equals else self._take_argument(key, word)

    def _take_cluster(self, word: str) -> Iterator[tuple[str, str]]:
        """The letters of ``-qf raw``."""
        # While letters are left the peer's scan has not moved on: it names the word before.
        before = self.rest[-1] if self.rest else self._words[self._next - 1] if self._next else self._program
        self._next += 1
        for at in range(1, len(word)):
            letter, last = word[at], at + 1 == len(word)
            wants = self._short.get(letter)
            if wants is None:
                yield UNKNOWN, word if last else before
            elif not wants:
                yield letter, ""
            elif last:
                yield self._take_argument(letter, word)
            else:
                yield letter, word[at + 1 :]
                return

    def _take_argument(self, key: str, word: str) -> tuple[str, str]:
        if self._next >= len(self._words):
            return MISSING, word
        self._next += 1
        return key, self._words[self._next - 1]
