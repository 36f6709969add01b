"""Images of one prompt, which follow each other: as groups, in requests, and in pairs that are compared."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from runners.prompts import Prompt

Pair = tuple[int, int]


def groups(prompts: Sequence[Prompt]) -> Iterator[slice]:
    """The images of each prompt."""
    drawn = [(prompt.group, prompt.text) for prompt in prompts]
    starts = [i for i in range(len(drawn)) if i == 0 or drawn[i] != drawn[i - 1]]
    return (slice(start, stop) for start, stop in pairwise([*starts, len(prompts)]))


def whole_groups(prompts: Sequence[Prompt], at_most: int) -> Iterator[slice]:
    """Whole groups, together at most so many images; a larger group is alone."""
    begin = end = 0
    for group in groups(prompts):
        if group.stop - begin > at_most and end > begin:
            yield slice(begin, end)
            begin = end
        end = group.stop
    if end > begin:
        yield slice(begin, end)


def pairs(group: slice, opponents: int | None = None) -> list[Pair]:
    """Each pair of a group once; with `opponents`, an even number, those that give each image so many.

    The images stand in a circle, and each is paired with the next opponents / 2: all are compared equally often.
    """
    size = group.stop - group.start
    if opponents is None or opponents >= size - 1:
        return [(i, j) for i in range(group.start, group.stop) for j in range(i + 1, group.stop)]
    steps = range(1, opponents // 2 + 1)
    return [(group.start + i, group.start + (i + step) % size) for i in range(size) for step in steps]


def shares_won(
    number: int, compared: Sequence[Pair], outcomes: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.int_]]:
    """The share of its comparisons that each of `number` images has won, NaN without any; and how many these are.

    outcomes [c]: 1 where the first of a pair has won, 0 the second, 1/2 a tie, NaN where it is not known.
    """
    won, told = np.zeros(number), np.zeros(number, int)
    for (first, second), outcome in zip(compared, outcomes, strict=True):
        if np.isfinite(outcome):
            won[[first, second]] += outcome, 1 - outcome
            told[[first, second]] += 1
    shares: NDArray[np.float64] = np.where(told, won / np.maximum(told, 1), np.nan)
    return shares, told
