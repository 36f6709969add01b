"""Count sketch: gradients of any size as a few thousand numbers whose inner products are unbiased.

Every parameter adds to one bucket at random, with a random sign, so that E <Sx, Sy> = <x, y>, with a standard deviation
of at most sqrt(2 / size) |x| |y|. Gradients are sketched tensor by tensor, in stretches of at most `table` entries; all
share one table of buckets and signs, each under a rotation and a sign of its own, which keeps the expectation and needs
memory for one stretch alone.

Source: Charikar, Chen and Farach-Colton 2002, "Finding frequent items in data streams"; as a projection, Weinberger et
al. 2009 (arXiv 0902.2206), lemma 2.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ablate.seeding import generator

SIZE = 2**14  # inner products to 1.1 % of |x| |y|


class Sketch:
    """The linear map from lists of tensors to [size] numbers that a seed stands for; the same on every device."""

    def __init__(self, seed: int = 0, *, size: int = SIZE, table: int = 2**20) -> None:
        drawn = generator(seed, "sketch")
        self.size = size
        self._bucket = torch.randint(size, (table,), generator=drawn)
        self._sign = 2.0 * torch.randint(2, (table,), generator=drawn) - 1
        self._turns = drawn  # goes on as stretches are added
        self._turn: list[tuple[int, int]] = []

    def __call__(self, blocks: Iterable[Tensor]) -> Tensor:
        """[size], on the device of the blocks, which are taken in order."""
        parts = (part for block in blocks for part in torch.split(block.detach().flatten(), len(self._bucket)))
        total = torch.zeros(self.size)
        for stretch, part in enumerate(parts):
            self._bucket, self._sign, total = (value.to(part.device) for value in (self._bucket, self._sign, total))
            shift, sign = self._turn_of(stretch)
            signed = part.float() * self._sign[: len(part)]
            folded = torch.zeros_like(total).index_add_(0, self._bucket[: len(part)], signed)
            total += sign * folded.roll(shift)
        return total

    def _turn_of(self, stretch: int) -> tuple[int, int]:
        while len(self._turn) <= stretch:
            shift, sign = (int(torch.randint(n, (), generator=self._turns)) for n in (self.size, 2))
            self._turn.append((shift, 2 * sign - 1))
        return self._turn[stretch]
