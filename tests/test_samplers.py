"""Samplers on a Gaussian flow, where marginals and transition densities are known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from gaussian_flow import GaussianFlow

from ablate.flow import diffusers_sigmas, linear_sigmas
from ablate.samplers import SAMPLERS
from ablate.samplers.mixed import Mixed
from ablate.samplers.ode import ODE, dpm2_weight
from ablate.samplers.sde import FlowSDE
from ablate.samplers.steps import flow_sde_step
from ablate.seeding import streams

FLOW = GaussianFlow()


def roll_out(sampler, num_steps, batch=4, dims=4000, sigmas=None, epoch=0, seed=0):
    own = streams(seed, "test", samples=range(batch))
    noise = own.normal([dims], torch.empty((), dtype=torch.float64))
    levels = linear_sigmas(num_steps, 1.0) if sigmas is None else sigmas
    return sampler.sample(FLOW.velocity, noise, sigmas=levels, epoch=epoch, streams=own)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_flow_sde_keeps_the_marginal(noise_level: float) -> None:
    x0 = roll_out(FlowSDE(noise_level=noise_level), 400).x0
    assert x0.mean() == pytest.approx(FLOW.mean, abs=0.02)
    assert x0.std() == pytest.approx(FLOW.scale, rel=0.03)


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm2", 2)])
def test_ode_solvers_converge_at_their_order(solver: str, order: int) -> None:
    # from sigma 0.9 to 0.1, inside the region where both are smooth; the exact map of a Gaussian flow is affine
    start, end = 0.9, 0.1
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]

    def error(num_steps: int) -> float:
        sigmas = torch.linspace(start, end, num_steps + 1, dtype=torch.float64)
        own = streams(0, samples=[0])
        out = ODE(solver=solver).sample(FLOW.velocity, x, sigmas=sigmas, epoch=0, streams=own).x0
        ratio = (FLOW.variance(sigmas[-1]) / FLOW.variance(sigmas[0])).sqrt()
        exact = (1 - end) * FLOW.mean + ratio * (x - (1 - start) * FLOW.mean)
        return float((out - exact).abs().max())

    assert math.log2(error(64) / error(128)) == pytest.approx(order, abs=0.25)


def test_dpm2_starts_at_first_order_and_extrapolates_most_before_the_end() -> None:
    levels = diffusers_sigmas(10).tolist()
    weights = [dpm2_weight(*levels[i - 1 : i + 2]) for i in range(1, 9)]
    assert weights == pytest.approx([0, 0.338, 0.42, 0.474, 0.526, 0.593, 0.733, 2.308], abs=1e-3)


def test_step_deviations_of_flow_sde_at_ten_steps() -> None:
    levels = diffusers_sigmas(10).tolist()
    stds = [flow_sde_step(a, b, 0.7, guard=levels[1]).std for a, b in itertools.pairwise(levels)]
    expected = [0.70000, 0.74296, 0.53615, 0.44590, 0.39179, 0.35280, 0.31907, 0.28201, 0.22536, 0.00628]
    assert stds == pytest.approx(expected, abs=1e-5)


def test_transitions_are_what_happened() -> None:
    rollout = roll_out(FlowSDE(score_last=True), 6, dims=5)
    t = rollout.transitions
    torch.testing.assert_close(t.x[:, 1:], t.next_x[:, :-1])
    torch.testing.assert_close(t.next_x[:, -1], rollout.x0)
    for i in range(6):
        torch.testing.assert_close(t.velocity[:, i], FLOW.velocity(t.x[:, i], t.sigma[i].expand(4)))


def test_the_noise_of_transitions_is_standard_normal() -> None:
    t = roll_out(FlowSDE(score_last=True), 6, dims=20000).transitions

    def column(values):
        return values[None, :, None]

    z = (t.next_x - column(t.x_coef) * t.x - column(t.velocity_coef) * t.velocity) / column(t.std)
    assert z.mean().abs() < 0.01
    assert z.std() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_as_many_steps_are_scored_as_a_sampler_says(name: str) -> None:
    sampler = SAMPLERS[name]()
    transitions = roll_out(sampler, 6, dims=2).transitions
    assert (0 if transitions is None else transitions.x.shape[1]) == sampler.num_scored(6)
    assert sampler.stochastic == (transitions is not None)


def test_the_last_step_is_stochastic_but_not_scored() -> None:
    scored, left_out = (roll_out(FlowSDE(score_last=last), 6, dims=3) for last in (True, False))
    torch.testing.assert_close(left_out.x0, scored.x0)
    torch.testing.assert_close(left_out.transitions.sigma, scored.transitions.sigma[:-1])


def test_a_window_is_contiguous_shared_and_never_the_last_step() -> None:
    sigmas = diffusers_sigmas(8)
    starts = set()
    for epoch in range(60):
        t = roll_out(Mixed(window=3), 8, dims=2, sigmas=sigmas, epoch=epoch, seed=epoch).transitions
        assert t.x.shape[1] == 3
        start = int((sigmas == t.sigma[0]).nonzero())
        torch.testing.assert_close(t.sigma, sigmas[start : start + 3])
        starts.add(start)
    assert starts == {0, 1, 2, 3, 4}


def test_a_progressive_window_moves_from_noise_to_data_and_starts_again() -> None:
    sampler = Mixed(window=3, policy="progressive", epochs_per_place=2)
    places = [sampler.window_start(6, epoch, torch.Generator()) for epoch in range(8)]
    assert places == [0, 0, 1, 1, 2, 2, 0, 0]


def test_outside_its_window_mixed_is_euler() -> None:
    mixed = roll_out(Mixed(window=1, policy="progressive", epochs_per_place=1), 8, dims=3, epoch=6)
    euler = roll_out(ODE(), 8, dims=3)
    assert mixed.transitions.sigma.tolist() == [mixed.sigmas[6]]
    steps = mixed.transitions.x[:, 0]
    own = streams(0, "test", samples=range(4))
    noise = own.normal([3], torch.empty((), dtype=torch.float64))
    head = ODE().sample(FLOW.velocity, noise, sigmas=mixed.sigmas[:7], epoch=0, streams=own).x0
    torch.testing.assert_close(steps, head)
    assert not torch.equal(mixed.x0, euler.x0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_do_not_depend_on_the_batch(name: str) -> None:
    sampler = SAMPLERS[name]()
    whole = roll_out(sampler, 5, batch=4, dims=3).x0
    own = streams(0, "test", samples=[2])
    noise = own.normal([3], torch.empty((), dtype=torch.float64))
    alone = sampler.sample(FLOW.velocity, noise, sigmas=linear_sigmas(5, 1.0), epoch=0, streams=own).x0
    torch.testing.assert_close(whole[2:3], alone)


def test_impossible_windows_are_explained() -> None:
    assert "does not fit" in (Mixed(window=8).problem(8) or "")
    assert Mixed(window=7).problem(8) is None
    with pytest.raises(ValueError, match="noise_level"):
        FlowSDE(noise_level=0)
