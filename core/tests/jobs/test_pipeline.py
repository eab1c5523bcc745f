"""The pipeline: bounded, ordered where asked for, and ended by the first failure."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from vm_core.block.jobs import pipeline


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_item_once(workers: int) -> None:
    """Each item is worked on exactly once, each worker with its own state."""
    done: list[tuple[int, int]] = []
    states = itertools.count()
    pipeline.run(
        iter(range(500)),
        lambda item, state: done.append((item, state)),
        workers=workers,
        make_state=lambda: next(states),
    )
    assert sorted(item for item, _ in done) == list(range(500))
    assert {state for _, state in done} <= set(range(workers))


def test_turns_keep_the_order() -> None:
    """What is done in a turn happens in the order of the numbers, however long the work before it takes."""
    turns, order = pipeline.Turns(), []
    chance = random.Random(1)

    def work(item: int, state: object) -> None:
        time.sleep(chance.random() / 1000)
        turns.wait(item)
        order.append(item)
        turns.done()

    pipeline.run(iter(range(200)), work, workers=4, turns=turns)
    assert order == list(range(200))


def test_items_are_taken_as_needed() -> None:
    """No more items are out than there are workers: memory does not grow with the work."""
    out = most = 0
    lock = threading.Lock()

    def items() -> Iterator[int]:
        nonlocal out, most
        for item in range(200):
            with lock:
                out += 1
                most = max(most, out)
            yield item

    def work(item: int, state: object) -> None:
        nonlocal out
        time.sleep(0.0005)
        with lock:
            out -= 1

    pipeline.run(items(), work, workers=3)
    assert most <= 4


@pytest.mark.parametrize("workers", [1, 3])
def test_first_failure_ends_all(workers: int) -> None:
    """An error stops the workers, also those that wait for their turn, and is raised."""
    turns, done = pipeline.Turns(), []

    def work(item: int, state: object) -> None:
        if item == 20:
            raise ValueError("broken")
        turns.wait(item)
        done.append(item)
        turns.done()

    with pytest.raises(ValueError, match="broken"):
        pipeline.run(iter(range(100000)), work, workers=workers, turns=turns)
    assert done == list(range(len(done)))
    assert len(done) <= 20


def test_failure_of_the_planner() -> None:
    """An error of whoever makes the items is raised too."""

    def items() -> Iterator[int]:
        yield 1
        raise OSError(5, "no map")

    with pytest.raises(OSError, match="no map"):
        pipeline.run(items(), lambda item, state: None, workers=2)


def test_interrupt_stops_the_workers() -> None:
    """Ctrl-C ends the workers at their next item and is raised."""
    working: set[int] = set()

    def work(item: int, state: object) -> None:
        working.add(item)
        time.sleep(0.01)
        working.discard(item)

    timer = threading.Timer(0.2, lambda: signal.raise_signal(signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(itertools.count(), work, workers=2)
    assert not working
    timer.join()
