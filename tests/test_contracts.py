"""Every entry of every table keeps its contract, and a broken contract is found."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch

from ablate.contracts import check_estimator, check_objective, check_sampler
from ablate.estimators import ESTIMATORS
from ablate.estimators.elbo import ELBO
from ablate.objectives import OBJECTIVES
from ablate.objectives.reinforce import Reinforce
from ablate.samplers import SAMPLERS
from ablate.samplers.sde import FlowSDE
from ablate.samplers.steps import euler_step

TABLES = {**OBJECTIVES, **ESTIMATORS, **SAMPLERS}
VARIANTS = [
    *(OBJECTIVES[name](ratio=False) for name in ("epg", "pepg", "par")),
    OBJECTIVES["rloo"](kl_coef=0.1),
    OBJECTIVES["dpo"](pairs="margin", margin=0.1),
    OBJECTIVES["crd"](loss="bce"),
    OBJECTIVES["nft"](beta=0.1),
    OBJECTIVES["ram"](residual="current"),
    OBJECTIVES["rwr"](temperature=0.5),
    OBJECTIVES["grpo_guard"](per_dt=True),
]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives(name: str) -> None:
    check_objective(OBJECTIVES[name]())


@pytest.mark.parametrize("objective", [v for v in VARIANTS if "temperature=0.5" not in repr(v)], ids=repr)
def test_variants_of_objectives(objective) -> None:
    check_objective(objective)


def test_exponential_weights_move_the_policy_even_where_rewards_are_equal() -> None:
    with pytest.raises(AssertionError, match="without any difference in reward"):
        check_objective(OBJECTIVES["rwr"](temperature=0.5))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators(name: str) -> None:
    check_estimator(ESTIMATORS[name]())


@pytest.mark.parametrize(
    "estimator",
    [
        *(
            ELBO(weight=weight, sigma_law=law)
            for weight in ("simple", "path_kl", "adaptive", "x0", "ghuber")
            for law in ("sampler_grid", "uniform", "linear", "logit_normal", "scheduler_density")
        ),
        ELBO(antithetic=True),
        ELBO(weight="path_kl", antithetic=True, unit="nats"),
        ELBO(xt_from_rollout=True, pool="mean"),
        ELBO(weight="simple", sigma_law="uniform", importance=True),
        ESTIMATORS["trajectory"](unit="nats", pool="sum"),
    ],
    ids=repr,
)
def test_variants_of_estimators(estimator) -> None:
    check_estimator(estimator)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers(name: str) -> None:
    check_sampler(SAMPLERS[name]())


@pytest.mark.parametrize(
    "sampler",
    [
        FlowSDE(score_last=True),
        SAMPLERS["ode"](solver="dpm2"),
        SAMPLERS["dpm_sde"](order=2),
        SAMPLERS["ddim"](eta=0.3),
        SAMPLERS["cps"](use_density=True),
        *(SAMPLERS["mixed"](policy=policy) for policy in ("progressive", "exp_decay", "branch")),
        SAMPLERS["mixed"](step="cps", until=0.5),
    ],
    ids=repr,
)
def test_variants_of_samplers(sampler) -> None:
    check_sampler(sampler)


@pytest.mark.parametrize("name", TABLES)
def test_docstrings_have_a_formula_and_a_source(name: str) -> None:
    document = inspect.getdoc(TABLES[name]) or ""
    formula, *_, source = document.split("\n\n")
    assert re.search(r"[=~]|dx", formula.split("\n")[0]), formula
    assert source.startswith("Source: ")


# A contract that cannot be broken would be worth nothing.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken(Reinforce):
    how: str = ""

    @property
    def needs(self):  # type: ignore[override]
        return frozenset({"olde"} if self.how == "needs" else ())

    def __call__(self, evaluation):
        f, advantage = evaluation.log_prob, evaluation.advantage[:, None]
        loss = -(advantage * f).mean()
        if self.how == "undeclared":
            loss = loss + 0 * evaluation.old().mean()
        return {
            "direction": (-loss, {}),
            "sum": (-(advantage * f).sum(), {}),
            "pull": (loss + 0.1 * f.mean(), {}),
            "metric": (loss, {"loss": loss}),
            "float": (loss, {"loss": 0.0}),
            "coupled": (-((advantage - advantage.mean()) * f).mean(), {}),
        }.get(self.how, (loss, {}))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("needs", "needs 'olde' is unknown, did you mean 'old'"),
        ("undeclared", "reads what it does not declare"),
        ("float", "metric 'loss' is no tensor but float"),
        ("direction", "prefers the worse sample"),
        ("sum", "not the mean of its terms' losses"),
        ("pull", "without any difference in reward"),
        ("metric", "metric 'loss' carries a gradient"),
        ("coupled", "not the mean of its terms' losses"),
    ],
)
def test_broken_objectives_are_found(how: str, message: str) -> None:
    check_objective(Broken())
    with pytest.raises(AssertionError, match=message):
        check_objective(Broken(how=how))


class Jittered(ELBO):
    def log_prob(self, velocity, probe):
        return super().log_prob(velocity, probe) + torch.rand(())


class Unseeded(ELBO):
    def probe(self, rollout, *, num_points, streams):
        probe = super().probe(rollout, num_points=num_points, streams=streams)
        return dataclasses.replace(probe, x=probe.x + torch.rand(()))


class Deaf(ELBO):
    def probe(self, rollout, *, num_points, streams):
        return super().probe(rollout, num_points=2, streams=streams)


class Recorded(FlowSDE):
    def sample(self, velocity, noise, *, sigmas, epoch, streams):
        rollout = super().sample(velocity, noise, sigmas=sigmas, epoch=epoch, streams=streams)
        t = rollout.transitions
        return dataclasses.replace(rollout, transitions=dataclasses.replace(t, std=1.1 * t.std))


class Global(FlowSDE):
    def sample(self, velocity, noise, *, sigmas, epoch, streams):
        rollout = super().sample(velocity, noise, sigmas=sigmas, epoch=epoch, streams=streams)
        return dataclasses.replace(rollout, x0=rollout.x0 + torch.rand(()))


class Doubled(FlowSDE):
    def sample(self, velocity, noise, *, sigmas, epoch, streams):
        return super().sample(
            lambda x, s: (velocity(x, s) + velocity(x, s)) / 2, noise, sigmas=sigmas, epoch=epoch, streams=streams
        )


@pytest.mark.parametrize(
    ("check", "component", "message"),
    [
        (check_estimator, Jittered(), "not a pure function"),
        (check_estimator, Unseeded(), "does not come from the streams"),
        (check_estimator, Deaf(), "announced"),
        (check_sampler, Recorded(), "a recorded step is not"),
        (check_sampler, Global(), "does not come from the streams"),
        (check_sampler, Doubled(), "calls the network 16 times"),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__),
)
def test_broken_estimators_and_samplers_are_found(check, component, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(component)


class Plain:
    """No dataclass."""

    needs = frozenset()
    level = "term"

    def __call__(self, evaluation):
        return evaluation.log_prob.mean(), {}


@dataclasses.dataclass(frozen=True)
class Misdeclared(Reinforce):
    needs = "old"
    level = "term"


@dataclasses.dataclass(frozen=True)
class Token(Reinforce):
    level = "token"


@dataclasses.dataclass(frozen=True)
class Quiet(FlowSDE):
    def rule(self, sigmas):
        return euler_step


@pytest.mark.parametrize(
    ("check", "component", "message"),
    [
        (check_objective, Reinforce, "got the class Reinforce, expected an instance"),
        (check_objective, Plain(), "Plain is no dataclass"),
        (check_objective, Misdeclared(), "needs: got 'old', expected a set of words"),
        (check_objective, Token(), "level 'token' is unknown"),
        (check_objective, ELBO(), "ELBO has no 'level'"),
        (check_sampler, Quiet(), "no step of the rule has noise"),
    ],
    ids=lambda v: getattr(v, "__name__", type(v).__name__),
)
def test_what_is_no_component_at_all_is_found(check, component, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(component)
