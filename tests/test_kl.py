"""Every regulariser against its closed form."""

from __future__ import annotations

import pytest
import torch

from ablate.contracts import scene, velocity_at
from ablate.estimators.elbo import ELBO
from ablate.estimators.trajectory import Trajectory
from ablate.kl import KINDS, Difference
from ablate.objectives.reinforce import Reinforce
from ablate.recipe import KLRecipe

NEVER_NEGATIVE = [kind for kind in KINDS if kind != "k1"]


def difference(estimator, distance=0.3) -> Difference:
    probe = scene(Reinforce(), estimator=estimator).probe
    reference = velocity_at(probe)
    g = torch.Generator().manual_seed(0)
    velocity = reference + distance * torch.randn(reference.shape, generator=g, dtype=reference.dtype)
    return Difference(
        velocity=velocity,
        reference_velocity=reference,
        log_prob=estimator.log_prob(velocity, probe),
        reference_log_prob=estimator.log_prob(reference, probe),
        probe=probe,
    )


def test_the_recipe_names_every_kind() -> None:
    allowed = KLRecipe.model_json_schema()["properties"]["kind"]["enum"]
    assert allowed == list(KINDS)


@pytest.mark.parametrize("kind", NEVER_NEGATIVE)
def test_they_vanish_at_the_reference_alone(kind: str) -> None:
    assert KINDS[kind](difference(Trajectory(), 0.0)).abs().max() == 0
    d = difference(Trajectory())
    assert KINDS[kind](d)[d.probe.sigma < 1].min() > 0  # at sigma = 1, `path` has weight 0


def test_the_gaussian_step_is_the_kl_of_the_steps_two_gaussians() -> None:
    d = difference(Trajectory())
    p = d.probe
    means = [p.x_coef[..., None] * p.x + p.velocity_coef[..., None] * v for v in (d.velocity, d.reference_velocity)]
    current, reference = (torch.distributions.Normal(m, p.std[..., None]) for m in means)
    exact = torch.distributions.kl_divergence(current, reference).mean(-1)
    torch.testing.assert_close(KINDS["gaussian_step"](d), exact)
    dt = p.sigma - p.next_sigma
    torch.testing.assert_close(KINDS["released_gaussian_step"](d), exact * dt)


def test_step_and_path_kl_of_flow_sde_agree_up_to_a_constant() -> None:
    """gaussian_step = |dt| c path with c = (1 + eta^2/2)^2 / (2 eta^2), off the guard at sigma = 1."""
    d = difference(Trajectory())
    c = (1 + 0.49 / 2) ** 2 / (2 * 0.49)
    expected = (d.probe.sigma - d.probe.next_sigma) * c * KINDS["path"](d)
    inside = d.probe.sigma < 1
    torch.testing.assert_close(KINDS["gaussian_step"](d)[inside], expected[inside])


def test_path_weighs_the_velocity_kl() -> None:
    d = difference(ELBO())
    s = d.probe.sigma
    torch.testing.assert_close(KINDS["velocity"](d), (d.velocity - d.reference_velocity).square().mean(-1))
    torch.testing.assert_close(KINDS["path"](d), (1 - s) / s * KINDS["velocity"](d))


def test_k1_k2_k3_are_schulmans_estimators() -> None:
    """On samples of the current policy, k1 and k3 are unbiased for KL(current, reference), and k3 varies less."""
    current, reference = torch.distributions.Normal(0.3, 1.0), torch.distributions.Normal(0.0, 1.0)
    torch.manual_seed(0)
    x = current.sample((200_000,))
    d = Difference(
        velocity=x,
        reference_velocity=x,
        log_prob=current.log_prob(x)[:, None],
        reference_log_prob=reference.log_prob(x)[:, None],
        probe=None,
    )
    kl = 0.3**2 / 2
    assert float(KINDS["k1"](d).mean()) == pytest.approx(kl, rel=0.05)
    assert float(KINDS["k3"](d).mean()) == pytest.approx(kl, rel=0.05)
    assert KINDS["k3"](d).std() < KINDS["k1"](d).std()
    assert KINDS["k1"](d).min() < 0
    torch.testing.assert_close(KINDS["k2"](d), KINDS["k1"](d) ** 2 / 2)


def test_the_released_k3_is_that_of_the_reverse_ratio() -> None:
    d = difference(ELBO(weight="simple"))
    swapped = Difference(
        velocity=d.reference_velocity,
        reference_velocity=d.velocity,
        log_prob=d.reference_log_prob,
        reference_log_prob=d.log_prob,
        probe=d.probe,
    )
    torch.testing.assert_close(KINDS["released_k3"](d), KINDS["k3"](swapped))
