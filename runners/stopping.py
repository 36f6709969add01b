"""Requests to stop, as a terminal, a batch system or a launcher sends them."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
