"""Work that may not fit into the device's memory, repeated with smaller batches; the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def in_memory(size: int, attempt: Callable[[int], Result], note: Callable[[str], None] = print) -> tuple[Result, int]:
    """`attempt(size)`, halving the size after each time the device ran out of memory; the size that fitted.

    `attempt` must start anew each time. Raises torch.OutOfMemoryError where even a size of 1 does not fit.
    """
    while True:
        try:
            return attempt(size), size
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2  # outside of `except`, whose traceback still holds the tensors that did not fit
        note(f"out of memory; going on with batches of {size}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
