"""The network calls of a cell, as they follow from its components and recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ablate.components import build
from ablate.part import COMPONENT_AXES
from ablate.plan import Cell


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Network calls per trained image: `forward` without gradient, `backward` with (a forward and a backward)."""

    rollout: float
    forward: float
    backward: float

    @property
    def nfe(self) -> float:
        """Calls in all; one with gradient counts three, as its backward costs about two forwards."""
        return self.rollout + self.forward + 3 * self.backward


def passes(cell: Cell) -> Passes:
    """The forward plan of a cell, per trained image: which policies are asked, and how often.

    The old policy is not asked when the objective does not read it, when the sampler has recorded its answers, or when
    it still equals the current one; the reference only when the objective or the KL reads it. An objective that
    couples more than a micro-batch holds needs its log-probs once more, without gradient. Groups that dynamic sampling
    rolls out and drops are not foreseen.
    """
    objective, estimator, sampler = (build(axis, cell.components[axis]) for axis in COMPONENT_AXES)
    recipe, steps = cell.recipe, cell.recipe.rollout.num_steps
    points = estimator.num_points(recipe.update.num_points, steps, sampler.num_scored(steps))
    sampling, training = (1 + (scale > 1) for scale in (recipe.rollout.guidance_scale, recipe.update.guidance_scale))
    old = float("old" in objective.needs and "transitions" not in estimator.needs)  # a trajectory records its answers
    if not recipe.old_policy.lags:
        old *= 1 - 1 / recipe.update.updates_per_epoch
    reference = "reference" in objective.needs or recipe.kl.coef > 0
    level = coupling(objective, estimator)
    single = one_pass(level, points, recipe.update.micro_batch_size, recipe.rollout.group_size)
    return Passes(
        rollout=steps * sampling * (recipe.rollout.candidates or recipe.rollout.group_size) / recipe.rollout.group_size,
        forward=points * (old + reference + (not single)) * training,
        backward=points * training,
    )


def coupling(objective: Any, estimator: Any) -> str:
    """How far apart the entries may be that the loss couples: pooled points of a sample are coupled at least."""
    return "sample" if objective.level == "term" and estimator.pool != "each" else str(objective.level)


def one_pass(level: str, num_points: int, micro_batch_size: int, group_size: int) -> bool:
    """Whether a micro-batch holds all the entries that the objective's loss couples."""
    samples = micro_batch_size // num_points
    return {"term": True, "sample": samples >= 1, "group": samples >= group_size}[level]
