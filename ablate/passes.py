"""The network calls of a cell, as they follow from its components and recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ablate.components import build
from ablate.grid import COMPONENT_AXES
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
    """The forward plan of a cell, per image: which policies are asked, and how often.

    The old policy is not asked when the objective does not read it, when the sampler has recorded its answers, or when
    it still equals the current one; the reference only when the objective or the KL reads it. An objective that
    couples more than a micro-batch holds needs its log-probs once more, without gradient.
    """
    objective, estimator, sampler = (build(axis, cell.components[axis]) for axis in COMPONENT_AXES)
    recipe = cell.recipe
    points = _num_points(cell, estimator, sampler)
    sampling, training = (1 + (scale > 1) for scale in (recipe.rollout.guidance_scale, recipe.update.guidance_scale))
    old = float("old" in objective.needs and not estimator.needs_transitions)  # a trajectory records its answers
    if recipe.old_policy.decay == "none":
        old *= 1 - 1 / recipe.update.updates_per_epoch
    reference = "reference" in objective.needs or recipe.kl.coef > 0
    single = one_pass(objective.level, points, recipe.update.micro_batch_size, recipe.rollout.group_size)
    return Passes(
        rollout=recipe.rollout.num_steps * sampling,
        forward=points * (old + reference + (not single)) * training,
        backward=points * training,
    )


def one_pass(level: str, num_points: int, micro_batch_size: int, group_size: int) -> bool:
    """Whether a micro-batch holds all the entries that the objective's loss couples."""
    samples = micro_batch_size // num_points
    return {"term": True, "sample": samples >= 1, "group": samples >= group_size}[level]


def _num_points(cell: Cell, estimator: Any, sampler: Any) -> int:
    steps, asked = cell.recipe.rollout.num_steps, cell.recipe.update.num_points
    if estimator.needs_transitions:
        scored: int = sampler.num_scored(steps)
        return min(asked or scored, scored)
    points = asked or steps - 1
    return min(points, steps) if getattr(estimator, "law", None) == "sampler_grid" else points
