"""Estimators against densities known in closed form."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from ablate.contracts import DIMS, roll_out, velocity_at
from ablate.estimators import ESTIMATORS
from ablate.estimators.elbo import ELBO, ElboProbe
from ablate.estimators.laws import LINEAR, UNIFORM, logit_normal, scheduler_density
from ablate.estimators.protocol import pooled
from ablate.estimators.trajectory import Trajectory
from ablate.flow import diffusers_sigmas, linear_sigmas
from ablate.gaussian_flow import GaussianFlow
from ablate.rollout import Rollout
from ablate.samplers.sde import CPS, DanceSDE, FlowSDE
from ablate.seeding import streams

FLOW = GaussianFlow()


def probe_of(estimator, num_points=None, samples=range(3), group_size=None):
    own = streams(1, "probe", samples=samples, group_size=group_size)
    return estimator.probe(roll_out(FlowSDE(), samples=range(len(samples))), num_points=num_points, streams=own)


@pytest.mark.parametrize("x0", [-0.3, 0.7, 1.9])
def test_path_kl_elbo_is_the_log_density(x0: float) -> None:
    """log p(x0) = E log p(x0 | x_min) - integral of (1 - s)/s E|v - (noise - x0)|^2 ds, tight for the exact v."""
    smallest = 0.01
    grid = torch.cat([torch.linspace(smallest, 0.1, 4001), torch.linspace(0.1, 1, 4001)[1:]]).double()
    nodes, weights = gauss_hermite(40)
    sigma = grid[:, None].expand(-1, len(nodes))
    noise = nodes.expand(len(grid), -1)
    x = (1 - sigma) * x0 + sigma * noise
    velocity = FLOW.velocity(x.reshape(-1, 1), sigma.reshape(-1)).reshape(x.shape)
    probe = ElboProbe(x=x[..., None], target=(noise - x0)[..., None], sigma=sigma)
    estimate = ELBO(weight="path_kl", importance=False).log_prob(velocity[..., None], probe) @ weights
    integral = torch.trapezoid(estimate, grid)
    # the decoder p(x0 | x_min) of the exact reverse process is Gaussian
    s = torch.tensor(smallest, dtype=torch.float64)
    precision = 1 / FLOW.scale**2 + (1 - s) ** 2 / s**2
    x_min = (1 - s) * x0 + s * nodes
    posterior = (FLOW.mean / FLOW.scale**2 + (1 - s) * x_min / s**2) / precision
    decoder = (-0.5 * precision * (x0 - posterior) ** 2 + 0.5 * precision.log() - 0.5 * math.log(2 * math.pi)) @ weights
    assert float(decoder + integral) == pytest.approx(float(FLOW.log_density(torch.tensor(x0))), abs=1e-4)


def gauss_hermite(n):
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())


def test_trajectory_is_the_gaussian_log_density_of_each_step() -> None:
    probe = probe_of(Trajectory())
    velocity = velocity_at(probe)
    c = [value[..., None] for value in (probe.x_coef, probe.velocity_coef, probe.std)]
    density = torch.distributions.Normal(c[0] * probe.x + c[1] * velocity, c[2]).log_prob(probe.next_x)
    torch.testing.assert_close(Trajectory().log_prob(velocity, probe), density.mean(-1))


def test_trajectory_at_the_rollouts_own_velocity_is_recorded() -> None:
    probe = probe_of(Trajectory(), num_points=3)
    torch.testing.assert_close(velocity_at(probe), probe.rollout_velocity)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0, 2**0.5, 2.0])
def test_step_kl_is_the_path_kl_weight_up_to_a_constant(noise_level: float) -> None:
    """velocity_coef^2 / (2 std^2) = |dt| c (1 - s)/s with c = (1 + eta^2/2)^2 / (2 eta^2), off the guard."""
    t = roll_out(FlowSDE(noise_level=noise_level)).transitions.first(7)
    step_kl = (t.velocity_coef**2 / (2 * t.std**2))[1:]
    c = (1 + noise_level**2 / 2) ** 2 / (2 * noise_level**2)
    assert c == pytest.approx({0.3: 6.07, 0.7: 1.582, 1.0: 1.125, 2.0: 1.125}.get(noise_level, 1), abs=4e-3)
    torch.testing.assert_close(step_kl, ((t.sigma - t.next_sigma) * c * (1 - t.sigma) / t.sigma)[1:])


def test_step_kl_of_constant_diffusion() -> None:
    t = roll_out(DanceSDE(noise_level=0.3)).transitions
    c = (1 + 0.09 * (1 - t.sigma) / (2 * t.sigma)) ** 2 / (2 * 0.09)
    torch.testing.assert_close(t.velocity_coef**2 / (2 * t.std**2), (t.sigma - t.next_sigma) * c)


def test_elbo_weights() -> None:
    probe = probe_of(ELBO(sigma_law="sampler_grid"))
    velocity = velocity_at(probe)
    residual = velocity - probe.target
    mse, mae = residual.square().mean(-1), residual.abs().mean(-1)

    def value(weight, **fields):
        return ELBO(weight=weight, sigma_law="sampler_grid", **fields).log_prob(velocity, probe)

    s = probe.sigma
    torch.testing.assert_close(value("simple"), -mse)
    torch.testing.assert_close(value("path_kl"), -(1 - s) / s * mse)
    torch.testing.assert_close(value("adaptive"), -s * mse / mae)
    torch.testing.assert_close(value("x0"), -(s**2) * mse)
    torch.testing.assert_close(value("ghuber"), -s * ((mse + 1e-10) ** 0.25 - 1e-10**0.25) * 4)
    torch.testing.assert_close(value("ghuber", power=1), -s * mse)
    released = ESTIMATORS["released_path_kl"]().log_prob(velocity, probe)
    torch.testing.assert_close(released, -(1 - s) / (s + 1e-3) * mse)
    torch.testing.assert_close(ESTIMATORS["released_awm"]().log_prob(velocity, probe), value("ghuber"))


def test_the_papers_formula_of_the_adaptive_weight_is_the_released_one_times_the_dimensions() -> None:
    """s D |residual|_2^2 / |residual|_1, as printed, is the value in nats."""
    probe = probe_of(ELBO())
    velocity = velocity_at(probe)
    residual = velocity - probe.target
    printed = -probe.sigma * DIMS * residual.square().sum(-1) / residual.abs().sum(-1)
    torch.testing.assert_close(ELBO(unit="nats").log_prob(velocity, probe), printed)
    torch.testing.assert_close(ELBO().log_prob(velocity, probe), printed / DIMS)


def test_the_adaptive_denominator_has_no_gradient() -> None:
    probe = probe_of(ELBO())
    velocity = velocity_at(probe).requires_grad_()
    ELBO(weight="adaptive").log_prob(velocity, probe).sum().backward()
    residual = (velocity - probe.target).detach()
    expected = -2 * probe.sigma[..., None] * residual / residual.shape[-1] / residual.abs().mean(-1, keepdim=True)
    torch.testing.assert_close(velocity.grad, expected)


def test_on_the_released_grid_one_level_holds_nearly_all_of_the_path_kl_weight() -> None:
    s = diffusers_sigmas(10)[:-1]
    weights = (1 - s) / (s + 1e-3)
    assert float(weights[-1] / weights.sum()) == pytest.approx(0.95, abs=0.01)


def test_the_uniform_law_is_stratified_and_reaches_both_ends() -> None:
    sigma = probe_of(ELBO(weight="path_kl"), num_points=50).sigma
    assert sigma.shape == (3, 50)
    strata = ((sigma - 0.01) / 0.99 * 50).floor()
    assert torch.equal(strata, torch.arange(50).double().expand(3, -1))


LAWS = {
    "uniform": UNIFORM,
    "linear": LINEAR,
    "logit_normal": logit_normal(),
    "scheduler_density": scheduler_density(3.0),
}


@pytest.mark.parametrize("name", LAWS)
def test_laws_are_consistent(name: str) -> None:
    """The quantile inverts the distribution, whose derivative is the density, also when cut off below."""
    law, low = LAWS[name], 0.05
    u = torch.linspace(0.001, 0.999, 401, dtype=torch.float64)
    torch.testing.assert_close(law.distribution(law.quantile(u)), u)
    sigma = law.levels(u, low).requires_grad_()
    assert float(law.levels(torch.zeros(1, dtype=torch.float64), low)) == pytest.approx(low)
    (slope,) = torch.autograd.grad(law.distribution(sigma).sum(), sigma)
    torch.testing.assert_close(slope, law.density(sigma.detach()))
    grid = torch.linspace(low, 1 - 1e-6, 200_001, dtype=torch.float64)
    assert float(torch.trapezoid(law.density_above(grid, low), grid)) == pytest.approx(1, abs=1e-4)


def test_the_scheduler_density_is_that_of_the_shifted_levels() -> None:
    torch.testing.assert_close(
        scheduler_density(3.0).quantile(torch.linspace(1, 0, 11, dtype=torch.float64)), linear_sigmas(10, 3.0)
    )


@pytest.mark.parametrize("law", ["uniform", "linear", "logit_normal", "scheduler_density"])
def test_with_importance_weights_every_law_estimates_the_same_integral(law: str) -> None:
    """E f under the law = integral of -(1 - s)/s |residual|^2 ds from min_sigma: the bound, whatever the law."""
    estimator = ELBO(weight="path_kl", sigma_law=law, min_sigma=0.1, unit="nats")
    assert estimator.importance_weighted
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    sigma = estimator._law().levels(u, 0.1)[None]
    residual = torch.full((1, 4000, DIMS), 0.3, dtype=torch.float64)
    probe = ElboProbe(x=residual, target=torch.zeros_like(residual), sigma=sigma)
    integral = -DIMS * 0.09 * (math.log(1 / 0.1) - 0.9)
    assert float(estimator.log_prob(residual, probe).mean()) == pytest.approx(integral, rel=2e-3)


@pytest.mark.parametrize("x0", [-0.3, 0.7, 1.9])
def test_in_nats_the_path_kl_elbo_with_its_decoder_is_the_log_density(x0: float) -> None:
    """The estimator end to end: its own levels, noise and importance weights, and the exact velocity."""
    low, n = 0.05, 40_000
    rollout = Rollout(x0=torch.full((1, 1), x0, dtype=torch.float64), sigmas=diffusers_sigmas(10))
    estimator = ELBO(weight="path_kl", unit="nats", min_sigma=low, antithetic=True)
    probe = estimator.probe(rollout, num_points=n, streams=streams(0, samples=[0]))
    bound = float(estimator.log_prob(velocity_at(probe), probe).mean())
    nodes, weights = gauss_hermite(40)
    precision = 1 / FLOW.scale**2 + (1 - low) ** 2 / low**2
    posterior = (FLOW.mean / FLOW.scale**2 + (1 - low) * ((1 - low) * x0 + low * nodes) / low**2) / precision
    decoder = -0.5 * precision * (x0 - posterior) ** 2 + 0.5 * math.log(precision) - 0.5 * math.log(2 * math.pi)
    assert float(decoder @ weights) + bound == pytest.approx(float(FLOW.log_density(torch.tensor(x0))), abs=0.02)


def test_antithetic_points_share_their_level_and_have_opposite_noise() -> None:
    probe = probe_of(ELBO(antithetic=True), num_points=4)
    noise = probe.target + roll_out(FlowSDE(), range(3)).x0[:, None]
    torch.testing.assert_close(noise[:, 0::2], -noise[:, 1::2])
    assert torch.equal(probe.sigma[:, 0::2], probe.sigma[:, 1::2])
    assert probe_of(ELBO(antithetic=True), num_points=3).sigma.shape == (3, 4)


def test_stratified_over_a_group_its_levels_are_evenly_spread() -> None:
    estimator = ELBO(weight="path_kl")
    sigma = probe_of(estimator, num_points=2, samples=range(8), group_size=4).sigma
    u = (sigma - estimator.min_sigma) / (1 - estimator.min_sigma)
    for group in (u[:4], u[4:]):
        for k in range(2):
            inside = (2 * group[:, k] - k).sort().values  # uniform on [0, 1) within its stratum
            torch.testing.assert_close(inside.diff(), torch.full((3,), 0.25, dtype=torch.float64))
    assert not torch.allclose(u[:4], u[4:])


def test_latents_of_the_rollout_can_be_the_points() -> None:
    rollout = roll_out(FlowSDE(), range(3))
    probe = probe_of(ELBO(xt_from_rollout=True), num_points=8)
    s = probe.sigma[..., None]
    for row in range(3):
        for k in range(8):
            i = int((rollout.sigmas == probe.sigma[row, k]).nonzero())
            assert torch.equal(probe.x[row, k], rollout.latents[row, i])
    noise = probe.target + rollout.x0[:, None]
    torch.testing.assert_close((1 - s) * rollout.x0[:, None] + s * noise, probe.x)


def test_pooling() -> None:
    f = torch.tensor([[1.0, 2.0, 6.0]])
    assert [pooled(f, pool).tolist() for pool in ("each", "mean", "sum")] == [[[1, 2, 6]], [[3]], [[9]]]


def test_summed_in_nats_a_trajectory_is_the_log_density_of_the_path() -> None:
    estimator = Trajectory(unit="nats", pool="sum")
    probe = probe_of(estimator)
    velocity = velocity_at(probe)
    mean = probe.x_coef[..., None] * probe.x + probe.velocity_coef[..., None] * velocity
    steps = torch.distributions.Normal(mean, probe.std[..., None]).log_prob(probe.next_x)
    torch.testing.assert_close(pooled(estimator.log_prob(velocity, probe), estimator.pool)[:, 0], steps.sum((1, 2)))


def test_without_the_normaliser_ratios_are_the_same_and_values_are_not() -> None:
    probe = probe_of(Trajectory())
    velocity, other = velocity_at(probe), velocity_at(probe) + 0.1
    exact, released = Trajectory(), ESTIMATORS["released_trajectory"]()
    ratios = [e.log_prob(velocity, probe) - e.log_prob(other, probe) for e in (exact, released)]
    torch.testing.assert_close(*ratios)
    lost = -probe.std.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(exact.log_prob(velocity, probe) - released.log_prob(velocity, probe), lost)


def test_the_distance_of_cps_is_its_density_without_the_deviation() -> None:
    rollout = roll_out(CPS(), range(3))
    probe = Trajectory().probe(rollout, num_points=None, streams=streams(1, samples=range(3)))
    velocity = velocity_at(probe) + 0.1
    density = ESTIMATORS["released_trajectory"]().log_prob(velocity, probe)
    distance = ESTIMATORS["cps_distance"]().log_prob(velocity, probe)
    torch.testing.assert_close(distance, 2 * probe.std**2 * density)


def test_a_recording_in_bfloat16_is_scored_in_full_precision() -> None:
    """The latents are taken as they were recorded; coefficients and velocities are not rounded to their type."""
    probe = probe_of(Trajectory())
    kept = {name: getattr(probe, name).bfloat16() for name in ("x", "next_x", "rollout_velocity")}
    rounded = dataclasses.replace(probe, **kept)
    velocity = velocity_at(probe).bfloat16()
    exact = dataclasses.replace(rounded, **{name: value.double() for name, value in kept.items()})
    expected = Trajectory().log_prob(velocity.double(), exact)
    value = Trajectory().log_prob(velocity, rounded)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma_law": "sampler_grid", "importance": True}, "sampler_grid has none"),
        ({"weight": "path_kl", "xt_from_rollout": True}, "not sigma_law uniform"),
        ({"antithetic": True, "xt_from_rollout": True}, "antithetic noise has no place"),
        ({"min_sigma": 0.0}, "min_sigma must lie in"),
        ({"power": 0.0}, "must be positive"),
    ],
)
def test_impossible_fields(fields, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ELBO(**fields)


def test_grid_points_are_the_rollouts_levels_without_repetition() -> None:
    probe = probe_of(ELBO(weight="simple"))
    levels = diffusers_sigmas(8)[:-1]
    assert probe.sigma.shape == (3, 7)  # as released: all but one
    for row in probe.sigma:
        assert len(row.unique()) == 7
        assert all(level in levels for level in row)


def test_samples_with_equal_streams_are_probed_at_the_same_noise() -> None:
    """How a group shares its probe: the same levels for all, and for the ELBO the same noise."""
    probe = probe_of(ELBO(), num_points=3, samples=[0, 0, 1])
    noise = probe.target + roll_out(FlowSDE(), range(3)).x0[:, None]
    torch.testing.assert_close(noise[0], noise[1])
    assert not torch.equal(probe.sigma[0], probe.sigma[2])
