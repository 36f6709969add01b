"""The lock of a cell's folder, which says whether a process is at work there."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from ablate.source import InputError


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a cell's folder; the system releases it when the process dies. Raises InputError if it is taken."""
    with (folder / ".lock").open("w") as file:
        if not any(_acquired(file, fcntl.LOCK_EX, delay) for delay in (0, 0.1, 0.2)):  # outlasts a look by is_locked
            raise InputError(f"{folder}: another process is running this cell")
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process is running this cell."""
    path = folder / ".lock"
    if not path.exists():
        return False
    with path.open() as file:
        return not _acquired(file, fcntl.LOCK_SH)


def _acquired(file: TextIO, kind: int, delay: float = 0) -> bool:
    time.sleep(delay)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
