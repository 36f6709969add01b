"""Commands in the process of a test, and waiting for what others do; the fixture `ablate` is in conftest.py."""

from __future__ import annotations

import time
from collections.abc import Callable

Command = Callable[..., tuple[int, str, str]]  # its words -> exit code, standard output, standard error


def wait_until(condition: Callable[[], object], seconds: float = 120, pause: float = 0.01) -> bool:
    """Whether something has come true within so many seconds."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(pause)
    return bool(met)
