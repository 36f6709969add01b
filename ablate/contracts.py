"""What every component must keep, as checks that run in milliseconds: for the built-in ones and for yours.

    from ablate.contracts import check_objective
    check_objective(MyObjective())

A broken contract raises AssertionError and says which. Everything is evaluated on a small flow whose data are
normally distributed, so that its velocity is known in closed form.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ablate.components import MEMBERS, check_declarations
from ablate.estimators.elbo import ELBO
from ablate.estimators.protocol import pooled
from ablate.estimators.trajectory import Trajectory
from ablate.flow import diffusers_sigmas
from ablate.gaussian_flow import GaussianFlow
from ablate.rollout import Evaluation, Rollout, take
from ablate.samplers.ode import ODE
from ablate.samplers.sde import FlowSDE
from ablate.seeding import streams

GROUPS, SIZE, POINTS, STEPS, DIMS = 3, 4, 3, 8, 6
FLOW = GaussianFlow()


def roll_out(sampler: Any, samples: range = range(GROUPS * SIZE)) -> Rollout:
    """Float64 samples [b, 6] of the small flow, with the latents that the network saw."""
    own = streams(0, "contracts", samples=samples)
    noise = own.normal([DIMS], torch.empty((), dtype=torch.float64))
    seen: list[Tensor] = []

    def field(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return FLOW.velocity(x, sigma)

    rollout: Rollout = sampler.sample(field, noise, sigmas=diffusers_sigmas(STEPS), epoch=0, streams=own)
    assert len(seen) == STEPS, f"the sampler calls the network {len(seen)} times in {STEPS} steps"
    return dataclasses.replace(rollout, latents=torch.stack(seen, 1))


def velocity_at(probe: Any) -> Tensor:
    """The exact velocity at the points of a probe, [b, k, ...]."""
    return FLOW.velocity(probe.x.flatten(0, 1), probe.sigma.flatten()).reshape(probe.x.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """An evaluation as the training loop makes it, as a function of the velocity [b, k, d]."""

    objective: Any
    estimator: Any
    probe: Any
    velocity: Tensor  # of the current policy
    old_velocity: Tensor
    reference_velocity: Tensor
    advantage: Tensor
    group: Tensor

    def evaluation(self, velocity: Tensor, needs: frozenset[str] | None = None) -> Evaluation:
        """What the objective sees when the current policy answers with this velocity."""
        declared = self.objective.needs if needs is None else needs

        def given(need: str, value: Tensor) -> Tensor | None:
            return value if need in declared else None

        def score(v: Tensor) -> Tensor:
            return pooled(self.estimator.log_prob(v, self.probe), self.estimator.pool)

        velocities = "velocity" in declared
        return Evaluation(
            log_prob=score(velocity),
            old_log_prob=given("old", score(self.old_velocity)),
            reference_log_prob=given("reference", score(self.reference_velocity)),
            advantage=self.advantage,
            group=self.group,
            reward=given("reward", self.advantage),
            velocity=given("velocity", velocity),
            old_velocity=given("old", self.old_velocity) if velocities else None,
            reference_velocity=given("reference", self.reference_velocity) if velocities else None,
            probe=self.probe if declared & {"target", "transitions"} else None,
        )

    def loss(self, velocity: Tensor) -> Tensor:
        value: Tensor = self.objective(self.evaluation(velocity))[0]
        return value

    def gradient(self) -> Tensor:
        """d loss / d velocity, [b, k, d]."""
        leaf = self.velocity.detach().clone().requires_grad_()
        return torch.autograd.grad(self.loss(leaf), leaf)[0]


def scene(
    objective: Any, *, estimator: Any = None, on_policy: bool = False, advantage: Tensor | None = None, seed: int = 0
) -> Scene:
    """A scene for an objective: on the trajectory where it needs transitions, else on the simple ELBO."""
    if estimator is None:
        estimator = Trajectory() if "transitions" in objective.needs else ELBO(weight="simple")
    rollout = roll_out(FlowSDE() if "transitions" in estimator.needs else ODE())
    group = torch.arange(GROUPS).repeat_interleave(SIZE)
    samples = group.tolist() if objective.level == "group" else range(GROUPS * SIZE)
    probe = estimator.probe(rollout, num_points=POINTS, streams=streams(1, "probe", samples=samples))
    g = torch.Generator().manual_seed(seed)

    def near(velocity: Tensor, distance: float) -> Tensor:
        return velocity + distance * torch.randn(velocity.shape, generator=g, dtype=velocity.dtype)

    old = velocity_at(probe) if probe.rollout_velocity is None else probe.rollout_velocity
    drawn = torch.randn(len(group), generator=g, dtype=torch.float64)
    return Scene(
        objective=objective,
        estimator=estimator,
        probe=probe,
        velocity=old if on_policy else near(old, 0.05),
        old_velocity=old,
        reference_velocity=old if on_policy else near(old, 0.1),
        advantage=drawn if advantage is None else advantage,
        group=group,
    )


def _check_class(axis: str, component: Any) -> None:
    """A dataclass with all members, whose declarations exist."""
    assert not isinstance(component, type), f"got the class {component.__name__}, expected an instance of it"
    assert dataclasses.is_dataclass(component), f"{type(component).__name__} is no dataclass"
    for member in MEMBERS[axis]:
        assert hasattr(component, member), f"{type(component).__name__} has no {member!r}"
    try:
        check_declarations(axis, component)
    except ValueError as error:
        raise AssertionError(str(error)) from None


def check_objective(objective: Any) -> None:
    """Needs, level, scalars, no gradient without a difference in reward, the right direction, a mean over units."""
    _check_class("objective", objective)
    assert objective.level == "term" or "velocity" not in objective.needs, "velocities come term by term"
    s = scene(objective)
    loss, metrics = objective(s.evaluation(s.velocity.detach().requires_grad_()))
    assert loss.shape == (), "the loss is no scalar"
    for name, v in metrics.items():
        assert isinstance(v, Tensor), f"metric {name!r} is no tensor but {type(v).__name__}"
        assert v.shape == (), f"metric {name!r} is no scalar"
        assert not v.requires_grad, f"metric {name!r} carries a gradient: detach it"
    nothing = scene(objective, on_policy=True, advantage=torch.zeros(GROUPS * SIZE, dtype=torch.float64))
    assert nothing.gradient().abs().max() < 1e-12, "a gradient on-policy without any difference in reward"
    _check_direction(scene(objective, on_policy=True))
    _check_mean_over_units(s)


def _check_direction(s: Scene) -> None:
    """A small step against the gradient makes the best sample of each group likelier, compared with the worst."""
    before = s.estimator.log_prob(s.velocity, s.probe)
    after = s.estimator.log_prob(s.velocity - 1e-3 * s.gradient(), s.probe)
    gain = (after - before).mean(1)
    for g in range(GROUPS):
        rows = (s.group == g).nonzero()[:, 0]
        best, worst = rows[s.advantage[rows].argmax()], rows[s.advantage[rows].argmin()]
        assert gain[best] > gain[worst], "a step against the gradient prefers the worse sample"


def _check_mean_over_units(s: Scene) -> None:
    level = s.objective.level
    rows, columns = (SIZE if level == "group" else 1), (1 if level == "term" else POINTS)
    whole = s.evaluation(s.velocity)
    parts = [
        s.objective(take(whole, slice(r, r + rows), slice(c, c + columns)))[0]
        for r in range(0, GROUPS * SIZE, rows)
        for c in range(0, POINTS, columns)
    ]
    mean = torch.stack(parts).mean()
    assert torch.allclose(s.objective(whole)[0], mean), f"the loss of a batch is not the mean of its {level}s' losses"


def check_estimator(estimator: Any) -> None:
    """One draw for all policies, as many points as announced, a pure function of the velocity, parts are probes."""
    _check_class("estimator", estimator)
    rollout = roll_out(FlowSDE())
    for asked in (None, 2, 4):
        k = estimator.num_points(asked, STEPS, STEPS - 1)
        probe, again = (
            estimator.probe(rollout, num_points=asked, streams=streams(1, samples=range(GROUPS * SIZE)))
            for _ in range(2)
        )
        assert hasattr(probe, "rollout_velocity"), "the probe has no rollout_velocity, a tensor or None"
        assert "transitions" in estimator.needs or hasattr(probe, "target"), "the probe has no target: noise - x0"
        assert torch.equal(probe.x, again.x), "randomness that does not come from the streams"
        assert probe.sigma.shape == (GROUPS * SIZE, k), f"announced {k} points, drew {tuple(probe.sigma.shape)}"
        assert (probe.sigma > 0).all(), "a level of 0"
        assert (probe.sigma <= 1).all(), "a level above 1"
        velocity = (velocity_at(probe) + 0.1).requires_grad_()
        value = estimator.log_prob(velocity, probe)
        assert value.shape == probe.sigma.shape, f"log_prob is {tuple(value.shape)}, not [b, k]"
        assert value.isfinite().all(), "log_prob is not finite"
        assert torch.equal(value, estimator.log_prob(velocity, probe)), "log_prob is not a pure function"
        (gradient,) = torch.autograd.grad(value.sum(), velocity)
        assert gradient.abs().max() > 0, "log_prob has no gradient"
        part = take(probe, slice(1, 3), slice(0, 1))
        assert torch.allclose(estimator.log_prob(velocity[1:3, :1], part), value[1:3, :1]), "a part is no probe"
    same = estimator.probe(rollout, num_points=2, streams=streams(1, samples=[0] * GROUPS * SIZE)).sigma
    assert torch.equal(same[:1].expand_as(same), same), "samples with equal streams are probed at different levels"


def check_sampler(sampler: Any) -> None:
    """Reproducible, independent of the batch, as many recorded steps as announced, and these are what happened."""
    _check_class("sampler", sampler)
    assert sampler.problem(STEPS) is None, f"cannot run {STEPS} steps"
    rollout = roll_out(sampler)
    assert rollout.x0.shape == (GROUPS * SIZE, DIMS)
    assert rollout.x0.isfinite().all(), "samples are not finite"
    assert torch.equal(rollout.x0, roll_out(sampler).x0), "randomness that does not come from the streams"
    alone = roll_out(sampler, range(2, 3)).x0
    assert torch.allclose(alone, rollout.x0[2:3]), "a sample depends on the batch that it is in"
    t = rollout.transitions
    scored = 0 if t is None else t.x.shape[1]
    assert scored == sampler.num_scored(STEPS), f"announced {sampler.num_scored(STEPS)} recorded steps, left {scored}"
    assert ("transitions" in sampler.leaves) == (t is not None), "transitions are left but not announced, or missing"
    if t is None:
        return
    assert (t.std > 0).all(), "a recorded step without noise has no density"
    columns = [value[None, :, None] for value in (t.x_coef, t.velocity_coef, t.std)]
    noise = (t.next_x - columns[0] * t.x - columns[1] * t.velocity) / columns[2]
    own = streams(0, "contracts", samples=range(GROUPS * SIZE))
    own.normal([DIMS], noise)  # the start
    drawn = torch.stack([own.normal([DIMS], noise) for _ in range(STEPS)], 1)  # [b, steps, d]
    assert all(any(torch.allclose(noise[:, i], drawn[:, j], atol=1e-6) for j in range(STEPS)) for i in range(scored)), (
        "a recorded step is not x_coef x + velocity_coef velocity + std z with the z of the streams"
    )
