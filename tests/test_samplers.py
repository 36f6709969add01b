"""Samplers on a Gaussian flow, where marginals and transition densities are known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ablate.flow import diffusers_sigmas, linear_sigmas
from ablate.gaussian_flow import GaussianFlow
from ablate.samplers.mixed import Mixed
from ablate.samplers.ode import ODE, dpm2_weight
from ablate.samplers.sde import CPS, DDIM, DMD, DanceSDE, DPMSolverSDE, FlowSDE
from ablate.samplers.steps import euler_step, flow_sde_step, renoise_step, sde_step
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


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_dance_sde_keeps_the_marginal(eta: float) -> None:
    x0 = roll_out(DanceSDE(noise_level=eta), 400).x0
    assert x0.mean() == pytest.approx(FLOW.mean, abs=0.02)
    assert x0.std() == pytest.approx(FLOW.scale, rel=0.03)


@pytest.mark.parametrize("sampler", [DDIM(eta=0.5), DDIM(), DPMSolverSDE(), DPMSolverSDE(order=2)], ids=repr)
def test_ddim_and_dpm_solver_sde_keep_the_marginal(sampler) -> None:
    x0 = roll_out(sampler, 400).x0
    assert x0.mean() == pytest.approx(FLOW.mean, abs=0.02)
    assert x0.std() == pytest.approx(FLOW.scale, rel=0.03)


def test_cps_is_not_a_consistent_discretisation() -> None:
    """On N(0, 1) data the final variance tends to 0.72 at eta 0.7, not to 1, however many steps are taken."""
    flow = GaussianFlow(mean=0.0, scale=1.0)
    variances = {}
    for n in (10, 40, 640):
        own = streams(0, samples=range(4))
        noise = own.normal([4000], torch.empty((), dtype=torch.float64))
        x0 = CPS(noise_level=0.7).sample(flow.velocity, noise, sigmas=diffusers_sigmas(n), epoch=0, streams=own).x0
        variances[n] = float(x0.var())
    assert variances == pytest.approx({10: 0.50, 40: 0.65, 640: 0.72}, abs=0.03)


def test_dmd_draws_every_level_anew() -> None:
    """x' ~ N((1 - s') x0, s'^2): nothing of the old noise is kept."""
    t = roll_out(DMD(), 6, dims=3).transitions
    torch.testing.assert_close(t.std, t.next_sigma)
    torch.testing.assert_close(t.x_coef, 1 - t.next_sigma)
    torch.testing.assert_close(t.velocity_coef, -(1 - t.next_sigma) * t.sigma)


PAIRS = list(itertools.pairwise(diffusers_sigmas(10).tolist()))


@pytest.mark.parametrize(("a", "b"), PAIRS[:-1])
def test_ddim_at_eta_1_is_the_first_order_of_dpm_solver_sde(a: float, b: float) -> None:
    """Mean (s'/s) e^-h x + (1 - s') (1 - e^-2h) x0, std s' sqrt(1 - e^-2h), e^-h = s' (1 - s) / (s (1 - s'))."""
    decay = b * (1 - a) / (a * (1 - b))
    step = DDIM(eta=1).rule([])(a, b)
    assert step.std == pytest.approx(b * math.sqrt(1 - decay**2))
    x0_coef = (1 - b) * (1 - decay**2)  # x0 = x - a v
    assert step.x_coef == pytest.approx(b / a * decay + x0_coef)
    assert step.velocity_coef == pytest.approx(-a * x0_coef)
    assert torch.equal(roll_out(DDIM(), 6, dims=3).x0, roll_out(DPMSolverSDE(), 6, dims=3).x0)


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_without_noise_every_step_is_euler(a: float, b: float) -> None:
    for step in (sde_step(a, b, 0.0), renoise_step(a, b, 0.0)):
        assert (step.x_coef, step.velocity_coef, step.std) == pytest.approx((1, euler_step(a, b).velocity_coef, 0))


def test_the_memoryless_limit_of_flow_sde_is_ddim_at_eta_1() -> None:
    """Flow-SDE with noise_level sqrt(2) and DDIM with eta 1 agree as the step goes to 0."""
    a, dt = 0.6, 1e-5
    flow, ddim = flow_sde_step(a, a - dt, 2**0.5, guard=0.99), DDIM(eta=1).rule([])(a, a - dt)
    assert flow.std == pytest.approx(ddim.std, rel=1e-4)
    assert flow.x_coef - 1 == pytest.approx(ddim.x_coef - 1, rel=1e-3)
    assert flow.velocity_coef == pytest.approx(ddim.velocity_coef, rel=1e-3)


@pytest.mark.parametrize(("a", "b"), PAIRS[1:-1])
def test_the_first_order_of_dpm_solver_is_euler(a: float, b: float) -> None:
    """(s'/s) x - (1 - s') (e^-h - 1) x0, h the step in log((1 - s) / s), x0 = x - s v: that of Euler."""
    h = math.log((1 - b) / b) - math.log((1 - a) / a)
    x0_coef = -(1 - b) * math.expm1(-h)
    euler = euler_step(a, b)
    assert b / a + x0_coef == pytest.approx(euler.x_coef)
    assert -a * x0_coef == pytest.approx(euler.velocity_coef)
    assert torch.equal(roll_out(ODE(solver="dpm1"), 8, dims=5).x0, roll_out(ODE(), 8, dims=5).x0)


