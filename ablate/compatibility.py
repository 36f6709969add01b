"""Which components and recipe fit together, and why others do not, in words."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from ablate.recipe import Recipe
from ablate.source import as_yaml


def impossible(names: Mapping[str, str], objective: Any, estimator: Any, sampler: Any, recipe: Recipe) -> str | None:
    """Why the components of these names cannot be in one cell under a recipe; None if they can."""
    o, e, s = (names[axis] for axis in ("objective", "estimator", "sampler"))
    problems = itertools.chain(
        _of_estimator_and_sampler(e, estimator, s, sampler),
        _of_objective_and_estimator(o, objective, e, estimator),
        _of_sampler_and_recipe(s, sampler, recipe),
        _of_estimator_and_recipe(e, estimator, recipe),
        _of_objective_and_recipe(o, objective, recipe),
    )
    return next(problems, None)


def _of_estimator_and_sampler(e: str, estimator: Any, s: str, sampler: Any) -> Iterator[str]:
    if "transitions" in estimator.needs - sampler.leaves:
        yield f"{e} needs transition densities, and {s} leaves none: use sde or elbo"
    if "density" in estimator.needs - sampler.leaves:
        yield f"{e} needs a density, and the steps of {s} are not meant to have one: use cps_distance, or use_density"


def _of_objective_and_estimator(o: str, objective: Any, e: str, estimator: Any) -> Iterator[str]:
    on_steps = "transitions" in estimator.needs
    if "transitions" in objective.needs and not on_steps:
        yield f"{o} needs the steps of a rollout, their mean and deviation, and {e} has none: use estimator trajectory"
    if "target" in objective.needs and on_steps:
        yield f"{o} regresses on velocities at noised final samples, and {e} has none: use estimator elbo"
    if objective.level == "term" and objective.needs & {"velocity", "transitions"} and estimator.pool != "each":
        yield f"{o} takes each point by itself, and {e} pools them (pool: {estimator.pool}): use one with pool each"


def _of_sampler_and_recipe(s: str, sampler: Any, recipe: Recipe) -> Iterator[str]:
    if problem := sampler.problem(recipe.rollout.num_steps):
        yield problem
    if recipe.rollout.noise == "group" and getattr(sampler, "deterministic", False):
        yield f"with rollout.noise group, all images of a prompt are the same under {s}, which has no noise of its own"
    if recipe.rollout.noise != "group" and getattr(sampler, "policy", None) == "branch":
        yield f"{s} branches off a path that a group shares: set rollout.noise to group"


def _of_estimator_and_recipe(e: str, estimator: Any, recipe: Recipe) -> Iterator[str]:
    on_steps, kind = "transitions" in estimator.needs, recipe.kl.kind
    if on_steps and recipe.rollout.guidance_scale != recipe.update.guidance_scale:
        yield f"{e} scores the rollout's own steps, so rollout and update need the same guidance_scale"
    if not on_steps and recipe.kl.coef > 0 and kind.endswith("gaussian_step"):
        yield f"kl.kind {kind} compares the Gaussians of a rollout's steps, and {e} has none: use velocity"
    if recipe.update.group_probe == "stratified" and (on_steps or getattr(estimator, "law", None) == "sampler_grid"):
        yield f"group_probe stratified needs a continuous law of sigma, and {e} draws from the rollout's own levels"


def _of_objective_and_recipe(o: str, objective: Any, recipe: Recipe) -> Iterator[str]:
    if recipe.update.group_probe == "stratified" and objective.level == "group":
        yield f"{o} compares samples at the same probe, so group_probe cannot be stratified"
    for path, wanted in getattr(objective, "demands", {}).items():
        if (got := operator.attrgetter(path)(recipe)) != wanted:
            yield f"{o} is defined by {path}: {as_yaml(wanted)}, and the recipe has {as_yaml(got)}"
