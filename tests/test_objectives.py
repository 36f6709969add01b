"""Facts that single objectives promise; what all of them keep is in test_contracts.py."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ablate.contracts import POINTS, Scene, scene
from ablate.estimators.elbo import ELBO
from ablate.estimators.trajectory import Trajectory
from ablate.objectives import OBJECTIVES
from ablate.rollout import Evaluation

GROUPS, SIZE = 3, 4
OFF_POLICY_SEEDS = range(5)
RATIO_SURROGATES = ("epg", "pepg", "par", "grpo", "dr_grpo", "dapo", "gspo", "gmpo", "cispo", "sapo")


def evaluation(on_policy=False, advantage=None, seed=0, distance=0.01) -> Evaluation:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    n = GROUPS * SIZE
    f = draw(n, POINTS).requires_grad_()
    return Evaluation(
        log_prob=f,
        old_log_prob=f.detach().clone() if on_policy else f.detach() + distance * draw(n, POINTS),
        reference_log_prob=f.detach() + 0.1 * draw(n, POINTS),
        advantage=draw(n) if advantage is None else advantage,
        group=torch.arange(GROUPS).repeat_interleave(SIZE),
    )


def gradient(objective, e: Evaluation) -> Tensor:
    return torch.autograd.grad(objective(e)[0], e.log_prob)[0]


def of(name: str, **parameters):
    return OBJECTIVES[name](**parameters)


ON_POLICY = {  # how much of REINFORCE's gradient, where it is not one
    "kimi": 2.0,
    "tb": 2.0,
    "dgpo": 0.5,
    "crd": 1.0,
    "rloo": 1.0,
}


@pytest.mark.parametrize("name", [*RATIO_SURROGATES, *ON_POLICY, "nft", "ram", "awm", "rwr", "grpo_guard", "tempflow"])
def test_on_policy_every_policy_gradient_is_a_multiple_of_reinforce(name: str) -> None:
    """With advantages that sum to zero in each group. Step corrections multiply each step by its deviation."""
    advantage = torch.randn(GROUPS, SIZE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    advantage = (advantage - advantage.mean(1, keepdim=True)).flatten()
    weight = {"nft": "adaptive", "awm": "ghuber"}.get(name, "simple")
    steps = "transitions" in of(name).needs
    estimator = Trajectory() if steps else ELBO(weight=weight)
    s = scene(of(name), estimator=estimator, on_policy=True, advantage=advantage)
    reinforce = dataclasses.replace(s, objective=of("reinforce")).gradient()
    factor = {**ON_POLICY, "ram": 100.0}.get(name, 1.0)
    scale = s.probe.std[..., None] if steps else 1.0
    torch.testing.assert_close(s.gradient(), factor * scale * reinforce)


# the paper's family


@pytest.mark.parametrize("ratio", [True, False])
@pytest.mark.parametrize("seed", OFF_POLICY_SEEDS)
def test_par_and_pepg_have_exactly_the_same_gradient(ratio: bool, seed: int) -> None:
    e = evaluation(seed=seed, distance=1.0)
    assert torch.equal(gradient(of("par", ratio=ratio), e), gradient(of("pepg", ratio=ratio), e))


@pytest.mark.parametrize("seed", OFF_POLICY_SEEDS)
def test_epg_has_the_gradient_of_the_unclipped_surrogate(seed: int) -> None:
    e = evaluation(seed=seed, distance=1.0)
    surrogate = -(e.advantage[:, None] * (e.log_prob - e.old()).exp()).mean()
    torch.testing.assert_close(gradient(of("epg"), e), torch.autograd.grad(surrogate, e.log_prob)[0])
    torch.testing.assert_close(gradient(of("epg"), e), gradient(of("grpo", clip_range=1e9), e))
    torch.testing.assert_close(gradient(of("epg"), e), gradient(of("cispo", max_ratio=1e9), e))


def test_without_its_ratio_epg_is_reinforce_and_does_not_ask_the_old_policy() -> None:
    e = evaluation()
    assert of("epg", ratio=False).needs == frozenset()
    assert torch.equal(gradient(of("epg", ratio=False), e), gradient(of("reinforce"), e))


def test_kimi_is_twice_par_without_its_ratio() -> None:
    e = evaluation(distance=1.0)
    torch.testing.assert_close(gradient(of("kimi"), e), 2 * gradient(of("par", ratio=False), e))


def test_the_field_of_pepg_vanishes_at_the_closed_form_step_only_with_its_own_advantage() -> None:
    """Theorem 3.1, five states: pi ~ [exp(R/beta) pi_ref]^(eta/(1+eta)) pi_k^(1/(1+eta)) if A = eta/beta (R - mean)."""
    g = torch.Generator().manual_seed(0)
    eta, beta = 0.3, 0.7
    reward = torch.randn(5, generator=g, dtype=torch.float64)
    ref, old = torch.randn(2, 5, generator=g, dtype=torch.float64).softmax(-1)
    step = ((eta / (1 + eta)) * (reward / beta + ref.log()) + old.log() / (1 + eta)).softmax(0)

    def field(scale: float) -> Tensor:
        """PEPG's expected gradient plus that of eta KL(pi, ref), in the logits, at the closed form."""
        logits = step.log().requires_grad_()
        log_pi = logits.log_softmax(0)
        mean = (step * reward).sum()
        e = Evaluation(
            log_prob=log_pi[:, None],
            old_log_prob=old.log()[:, None],
            advantage=scale * (reward - mean),
            group=torch.zeros(5, dtype=torch.long),
        )
        # a mean over states drawn from pi_old, times the ratio: the loss of each state, weighted by pi_old
        losses = [
            old[i] * of("pepg")(dataclasses.replace(e, **{n: getattr(e, n)[i : i + 1] for n in FIELDS}))[0]
            for i in range(5)
        ]
        kl = (log_pi.exp() * (log_pi - ref.log())).sum()
        return torch.autograd.grad(torch.stack(losses).sum() + eta * kl, logits)[0]

    assert field(eta / beta).abs().max() < 1e-12
    assert field(1.0).abs().max() > 1e-3


