"""Estimators on a network, whose density is known through its probability-flow ODE alone: an oracle with errors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ablate.agreement import Agreement, Angle, agreement, angle, claimed
from ablate.likelihood import ProbabilityFlow
from ablate.seeding import streams
from runners.probe_gradient import Project, Rollouts, draw, gradient_of, numbers_of_points
from runners.probe_worlds import spread_of_points
from runners.run import Run

NUM_STEPS, POWER = 24, 1.5  # of the midpoint rule: on the embedded model within 0.6 % of 64 steps


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Of a rollout's samples, by two independent sets of sign vectors."""

    nats: Tensor  # [b]  mean of the two
    gradient: Tensor  # [2, u, q]  of -mean(A log p / D), group by group
    error: float  # mean standard error of nats
    step_error: float  # mean change of nats with half the steps
    oracle: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """An estimator against the truth."""

    agreement: Agreement
    angle: Angle | None
    point_sd: float
    value: Tensor  # [b]


def true_values(run: Run, rollouts: Rollouts, num_probes: int, project: Project) -> Truth:
    """log p of every sample and the true policy gradient, with `num_probes` sign vectors in each of two sets."""
    x0, size = rollouts.samples.rollout.x0, rollouts.group_size
    solver = ProbabilityFlow(solver="midpoint", num_steps=NUM_STEPS, power=POWER, num_probes=num_probes)
    coarse = ProbabilityFlow(solver="midpoint", num_steps=NUM_STEPS // 2, power=POWER, num_probes=num_probes)
    each: list[list[Tensor]] = [[], []]
    gradients: list[Tensor] = []
    changes = []
    # fused attention has no second derivative, which the gradient of a divergence needs
    with sdpa_kernel(SDPBackend.MATH):
        for half in range(2):
            for group in range(rollouts.num_groups):
                rows = slice(group * size, (group + 1) * size)
                field = run.policy.field(rollouts.samples.conditioning.rows(rows), run.recipe.update.guidance_scale)
                signs = [streams(run.cell.seed, "signs", half, samples=range(rows.start, rows.stop)) for _ in range(2)]
                run.optimizer.zero_grad()
                found = solver.log_likelihood(field, x0[rows], streams=signs[0], parameters=run.policy.trainable)
                loss = -(rollouts.advantage[rows] * found.per_dimension).mean()
                loss.backward()  # type: ignore[no-untyped-call]
                gradients.append(project(gradient_of(run)))
                each[half].append(found.each.detach())
                if half == 0:
                    with torch.no_grad():
                        less = coarse.log_likelihood(field, x0[rows], streams=signs[1])
                    changes.append((less.nats - found.nats.detach()).abs())
    run.optimizer.zero_grad()
    both = torch.cat([torch.cat(half) for half in each], 1)  # [b, 2 m]
    return Truth(
        nats=both.mean(1),
        gradient=torch.stack(gradients).reshape(2, rollouts.num_groups, -1),
        error=float((both.std(1) / both.shape[1] ** 0.5).mean()),
        step_error=float(torch.cat(changes).mean()),
        oracle=f"ODE, midpoint rule with {NUM_STEPS} steps, {2 * num_probes} sign vectors",
    )


def compare(run: Run, rollouts: Rollouts, truth: Truth, num_draws: int, project: Project) -> Found:
    """The values and policy gradient of the run's estimator with a point at every level, drawn 2 x num_draws times."""
    x0 = rollouts.samples.rollout.x0
    k, dims = numbers_of_points(run, [])[0], x0[0].numel()
    draws = [draw(run, rollouts, k, number, project) for number in range(2 * num_draws)]
    halves = [draws[:num_draws], draws[num_draws:]]
    value = torch.stack([claimed(run.estimator, d.log_prob, dims) for d in draws]).mean(0)
    gradient = torch.stack([torch.stack([d.gradient for d in half]).mean(0) for half in halves])
    return Found(
        agreement=agreement(value, truth.nats),
        angle=angle(gradient, truth.gradient),
        point_sd=float(torch.stack([spread_of_points(run.estimator, d.log_prob, dims) for d in draws]).mean()),
        value=value,
    )
