"""Noise schedules against the tables of diffusers and DanceGRPO, and the algebra of the flow."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ablate.flow import diffusers_sigmas, interpolate, linear_sigmas, predict_x0

TEN = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0]


def test_ten_diffusers_levels() -> None:
    assert diffusers_sigmas(10).tolist() == pytest.approx(TEN, abs=1e-6)


@pytest.mark.parametrize(("num_steps", "shift"), [(4, 5.0), (8, 3.0), (25, 3.0), (40, 3.0)])
def test_levels_are_those_of_diffusers(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    assert diffusers_sigmas(num_steps, shift).tolist() == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_linear_levels_of_dance_grpo() -> None:
    expected = [1, 0.96429, 0.92308, 0.875, 0.81818, 0.75, 0.66667, 0.5625, 0.42857, 0.25, 0]
    assert linear_sigmas(10).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_true_velocity_points_to_the_clean_sample() -> None:
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    sigma = torch.tensor([0.2, 0.9], dtype=torch.float64)
    x, velocity = interpolate(x0, noise, sigma), noise - x0
    torch.testing.assert_close(predict_x0(x, velocity, sigma), x0)
