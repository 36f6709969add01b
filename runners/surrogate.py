"""The gradient of any objective in bounded memory.

An objective is a function of the log-probs [B, K] of a whole update. Where it couples more entries than one
micro-batch holds, the log-probs are first evaluated without gradient, c = d loss / d log_prob is taken on that small
matrix, and the network is replayed micro-batch by micro-batch with the loss sum(c log_prob): the chain rule, cut at
log_prob, so it equals full-graph autograd. An objective that reads velocities couples single terms alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ablate.estimators import Estimator
from ablate.estimators.protocol import pooled
from ablate.kl import KINDS, Difference
from ablate.objectives import Objective
from ablate.passes import coupling, one_pass
from ablate.recipe import KLRecipe
from ablate.rollout import Evaluation, Probe, needed, take

Asked = Literal["current", "old", "reference"]
Ask = Callable[[Asked, slice, slice], Tensor]
"""The velocity [n, m, ...] of a policy at some rows (samples) and columns (points) of the probe."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples of one update, whole groups, sorted by group."""

    probe: Probe  # [b, k]
    advantage: Tensor  # [b]
    group: Tensor  # [b]
    group_size: int
    reward: Tensor | None = None  # [b]


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """What the other policies say at one micro-batch."""

    rows: slice
    columns: slice
    share: float  # of the update's terms
    probe: Probe  # its part
    old_velocity: Tensor | None = None
    reference_velocity: Tensor | None = None
    old_log_prob: Tensor | None = None
    reference_log_prob: Tensor | None = None