FIELDS = ("log_prob", "old_log_prob", "advantage", "group")


# clipping


def test_clipping_stops_ratios_that_have_moved_enough() -> None:
    e = evaluation()
    ratio = (e.log_prob - e.old()).detach().exp()
    moved = ((ratio > 1.005) & (e.advantage[:, None] > 0)) | ((ratio < 0.995) & (e.advantage[:, None] < 0))
    assert moved.any()
    assert torch.equal(gradient(of("grpo", clip_range=0.005), e) == 0, moved)


def test_dapo_clips_higher_above_than_below() -> None:
    e = evaluation()
    ratio, a = (e.log_prob - e.old()).detach().exp(), e.advantage[:, None]
    moved = ((ratio > 1.012) & (a > 0)) | ((ratio < 0.995) & (a < 0))
    loss, metrics = of("dapo", clip_low=0.005, clip_high=0.012)(e)
    assert torch.equal(torch.autograd.grad(loss, e.log_prob)[0] == 0, moved)
    assert float(metrics["clip_fraction"]) == pytest.approx(float(((ratio > 1.012) | (ratio < 0.995)).double().mean()))


def test_gspo_clips_whole_samples_and_is_grpo_on_pooled_points() -> None:
    e = evaluation()
    zero = gradient(of("gspo", clip_range=1e-3), e) == 0
    assert torch.equal(zero.any(1), zero.all(1))
    assert zero.any()
    mean = dataclasses.replace(e, log_prob=e.log_prob.mean(1, keepdim=True), old_log_prob=e.old().mean(1, keepdim=True))
    torch.testing.assert_close(of("gspo")(e)[0], of("grpo")(mean)[0])


def test_cispo_truncates_the_weight_and_keeps_the_gradient() -> None:
    e = evaluation(distance=1.0)
    ratio = (e.log_prob - e.old()).detach().exp()
    expected = -e.advantage[:, None] * ratio.clamp(max=1.5) / ratio.numel()
    assert (ratio > 1.5).any()
    torch.testing.assert_close(gradient(of("cispo", max_ratio=1.5), e), expected)


