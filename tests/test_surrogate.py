"""The gradient in bounded memory equals full-graph autograd, for every objective."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from ablate.estimators import ESTIMATORS
from ablate.flow import diffusers_sigmas
from ablate.kl import velocity_kl
from ablate.objectives import OBJECTIVES
from ablate.rollout import Evaluation, take
from ablate.samplers.sde import FlowSDE
from ablate.seeding import streams
from runners.surrogate import Batch, accumulate_gradient

GROUPS, SIZE, DIMS, POINTS = 3, 4, 5, 3


class Network(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(DIMS + 1, 16), nn.Tanh(), nn.Linear(16, DIMS)).double()

    def forward(self, x, sigma):
        return self.body(torch.cat([x, sigma[..., None].to(x)], -1))


POLICIES = {"current": 0, "old": 1, "reference": 2}


def scene(estimator, seed=0):
    networks = {name: Network(s) for name, s in POLICIES.items()}
    n = GROUPS * SIZE
    own = streams(seed, samples=range(n))
    noise = own.normal([DIMS], torch.empty((), dtype=torch.float64))
    with torch.no_grad():
        rollout = FlowSDE().sample(networks["old"], noise, sigmas=diffusers_sigmas(6), epoch=0, streams=own)
    probe = estimator.probe(rollout, num_points=POINTS, streams=own)
    advantage = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    group = torch.arange(GROUPS).repeat_interleave(SIZE)
    return networks, Batch(probe=probe, advantage=advantage, group=group, group_size=SIZE)


def full_graph(objective, estimator, networks, batch, kl_coef):
    velocity = {name: network(batch.probe.x, batch.probe.sigma) for name, network in networks.items()}
    value = {name: estimator.log_prob(v, batch.probe) for name, v in velocity.items()}
    loss, _ = objective(
        Evaluation(
            log_prob=value["current"],
            old_log_prob=value["old"].detach() if "old" in objective.needs else None,
            reference_log_prob=value["reference"].detach() if "reference" in objective.needs else None,
            advantage=batch.advantage,
            group=batch.group,
        )
    )
    loss = loss + kl_coef * velocity_kl(velocity["current"], velocity["reference"].detach()).mean()
    loss.backward()
    return gradient(networks["current"])


def gradient(network):
    return torch.cat([p.grad.flatten() for p in network.parameters()])


def asker(networks, batch, asked=None):
    def ask(weights, rows, columns):
        if asked is not None:
            asked.append((weights, torch.is_grad_enabled()))
        part = take(batch.probe, rows, columns)
        return networks[weights](part.x, part.sigma)

    return ask


@pytest.mark.parametrize(
    ("name", "estimator", "size", "kl_coef"),
    [
        (name, estimator, size, kl_coef)
        for name, estimator in itertools.product(OBJECTIVES, ESTIMATORS)
        for size, kl_coef in [(1, 0.0), (2, 0.3), (7, 0.0), (12, 0.3), (100, 0.0)]
    ],
)
def test_equals_full_graph_autograd(name: str, estimator: str, size: int, kl_coef: float) -> None:
    objective, est = OBJECTIVES[name](), ESTIMATORS[estimator]()
    networks, batch = scene(est)
    accumulate_gradient(objective, est, batch, asker(networks, batch), micro_batch_size=size, kl_coef=kl_coef)
    bounded = gradient(networks["current"])
    networks["current"].zero_grad()
    expected = full_graph(objective, est, networks, batch, kl_coef)
    assert expected.norm() > 0
    assert float((bounded - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nobody_is_asked_in_vain(name: str) -> None:
    """No old policy unless it is read, and then not for recorded steps; no reference unless it is read."""
    objective = OBJECTIVES[name]()
    for estimator in ESTIMATORS:
        asked: list[tuple[str, bool]] = []
        networks, batch = scene(ESTIMATORS[estimator]())
        accumulate_gradient(
            objective, ESTIMATORS[estimator](), batch, asker(networks, batch, asked), micro_batch_size=100
        )
        expected = {("current", True)}
        expected |= {("reference", False)} if "reference" in objective.needs else set()
        expected |= {("old", False)} if "old" in objective.needs and estimator == "elbo" else set()
        assert set(asked) == expected
        assert len(asked) == len(expected)


def test_when_old_is_current_it_is_not_asked_and_the_ratio_is_one() -> None:
    est = ESTIMATORS["elbo"]()
    networks, batch = scene(est)
    networks["old"].load_state_dict(networks["current"].state_dict())
    asked: list[tuple[str, bool]] = []
    metrics = accumulate_gradient(
        OBJECTIVES["grpo"](), est, batch, asker(networks, batch, asked), micro_batch_size=100, old_is_current=True
    )
    assert asked == [("current", True)]
    assert metrics["log_ratio_abs"] == 0
