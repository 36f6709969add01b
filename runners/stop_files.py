"""Requests to stop that reach another machine: a file `.stop` in a cell's folder, or in a grid's.

In a cell's folder it names the token of the lock whose owner is asked, so that it means nothing to who has the cell
later. In a grid's it holds a word that changes with each request; launchers look for a change.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ablate.lock import is_locked, owner
from ablate.record import write_atomic
from ablate.source import InputError

NAME = ".stop"
PATIENCE = 5.0  # seconds that who takes a lock has to write who it is


def ask_cell(folder: Path) -> dict[str, Any] | None:
    """Ask the process that runs a cell to save itself and end, after its epoch; who that is, None if nobody runs it.

    Raises InputError where the lock does not say.
    """
    end = time.monotonic() + PATIENCE
    while is_locked(folder):
        found = owner(folder)
        if all(str(found.get(key, "\n")).isprintable() for key in ("host", "pid", "token")):
            write_atomic(folder / NAME, str(found["token"]))
            return found
        if time.monotonic() > end:
            raise InputError(f"{folder / '.lock'}: does not say which process has the cell; end it where it runs")
        time.sleep(0.05)  # it has the lock, and is about to write who it is
    return None


def cell_is_asked(folder: Path) -> bool:
    """Whether the owner of a cell's lock is asked to stop."""
    token = _read(folder)
    return token is not None and token == owner(folder).get("token")


def ask_launchers(results: Path) -> None:
    """Ask all launchers of a grid to stop, wherever they are."""
    write_atomic(results / NAME, uuid.uuid4().hex)


def launcher_requests(results: Path) -> Callable[[], bool]:
    """A function that says whether launchers of this grid have been asked to stop since now."""
    before = _read(results)
    return lambda: _read(results) != before


def _read(folder: Path) -> str | None:
    try:
        return (folder / NAME).read_text(encoding="utf-8", errors="replace")  # somebody else's word asks nobody
    except (FileNotFoundError, NotADirectoryError):
        return None