def test_gmpo_is_a_geometric_mean_clipped_in_the_direction_of_the_advantage() -> None:
    e = evaluation(distance=1.0)
    log_r = (e.log_prob - e.old()).detach()
    sign = e.advantage.sign()[:, None]
    clipped = sign * torch.minimum(sign * log_r, (sign * log_r).clamp(-0.4, 0.4))
    expected = -(e.advantage * clipped.mean(1).exp()).mean()
    torch.testing.assert_close(of("gmpo")(e)[0], expected)
    assert torch.equal(gradient(of("gmpo"), e) == 0, sign * log_r > 0.4)


def test_sapo_bends_the_ratio_softly_and_more_for_bad_samples() -> None:
    e = evaluation(distance=1.0)
    ratio, a = (e.log_prob - e.old()).detach().exp(), e.advantage[:, None]
    tau = torch.where(a > 0, 1.0, 1.05).double()
    gate = torch.sigmoid(tau * (ratio - 1))
    torch.testing.assert_close(gradient(of("sapo"), e), -a * ratio * 4 * gate * (1 - gate) / ratio.numel())


# matching


@pytest.mark.parametrize("seed", OFF_POLICY_SEEDS)
def test_tb_does_not_see_a_constant_of_a_group(seed: int) -> None:
    """log Z absorbs it: neither a shift of a group's rewards nor of its log-ratios changes the gradient."""
    e = evaluation(seed=seed)
    shift = torch.randn(GROUPS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))[e.group]
    shifted = dataclasses.replace(e, advantage=e.advantage + shift, old_log_prob=e.old() - 2 * shift[:, None])
    torch.testing.assert_close(gradient(of("tb"), e), gradient(of("tb"), shifted))


def test_crd_is_tb_on_rewards_between_0_and_1() -> None:
    e = evaluation()
    reward = (e.advantage.clamp(-5, 5) / 5 + 1) / 2
    balanced = dataclasses.replace(e, advantage=reward)
    torch.testing.assert_close(gradient(of("crd"), e), 5 * gradient(of("tb"), balanced))


def test_rloo_has_the_kl_in_its_reward() -> None:
    e = evaluation()
    kl = (e.log_prob - e.reference()).detach().mean(1)
    others = [kl[(e.group == e.group[i]) & (torch.arange(12) != i)].mean() for i in range(12)]
    shaped = dataclasses.replace(e, advantage=e.advantage - 0.3 * (kl - torch.stack(others)))
    torch.testing.assert_close(gradient(of("rloo", kl_coef=0.3), e), gradient(of("reinforce"), shaped))
    assert torch.equal(gradient(of("rloo"), e), gradient(of("reinforce"), e))


# preferences


def test_dpo_moves_the_best_and_the_worst_alone() -> None:
    e = evaluation(on_policy=True)
    g = gradient(of("dpo"), e)
    for group in range(GROUPS):
        rows = (e.group == group).nonzero()[:, 0]
        a = e.advantage[rows]
        moved = set(rows[(g[rows] != 0).any(1)].tolist())
        assert moved == {int(rows[a.argmax()]), int(rows[a.argmin()])}


def test_dpo_takes_all_pairs_above_a_margin() -> None:
    advantage = torch.tensor([0.0, 1.0, 2.5, 2.6] + [0.0] * 8, dtype=torch.float64)
    e = evaluation(advantage=advantage)
    gain = e.log_prob - e.reference()
    pairs = [(1, 0), (2, 0), (3, 0), (2, 1), (3, 1)]  # all but (3, 2), which differ by 0.1
    losses = torch.stack([-logsigmoid(7 * (gain[best] - gain[worst])).mean() for best, worst in pairs])
    torch.testing.assert_close(of("dpo", beta=7, pairs="margin", margin=0.5)(e)[0], losses.mean() / 3)
    torch.testing.assert_close(of("dpo", beta=7)(e)[0], -logsigmoid(7 * (gain[3] - gain[0])).mean() / 3)


