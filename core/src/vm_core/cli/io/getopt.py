"""Options of the program and of its commands, with the complaints of the C library's ``getopt_long``.

The grammar is that of the C library's manual ("Using the getopt function"): options may stand behind operands, long
ones may be abbreviated. Complaints go to standard error and begin with the first word, as the C library prints them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence

#: The key of a wrong option; the complaint has been printed.
WRONG = "?"


class Getopt:
    """A scan over *words*, the first of which is the program's or command's name: iterate for ``(key, value)`` pairs.

    *short* is getopt's own ``"hf:q"``; *long* maps a long option, with a colon behind one that takes an argument, to
    the key that is given out for it. Afterwards :attr:`rest` holds the operands.
    """

    def __init__(self, words: Sequence[str], short: str, long: Mapping[str, str] | None = None) -> None:
        self._words = words
        self._short = {letter: short[at + 1 : at + 2] == ":" for at, letter in enumerate(short) if letter != ":"}
        self._long = {name.rstrip(":"): (key, name[-1] == ":") for name, key in (long or {}).items()}
        self._permute = "POSIXLY_CORRECT" not in os.environ
        self.rest: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, str]]:
        words, position = self._words, 1
        while position < len(words):
            word = words[position]
            position += 1
            if word == "--":
                break
            if len(word) < 2 or word[0] != "-":
                if not self._permute:
                    position -= 1
                    break
                self.rest.append(word)
            elif word[1] == "-" and self._long:
                key, value, wants = self._take_long(word[2:])
                if wants:
                    if position == len(words):
                        self._complain(f"option '--{value}' requires an argument")
                        key, value = WRONG, ""
                    else:
                        value = words[position]
                        position += 1
                yield key, value
            else:
                for at in range(1, len(word)):
                    letter = word[at]
                    wants_one = self._short.get(letter)
                    if wants_one is None:
                        self._complain(f"invalid option -- '{letter}'")
                        yield WRONG, ""
                    elif not wants_one:
                        yield letter, ""
                    elif at + 1 < len(word):
                        yield letter, word[at + 1 :]
                        break
                    elif position == len(words):
                        self._complain(f"option requires an argument -- '{letter}'")
                        yield WRONG, ""
                    else:
                        position += 1
                        yield letter, words[position - 1]
        self.rest.extend(words[position:])

    def _take_long(self, text: str) -> tuple[str, str, bool]:
        """Key, value (or the option's full name) and whether the argument is the next word."""
        name, equals, value = text.partition("=")
        full = [name] if name in self._long else [each for each in self._long if each.startswith(name)]
        if len({self._long[each] for each in full}) != 1:
            if full:
                choices = "".join(f" '--{each}'" for each in full)
                self._complain(f"option '--{text}' is ambiguous; possibilities:{choices}")
            else:
                self._complain(f"unrecognized option '--{text}'")
            return WRONG, "", False
        key, wants = self._long[full[0]]
        if equals and not wants:
            self._complain(f"option '--{full[0]}' doesn't allow an argument")
            return WRONG, "", False
        return (key, value, False) if equals or not wants else (key, full[0], True)

    def _complain(self, text: str) -> None:
        sys.stderr.write(f"{self._words[0]}: {text}\n")
