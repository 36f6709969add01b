"""The gradient in bounded memory equals full-graph autograd, for every objective."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ablate.estimators.elbo import ELBO
from ablate.estimators.protocol import pooled
from ablate.estimators.trajectory import Trajectory
from ablate.flow import diffusers_sigmas
from ablate.kl import KINDS, Difference
from ablate.objectives import OBJECTIVES
from ablate.recipe import KLRecipe
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
    return networks, Batch(probe=probe, advantage=advantage, group=group, group_size=SIZE, reward=advantage + 1)


def full_graph(objective, estimator, networks, batch, kl):
    velocity = {name: network(batch.probe.x, batch.probe.sigma) for name, network in networks.items()}
    velocity = {name: v if name == "current" else v.detach() for name, v in velocity.items()}
    value = {name: estimator.log_prob(v, batch.probe) for name, v in velocity.items()}
    seen = {name: pooled(v, estimator.pool) for name, v in value.items()}
    loss, _ = objective(
        Evaluation(
            log_prob=seen["current"],
            old_log_prob=seen["old"],
            reference_log_prob=seen["reference"],
            advantage=batch.advantage,
            group=batch.group,
            reward=batch.reward,
            velocity=velocity["current"],
            old_velocity=velocity["old"],
            reference_velocity=velocity["reference"],
            probe=batch.probe,
        )
    )
    difference = Difference(
        velocity=velocity["current"],
        reference_velocity=velocity["reference"],
        log_prob=value["current"],
        reference_log_prob=value["reference"],
        probe=batch.probe,
    )
    loss = loss + kl.coef * KINDS[kl.kind](difference).mean()
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


ESTIMATED = {
    "trajectory": Trajectory(),
    "elbo": ELBO(),
    "elbo-pooled": ELBO(weight="path_kl", pool="mean"),
    "trajectory-pooled": Trajectory(pool="sum"),
}


def fits(objective, estimator) -> bool:
    on_steps = "transitions" in estimator.needs
    refused = "target" if on_steps else "transitions"
    return refused not in objective.needs and not ("velocity" in objective.needs and estimator.pool != "each")


@pytest.mark.parametrize(
    ("name", "estimator"), [(n, e) for n in OBJECTIVES for e in ESTIMATED if fits(OBJECTIVES[n](), ESTIMATED[e])]
)
def test_equals_full_graph_autograd(name: str, estimator: str) -> None:
    objective, est = OBJECTIVES[name](), ESTIMATED[estimator]
    for size, kind in [(1, None), (2, "velocity"), (7, None), (12, "k3"), (100, "path")]:
        kl = KLRecipe() if kind is None else KLRecipe(coef=0.3, kind=kind)
        networks, batch = scene(est)
        accumulate_gradient(objective, est, batch, asker(networks, batch), micro_batch_size=size, kl=kl)
        bounded = gradient(networks["current"])
        networks["current"].zero_grad()
        expected = full_graph(objective, est, networks, batch, kl)
        assert expected.norm() > 0
        assert float((bounded - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("name", OBJECTIVES)
def test_nobody_is_asked_in_vain(name: str) -> None:
    """No old policy unless it is read, and then not for recorded steps; no reference unless it is read."""
    objective = OBJECTIVES[name]()
    for estimator in (Trajectory(), ELBO()):
        if not fits(objective, estimator):
            continue
        asked: list[tuple[str, bool]] = []
        networks, batch = scene(estimator)
        accumulate_gradient(objective, estimator, batch, asker(networks, batch, asked), micro_batch_size=100)
        expected = {("current", True)}
        expected |= {("reference", False)} if "reference" in objective.needs else set()
        expected |= {("old", False)} if "old" in objective.needs and not estimator.needs else set()
        assert set(asked) == expected
        assert len(asked) == len(expected)


def test_when_old_is_current_it_is_not_asked_and_the_ratio_is_one() -> None:
    est = ELBO()
    networks, batch = scene(est)
    networks["old"].load_state_dict(networks["current"].state_dict())
    asked: list[tuple[str, bool]] = []
    metrics = accumulate_gradient(
        OBJECTIVES["grpo"](), est, batch, asker(networks, batch, asked), micro_batch_size=100, old_is_current=True
    )
    assert asked == [("current", True)]
    assert metrics["log_ratio_abs"] == 0
