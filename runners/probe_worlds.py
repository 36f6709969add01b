"""Estimators where the truth is known: on flows in the plane whose density and policy gradient have a closed form.

`gaussian` and `mixture` have the exact velocity of their density, for all values of their parameters. The velocity of
`mixture, velocity 5% off` is 1.05 times the mixture's: the density it really generates comes from the ODE. The reward
is a sample's first coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ablate.agreement import Agreement, Angle, agreement, angle, claimed
from ablate.estimators import ESTIMATORS
from ablate.likelihood import ProbabilityFlow
from ablate.mixture_flow import MixtureFlow, ring, single
from ablate.rollout import Rollout, take
from ablate.samplers import SAMPLERS
from ablate.seeding import generator, streams

WEIGHTS = ("path_kl", "simple", "adaptive", "x0", "ghuber")
LAWS = ("uniform", "linear", "logit_normal", "scheduler_density", "sampler_grid")
STOCHASTIC = ("sde", "dance", "ddim")
EXACT = "exact"  # samples of the density itself
NUM_UNITS = 16  # over which angles are bootstrapped
ORACLE = ProbabilityFlow(tolerance=1e-6)


@dataclass(frozen=True, kw_only=True)
class World:
    """A flow with parameters, and the velocity that a policy has."""

    name: str
    flow: MixtureFlow
    factor: float = 1.0  # of the exact velocity

    @property
    def oracle(self) -> str:
        return "closed form" if self.factor == 1 else "ODE, exact divergence"

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.factor * self.flow.velocity(x, sigma)

    def log_likelihood(self, x: Tensor) -> Tensor:
        """[n] nats in all, differentiable in the flow's parameters."""
        return self.flow.log_density(x) if self.factor == 1 else ORACLE.log_likelihood(self.velocity, x).nats


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An estimator, and the sampler whose steps it needs; without one, samples are drawn from the density itself."""

    label: str
    estimator: Any
    sampler: str = EXACT
    pictured: bool = False  # in the scatter of samples


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Samples of a world, with their true log-likelihood and the true policy gradient, unit by unit."""

    rollout: Rollout
    advantage: Tensor  # [n]
    nats: Tensor  # [n]
    gradient: Tensor  # [u, q]


@dataclass(frozen=True, kw_only=True)
class Found:
    """An estimator against the truth."""

    agreement: Agreement
    angle: Angle | None
    point_sd: float
    value: Tensor  # [n]


def worlds() -> list[World]:
    """Flows whose parameters take gradients."""
    flows = {
        name: MixtureFlow(**{f.name: getattr(flow, f.name).requires_grad_() for f in fields(flow)})
        for name, flow in (("gaussian", single()), ("mixture", ring()))
    }
    off = World(name="mixture, velocity 5% off", flow=flows["mixture"], factor=1.05)
    return [*(World(name=name, flow=flow) for name, flow in flows.items()), off]


def subjects() -> list[Subject]:
    """Every weight of the ELBO under every law of sigma, and the trajectory on three SDEs."""
    elbos = [ESTIMATORS["elbo"](weight=weight, sigma_law=law) for weight in WEIGHTS for law in LAWS]
    defaults = [ESTIMATORS["elbo"](weight=weight) for weight in WEIGHTS]
    usual = {(e.weight, e.law) for e in defaults}  # type: ignore[attr-defined]
    return [
        *(
            Subject(label=f"elbo-{e.weight} {e.law}", estimator=e, pictured=(e.weight, e.law) in usual)  # type: ignore[attr-defined]
            for e in elbos
        ),
        *(
            Subject(label="trajectory", estimator=ESTIMATORS["trajectory"](), sampler=name, pictured=i == 0)
            for i, name in enumerate(STOCHASTIC)
        ),
    ]


