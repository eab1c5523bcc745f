"""The state of the rules: which errors wait for a request, and which requests are stopped.

At an event all its rules are looked at in the state before it. Rules for errors *arm* themselves: the next request that
they match fails. The first one that does so at an event disarms what events before had armed. A rule for a new state
takes effect when all rules of the event have been looked at. Then the request stops at the breakpoints that it met.
"""

from __future__ import annotations

from collections.abc import Iterable
from threading import Event, Lock

from vm_core.block import breakpoints, waiting
from vm_core.errors import BlockError, UsageError

from .rules import EVENTS, InjectError, Rule, SetState, Suspend


class _Stopped:
    """A request that has been stopped."""

    __slots__ = ("go", "tag")

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.go = Event()


class Engine:
    """The rules of one node. Safe to use from several threads."""

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._lock = Lock()
        self._rules: dict[str, list[Rule]] = {}
        self._state = 1
        self._armed: list[InjectError] = []
        self._stopped: list[_Stopped] = []
        for rule in rules:
            self._rules.setdefault(rule.event, []).append(rule)

    @property
    def state(self) -> int:
        """The current state; 1 in the beginning."""
        return self._state

    def event(self, name: str) -> None:
        """Something is about to happen. Returns when the request may go on."""
        if name not in self._rules:
            return
        met: list[_Stopped] = []
        with self._lock:
            rules = self._rules.get(name, [])
            new = self._state
            armed: list[InjectError] = []
            for rule in list(rules):
                if rule.state and rule.state != self._state:
                    continue
                if isinstance(rule, InjectError):
                    armed.append(rule)
                elif isinstance(rule, SetState):
                    new = rule.new
                elif isinstance(rule, Suspend):
                    rules.remove(rule)
                    met.append(_Stopped(rule.tag))
            if armed:
                self._armed = armed
            self._state = new
            self._stopped += met
            if not rules:
                self._rules.pop(name, None)
        for request in met:
            breakpoints.say(f"blkdebug: Suspended request '{request.tag}'\n")
            waiting.announce()
            request.go.wait()

    def check(self, kind: str, offset: int = 0, length: int = 0) -> None:
        """A request comes by. Raises BlockError where a rule wants it to fail."""
        if not self._armed:
            return
        with self._lock:
            for rule in self._armed:
                if rule.hits(kind, offset, length):
                    if rule.once:
                        self._armed.remove(rule)
                        rules = self._rules.get(rule.event, [])
                        if rule in rules:
                            rules.remove(rule)
                    code = rule.code
                    break
            else:
                return
        if code:
            raise BlockError.of(code)

    # Breakpoints

    def set(self, event: str, tag: str) -> None:
        """Stop the next request that comes to *event* and call it *tag*. Raises UsageError for an unknown event."""
        if event not in EVENTS:
            raise UsageError(f"there is no event {event!r}; there is: {', '.join(sorted(EVENTS))}")
        with self._lock:
            self._rules.setdefault(event, []).append(Suspend(event, tag))

    def remove(self, tag: str) -> bool:
        """Forget the breakpoints called *tag*, and let the requests that they stopped go on.

        Returns whether there was a breakpoint that no request had met.
        """
        found = False
        with self._lock:
            for rules in self._rules.values():
                for rule in [rule for rule in rules if isinstance(rule, Suspend) and rule.tag == tag]:
                    rules.remove(rule)
                    found = True
        while self.resume(tag):
            pass
        return found

    def resume(self, tag: str) -> bool:
        """Let the first request that was stopped as *tag* go on."""
        with self._lock:
            request = next((request for request in self._stopped if request.tag == tag), None)
            if request is None:
                return False
            self._stopped.remove(request)
        breakpoints.say(f"blkdebug: Resuming request '{tag}'\n")
        request.go.set()
        return True

    def suspended(self, tag: str) -> bool:
        """Whether a request is stopped as *tag*."""
        with self._lock:
            return any(request.tag == tag for request in self._stopped)

    def release(self) -> None:
        """Let everything go on: the node is closed."""
        with self._lock:
            stopped, self._stopped = self._stopped, []
        for request in stopped:
            request.go.set()
