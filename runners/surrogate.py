"""The gradient of any objective in bounded memory.

An objective is a function of the log-probs [B, K] of a whole update. Where it couples more entries than one
micro-batch holds, the log-probs are first evaluated without gradient, c = d loss / d log_prob is taken on that small
matrix, and the network is replayed micro-batch by micro-batch with the loss sum(c log_prob): the chain rule, cut at
log_prob, so it equals full-graph autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ablate.estimators import Estimator
from ablate.kl import velocity_kl
from ablate.objectives import Objective
from ablate.passes import one_pass
from ablate.rollout import Evaluation, Probe, take

Ask = Callable[[Literal["current", "old", "reference"], slice, slice], Tensor]
"""The velocity [n, m, ...] of a policy at some rows (samples) and columns (points) of the probe."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The samples of one update, whole groups, sorted by group."""

    probe: Probe  # [b, k]
    advantage: Tensor  # [b]
    group: Tensor  # [b]
    group_size: int


@dataclass(frozen=True)
class _Answers:
    """What the other policies say at one micro-batch."""

    rows: slice
    columns: slice
    share: float  # of the update's terms
    old_log_prob: Tensor | None
    reference_log_prob: Tensor | None
    reference_velocity: Tensor | None


def accumulate_gradient(
    objective: Objective,
    estimator: Estimator[Any],
    batch: Batch,
    ask: Ask,
    *,
    micro_batch_size: int,
    kl_coef: float = 0.0,
    old_is_current: bool = False,
) -> dict[str, Tensor]:
    """Add d(objective + kl_coef KL) / d parameters to `.grad`; returns the loss and the objective's metrics."""
    num_samples, num_points = batch.probe.sigma.shape

    def log_prob(velocity: Tensor, rows: slice, columns: slice) -> Tensor:
        return estimator.log_prob(velocity, take(batch.probe, rows, columns))

    @torch.no_grad()
    def answers(rows: slice, columns: slice) -> _Answers:
        old = reference = velocity = None
        if "old" in objective.needs and not old_is_current:
            recorded = batch.probe.rollout_velocity
            asked = ask("old", rows, columns) if recorded is None else recorded[rows, columns]
            old = log_prob(asked, rows, columns)
        if "reference" in objective.needs or kl_coef > 0:
            asked = ask("reference", rows, columns)
            reference = log_prob(asked, rows, columns)
            velocity = asked if kl_coef > 0 else None
        share = batch.probe.sigma[rows, columns].numel() / (num_samples * num_points)
        return _Answers(rows, columns, share, old, reference, velocity)

    def evaluate(
        f: Tensor, old: Tensor | None, reference: Tensor | None, rows: slice
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if "old" in objective.needs and old is None:
            old = f.detach()
        evaluation = Evaluation(
            log_prob=f,
            old_log_prob=old,
            reference_log_prob=reference if "reference" in objective.needs else None,
            advantage=batch.advantage[rows],
            group=batch.group[rows],
        )
        return objective(evaluation)

    chunks = [
        answers(*chunk)
        for chunk in _chunks(num_samples, num_points, micro_batch_size, objective.level, batch.group_size)
    ]
    single = one_pass(objective.level, num_points, micro_batch_size, batch.group_size)
    metrics: dict[str, Tensor] = {}
    weights = None
    if not single:
        with torch.no_grad():
            values = [log_prob(ask("current", c.rows, c.columns), c.rows, c.columns) for c in chunks]
            f = _assemble(values, chunks, batch.probe.sigma)
        f.requires_grad_()
        loss, metrics = evaluate(
            f,
            _assemble([c.old_log_prob for c in chunks], chunks, batch.probe.sigma),
            _assemble([c.reference_log_prob for c in chunks], chunks, batch.probe.sigma),
            slice(None),
        )
        (weights,) = torch.autograd.grad(loss, f)
        metrics = {"loss": loss.detach(), **metrics}
    for chunk in chunks:
        velocity = ask("current", chunk.rows, chunk.columns)
        f = log_prob(velocity, chunk.rows, chunk.columns)
        parts: dict[str, Tensor] = {}
        if weights is None:
            loss, parts = evaluate(f, chunk.old_log_prob, chunk.reference_log_prob, chunk.rows)
            parts = {"loss": loss.detach(), **parts}
            loss = loss * chunk.share
        else:
            loss = (weights[chunk.rows, chunk.columns] * f).sum()
        if kl_coef > 0:
            assert chunk.reference_velocity is not None
            kl = velocity_kl(velocity, chunk.reference_velocity).mean()
            parts["kl"] = kl.detach()
            loss = loss + kl_coef * kl * chunk.share
        loss.backward()  # type: ignore[no-untyped-call]
        for name, value in parts.items():
            metrics[name] = metrics.get(name, torch.zeros_like(value)) + value * chunk.share
    return metrics


def _chunks(num_samples: int, num_points: int, size: int, level: str, group_size: int) -> Iterator[tuple[slice, slice]]:
    """Micro-batches of at most `size` entries (but at least one): whole samples and groups where they fit."""
    if size < num_points:
        for row in range(num_samples):
            for column in range(0, num_points, size):
                yield slice(row, row + 1), slice(column, min(column + size, num_points))
        return
    rows = size // num_points
    if level == "group" and rows >= group_size:
        rows -= rows % group_size
    for row in range(0, num_samples, rows):
        yield slice(row, min(row + rows, num_samples)), slice(0, num_points)


def _assemble(parts: list[Any], chunks: list[_Answers], shape_of: Tensor) -> Any:
    """The matrix [b, k] whose micro-batches these are; None where nobody was asked."""
    if parts[0] is None:
        return None
    whole = torch.empty(shape_of.shape, dtype=parts[0].dtype, device=parts[0].device)
    for part, chunk in zip(parts, chunks, strict=True):
        whole[chunk.rows, chunk.columns] = part
    return whole
