"""Progress, cancelling, rate limits."""

from __future__ import annotations

import threading

import pytest

from vm_core.block.jobs.job import Cancelled, Job, RateLimit


def test_progress_is_told_in_order() -> None:
    """Every step is told once with what is done by then, from whatever thread."""
    told: list[tuple[int, int]] = []
    job = Job(lambda done, total: told.append((done, total)))
    job.start(100)
    threads = [threading.Thread(target=lambda: [job.advance(1) for _ in range(25)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    job.finish()
    assert told == [(number, 100) for number in range(101)] + [(100, 100)]


def test_cancel_is_noticed_at_the_next_step() -> None:
    """After cancel() the work ends with Cancelled."""
    job = Job()
    job.advance(1)
    job.cancel()
    with pytest.raises(Cancelled):
        job.advance(1)
    with pytest.raises(Cancelled):
        job.check()


def test_rate_limit_holds_on_average() -> None:
    """A thousand bytes at a hundred a second take ten seconds, less the slice that may be ahead."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        assert seconds > 0
        now += seconds

    limit = RateLimit(100, clock=lambda: now)
    for _ in range(100):
        limit.wait(10, sleep=sleep)
    assert 9.5 <= now <= 10.0


def test_rate_limit_can_be_cancelled() -> None:
    """Waiting for the rate ends when the job is cancelled."""
    job = Job(rate=1)
    job.throttle(1000)
    threading.Timer(0.1, job.cancel).start()
    with pytest.raises(Cancelled):
        job.throttle(1000)
