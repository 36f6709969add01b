"""What the probe measures with: sketches, signal and noise, weights of points, agreement; the bound by quadrature."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ablate.agreement import agreement, angle, claimed, is_bound
from ablate.concentration import effective_points, largest_share, point_weights
from ablate.contracts import roll_out, velocity_at
from ablate.estimators import ESTIMATORS
from ablate.estimators.elbo import ELBO, ElboProbe
from ablate.estimators.trajectory import Trajectory
from ablate.flow import diffusers_sigmas
from ablate.gaussian_flow import GaussianFlow
from ablate.mixture_flow import MixtureFlow, ring
from ablate.rollout import Rollout
from ablate.samplers.sde import FlowSDE
from ablate.seeding import generator, streams
from ablate.sketch import Sketch
from ablate.snr import signal_and_noise

# the bound


def noise_and_level_nodes(num_noise: int, num_levels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gauss-Hermite nodes and weights for N(0, 1), Gauss-Legendre for a uniform level on (0, 1)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_noise)
    levels, shares = np.polynomial.legendre.leggauss(num_levels)
    return (
        torch.from_numpy(nodes),
        torch.from_numpy(weights / weights.sum()),
        torch.from_numpy((levels + 1) / 2),
        torch.from_numpy(shares / 2),
    )


@pytest.mark.parametrize("x0", [-0.9, -0.3, 0.7, 1.9])
def test_path_kl_differences_between_policies_are_those_of_log_p(x0: float) -> None:
    """Uniform sigma, weight (1 - s)/s, no decoder: 1e-4 relative, by quadrature over level and noise."""
    noise, noise_weight, sigma, level_weight = noise_and_level_nodes(8, 64)
    level, z = torch.meshgrid(sigma, noise, indexing="ij")
    x = (1 - level) * x0 + level * z

    def expected(flow: GaussianFlow) -> float:
        velocity = flow.velocity(x.reshape(-1, 1), level.reshape(-1)).reshape(*x.shape, 1)
        probe = ElboProbe(x=x[..., None], target=(z - x0)[..., None], sigma=level)
        return float(level_weight @ ELBO(weight="path_kl", importance=False).log_prob(velocity, probe) @ noise_weight)

    now, before = GaussianFlow(0.7, 0.5), GaussianFlow(0.5, 0.65)
    truth = float(now.log_density(torch.tensor(x0)) - before.log_density(torch.tensor(x0)))
    assert expected(now) - expected(before) == pytest.approx(truth, rel=1e-4)


def test_path_kl_differences_are_those_of_log_p_on_the_mixture() -> None:
    noise, noise_weight, sigma, level_weight = noise_and_level_nodes(24, 64)
    z = torch.cartesian_prod(noise, noise)  # [m, 2]
    weight = torch.outer(level_weight, torch.outer(noise_weight, noise_weight).flatten())  # [levels, m]
    before = ring()
    now = MixtureFlow(logits=before.logits.flip(0), means=1.1 * before.means, log_scales=before.log_scales + 0.2)
    for x0 in before.sample(4, generator(0)):
        x = (1 - sigma)[:, None, None] * x0 + sigma[:, None, None] * z
        level = sigma[:, None].expand(-1, len(z))
        probe = ElboProbe(x=x, target=(z - x0).expand_as(x), sigma=level)

        def expected(flow: MixtureFlow, probe: ElboProbe = probe) -> float:
            velocity = flow.velocity(probe.x.reshape(-1, 2), probe.sigma.reshape(-1)).reshape(probe.x.shape)
            estimator = ELBO(weight="path_kl", importance=False, unit="nats")
            return float((weight * estimator.log_prob(velocity, probe)).sum())

        truth = float(now.log_density(x0[None]) - before.log_density(x0[None]))
        assert expected(now) - expected(before) == pytest.approx(truth, abs=2e-3)


def test_who_claims_to_be_a_bound_and_with_which_decoder() -> None:
    assert is_bound(ELBO(weight="path_kl"))
    assert is_bound(ELBO(weight="path_kl", sigma_law="logit_normal"))
    others = [ELBO(), ELBO(weight="path_kl", importance=False), ELBO(weight="path_kl", guard=1e-3), Trajectory()]
    assert not any(map(is_bound, [*others, ESTIMATORS["released_path_kl"]()]))
    s = 0.01 / 0.99
    entropy = float(torch.distributions.Normal(0.0, s).entropy())
    assert ELBO(weight="path_kl").decoder(3) == pytest.approx(-3 * entropy)


def test_what_points_claim_is_in_nats_in_all() -> None:
    points = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]])
    assert claimed(ELBO(), points, 5).tolist() == [-10.0, -10.0]
    assert claimed(ELBO(unit="nats"), points, 5).tolist() == [-2.0, -2.0]
    assert claimed(Trajectory(), points, 5).tolist() == [-20.0, -20.0]
    bound = ELBO(weight="path_kl")
    torch.testing.assert_close(claimed(bound, points, 5), torch.full((2,), -10.0 + bound.decoder(5)))


# weights of points


def all_levels(estimator: ELBO, num_points: int = 10) -> tuple[Tensor, ElboProbe]:
    x0 = torch.randn(64, 6, generator=generator(0), dtype=torch.float64)
    rollout = Rollout(x0=x0, sigmas=diffusers_sigmas(10))
    probe = estimator.probe(rollout, num_points=num_points, streams=streams(0, samples=range(64)))
    return point_weights(estimator, velocity_at(probe), probe), probe


def test_released_path_kl_puts_95_percent_of_its_weight_on_one_of_ten_nodes() -> None:
    weight, probe = all_levels(ESTIMATORS["released_path_kl"]())
    torch.testing.assert_close(weight, (1 - probe.sigma) / (probe.sigma + 1e-3))
    assert float(largest_share(weight).mean()) == pytest.approx(0.95, abs=0.005)
    assert float(effective_points(weight).mean()) == pytest.approx(1.11, abs=0.01)


def test_the_principled_form_does_not() -> None:
    weight, _ = all_levels(ESTIMATORS["elbo"](weight="path_kl"))
    assert float(largest_share(weight).mean()) < 0.7
    assert float(effective_points(weight).mean()) > 2
    weight, _ = all_levels(ESTIMATORS["elbo"](weight="path_kl", sigma_law="logit_normal"))
    assert float(largest_share(weight).mean()) < 0.95
    weight, _ = all_levels(ESTIMATORS["elbo"](weight="simple"))
    torch.testing.assert_close(effective_points(weight), torch.full((64,), 10.0, dtype=torch.float64))
    torch.testing.assert_close(largest_share(weight), torch.full((64,), 0.1, dtype=torch.float64))


def test_the_weight_of_a_step_is_its_kl() -> None:
    probe = Trajectory().probe(roll_out(FlowSDE()), num_points=None, streams=streams(0, samples=range(12)))
    weight = point_weights(Trajectory(), velocity_at(probe), probe)
    torch.testing.assert_close(weight, probe.velocity_coef**2 / (2 * probe.std**2))
    in_all = point_weights(Trajectory(unit="nats"), velocity_at(probe), probe)
    torch.testing.assert_close(in_all, weight * probe.x.shape[2])


# sketches


def test_inner_products_of_sketches_are_unbiased_with_the_variance_of_a_count_sketch() -> None:
    """Blocks of several sizes, some longer than the table, so that stretches share buckets and signs."""
    g = generator(0)
    x, y = ([torch.randn(n, generator=g) for n in (7, 50, 3, 130)] for _ in range(2))
    y[3] += 2 * x[3]
    truth = sum(float(a @ b) for a, b in zip(x, y, strict=True))
    norms = [sum(float(b.square().sum()) for b in blocks) for blocks in (x, y)]
    found = []
    for seed in range(4000):
        sketch = Sketch(seed, size=32, table=40)
        found.append(float(sketch(x) @ sketch(y)))
    expected_sd = math.sqrt((norms[0] * norms[1] + truth**2) / 32)
    assert np.mean(found) == pytest.approx(truth, abs=4 * expected_sd / math.sqrt(4000))
    assert np.std(found) == pytest.approx(expected_sd, rel=0.1)


def test_a_sketch_is_linear_and_the_same_for_the_same_seed() -> None:
    x, y = (torch.randn(300, generator=generator(seed)) for seed in (0, 1))
    sketch = Sketch(3, size=64, table=128)
    torch.testing.assert_close(sketch([x + 2 * y]), sketch([x]) + 2 * sketch([y]))
    torch.testing.assert_close(sketch([x[:100], x[100:]]), Sketch(3, size=64, table=128)([x[:100], x[100:]]))
    assert not torch.allclose(sketch([x]), Sketch(4, size=64, table=128)([x]))


# signal and noise


def test_signal_and_noise_are_unbiased() -> None:
    """Groups whose means have covariance B I, draws with W I around them, and a mean of squared norm |mu|^2."""
    groups, draws, q, between, within, repeats = 4, 3, 5, 2.0, 0.5, 20_000
    mu = torch.full((q,), 0.6, dtype=torch.float64)
    g = generator(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(repeats, *shape, q, generator=g, dtype=torch.float64)

    means = mu + math.sqrt(between) * normal(groups, 1)
    gradients = means + math.sqrt(within) * normal(groups, draws)
    found = [signal_and_noise(each) for each in gradients]

    def mean_and_error(values: list[float]) -> tuple[float, float]:
        return float(np.mean(values)), 4 * float(np.std(values)) / math.sqrt(repeats)

    expected = {
        "noise": within * q / groups,
        "total_signal": float(mu.square().sum()),
        "total_noise": (between + within) * q / groups,
        "signal": float(means.mean(1).square().sum(-1).mean()),  # the conditional mean of these very groups
    }
    for name, truth in expected.items():
        value, error = mean_and_error([getattr(each, name) for each in found])
        assert value == pytest.approx(truth, abs=error), name


# agreement


def test_agreement_of_a_shifted_and_scaled_value() -> None:
    truth = torch.linspace(-3, 1, 50, dtype=torch.float64)
    found = agreement(2 * truth + 1, truth)
    assert found.gap_mean == pytest.approx(float(truth.mean()) + 1)
    assert found.gap_sd == pytest.approx(float(truth.std()))
    assert (found.pearson, found.spearman) == (pytest.approx(1), pytest.approx(1))


def test_the_angle_is_that_of_the_noiseless_gradients() -> None:
    """60 degrees between means; the estimate is drawn twice with as much noise as signal."""
    q, units = 2000, 8
    truth, across = torch.zeros(units, q), torch.zeros(units, q)
    truth[:, 0], across[:, 1] = 1, 1
    exact = 0.5 * truth + math.sqrt(0.75) * across
    noise = torch.randn(2, units, q, generator=generator(0)) * math.sqrt(units / q)
    assert angle(torch.stack([exact] * 2), torch.stack([truth] * 2)).degrees == pytest.approx(60, abs=1e-3)
    noisy = angle(exact + noise, torch.stack([truth] * 2))
    assert noisy.degrees == pytest.approx(60, abs=4)
    assert noisy.low < 60 < noisy.high
    single = torch.cosine_similarity((exact + noise)[0].mean(0), truth.mean(0), dim=0)
    assert math.degrees(math.acos(float(single))) > 65


def test_no_angle_where_there_is_only_noise() -> None:
    g = generator(0)
    noise, truth = torch.randn(2, 8, 500, generator=g), torch.randn(1, 8, 500, generator=g).expand(2, -1, -1)
    assert angle(noise, truth) is None
