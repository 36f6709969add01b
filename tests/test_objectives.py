"""Contracts over every objective, and the facts that single ones promise."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from ablate.objectives import OBJECTIVES
from ablate.objectives.epg import EPG
from ablate.objectives.grpo import GRPO, GSPO
from ablate.objectives.reinforce import Reinforce
from ablate.rollout import Evaluation

GROUPS, SIZE, POINTS = 3, 4, 5
RATIO_SURROGATES = ("epg", "grpo", "gspo")


def evaluation(needs=("old", "reference"), on_policy=False, advantage=None, seed=0) -> Evaluation:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n = GROUPS * SIZE
    f = draw(n, POINTS).requires_grad_()
    old = f.detach().clone() if on_policy else f.detach() + 0.01 * draw(n, POINTS)
    a = draw(n) if advantage is None else advantage
    return Evaluation(
        log_prob=f,
        old_log_prob=old if "old" in needs else None,
        reference_log_prob=f.detach() + 0.1 * draw(n, POINTS) if "reference" in needs else None,
        advantage=a,
        group=torch.arange(GROUPS).repeat_interleave(SIZE),
    )


def gradient(objective, e: Evaluation) -> Tensor:
    return torch.autograd.grad(objective(e)[0], e.log_prob)[0]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_zero_advantage_gives_zero_gradient(name: str) -> None:
    objective = OBJECTIVES[name]()
    e = evaluation(advantage=torch.zeros(GROUPS * SIZE, dtype=torch.float64))
    assert gradient(objective, e).abs().max() == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_declared_needs_are_the_needs(name: str) -> None:
    objective = OBJECTIVES[name]()
    assert objective.needs <= {"old", "reference"}
    loss, metrics = objective(evaluation(needs=objective.needs))
    assert loss.shape == ()
    assert all(value.shape == () for value in metrics.values())
    for missing in objective.needs:
        with pytest.raises(AssertionError):
            objective(evaluation(needs=objective.needs - {missing}))


@pytest.mark.parametrize("name", RATIO_SURROGATES)
def test_on_policy_every_ratio_surrogate_is_reinforce(name: str) -> None:
    e = evaluation(on_policy=True)
    torch.testing.assert_close(gradient(OBJECTIVES[name](), e), gradient(Reinforce(), e))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_down_the_gradient_prefers_the_better_sample(name: str) -> None:
    e = evaluation(on_policy=True)
    direction = -gradient(OBJECTIVES[name](), e).sum(1)
    for group in range(GROUPS):
        rows = (e.group == group).nonzero()[:, 0]
        assert direction[rows[e.advantage[rows].argmax()]] > direction[rows[e.advantage[rows].argmin()]]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_is_a_mean_over_units_and_couples_no_further_than_its_level(name: str) -> None:
    """The whole batch's loss is the mean of its units' losses: terms, samples or groups."""
    objective, e = OBJECTIVES[name](), evaluation()
    rows = {"term": 1, "sample": 1, "group": SIZE}[objective.level]
    columns = 1 if objective.level == "term" else POINTS
    parts = []
    for r in range(0, GROUPS * SIZE, rows):
        for c in range(0, POINTS, columns):
            part = (slice(r, r + rows), slice(c, c + columns))
            unit = Evaluation(
                log_prob=e.log_prob[part],
                old_log_prob=e.old()[part],
                reference_log_prob=e.reference()[part],
                advantage=e.advantage[part[0]],
                group=e.group[part[0]],
            )
            parts.append(objective(unit)[0])
    torch.testing.assert_close(objective(e)[0], torch.stack(parts).mean())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_matches_finite_differences(name: str) -> None:
    objective, e = OBJECTIVES[name](), evaluation(seed=3)
    if name == "epg":  # its ratio has no gradient, so its loss is not the antiderivative: compare the surrogate
        surrogate = -(e.advantage[:, None] * (e.log_prob - e.old()).exp()).mean()
        torch.testing.assert_close(gradient(objective, e), torch.autograd.grad(surrogate, e.log_prob)[0])
        return
    analytic, h = gradient(objective, e), 1e-6
    for index in [(0, 0), (5, 2), (11, 4)]:
        values = []
        for sign in (1, -1):
            shifted = e.log_prob.detach().clone()
            shifted[index] += sign * h
            values.append(objective(replace_log_prob(e, shifted))[0])
        assert float((values[0] - values[1]) / (2 * h)) == pytest.approx(float(analytic[index]), abs=1e-6)


def replace_log_prob(e: Evaluation, log_prob: Tensor) -> Evaluation:
    return dataclasses.replace(e, log_prob=log_prob)


@pytest.mark.parametrize(("name", "field"), [("grpo", "clip_range"), ("gspo", "clip_range"), ("dpo", "beta")])
def test_hyperparameters_that_must_be_positive(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be positive, got -1"):
        OBJECTIVES[name](**{field: -1})


def test_epg_has_the_gradient_of_the_unclipped_surrogate() -> None:
    e = evaluation()
    torch.testing.assert_close(gradient(EPG(), e), gradient(GRPO(clip_range=1e9), e))


def test_clipping_stops_ratios_that_have_moved_enough() -> None:
    e = evaluation()
    ratio = (e.log_prob - e.old()).detach().exp()
    moved = ((ratio > 1.005) & (e.advantage[:, None] > 0)) | ((ratio < 0.995) & (e.advantage[:, None] < 0))
    g = gradient(GRPO(clip_range=0.005), e)
    assert moved.any()
    assert torch.equal(g == 0, moved)


def test_gspo_clips_whole_samples() -> None:
    g = gradient(GSPO(clip_range=1e-3), evaluation())
    zero = g == 0
    assert torch.equal(zero.any(1), zero.all(1))
    assert zero.any()


def test_dpo_moves_the_best_and_the_worst_alone() -> None:
    e = evaluation(on_policy=True)
    g = gradient(OBJECTIVES["dpo"](), e)
    for group in range(GROUPS):
        rows = (e.group == group).nonzero()[:, 0]
        a = e.advantage[rows]
        moved = set(rows[(g[rows] != 0).any(1)].tolist())
        assert moved == {int(rows[a.argmax()]), int(rows[a.argmin()])}
