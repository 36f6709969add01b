"""What flows between the three axes: rollouts, probes and evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """The stochastic steps of a rollout, linear-Gaussian in (x, velocity).

    next_x ~ N(x_coef x + velocity_coef velocity, std^2 I). Latents are stored in the dtype the network saw.
    """

    x: Tensor  # [b, s, ...]
    next_x: Tensor  # [b, s, ...]
    velocity: Tensor  # [b, s, ...]  what the rollout policy said there
    sigma: Tensor  # [s]
    x_coef: Tensor  # [s]
    velocity_coef: Tensor  # [s]
    std: Tensor  # [s]

    def first(self, num_steps: int) -> Transitions:
        """The first so many of the steps."""
        kept = slice(num_steps)
        return Transitions(
            x=self.x[:, kept],
            next_x=self.next_x[:, kept],
            velocity=self.velocity[:, kept],
            sigma=self.sigma[kept],
            x_coef=self.x_coef[kept],
            velocity_coef=self.velocity_coef[kept],
            std=self.std[kept],
        )


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """b samples of one sampler. `transitions` is None for a deterministic sampler."""

    x0: Tensor  # [b, ...]  clean latents
    sigmas: Tensor  # [t + 1]  decreasing, 1 = noise, 0 = data
    transitions: Transitions | None = None


class Probe(Protocol):
    """Where the policy is asked: k points per sample, drawn once and shared by all policies.

    Every field is a tensor [b, k, ...] or None, so that any part of a probe is a probe.
    """

    @property
    def x(self) -> Tensor:  # [b, k, ...]
        ...

    @property
    def sigma(self) -> Tensor:  # [b, k]
        ...

    @property
    def rollout_velocity(self) -> Tensor | None:
        """[b, k, ...] velocity of the rollout policy at these very points, where the sampler has computed it."""
        ...


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an objective sees. A log-prob that it does not declare in `needs` is None."""

    log_prob: Tensor  # [b, k]  nats per latent dimension, differentiable
    old_log_prob: Tensor | None  # [b, k]
    reference_log_prob: Tensor | None  # [b, k]
    advantage: Tensor  # [b]
    group: Tensor  # [b]  samples with equal numbers share a prompt

    def old(self) -> Tensor:
        """The rollout policy's log-prob, for an objective that declares `needs = {"old"}`."""
        assert self.old_log_prob is not None
        return self.old_log_prob

    def reference(self) -> Tensor:
        """The reference policy's log-prob, for an objective that declares `needs = {"reference"}`."""
        assert self.reference_log_prob is not None
        return self.reference_log_prob


Batched = TypeVar("Batched")


def take(batch: Batched, rows: slice | Tensor, columns: slice = slice(None)) -> Batched:
    """The rows (samples) and columns (points or steps) of a dataclass whose tensors are [b], [b, k] or [b, k, ...]."""

    def part(value: Any) -> Any:
        if value is None:
            return None
        return value[rows] if value.ndim == 1 else value[rows, columns]

    fields = dataclasses.fields(batch)  # type: ignore[arg-type]
    return dataclasses.replace(batch, **{f.name: part(getattr(batch, f.name)) for f in fields})  # type: ignore[type-var]


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """One rollout of all the samples; the noise levels and step coefficients must be the same in all."""

    def join(parts: Sequence[Transitions | None]) -> Transitions | None:
        kept = [p for p in parts if p is not None]
        if not kept:
            return None
        batched = {name: torch.cat([getattr(p, name) for p in kept]) for name in ("x", "next_x", "velocity")}
        return dataclasses.replace(kept[0], **batched)

    return Rollout(
        x0=torch.cat([r.x0 for r in rollouts]),
        sigmas=rollouts[0].sigmas,
        transitions=join([r.transitions for r in rollouts]),
    )