def accumulate_gradient(
    objective: Objective,
    estimator: Estimator[Any],
    batch: Batch,
    ask: Ask,
    *,
    micro_batch_size: int,
    kl: KLRecipe | None = None,
    old_is_current: bool = False,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> dict[str, Tensor]:
    """Add d(objective + kl.coef KL) / d parameters to `.grad`; returns the loss and the objective's metrics.

    With `old_is_current`, the log-probs of recorded steps are compared with those of the velocities that the rollout
    saw: `on_policy_log_ratio`, the mean distance in the estimator's unit.

    `scale` multiplies what the backward starts from, for gradients in float16.
    """
    num_samples, num_points = batch.probe.sigma.shape
    kl = kl or KLRecipe()

    @torch.no_grad()
    def answers(rows: slice, columns: slice) -> _Answers:
        probe = take(batch.probe, rows, columns)
        old = reference = None
        if "old" in objective.needs:
            old = probe.rollout_velocity
            if old is None and not old_is_current:
                old = ask("old", rows, columns)
        if "reference" in objective.needs or kl.coef > 0:
            reference = ask("reference", rows, columns)
        return _Answers(  # velocities are kept only where they are read: those of whole updates do not fit
            rows=rows,
            columns=columns,
            share=probe.sigma.numel() / (num_samples * num_points),
            probe=probe,
            old_velocity=old if "velocity" in objective.needs else None,
            reference_velocity=reference if "velocity" in objective.needs or kl.coef > 0 else None,
            old_log_prob=None if old is None else estimator.log_prob(old, probe),
            reference_log_prob=None if reference is None else estimator.log_prob(reference, probe),
        )

    def evaluate(f: Tensor, velocity: Tensor | None, of: _Answers) -> tuple[Tensor, dict[str, Tensor]]:
        old, old_velocity = of.old_log_prob, of.old_velocity
        if old is None:
            old, old_velocity = f.detach(), None if velocity is None else velocity.detach()

        def declared(need: str, value: Any) -> Any:
            return value if need in objective.needs else None

        def as_seen(value: Tensor | None) -> Tensor | None:
            return None if value is None else pooled(value, estimator.pool)

        needs_probe = objective.needs & {"target", "transitions"}
        evaluation = Evaluation(
            log_prob=pooled(f, estimator.pool),
            old_log_prob=declared("old", as_seen(old)),
            reference_log_prob=declared("reference", as_seen(of.reference_log_prob)),
            advantage=batch.advantage[of.rows],
            group=batch.group[of.rows],
            reward=declared("reward", None if batch.reward is None else batch.reward[of.rows]),
            velocity=declared("velocity", velocity),
            old_velocity=declared("velocity", declared("old", old_velocity)),
            reference_velocity=declared("velocity", declared("reference", of.reference_velocity)),
            probe=of.probe if needs_probe else None,
        )
        return objective(evaluation)

    level = coupling(objective, estimator)
    places = _chunks(num_samples, num_points, micro_batch_size, level, batch.group_size)
    chunks: Iterable[_Answers] = (answers(*place) for place in places)
    metrics: dict[str, Tensor] = {}
    weights = None
    if not one_pass(level, num_points, micro_batch_size, batch.group_size):
        chunks = list(chunks)
        with torch.no_grad():
            values = [estimator.log_prob(ask("current", c.rows, c.columns), c.probe) for c in chunks]
        f = _assemble(values, chunks, batch.probe.sigma).requires_grad_()
        whole = _Answers(
            rows=slice(None),
            columns=slice(None),
            share=1.0,
            probe=batch.probe,
            old_log_prob=_assemble([c.old_log_prob for c in chunks], chunks, batch.probe.sigma),
            reference_log_prob=_assemble([c.reference_log_prob for c in chunks], chunks, batch.probe.sigma),
        )
        loss, metrics = evaluate(f, None, whole)
        (weights,) = torch.autograd.grad(loss, f)
        metrics = {"loss": loss.detach(), **metrics}
    for chunk in chunks:
        velocity = ask("current", chunk.rows, chunk.columns)
        f = estimator.log_prob(velocity, chunk.probe)
        parts = _off_policy(f.detach(), estimator, chunk.probe) if old_is_current else {}
        if weights is None:
            loss, measured = evaluate(f, velocity, chunk)
            parts |= {"loss": loss.detach(), **measured}
            loss = loss * chunk.share
        else:
            loss = (weights[chunk.rows, chunk.columns] * f).sum()
        if kl.coef > 0:
            difference = Difference(
                velocity=velocity,
                reference_velocity=needed(chunk.reference_velocity),
                log_prob=f,
                reference_log_prob=needed(chunk.reference_log_prob),
                probe=chunk.probe,
            )
            distance = KINDS[kl.kind](difference).mean()
            parts["kl"] = distance.detach()
            loss = loss + kl.coef * distance * chunk.share
        scale(loss).backward()  # type: ignore[no-untyped-call]
        for name, value in parts.items():
            metrics[name] = metrics.get(name, torch.zeros_like(value)) + value * chunk.share
    return metrics


def _off_policy(f: Tensor, estimator: Estimator[Any], probe: Probe) -> dict[str, Tensor]:
    """How far log-probs [n, m] of the policy that rolled out are from those of what it said then."""
    if probe.rollout_velocity is None:
        return {}
    return {"on_policy_log_ratio": (f - estimator.log_prob(probe.rollout_velocity, probe)).abs().mean()}


def _chunks(num_samples: int, num_points: int, size: int, level: str, group_size: int) -> Iterator[tuple[slice, slice]]:
    """Micro-batches of at most `size` entries (but at least one): whole samples and groups where they fit."""
    if size < num_points:
        for row in range(num_samples):
            for column in range(0, num_points, size):
                yield slice(row, row + 1), slice(column, min(column + size, num_points))
        return
    whole = group_size if level == "group" and size // num_points >= group_size else 1
    most = size // num_points // whole * whole
    num_chunks = math.ceil(num_samples / most)
    rows = math.ceil(num_samples / whole / num_chunks) * whole  # as equal as can be: small ones are slow
    for row in range(0, num_samples, rows):
        yield slice(row, min(row + rows, num_samples)), slice(0, num_points)


def _assemble(parts: Sequence[Any], chunks: Sequence[_Answers], shape_of: Tensor) -> Any:
    """The matrix [b, k] whose micro-batches these are; None where nobody was asked."""
    if parts[0] is None:
        return None
    whole = torch.empty(shape_of.shape, dtype=parts[0].dtype, device=parts[0].device)
    for part, chunk in zip(parts, chunks, strict=True):
        whole[chunk.rows, chunk.columns] = part
    return whole