def test_dpo_on_the_simple_elbo_is_diffusion_dpo() -> None:
    s = scene(of("dpo", beta=50))
    e = s.evaluation(s.velocity)
    error = (s.velocity - s.probe.target).square().mean(-1)
    reference = (s.reference_velocity - s.probe.target).square().mean(-1)
    losses = []
    for group in range(GROUPS):
        rows = (e.group == group).nonzero()[:, 0]
        best, worst = rows[e.advantage[rows].argmax()], rows[e.advantage[rows].argmin()]
        inside = -100 / 2 * ((error[best] - reference[best]) - (error[worst] - reference[worst]))
        losses.append(-logsigmoid(inside).mean())
    torch.testing.assert_close(of("dpo", beta=50)(e)[0], torch.stack(losses).mean())


def test_d3po_clips_the_ratio_to_the_reference() -> None:
    e = dataclasses.replace(evaluation(), reference_log_prob=evaluation().log_prob.detach() - 1)
    assert gradient(of("d3po"), e).abs().max() == 0  # every ratio is e, far above 1.1
    near = evaluation(seed=1)
    near = dataclasses.replace(near, reference_log_prob=near.log_prob.detach() - 0.01)
    torch.testing.assert_close(gradient(of("d3po", beta=2), near), gradient(of("dpo", beta=2), near))


def test_dgpo_has_the_gradient_of_dpo_with_a_group_for_a_pair() -> None:
    """Two samples of advantages +1 and -1 are a pair: the gradients agree up to the factor of their definition."""
    g = torch.Generator().manual_seed(0)
    f, q = torch.randn(2, 2, 1, generator=g, dtype=torch.float64)
    f.requires_grad_()
    e = Evaluation(
        log_prob=f,
        reference_log_prob=q,
        advantage=torch.tensor([1.0, -1.0], dtype=torch.float64),
        group=torch.zeros(2, dtype=torch.long),
    )
    torch.testing.assert_close(gradient(of("dgpo", beta=6.0), e) * 6, gradient(of("dpo", beta=3.0), e))


# velocities


def on_elbo(name: str, weight: str = "simple", on_policy: bool = True, **parameters) -> Scene:
    return scene(of(name, **parameters), estimator=ELBO(weight=weight), on_policy=on_policy)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 3.0])
def test_on_policy_nft_is_reinforce_on_the_adaptive_elbo_for_every_beta(beta: float) -> None:
    nft, reinforce = on_elbo("nft", "adaptive", beta=beta), on_elbo("reinforce", "adaptive")
    torch.testing.assert_close(nft.gradient(), reinforce.gradient())


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("residual", ["old", "current"])
def test_on_policy_ram_is_reinforce_on_the_simple_elbo(scale: float, residual: str) -> None:
    ram, reinforce = on_elbo("ram", scale=scale, residual=residual), on_elbo("reinforce")
    torch.testing.assert_close(ram.gradient(), scale * reinforce.gradient())


def test_on_policy_awm_is_reinforce() -> None:
    awm, reinforce = on_elbo("awm", "ghuber"), on_elbo("reinforce", "ghuber")
    torch.testing.assert_close(awm.gradient(), reinforce.gradient())


def test_the_clip_of_awm_is_not_active_near_the_old_policy() -> None:
    clipped, free = (on_elbo("awm", on_policy=False, clip_range=c) for c in (1.0, 1e9))
    assert torch.equal(clipped.gradient(), free.gradient())
    assert not torch.allclose(on_elbo("awm", on_policy=False, clip_range=1e-4).gradient(), free.gradient())


def test_away_from_the_old_policy_awm_is_pulled_back() -> None:
    pulled, free = (on_elbo("awm", on_policy=False, ema_coef=c) for c in (2.0, 0.0))
    pull = 2 * 2.0 * (pulled.velocity - pulled.old_velocity) / pulled.velocity.numel()
    torch.testing.assert_close(pulled.gradient() - free.gradient(), pull)


def test_ram_regresses_on_the_corrected_reference() -> None:
    s = on_elbo("ram", on_policy=False, scale=3.0)
    target = s.reference_velocity + 3 * s.advantage[:, None, None] * (s.probe.target - s.old_velocity)
    torch.testing.assert_close(s.loss(s.velocity), (s.velocity - target).square().mean())