def true_values(world: World, sampler: str, sigmas: Tensor, num_samples: int, seed: int) -> Truth:
    """Samples from the density itself (`exact`) or of a sampler of the world's velocity."""
    rollout = _rollout(world, sampler, sigmas, num_samples, seed)
    advantage = rollout.x0[:, 0] - rollout.x0[:, 0].mean()
    nats, gradient = [], []
    for rows in _units(num_samples):
        value = world.log_likelihood(rollout.x0[rows])
        gradient.append(_gradient(world, advantage[rows], value))
        nats.append(value.detach())
    return Truth(rollout=rollout, advantage=advantage, nats=torch.cat(nats), gradient=torch.stack(gradient))


def compare(world: World, subject: Subject, truth: Truth, num_points: int, seed: int) -> Found:
    """The subject's values and policy gradient on the samples of the truth, each drawn twice."""
    values, spreads, gradients = [], [], []
    for half in range(2):
        probes = _probes(subject.estimator, truth.rollout, num_points, seed, half)
        for rows in _units(len(truth.nats)):
            value, spread = _points(world, subject.estimator, probes, rows)
            gradients.append(_gradient(world, truth.advantage[rows], value))
            values.append(value.detach())
            spreads.append(spread)
    value = torch.cat(values).reshape(2, -1).mean(0)
    return Found(
        agreement=agreement(value, truth.nats),
        angle=angle(torch.stack(gradients).reshape(2, NUM_UNITS, -1), torch.stack([truth.gradient] * 2)),
        point_sd=float(torch.cat(spreads).mean()),
        value=value,
    )


def _units(num_samples: int) -> tuple[Tensor, ...]:
    return torch.arange(num_samples).chunk(NUM_UNITS)


@torch.no_grad()
def _rollout(world: World, sampler: str, sigmas: Tensor, num_samples: int, seed: int) -> Rollout:
    if sampler == EXACT:
        return Rollout(x0=world.flow.sample(num_samples, generator(seed, "worlds", "data")), sigmas=sigmas)
    own = streams(seed, "worlds", samples=range(num_samples))
    noise = own.normal([world.flow.means.shape[1]], world.flow.means)
    return SAMPLERS[sampler]().sample(world.velocity, noise, sigmas=sigmas, epoch=0, streams=own)


def _probes(estimator: Any, rollout: Rollout, num_points: int, seed: int, half: int) -> list[Any]:
    """As many draws as give `num_points` points; of a trajectory, all its steps, once."""
    steps = len(rollout.sigmas) - 1
    scored = 0 if rollout.transitions is None else rollout.transitions.x.shape[1]
    k = estimator.num_points(scored or num_points, steps, scored)
    return [
        estimator.probe(
            rollout, num_points=k, streams=streams(seed, "worlds", "probe", half, i, samples=range(len(rollout.x0)))
        )
        for i in range(1 if scored else -(-num_points // k))
    ]


def _points(world: World, estimator: Any, probes: list[Any], rows: Tensor) -> tuple[Tensor, Tensor]:
    """Value [n] of some samples, and the standard deviation [n] of one point's value."""
    values, spreads = [], []
    for probe in probes:
        part = take(probe, rows)
        velocity = world.velocity(part.x.flatten(0, 1), part.sigma.flatten()).reshape(part.x.shape)
        log_prob = estimator.log_prob(velocity, part)
        values.append(claimed(estimator, log_prob, part.x.shape[2]))
        spreads.append(spread_of_points(estimator, log_prob, part.x.shape[2]))
    return torch.stack(values).mean(0), torch.stack(spreads).mean(0)


def spread_of_points(estimator: Any, log_prob: Tensor, num_dims: int) -> Tensor:
    """Standard deviation [b], in nats in all, of what one of the points [b, k] says; 0 for a single point."""
    each = torch.stack([claimed(estimator, f, num_dims) for f in torch.split(log_prob.detach(), 1, 1)], 1)
    return each.std(1) if each.shape[1] > 1 else torch.zeros_like(each[:, 0])


def _gradient(world: World, advantage: Tensor, value: Tensor) -> Tensor:
    """d mean(A f) / d parameters, [q]."""
    gradients = torch.autograd.grad((advantage * value).mean(), world.flow.parameters)
    return torch.cat([g.flatten() for g in gradients])
