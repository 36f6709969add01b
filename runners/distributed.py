"""The processes of one cell, one device each, as torchrun, accelerate or `ablate run --processes` start them.

Whole groups go to each process, so that losses and advantages need nothing from elsewhere but rewards. Gradients are
accumulated alone and averaged once per update: unlike a hook in the backward, this allows every process to repeat an
update that did not fit into its memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor, distributed

from runners.launchers.processes import MEETING_POINT

Value = TypeVar("Value")

TIMEOUT = timedelta(hours=2)  # that processes wait for each other: one may be scoring images elsewhere


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the `size` processes of its cell. A single one talks to nobody."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def main(self) -> bool:
        """Whether this process writes the cell's files."""
        return self.rank == 0

    def everyone(self, value: Value) -> list[Value]:
        """The value of every process, in order of ranks."""
        gathered: list[Value] = [value] if self.size == 1 else gather_object([value])
        return gathered

    def rows(self, rows: Tensor) -> tuple[Tensor, slice]:
        """The rows [b, ...] of all processes one after the other, and where those of this process are among them."""
        parts = self.everyone(rows)
        start = sum(len(part) for part in parts[: self.rank])
        return torch.cat(parts), slice(start, start + len(rows))

    def mean(self, values: Mapping[str, float], share: float | None = None) -> dict[str, float]:
        """The mean over the processes that have a value, each with its share of the whole (by default an equal one)."""
        every = self.everyone((dict(values), 1 / self.size if share is None else share))
        names = dict.fromkeys(name for of_one, part in every if part for name in of_one)
        there = {name: [(of_one[name], part) for of_one, part in every if part and name in of_one] for name in names}
        return {
            name: float(sum(v * part for v, part in vs) / sum(part for _, part in vs)) for name, vs in there.items()
        }

    def average_gradients(self, parameters: Sequence[Tensor], share: float) -> None:
        """Replace every gradient by its mean over the processes, each with its share of the whole."""
        if self.size == 1:
            return
        there = [any(of_all) for of_all in zip(*self.everyone([p.grad is not None for p in parameters]), strict=True)]
        for p, needed in zip(parameters, there, strict=True):
            if needed and p.grad is None:  # of a process that had nothing to do
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._foreach_mul_(gradients, share)
        for work in [distributed.all_reduce(gradient, async_op=True) for gradient in gradients]:
            work.wait()

    def share(self, tensors: Sequence[Tensor]) -> None:
        """Take over the tensors of the first process, in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)


def this_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_main() -> bool:
    """Whether this process is the first, or the only one, of its cell."""
    return os.environ.get("RANK", "0") == "0"


def join() -> World:
    """Meet the other processes of this cell, if whoever started this one says that there are any."""
    size, there = int(os.environ.get("WORLD_SIZE", "1")), os.environ.get(MEETING_POINT)
    if size == 1:
        return World(device=this_device())
    meeting = {"init_method": f"file://{there}", "rank": int(os.environ["RANK"]), "world_size": size} if there else {}
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT, **meeting)
    return World(device=state.device, rank=state.process_index, size=state.num_processes)


def leave() -> None:
    """Part from the other processes once all work is done."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
