"""Work that may not fit into the device's memory, repeated with smaller batches; the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")

# What RuntimeErrors of libraries say that allocate by themselves; torch's own allocator raises OutOfMemoryError.
SAID = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: can't allocate memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, torch's or that of a library below it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)
    )


def in_memory(size: int, attempt: Callable[[int], Result], note: Callable[[str], None] = print) -> tuple[Result, int]:
    """`attempt(size)`, halving the size after each time the device ran out of memory; the size that fitted.

    `attempt` must start anew each time. Raises the error of a size of 1 where even that does not fit.
    """
    while True:
        try:
            return attempt(size), size
        except RuntimeError as error:
            if size == 1 or not out_of_memory(error):
                raise
        size //= 2  # outside of `except`, whose traceback still holds the tensors that did not fit
        note(f"out of memory; going on with batches of {size}")
        empty_cache()


def with_room(attempt: Callable[[], Result], make_room: Callable[[], None]) -> Result:
    """`attempt()`, once more after `make_room()` where the device ran out of memory."""
    try:
        return attempt()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    make_room()
    empty_cache()
    return attempt()


def empty_cache() -> None:
    """Give back what torch keeps of the device's memory for later."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
