"""Estimators against densities known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from gaussian_flow import GaussianFlow

from ablate.estimators import ESTIMATORS
from ablate.estimators.elbo import ELBO, ElboProbe
from ablate.estimators.trajectory import Trajectory
from ablate.flow import diffusers_sigmas
from ablate.rollout import Rollout
from ablate.samplers.sde import FlowSDE
from ablate.seeding import streams

FLOW = GaussianFlow()
WEIGHTS = ("simple", "path_kl", "adaptive")


def rollout(dims=6, batch=3, num_steps=8) -> Rollout:
    own = streams(0, "rollout", samples=range(batch))
    noise = own.normal([dims], torch.empty((), dtype=torch.float64))
    return FlowSDE().sample(FLOW.velocity, noise, sigmas=diffusers_sigmas(num_steps), epoch=0, streams=own)


def probe_of(estimator, num_points=None):
    return estimator.probe(rollout(), num_points=num_points, streams=streams(1, "probe", samples=range(3)))


def velocity_at(probe):
    shape = probe.x.shape
    return FLOW.velocity(probe.x.flatten(0, 1), probe.sigma.flatten()).reshape(shape)


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
    estimate = ELBO(weight="path_kl").log_prob(velocity[..., None], probe) @ weights
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


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 2**0.5])
def test_step_kl_is_the_path_kl_weight_up_to_a_constant(noise_level: float) -> None:
    """velocity_coef^2 / (2 std^2) = |dt| c (1 - s)/s with c = (1 + eta^2/2)^2 / (2 eta^2), off the guard."""
    own = streams(0, samples=[0])
    r = FlowSDE(noise_level=noise_level).sample(
        FLOW.velocity, torch.zeros(1, 2).double(), sigmas=diffusers_sigmas(10), epoch=0, streams=own
    )
    t = r.transitions
    step_kl = (t.velocity_coef**2 / (2 * t.std**2))[1:]
    dt = (r.sigmas[:-1] - r.sigmas[1:])[1 : len(t.sigma)]
    c = (1 + noise_level**2 / 2) ** 2 / (2 * noise_level**2)
    torch.testing.assert_close(step_kl, dt * c * (1 - t.sigma[1:]) / t.sigma[1:])


def test_elbo_weights() -> None:
    probe = probe_of(ELBO(sigma_law="sampler_grid"))
    velocity = velocity_at(probe)
    residual = velocity - probe.target
    mse, mae = residual.square().mean(-1), residual.abs().mean(-1)

    def value(weight, law="sampler_grid"):
        return ELBO(weight=weight, sigma_law=law).log_prob(velocity, probe)

    s = probe.sigma
    torch.testing.assert_close(value("simple"), -mse)
    torch.testing.assert_close(value("path_kl", "uniform"), -(1 - s) / s * mse)
    torch.testing.assert_close(value("path_kl"), -(1 - s) / (s + 1e-3) * mse)
    torch.testing.assert_close(value("adaptive"), -s * mse / mae)


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


def test_grid_points_are_the_rollouts_levels_without_repetition() -> None:
    probe = probe_of(ELBO(weight="simple"))
    levels = diffusers_sigmas(8)[:-1]
    assert probe.sigma.shape == (3, 7)  # as released: all but one
    for row in probe.sigma:
        assert len(row.unique()) == 7
        assert all(level in levels for level in row)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_contract_probe_and_shapes(name: str) -> None:
    """A probe is drawn once: the same streams give the same one, and equal velocities equal values."""
    estimator = ESTIMATORS[name]()
    probe, again = probe_of(estimator, 3), probe_of(estimator, 3)
    torch.testing.assert_close(probe.x, again.x)
    value = estimator.log_prob(velocity_at(probe), probe)
    assert value.shape == probe.sigma.shape == (3, 3)
    assert torch.equal(value, estimator.log_prob(velocity_at(probe), probe))
    assert value.isfinite().all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_samples_with_equal_streams_are_probed_at_the_same_noise(name: str) -> None:
    """How a group shares its probe: the same levels for all, and for the ELBO the same noise."""
    estimator = ESTIMATORS[name]()
    probe = estimator.probe(rollout(), num_points=3, streams=streams(1, "probe", samples=[0, 0, 1]))
    assert torch.equal(probe.sigma[0], probe.sigma[1])
    assert not torch.equal(probe.sigma[0], probe.sigma[2])
    if name == "elbo":
        noise = probe.target + rollout().x0[:, None]
        torch.testing.assert_close(noise[0], noise[1])