@pytest.mark.parametrize(("num_steps", "variance"), [(10, 1.86), (40, 1.06), (640, 1.0)])
def test_dpm2_overshoots_with_few_steps(num_steps: int, variance: float) -> None:
    """Its penultimate step extrapolates by 2.3: on N(0, 1) data, ten steps give variance 1.86 (Euler: 0.67)."""
    flow = GaussianFlow(mean=0.0, scale=1.0)
    x, own = torch.linspace(-3, 3, 7, dtype=torch.float64)[None], streams(0, samples=[0])

    def slope(solver: str) -> float:
        out = ODE(solver=solver).sample(flow.velocity, x, sigmas=diffusers_sigmas(num_steps), epoch=0, streams=own).x0
        return float(out[0, -1] / x[0, -1])

    assert slope("dpm2") ** 2 == pytest.approx(variance, abs=0.01)
    if num_steps == 10:
        assert slope("euler") ** 2 == pytest.approx(0.67, abs=0.01)


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


def test_step_deviations_at_ten_steps() -> None:
    levels = diffusers_sigmas(10).tolist()
    stds = [flow_sde_step(a, b, 0.7, guard=levels[1]).std for a, b in itertools.pairwise(levels)]
    expected = [0.70000, 0.74296, 0.53615, 0.44590, 0.39179, 0.35280, 0.31907, 0.28201, 0.22536, 0.00628]
    assert stds == pytest.approx(expected, abs=1e-5)
    dance = [sde_step(a, b, 0.3).std for a, b in itertools.pairwise(levels)]
    expected = [0.0599, 0.0649, 0.0708, 0.0778, 0.0865, 0.0973, 0.1112, 0.1297, 0.1556, 0.0284]
    assert dance == pytest.approx(expected, abs=1e-4)


def test_transitions_are_what_happened() -> None:
    rollout = roll_out(FlowSDE(score_last=True), 6, dims=5)
    t = rollout.transitions
    torch.testing.assert_close(t.x[:, 1:], t.next_x[:, :-1])
    torch.testing.assert_close(t.next_x[:, -1], rollout.x0)
    for i in range(6):
        torch.testing.assert_close(t.velocity[:, i], FLOW.velocity(t.x[:, i], t.sigma[i].expand(4)))


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


def places(num_steps: int, epochs: int, **fields) -> list[int]:
    return [Mixed(**fields).window_start(num_steps, epoch, torch.Generator()) for epoch in range(epochs)]


def test_a_progressive_window_moves_from_noise_to_data_and_starts_again() -> None:
    assert places(6, 8, window=3, policy="progressive", epochs_per_place=2) == [0, 0, 1, 1, 2, 2, 0, 0]
    assert places(8, 4, window=3, policy="progressive", epochs_per_place=1, stride=3) == [0, 3, 0, 3]
    assert places(8, 4, window=3, policy="progressive", epochs_per_place=1, until=0.5) == [0, 1, 0, 1]
    random = [Mixed(until=0.5).window_start(10, 0, torch.Generator().manual_seed(seed)) for seed in range(99)]
    assert set(random) == {0, 1, 2}  # as Flow-GRPO-Fast, whose window lies in the first half


def test_an_exponentially_decaying_window_stays_ever_shorter() -> None:
    """ceil(tau exp(-k max(place - from, 0))) epochs at a place."""
    stays = places(9, 30, window=1, policy="exp_decay", epochs_per_place=4, decay=0.7, decay_from=2)
    assert stays[:19] == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 2 + [4] + [5] + [6] + [7] + [0]


def test_a_branch_is_one_random_step_and_its_group_shares_the_path_up_to_it() -> None:
    noise = torch.randn(1, 3, dtype=torch.float64).expand(4, 3)
    places = set()
    for seed in range(40):
        own = streams(seed, samples=range(4))
        rollout = Mixed(policy="branch", window=3).sample(
            FLOW.velocity, noise, sigmas=diffusers_sigmas(6), epoch=0, streams=own
        )
        t = rollout.transitions
        assert t.x.shape[1] == 1
        assert torch.equal(t.x[:1].expand_as(t.x), t.x)
        assert rollout.x0.unique(dim=0).shape[0] == 4
        places.add(float(t.sigma))
    assert len(places) == 5


def test_a_window_of_cps_steps_leaves_no_density() -> None:
    assert Mixed(step="cps").leaves == CPS().leaves == {"transitions"}
    assert Mixed().leaves == FlowSDE().leaves == CPS(use_density=True).leaves == {"transitions", "density"}


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


def test_impossible_windows_are_explained() -> None:
    assert "does not fit" in (Mixed(window=8).problem(8) or "")
    assert Mixed(window=7).problem(8) is None
    assert "does not fit into the first 0.5 of 8 steps: 4 at most" in (Mixed(window=5, until=0.5).problem(8) or "")


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (FlowSDE, {"noise_level": 0}, "noise_level must be positive"),
        (Mixed, {"noise_level": 0}, "noise_level must be positive"),
        (Mixed, {"stride": 0}, "stride must be at least 1, got 0"),
        (Mixed, {"until": 0}, "until must lie in"),
        (Mixed, {"decay": -1}, "decay must not be negative"),
        (DanceSDE, {"noise_level": 0}, "noise_level must be positive"),
        (DDIM, {"eta": 1.5}, "eta must lie in"),
        (CPS, {"noise_level": 0}, "noise_level must lie in"),
    ],
)
def test_impossible_fields_of_samplers(kind, fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)
