"""What flows between the three axes: rollouts, probes and evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Batched = TypeVar("Batched")
Needed = TypeVar("Needed")


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """The stochastic steps of a rollout, linear-Gaussian in (x, velocity).

    next_x ~ N(x_coef x + velocity_coef velocity, std^2 I). Latents are stored in the dtype the network saw.
    """

    x: Tensor  # [b, s, ...]
    next_x: Tensor  # [b, s, ...]
    velocity: Tensor  # [b, s, ...]  what the rollout policy said there
    sigma: Tensor  # [s]
    next_sigma: Tensor  # [s]
    x_coef: Tensor  # [s]
    velocity_coef: Tensor  # [s]
    std: Tensor  # [s]

    def first(self, num_steps: int) -> Transitions:
        """The first so many of the steps."""
        parts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Transitions(**{name: v[:num_steps] if v.ndim == 1 else v[:, :num_steps] for name, v in parts.items()})


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """b samples of one sampler. `transitions` is None for a deterministic sampler."""

    x0: Tensor  # [b, ...]  clean latents
    sigmas: Tensor  # [t + 1]  decreasing, 1 = noise, 0 = data
    transitions: Transitions | None = None
    latents: Tensor | None = None  # [b, t, ...]  what the network saw, for estimators that need it


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
    """What an objective sees. What it does not declare in `needs` is None, and is not computed for it."""

    log_prob: Tensor  # [b, k]  nats per latent dimension, differentiable
    old_log_prob: Tensor | None = None  # [b, k]  "old"
    reference_log_prob: Tensor | None = None  # [b, k]  "reference"
    advantage: Tensor  # [b]
    group: Tensor  # [b]  samples with equal numbers share a prompt
    reward: Tensor | None = None  # [b]  "reward"
    velocity: Tensor | None = None  # [b, k, ...]  "velocity", differentiable
    old_velocity: Tensor | None = None  # [b, k, ...]  "velocity" and "old"
    reference_velocity: Tensor | None = None  # [b, k, ...]  "velocity" and "reference"
    probe: Any = None  # "target": an ElboProbe; "transitions": a TrajectoryProbe

    def old(self) -> Tensor:
        """The rollout policy's log-prob, for an objective that declares `needs = {"old"}`."""
        return needed(self.old_log_prob)

    def reference(self) -> Tensor:
        """The reference policy's log-prob, for an objective that declares `needs = {"reference"}`."""
        return needed(self.reference_log_prob)


def needed(value: Needed | None) -> Needed:
    """A field of an evaluation that the objective has declared in `needs`."""
    assert value is not None, "the objective reads what it does not declare in `needs`"
    return value


def take(batch: Batched, rows: slice | Tensor, columns: slice = slice(None)) -> Batched:
    """The rows (samples) and columns (points or steps) of a dataclass of tensors [b], [b, k] or [b, k, ...]."""

    def part(value: Any) -> Any:
        if value is None:
            return None
        if dataclasses.is_dataclass(value):
            return take(value, rows, columns)
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

    if len(rollouts) == 1:
        return rollouts[0]
    latents = [r.latents for r in rollouts if r.latents is not None]
    return Rollout(
        x0=torch.cat([r.x0 for r in rollouts]),
        sigmas=rollouts[0].sigmas,
        transitions=join([r.transitions for r in rollouts]),
        latents=torch.cat(latents) if latents else None,
    )


def select(rollout: Rollout, samples: Tensor) -> Rollout:
    """The samples with these indices."""
    t = rollout.transitions
    if t is not None:
        t = dataclasses.replace(t, x=t.x[samples], next_x=t.next_x[samples], velocity=t.velocity[samples])
    latents = None if rollout.latents is None else rollout.latents[samples]
    return Rollout(x0=rollout.x0[samples], sigmas=rollout.sigmas, transitions=t, latents=latents)
