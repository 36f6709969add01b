"""The probability-flow ODE against densities and policy gradients known in closed form."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ablate.gaussian_flow import GaussianFlow
from ablate.likelihood import ProbabilityFlow
from ablate.mixture_flow import MixtureFlow, ring, single
from ablate.seeding import generator, streams

GAUSSIAN, RING = GaussianFlow(), ring()


def data(flow: MixtureFlow, num_samples: int = 24) -> Tensor:
    return flow.sample(num_samples, generator(0, "data"))


def test_gaussian_in_nats_in_all_and_per_dimension() -> None:
    x0 = torch.randn(5, 3, 2, generator=generator(0), dtype=torch.float64)
    found = ProbabilityFlow(tolerance=1e-8).log_likelihood(GAUSSIAN.velocity, x0)
    torch.testing.assert_close(found.nats, GAUSSIAN.log_density(x0).sum((1, 2)), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.per_dimension, GAUSSIAN.log_density(x0).mean((1, 2)), rtol=0, atol=1e-6)
    assert found.standard_error is None


def test_mixture() -> None:
    found = ProbabilityFlow(tolerance=1e-8).log_likelihood(RING.velocity, x0 := data(RING))
    torch.testing.assert_close(found.nats, RING.log_density(x0), rtol=0, atol=1e-6)


def test_the_density_of_the_mixture_is_one_and_its_velocity_that_of_the_gaussian_flow() -> None:
    line = torch.linspace(-4.5, 4.5, 301, dtype=torch.float64)
    plane = torch.cartesian_prod(line, line)
    assert float(RING.log_density(plane).exp().sum() * (line[1] - line[0]) ** 2) == pytest.approx(1, abs=1e-6)
    x, sigma = data(RING), torch.rand(24, generator=generator(1), dtype=torch.float64)
    torch.testing.assert_close(single().velocity(x, sigma), GAUSSIAN.velocity(x, sigma))
    torch.testing.assert_close(single().log_density(x), GAUSSIAN.log_density(x).sum(1))


def test_the_velocity_of_the_mixture_carries_its_own_marginals() -> None:
    """Continuity: d log p_s / ds + div v + v . grad log p_s = 0 at every level."""
    x = data(RING).requires_grad_()
    sigma = torch.full((len(x),), 0.3, dtype=torch.float64, requires_grad=True)

    def log_density(x: Tensor, sigma: Tensor) -> Tensor:
        s = sigma[:, None]
        return RING._log_joint(*RING._offset_and_variance(x, s)).logsumexp(1)

    by_level, score = torch.autograd.grad(log_density(x, sigma).sum(), (sigma, x))
    v = RING.velocity(x, sigma)
    divergence = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    change = by_level + divergence + (v * score).sum(1)
    torch.testing.assert_close(change.detach(), torch.zeros(len(x), dtype=torch.float64), rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_fixed_steps_converge_at_their_order(solver: str, order: int, power: float) -> None:
    x0 = torch.randn(8, 2, generator=generator(0), dtype=torch.float64)
    truth = GAUSSIAN.log_density(x0).sum(1)
    errors = []
    for num_steps in (32, 64):
        found = ProbabilityFlow(solver=solver, num_steps=num_steps, power=power).log_likelihood(GAUSSIAN.velocity, x0)
        errors.append(float((found.nats - truth).abs().mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.3)


@torch.no_grad()
def test_hutchinson_is_unbiased_and_knows_its_error() -> None:
    """512 sign vectors: the error is that of the mean, and shrinks as their root."""
    x0 = data(RING, 6)
    solve = {"solver": "rk4", "num_steps": 40}
    exact = ProbabilityFlow(**solve).log_likelihood(RING.velocity, x0)
    found = ProbabilityFlow(**solve, num_probes=512).log_likelihood(
        RING.velocity, x0, streams=streams(0, samples=range(6))
    )
    error = found.standard_error
    assert error is not None
    assert ((found.nats - exact.nats).abs() < 4 * error).all()
    assert float(error.max()) < 0.1
    torch.testing.assert_close(error, found.each.std(1) / 512**0.5)


def test_hutchinson_is_exact_where_the_jacobian_is_diagonal() -> None:
    x0 = torch.randn(4, 3, generator=generator(0), dtype=torch.float64)
    found = ProbabilityFlow(num_probes=1).log_likelihood(GAUSSIAN.velocity, x0, streams=streams(0, samples=range(4)))
    torch.testing.assert_close(found.nats, GAUSSIAN.log_density(x0).sum(1), rtol=0, atol=1e-4)
    assert found.standard_error is None


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("solve", [{"tolerance": 1e-7}, {"solver": "rk4", "num_steps": 60, "power": 2.0}])
def test_its_gradient_is_that_of_the_log_density(adjoint: bool, solve: dict[str, Any]) -> None:
    """The ingredient of a policy gradient, weighted by advantages: through the steps, and by the adjoint."""
    parameters = tuple(p.clone().requires_grad_() for p in RING.parameters)
    flow = MixtureFlow(**dict(zip(("logits", "means", "log_scales"), parameters, strict=True)))
    x0 = data(RING)
    advantage = x0[:, 0] - x0[:, 0].mean()
    solver = ProbabilityFlow(**solve)
    found = solver.log_likelihood(flow.velocity, x0, parameters=parameters if adjoint else None)
    gradients = torch.autograd.grad((advantage * found.nats).mean(), parameters)
    closed_form = torch.autograd.grad((advantage * flow.log_density(x0)).mean(), parameters)
    for gradient, expected in zip(gradients, closed_form, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_without_gradients_there_is_no_graph() -> None:
    parameters = [p.clone().requires_grad_() for p in RING.parameters]
    flow = MixtureFlow(logits=parameters[0], means=parameters[1], log_scales=parameters[2])
    with torch.no_grad():
        found = ProbabilityFlow().log_likelihood(flow.velocity, data(RING, 2))
    assert not found.nats.requires_grad


def test_a_later_start_is_the_density_at_that_level() -> None:
    start, x = 0.2, torch.randn(4, 2, generator=generator(0), dtype=torch.float64)
    found = ProbabilityFlow(start=start, tolerance=1e-8).log_likelihood(GAUSSIAN.velocity, x)
    scale = float(GAUSSIAN.variance(torch.tensor(start, dtype=torch.float64)).sqrt())
    there = dataclasses.replace(GAUSSIAN, mean=(1 - start) * GAUSSIAN.mean, scale=scale)
    torch.testing.assert_close(found.nats, there.log_density(x).sum(1), rtol=0, atol=1e-6)


def test_wrong_solvers_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'midpoint'"):
        ProbabilityFlow(solver="midpiont")
    with pytest.raises(ValueError, match="num_steps goes with euler"):
        ProbabilityFlow(solver="rk4")
    with pytest.raises(ValueError, match="num_steps goes with euler"):
        ProbabilityFlow(num_steps=10)
