"""Random numbers derived from (seed, labels), so that no stream depends on another, on batch split or on devices."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(seed: int, *labels: int | str) -> int:
    """A 63-bit seed for the stream named by `labels` under the run's `seed`."""
    text = "/".join(map(str, (seed, *labels)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *labels: int | str) -> torch.Generator:
    """A CPU generator for the stream named by `labels`."""
    return torch.Generator().manual_seed(derive_seed(seed, *labels))


@dataclass(frozen=True)
class Streams:
    """Randomness of a batch: one generator per sample, and one that all samples share.

    With a `group_size`, successive samples form groups, over which `uniform` numbers are spread evenly.
    """

    own: tuple[torch.Generator, ...]
    shared: torch.Generator
    group_size: int | None = None

    def normal(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Standard normal numbers [b, *shape], in the dtype and on the device of `like`."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.stack([torch.randn(tuple(shape), generator=g, dtype=dtype) for g in self.own]).to(like)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform numbers in [0, 1), [b, *shape], float64 on the CPU.

        With a group size n, sample i of a group gets u + i / n modulo 1 with the u of the group's first sample: each
        number is uniform, and a group's are 1 / n apart on the circle (Cranley and Patterson 1976).
        """
        drawn = torch.stack([torch.rand(tuple(shape), generator=g, dtype=torch.float64) for g in self.own])
        if self.group_size is None:
            return drawn
        index = torch.arange(len(drawn))
        place = (index % self.group_size).double().view(-1, *[1] * (drawn.ndim - 1))
        return (drawn[index - index % self.group_size] + place / self.group_size) % 1

    def permutation(self, n: int) -> Tensor:
        """A permutation of 0..n-1 for every sample, [b, n], on the CPU."""
        return torch.stack([torch.randperm(n, generator=g) for g in self.own])


def streams(seed: int, *labels: int | str, samples: Sequence[int], group_size: int | None = None) -> Streams:
    """Streams for the samples with these indices. Equal indices get equal numbers."""
    own = tuple(generator(seed, *labels, "sample", i) for i in samples)
    return Streams(own=own, shared=generator(seed, *labels, "shared"), group_size=group_size)