def test_nft_mixes_the_errors_of_its_two_velocities() -> None:
    s = on_elbo("nft", on_policy=False, beta=0.3)
    v, old, sigma = s.velocity, s.old_velocity, s.probe.sigma[..., None]
    errors = []
    for u in (0.3 * v + 0.7 * old, 1.3 * old - 0.3 * v):
        residual = sigma * (u - s.probe.target)
        errors.append(residual.square().mean(-1) / residual.abs().mean(-1))
    p = (s.advantage.clamp(-5, 5) / 10 + 0.5)[:, None]
    torch.testing.assert_close(s.loss(v), 5 / 0.3 * (p * errors[0] + (1 - p) * errors[1]).mean())


def test_regression_on_own_samples() -> None:
    rwr, sft = on_elbo("rwr", on_policy=False), on_elbo("sft", on_policy=False)
    error = (rwr.velocity - rwr.probe.target).square().mean(-1)
    torch.testing.assert_close(rwr.loss(rwr.velocity), (rwr.advantage[:, None] * error).mean())
    tempered = on_elbo("rwr", on_policy=False, temperature=0.5)
    weight = (tempered.advantage / 0.5).exp()[:, None]
    torch.testing.assert_close(tempered.loss(rwr.velocity), (weight * error).mean())
    error = (sft.velocity - sft.probe.target).square().mean(-1)
    best = [g * SIZE + int(sft.advantage[g * SIZE : (g + 1) * SIZE].argmax()) for g in range(GROUPS)]
    torch.testing.assert_close(sft.loss(sft.velocity), error[best].mean())


# steps


def test_the_log_ratio_of_grpo_guard_is_the_mean_of_noise_times_shift() -> None:
    """RatioNorm as published: (log r + |u|^2 / (2 D std^2)) std, u the shift of the mean; here without the detour."""
    s = scene(of("grpo_guard"))
    e = s.evaluation(s.velocity)
    plain = Trajectory().log_prob(s.velocity, s.probe) - Trajectory().log_prob(s.old_velocity, s.probe)
    shift = s.probe.velocity_coef[..., None] * (s.velocity - s.old_velocity)
    normalised = (plain + shift.square().mean(-1) / (2 * s.probe.std**2)) * s.probe.std
    unclipped = -(normalised.exp() * s.advantage[:, None]).mean()
    torch.testing.assert_close(of("grpo_guard", clip_range=1e9)(e)[0], unclipped)
    per_dt = -(normalised.exp() * s.advantage[:, None] / (s.probe.sigma - s.probe.next_sigma)).mean()
    torch.testing.assert_close(of("grpo_guard", clip_range=1e9, per_dt=True)(e)[0], per_dt)


def test_tempflow_weighs_steps_by_their_deviation() -> None:
    s = scene(of("tempflow", clip_range=1e9))
    ratio = (Trajectory().log_prob(s.velocity, s.probe) - Trajectory().log_prob(s.old_velocity, s.probe)).exp()
    torch.testing.assert_close(s.loss(s.velocity), -(s.probe.std * ratio * s.advantage[:, None]).mean())


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("grpo", "clip_range", -1, "clip_range must be positive, got -1"),
        ("dapo", "clip_high", 0, "clip_high must be positive, got 0"),
        ("dpo", "beta", -1, "beta must be positive, got -1"),
        ("dpo", "margin", -1, "margin must not be negative, got -1"),
        ("d3po", "eps", 1, r"eps must lie in \(0, 1\), got 1"),
        ("sapo", "tau_negative", 0, "tau_negative must be positive, got 0"),
        ("rwr", "temperature", 0, "temperature must be positive, got 0"),
        ("rloo", "kl_coef", -math.pi, "kl_coef must not be negative"),
        ("awm", "ema_coef", -1, "ema_coef must not be negative, got -1"),
    ],
)
def test_impossible_hyperparameters(name: str, field: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(name, **{field: value})
