"""What a cell's processes have printed."""

from __future__ import annotations

import codecs
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from ablate.attempts import read_attempts
from ablate.lock import is_locked
from ablate.record import read_record

PAUSE = 0.3  # seconds between looks at a log that grows
BLOCK = 1 << 16  # bytes that are read at a time


def read_log(folder: Path, *, lines: int | None = None, follow: bool = False) -> Iterator[str]:
    """The text of a cell's log.txt, its last `lines` if so many are asked for, and then its traceback if it failed.

    `follow`: and what is added, until the cell has ended; one that has not started is waited for.
    """
    path, position = folder / "log.txt", 0
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    if path.exists() and lines is not None:
        position = _start_of_last(path, lines)
    while True:
        ended = not follow or (read_record(folder) is not None and not is_locked(folder))  # before the last look
        if path.exists():
            with path.open("rb") as log:
                log.seek(position)
                while block := log.read(BLOCK):
                    yield decoder.decode(block)
                position = log.tell()
        if ended:
            break
        time.sleep(PAUSE)
    traceback = folder / "traceback.txt"
    if traceback.exists():
        yield traceback.read_text(encoding="utf-8", errors="replace")


def why_empty(folder: Path) -> str:
    """What to say of a cell whose log has no text."""
    if not read_attempts(folder):
        return "has not been started"
    return "has printed nothing" if (folder / "log.txt").exists() else "has no log: it printed where it was started"


def _start_of_last(path: Path, lines: int) -> int:
    """Where the last lines of a file begin."""
    with path.open("rb") as file:
        last = deque(file, maxlen=lines)
        return file.tell() - sum(map(len, last))
