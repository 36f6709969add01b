"""The ends of a metrics.jsonl: all that a look at a cell needs, however long the file is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from ablate.record import read_metrics

BLOCK = 1 << 14  # bytes that are read at a time, from the end


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Lines of metrics.jsonl, each empty where there is none."""

    first: dict[str, Any] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    evaluated: dict[str, Any] = field(default_factory=dict)  # the last one with an evaluation
    trained: dict[str, Any] = field(default_factory=dict)  # the last one with a training reward


def read_ends(folder: Path) -> Ends:
    """Read the first line of a cell's metrics.jsonl, and the last ones as far back as the last evaluation.

    A last line cut short by a kill is left out. Raises InputError as read_metrics does where one of them is damaged.
    """
    try:
        with (folder / "metrics.jsonl").open("rb") as file:
            first, *_ = file.readline().splitlines(keepends=True) or [b""]
            if not first.endswith(b"\n"):
                return Ends()
            evaluated = trained = last = None
            for line in _from_the_end(file):
                last = last or line
                evaluated = evaluated or (line if b'"eval/score"' in line else None)
                trained = trained or (line if b'"rollout/score"' in line else None)
                if evaluated and trained:
                    break
        found = [json.loads(line) if line else {} for line in (first, last, evaluated, trained)]
        if all(isinstance(values, dict) for values in found):
            return Ends(**dict(zip(("first", "last", "evaluated", "trained"), found, strict=True)))
    except FileNotFoundError:
        return Ends()
    except (ValueError, OSError):
        pass
    return _ends_of(read_metrics(folder))  # says what is wrong, and where


def _ends_of(lines: Sequence[dict[str, Any]]) -> Ends:
    def last_with(name: str) -> dict[str, Any]:
        return next((line for line in reversed(lines) if name in line), {})

    if not lines:
        return Ends()
    return Ends(first=lines[0], last=lines[-1], evaluated=last_with("eval/score"), trained=last_with("rollout/score"))


def _from_the_end(file: BinaryIO) -> Iterator[bytes]:
    """The whole lines of a file, the last one first, without their line breaks."""
    position, rest, whole = file.seek(0, os.SEEK_END), b"", False
    while position:
        size = min(BLOCK, position)
        position -= size
        file.seek(position)
        rest, *lines = (file.read(size) + rest).split(b"\n")
        for line in reversed(lines):
            if whole:
                yield line
            whole = True  # what follows the last line break is not a whole line
    if whole:
        yield rest
