"""Advantages in closed form, and what no reward may break."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ablate.advantages import EPSILON, advantages
from ablate.recipe import AdvantageRecipe, OldPolicyRecipe

REWARD = torch.tensor([1.0, 3.0, 0.0, 4.0], dtype=torch.float64)  # groups of mean 2, deviations 1 and 2
GROUP = torch.tensor([0, 0, 1, 1])
SCALES = ["none", "group", "batch"]
REWARDS = st.lists(
    st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=3, max_size=3), min_size=1, max_size=6
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))


def of(reward: Tensor, group: Tensor, weights: Any = None, **recipe: Any) -> Tensor:
    return advantages(reward, group, AdvantageRecipe(**recipe), weights)


def by_rows(reward: Tensor, **recipe: Any) -> Tensor:
    """[groups, size] -> [groups, size]"""
    group = torch.arange(len(reward)).repeat_interleave(reward.shape[1])
    return of(reward.flatten(), group, **recipe).view_as(reward)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({}, [-1, 1, -2, 2]),
        ({"coef": 0.5}, [-0.5, 0.5, -1, 1]),
        ({"clip": 1.5}, [-1, 1, -1.5, 1.5]),
        ({"coef": 3, "clip": 4}, [-3, 3, -4, 4]),  # the clip comes last
        ({"scale": "group"}, [-1 / (1 + EPSILON), 1 / (1 + EPSILON), -2 / (2 + EPSILON), 2 / (2 + EPSILON)]),
        ({"scale": "batch"}, [a / (2.5**0.5 + EPSILON) for a in (-1, 1, -2, 2)]),  # variance (1 + 1 + 4 + 4) / 4
        ({"centre": "leave_one_out"}, [-2, 2, -4, 4]),  # R - the other one
        ({"scale": "batch", "coef": 2, "clip": 1.3}, [-2 / 2.5**0.5, 2 / 2.5**0.5, -1.3, 1.3]),
    ],
)
def test_closed_forms(recipe: dict[str, Any], expected: list[float]) -> None:
    torch.testing.assert_close(of(REWARD, GROUP, **recipe), torch.tensor(expected).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", SCALES)
def test_groups_of_equal_rewards_have_exactly_zero(scale: str) -> None:
    reward = torch.tensor([[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]])
    assert by_rows(reward, scale=scale)[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("value", [0.1, 2 / 3, 0.7, 1e-8, 1e4 / 3])
@pytest.mark.parametrize("size", [3, 7, 24])
def test_float_noise_in_a_mean_is_no_advantage(scale: str, value: float, size: int) -> None:
    for dtype in (torch.float32, torch.float64):
        reward = torch.full((2, size), value, dtype=dtype)
        reward[0, 0] = 0.25
        assert by_rows(reward, scale=scale)[1].tolist() == [0] * size


@pytest.mark.parametrize("scale", SCALES)
@given(reward=REWARDS, shift=st.floats(-5, 5))
def test_a_constant_per_group_changes_nothing_but_the_batch_scale(scale: str, reward: Tensor, shift: float) -> None:
    moved = reward.clone()
    moved[0] += shift
    before, after = by_rows(reward, scale=scale), by_rows(moved, scale=scale)
    if scale == "batch":  # whose deviation is that of all rewards
        before, after = (a * (r.std(correction=0) + EPSILON) for a, r in ((before, reward), (after, moved)))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-9)


@given(reward=REWARDS, scale=st.sampled_from(SCALES), clip=st.none() | st.floats(0.1, 5))
def test_bounds_order_and_zero_sum(reward: Tensor, scale: str, clip: float | None) -> None:
    result = by_rows(reward, scale=scale, clip=clip)
    assert result.isfinite().all()
    if clip is None:
        assert result.sum(1).abs().max() < 1e-6
    else:
        assert result.abs().max() <= clip
    order = reward.argsort(1)
    assert (result.gather(1, order).diff(dim=1) >= -1e-9).all()


@given(reward=REWARDS, scale=st.sampled_from(SCALES), seed=st.integers(0, 99))
def test_the_order_of_samples_and_the_names_of_groups_do_not_matter(reward: Tensor, scale: str, seed: int) -> None:
    group = torch.arange(len(reward)).repeat_interleave(reward.shape[1])
    mixed = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
    expected = of(reward.flatten(), group, scale=scale)[mixed]
    torch.testing.assert_close(of(reward.flatten()[mixed], 7 - 2 * group[mixed], scale=scale), expected)


def test_win_rates_count_the_others_of_the_group_that_a_sample_beats() -> None:
    reward = torch.tensor([[1.0, 5.0, 5.0, 7.0], [2.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    expected = torch.tensor([[0, 0.5, 0.5, 1], [0.5] * 4], dtype=torch.float64) - 0.5
    torch.testing.assert_close(by_rows(reward, transform="win_rate"), expected)
    torch.testing.assert_close(by_rows(reward.exp() * 10, transform="win_rate"), expected)  # only the order counts


SEVERAL = torch.tensor([[1.0, 100.0], [3.0, 0.0], [0.0, 0.0], [4.0, 300.0]], dtype=torch.float64)


def test_several_rewards_are_summed_or_each_normalised_or_whitened_first() -> None:
    """The weights apply to what is summed, so that no standardisation takes them away."""
    weights = torch.tensor([1.0, 0.1], dtype=torch.float64)
    torch.testing.assert_close(of(SEVERAL, GROUP, weights), of(SEVERAL @ weights, GROUP))
    each = [of(SEVERAL[:, i], GROUP, scale="group") for i in range(2)]
    expected = each[0] + 0.1 * each[1]
    torch.testing.assert_close(of(SEVERAL, GROUP, weights, scale="group", several="normalised"), expected)
    white = (SEVERAL - SEVERAL.mean(0)) / (SEVERAL.std(0, correction=0) + EPSILON)
    torch.testing.assert_close(of(SEVERAL, GROUP, weights, several="whitened"), of(white @ weights, GROUP))
    wins = [of(SEVERAL[:, i], GROUP, transform="win_rate") for i in range(2)]
    torch.testing.assert_close(of(SEVERAL, GROUP, weights, transform="win_rate"), wins[0] + 0.1 * wins[1])


def test_whitened_advantages_have_mean_0_and_deviation_1() -> None:
    advantage = of(SEVERAL, GROUP, scale="group", several="normalised", whiten=True)
    assert float(advantage.mean()) == pytest.approx(0, abs=1e-12)
    assert float(advantage.std(correction=0)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("start", "rate", "limit", "expected"),
    [
        (0, 0, 0, {0: 0, 500: 0}),
        (0, 0.001, 0.5, {100: 0.1, 500: 0.5, 900: 0.5}),  # decay_type 1
        (75, 0.0075, 0.999, {75: 0, 175: 0.75, 1000: 0.999}),  # 2
        (10, 0.01, 0.5, {9: 0, 60: 0.5}),  # 3
    ],
)
def test_the_old_policy_follows_by_a_ramp(start, rate, limit, expected) -> None:
    recipe = OldPolicyRecipe(start=start, rate=rate, limit=limit)
    assert {t: recipe.decay(t) for t in expected} == pytest.approx(expected)
    assert recipe.lags == (limit > 0)
