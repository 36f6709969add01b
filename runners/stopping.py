"""Requests to stop, as a terminal, a batch system or a launcher sends them."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from runners.launchers.protocol import Ended, Job

AT_ONCE = 60  # seconds that cells get to end, once they were asked to stop at once
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)  # the last: submitit's, a while before a time limit
ONE_REQUEST = 5  # seconds within which signals are one request: systemd, SLURM and torchrun send or pass on several


@contextmanager
def stop_requests(at_once: float = math.inf) -> Iterator[list[float]]:
    """Collect the times of requests by any of SIGNALS; number `at_once` and later raise KeyboardInterrupt.

    Of signals less than ONE_REQUEST seconds after a request, none is another. A signal that is ignored stays so.
    """
    received: list[float] = []

    def note(*_: object) -> None:
        now = time.monotonic()
        if received and now - received[-1] < ONE_REQUEST:
            return
        received.append(now)
        if len(received) >= at_once:
            raise KeyboardInterrupt

    heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heard}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_jobs(jobs: Sequence[Job], requests: Sequence[float]) -> list[Ended]:
    """Ask jobs to stop, and wait until they have saved themselves. Asked again: at once, then by force."""
    heard = len(requests)

    def wait(requested: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while None in [job.poll() for job in jobs] and len(requests) == requested and time.monotonic() < end:
            time.sleep(0.1)

    try:
        _cancel(jobs)
        wait(heard, math.inf)
        if len(requests) > heard:
            time.sleep(0.5)  # a cell heard of the first request a moment later, and ignores what follows too soon
            _cancel(jobs)
            wait(heard + 1, AT_ONCE)
    finally:
        _cancel(jobs, force=True)
    return [job.poll() or Ended(code=-9) for job in jobs]


def _cancel(jobs: Sequence[Job], *, force: bool = False) -> None:
    for job in jobs:
        job.cancel(force=force)
