"""What a likelihood estimator is."""

from __future__ import annotations

from typing import Generic, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from ablate.rollout import Probe, Rollout
from ablate.seeding import Streams

P = TypeVar("P", bound=Probe)

Pool = Literal["each", "mean", "sum"]
Unit = Literal["dimension", "nats"]


class Estimator(Protocol, Generic[P]):
    """A frozen dataclass: `probe` draws where the policy is asked, `log_prob` turns its answers into likelihood.

    A likelihood ratio means something only when both policies are evaluated at the same random points. `probe` draws
    them once; `log_prob` is then a pure function of the velocity, and networks are called elsewhere.
    """

    @property
    def needs(self) -> frozenset[str]:
        """What a rollout must leave behind: a subset of {"transitions", "density", "latents"}.

        With "transitions" only stochastic samplers will do, and the probe is a `TrajectoryProbe`, otherwise an
        `ElboProbe`. "density": the transitions are scored by their density. "latents": what the network saw at every
        step, from any sampler.
        """
        ...

    @property
    def pool(self) -> Pool:
        """What an objective sees of a sample's k points: `each` of them, or their `mean` or `sum` as one."""
        ...

    def num_points(self, asked: int | None, num_steps: int, num_scored: int) -> int:
        """How many points `probe` draws when `asked` for so many, after so many steps with so many transitions."""
        ...

    def probe(self, rollout: Rollout, *, num_points: int | None, streams: Streams) -> P:
        """k points per sample, k = `num_points` (None: as many as the source's method uses)."""
        ...

    def log_prob(self, velocity: Tensor, probe: P) -> Tensor:
        """velocity [b, k, ...] -> [b, k], nats per latent dimension up to terms that no policy changes."""
        ...


def pooled(log_prob: Tensor, pool: Pool) -> Tensor:
    """Log-probs [b, k] as an objective sees them: [b, k], or [b, 1].

    `each` exponentiates every point's ratio by itself, `mean` the ratio of the averaged points (AWM's `exp_first` and
    `sum_first`; FPO, arXiv 2507.21053, averages). `sum` over a trajectory's steps is the log-density of the path.
    """
    if pool == "each":
        return log_prob
    return log_prob.mean(1, keepdim=True) if pool == "mean" else log_prob.sum(1, keepdim=True)


def in_unit(per_dimension: Tensor, velocity: Tensor, unit: Unit) -> Tensor:
    """Nats per latent dimension [b, k], or nats in all: times the number of dimensions of velocity [b, k, ...]."""
    return per_dimension if unit == "dimension" else per_dimension * velocity[0, 0].numel()


def full_precision(x: Tensor) -> Tensor:
    """At least float32, whatever the dtype of the recording."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
