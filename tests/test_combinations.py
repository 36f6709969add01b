"""Every legal objective x estimator x sampler: it plans, and its gradient is that of its loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ablate.compatibility import impossible
from ablate.contracts import DIMS, GROUPS, POINTS, SIZE, STEPS, Scene, roll_out
from ablate.estimators import ESTIMATORS
from ablate.grid import load_grid
from ablate.objectives import OBJECTIVES
from ablate.passes import passes
from ablate.plan import make_plan
from ablate.recipe import Recipe
from ablate.samplers import SAMPLERS
from ablate.seeding import streams

RECIPE = Recipe.model_validate({"budget": {"epochs": 1}, "rollout": {"num_steps": STEPS}})


def demanded(objective: str) -> dict[str, str]:
    """The advantage that an objective is defined by."""
    return {"centre": "leave_one_out"} if objective == "rloo" else {}


def legal(objective: str) -> list[tuple[str, str]]:
    recipe = RECIPE.model_copy(update={"advantage": RECIPE.advantage.model_copy(update=demanded(objective))})

    def reason(estimator: str, sampler: str) -> str | None:
        names = {"objective": objective, "estimator": estimator, "sampler": sampler}
        parts = (OBJECTIVES[objective](), ESTIMATORS[estimator](), SAMPLERS[sampler]())
        return impossible(names, *parts, recipe)

    return [pair for pair in itertools.product(ESTIMATORS, SAMPLERS) if reason(*pair) is None]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_combination_plans_or_is_explained(objective: str, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "r.yaml").write_text(f"budget: {{epochs: 1}}\nadvantage: {demanded(objective)}\n")
    axes = {"objective": [objective], "estimator": list(ESTIMATORS), "sampler": list(SAMPLERS)}
    (tmp_path / "g.yaml").write_text(f"name: g\nrecipe: r\naxes: {axes}\nseeds: [0]\n")
    plan = make_plan(load_grid(tmp_path / "g.yaml"))
    planned = {(cell.components["estimator"].name, cell.components["sampler"].name) for cell in plan.cells}
    assert planned == set(legal(objective))
    assert len(plan.cells) + len(plan.excluded) == len(ESTIMATORS) * len(SAMPLERS)
    assert all(passes(cell).backward > 0 for cell in plan.cells)
    assert all(len(excluded.reason) > 20 for excluded in plan.excluded)


@contextmanager
def stopped_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Inside, `detach` first records its results; after `replay()` it returns them again, in the same order.

    So a loss with stopped gradients becomes a function that finite differences can follow.
    """
    real, recorded, position = Tensor.detach, [], [-1]

    def detach(self: Tensor) -> Tensor:
        if position[0] < 0:
            recorded.append(real(self))
            return recorded[-1]
        position[0] += 1
        return recorded[position[0] - 1]

    def replay() -> None:
        position[0] = 0

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "detach", detach)
        yield replay


class Policy:
    """v = the exact velocity of the small flow + what a small network adds."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.weights = 0.05 * torch.randn(DIMS + 2, DIMS, generator=g, dtype=torch.float64)

    def __call__(self, probe, exact: Tensor, weights: Tensor | None = None) -> Tensor:
        level = probe.sigma[..., None]
        features = torch.cat([torch.tanh(probe.x), level, torch.ones_like(level)], -1)
        return exact + features @ (self.weights if weights is None else weights)


def scene_of(objective: Any, estimator: Any, sampler: Any) -> tuple[Scene, Policy, Tensor]:
    rollout = roll_out(sampler)
    group = torch.arange(GROUPS).repeat_interleave(SIZE)
    samples = group.tolist() if objective.level == "group" else range(len(group))
    probe = estimator.probe(rollout, num_points=POINTS, streams=streams(1, "probe", samples=samples))
    current, old, reference = (Policy(seed) for seed in range(3))
    exact = torch.zeros_like(probe.x) if probe.rollout_velocity is None else probe.rollout_velocity
    scene = Scene(
        objective=objective,
        estimator=estimator,
        probe=probe,
        velocity=current(probe, exact),
        old_velocity=exact if "transitions" in estimator.needs else old(probe, exact),
        reference_velocity=reference(probe, exact),
        advantage=torch.randn(len(group), generator=torch.Generator().manual_seed(7), dtype=torch.float64),
        group=group,
    )
    return scene, current, exact


def check_gradient(objective: Any, estimator: Any, sampler: Any, monkeypatch: pytest.MonkeyPatch) -> float:
    """In one direction, the gradient is the central difference of the loss. Returns its largest entry."""
    scene, policy, exact = scene_of(objective, estimator, sampler)
    direction = torch.randn(policy.weights.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    h = 1e-6
    with stopped_gradients(monkeypatch) as replay:
        weights = policy.weights.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(scene.loss(policy(scene.probe, exact, weights)), weights)
        values = []
        for sign in (1, -1):
            replay()
            values.append(float(scene.loss(policy(scene.probe, exact, policy.weights + sign * h * direction))))
    expected = (values[0] - values[1]) / (2 * h)
    found = float((gradient * direction).sum())
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7), (estimator, sampler)
    return float(gradient.abs().max())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_match_finite_differences(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All names of all tables, with their defaults: about 900 combinations in a few seconds."""
    combinations = legal(objective)
    assert combinations
    for estimator, sampler in combinations:
        parts = (OBJECTIVES[objective](), ESTIMATORS[estimator](), SAMPLERS[sampler]())
        assert check_gradient(*parts, monkeypatch) > 0, (estimator, sampler)


VARIANTS = {
    "estimator": [
        *(
            {"name": "elbo", "weight": weight, "sigma_law": law, "pool": pool}
            for weight, law, pool in itertools.product(
                ("adaptive", "simple", "path_kl", "x0", "ghuber"),
                ("sampler_grid", "uniform", "linear", "logit_normal", "scheduler_density"),
                ("each", "mean", "sum"),
            )
        ),
        {"name": "elbo", "weight": "simple", "sigma_law": "logit_normal", "importance": True},
        {"name": "elbo", "antithetic": True},
        {"name": "elbo", "xt_from_rollout": True},
        {"name": "elbo", "weight": "simple", "unit": "nats"},
        *({"name": "trajectory", "pool": p, "unit": u} for p in ("each", "mean", "sum") for u in ("dimension", "nats")),
    ],
    "sampler": [
        {"name": "ode", "solver": "dpm2"},
        {"name": "sde", "score_last": True},
        {"name": "ddim", "eta": 0.3},
        {"name": "dpm_sde", "order": 2},
        {"name": "cps", "use_density": True},
        *({"name": "mixed", "policy": policy} for policy in ("random", "progressive", "exp_decay", "branch")),
    ],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_of_all_variants_match_finite_differences(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = 0
    recipe = RECIPE.model_copy(update={"advantage": RECIPE.advantage.model_copy(update=demanded(objective))})
    for chosen in itertools.product(VARIANTS["estimator"], VARIANTS["sampler"]):
        parts = [
            OBJECTIVES[objective](),
            *(
                table[spec["name"]](**{k: v for k, v in spec.items() if k != "name"})
                for table, spec in zip((ESTIMATORS, SAMPLERS), chosen, strict=True)
            ),
        ]
        names = {"objective": objective, "estimator": chosen[0]["name"], "sampler": chosen[1]["name"]}
        if impossible(names, *parts, recipe) is None:
            check_gradient(*parts, monkeypatch)
            checked += 1
    assert checked
