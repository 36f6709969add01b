"""What an epoch trains on: shared noise, candidates, dynamic sampling, several rewards, and what a rollout keeps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ablate.grid import load_grid
from ablate.plan import Cell, make_plan
from ablate.record import Status, read_metrics
from runners import checkpoint, train
from runners.collect import collect
from runners.rewards import RewardOutput
from runners.run import Run, set_up
from runners.scoring import Scorer

GRIDS = Path(__file__).parents[2] / "grids"
GROUPS, SIZE = 3, 4
SMALL = {
    "rollout.num_groups": GROUPS,
    "rollout.group_size": SIZE,
    "rollout.num_steps": 4,
    "update.micro_batch_size": 16,
    "evaluation.num_prompts": 6,
    "evaluation.num_steps": 2,
    "budget.epochs": 2,
}


def cell(what: str, tmp_path: Path, **settings: Any) -> Cell:
    text = f"name: g\nrecipe: {GRIDS / 'recipes' / 'tiny-scenes.yaml'}\naxes: {{{what}}}\nseeds: [0]\n"
    (tmp_path / "g.yaml").write_text(text)
    given = SMALL | {name.replace("__", "."): value for name, value in settings.items()}
    return make_plan(load_grid(tmp_path / "g.yaml", given)).cells[0]


ODE = "objective: [grpo], estimator: [elbo], sampler: [ode]"
SDE = "objective: [grpo], estimator: [trajectory], sampler: [sde]"


def run_of(what: str, tmp_path: Path, **settings: Any) -> Run:
    return set_up(tmp_path, cell(what, tmp_path, **settings))


class Listed:
    """A reward that gives listed scores, call by call."""

    def __init__(self, *scores: list[float]) -> None:
        self.scores = list(scores)

    def __call__(self, images, prompts) -> RewardOutput:
        score = np.array(self.scores.pop(0))
        assert len(score) == len(images) == len(prompts)
        return RewardOutput(score=score)


def test_without_any_choice_all_samples_are_taken(tmp_path: Path) -> None:
    samples = collect(run_of(SDE, tmp_path))
    assert samples.rollout.x0.shape[0] == GROUPS * SIZE
    assert samples.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert samples.rollout.transitions.x.shape[:2] == (GROUPS * SIZE, 3)
    assert samples.rollout.latents is None


def test_encoding_prompts_is_booked_as_part_of_the_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, clock, hours = run_of(ODE, tmp_path), time.perf_counter, []
    real = run.policy.encode
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * len(hours))
    run.policy.encode = lambda texts: hours.append(1) or real(texts)
    collect(run)
    assert run.progress.cost.rollout == pytest.approx(3600 * len(hours), rel=0.5)


def test_the_best_and_the_worst_candidates_are_kept(tmp_path: Path) -> None:
    run = run_of(ODE, tmp_path, rollout__candidates=6)
    scores = [5, 1, 4, 2, 3, 0, 1, 1, 1, 1, 1, 0, 0, 1, 2, 3, 4, 5]
    run.scorer = Scorer(Listed([float(s) for s in scores]), 60)
    whole = run_of(ODE, tmp_path, rollout__group_size=6)
    whole.scorer = Scorer(Listed([float(s) for s in scores]), 60)
    all_samples, samples = collect(whole), collect(run)
    kept = [0, 1, 2, 5, 6, 7, 10, 11, 12, 13, 16, 17]
    assert samples.score.tolist() == [scores[i] for i in kept]
    torch.testing.assert_close(samples.rollout.x0, all_samples.rollout.x0[kept])
    assert samples.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert samples.metrics["rollout/score"] == pytest.approx(np.mean(scores))  # of all that was rolled out


def test_groups_of_equal_rewards_are_drawn_again(tmp_path: Path) -> None:
    run = run_of(ODE, tmp_path, rollout__resample_rounds=3)
    equal, differing = [1.0] * 4, [0.0, 1.0, 2.0, 3.0]
    reward = Listed(equal + differing + equal, equal * 3, differing * 3, differing * 3)
    run.scorer = Scorer(reward, 60)
    samples = collect(run)
    assert len(reward.scores) == 1  # three informative groups after three rounds: the fourth is spared
    assert samples.score.tolist() == differing * 3
    assert samples.metrics["rollout/informative_groups"] == pytest.approx(4 / 9)
    assert samples.rollout.x0.unique(dim=0).shape[0] == GROUPS * SIZE


def test_what_is_missing_after_the_last_round_is_filled_up(tmp_path: Path) -> None:
    run = run_of(ODE, tmp_path, rollout__resample_rounds=1)
    run.scorer = Scorer(Listed([1.0] * 12, [0.0, 1.0, 2.0, 3.0] + [1.0] * 8), 60)
    samples = collect(run)
    assert samples.score.tolist() == [0.0, 1.0, 2.0, 3.0] + [1.0] * 8
    assert samples.metrics["rollout/informative_groups"] == pytest.approx(1 / 6)


def test_a_group_can_start_from_the_same_noise(tmp_path: Path) -> None:
    samples = collect(run_of(SDE, tmp_path, rollout__noise="group"))
    start = samples.rollout.transitions.x[:, 0]
    assert start.unique(dim=0).shape[0] == GROUPS
    assert torch.equal(start[0], start[3])
    assert samples.rollout.x0.unique(dim=0).shape[0] == GROUPS * SIZE


def test_batches_do_not_change_the_noise_of_a_group(tmp_path: Path) -> None:
    one, many = (collect(run_of(SDE, tmp_path, rollout__noise="group", rollout__batch_size=n)) for n in (12, 3))
    torch.testing.assert_close(one.rollout.transitions.x[:, 0], many.rollout.transitions.x[:, 0])
    torch.testing.assert_close(one.rollout.x0, many.rollout.x0, atol=1e-4, rtol=1e-3)


def test_latents_are_kept_for_an_estimator_that_needs_them(tmp_path: Path) -> None:
    what = "objective: [grpo], estimator: [{name: elbo, xt_from_rollout: true}], sampler: [ode]"
    samples = collect(run_of(what, tmp_path))
    assert samples.rollout.latents.shape[:2] == (GROUPS * SIZE, 4)


def test_released_rollouts_pass_truncated_times(tmp_path: Path) -> None:
    times = {}
    for truncate in (False, True):
        run = run_of(SDE, tmp_path, rollout__truncate_timesteps=truncate)
        real, seen = run.policy.velocity, []

        def recorded(x, sigma, *rest, real=real, seen=seen):
            seen.append(1000 * sigma)
            return real(x, sigma, *rest)

        run.policy.velocity = recorded
        collect(run)
        times[truncate] = torch.stack([t[0] for t in seen])
    torch.testing.assert_close(times[True], times[False].floor(), atol=1e-3, rtol=0)
    assert not torch.allclose(times[True], times[False])


def test_without_truncation_the_trajectorys_ratio_is_one_and_with_it_not(tmp_path: Path) -> None:
    moved = {}
    for truncate in (False, True):
        run = run_of(SDE, tmp_path, rollout__truncate_timesteps=truncate, update__updates_per_epoch=1)
        moved[truncate] = train.train_epoch(run)["train/log_ratio_abs"]
    assert moved[False] < 1e-5
    assert moved[True] > 10 * moved[False]


@pytest.mark.parametrize("fields", ["unit: nats", "pool: sum, unit: nats", "pool: mean"])
def test_a_trajectory_in_other_units_is_on_policy_too(fields: str, tmp_path: Path) -> None:
    what = f"objective: [grpo], estimator: [{{name: trajectory, {fields}}}], sampler: [sde]"
    chosen = cell(what, tmp_path)
    (tmp_path / "cell.json").write_text(chosen.model_dump_json())
    assert train.train_cell(tmp_path).status is Status.DONE


@pytest.mark.parametrize(
    "settings",
    [
        {"reward": {"scenes": 1.0, "jpeg": 0.2}, "advantage.several": "normalised", "advantage.whiten": True},
        {"advantage.transform": "win_rate"},
        {"kl.kind": "k3", "kl.coef": 0.1},
        {"rollout.candidates": 8, "rollout.resample_rounds": 1},
        {"update.group_probe": "stratified"},
        {"reference.refresh_every": 2},
        {"update.max_grad_norm": None},
    ],
    ids=",".join,
)
def test_what_stands_around_the_axes_trains(settings: dict[str, Any], tmp_path: Path) -> None:
    what = "objective: [grpo], estimator: [{name: elbo, weight: path_kl}], sampler: [ode]"
    chosen = cell(what, tmp_path, **{name.replace(".", "__"): value for name, value in settings.items()})
    (tmp_path / "cell.json").write_text(chosen.model_dump_json())
    record = train.train_cell(tmp_path)
    assert (record.status, record.message) == (Status.DONE, "")
    assert read_metrics(tmp_path)[-1]["train/grad_norm"] > 0
    if isinstance(chosen.recipe.reward, dict):
        assert {"eval/jpeg", "eval/scenes", "eval/accuracy"} <= record.metrics.keys()


def test_a_refreshed_reference_is_the_policy_of_that_update(tmp_path: Path) -> None:
    run = run_of("objective: [dpo], estimator: [elbo], sampler: [ode]", tmp_path, reference__refresh_every=3)
    base = [p.detach().clone() for p in run.policy.trainable]
    train.train_epoch(run)  # three updates
    with run.policy.using("reference"):
        reference = [p.detach().clone() for p in run.policy.trainable]
    assert all(torch.equal(r, p) for r, p in zip(reference, run.policy.trainable, strict=True))
    assert not all(torch.equal(r, b) for r, b in zip(reference, base, strict=True))
    run.policy.trainable[0].data.add_(1)  # it does not follow between refreshes
    with run.policy.using("reference"):
        assert torch.equal(run.policy.trainable[0], reference[0])


def test_a_refreshed_reference_survives_a_checkpoint_and_the_models_own_is_not_stored(tmp_path: Path) -> None:
    what = "objective: [dpo], estimator: [elbo], sampler: [ode]"
    run = run_of(what, tmp_path, reference__refresh_every=3)
    assert "reference" not in run.policy.state()
    train.train_epoch(run)
    checkpoint.save(tmp_path, run.progress, run.policy, run.optimizer, run.scaler)
    again = run_of(what, tmp_path, reference__refresh_every=3)
    assert again.progress.update == 3
    saved, restored = run.policy.state(), again.policy.state()
    assert saved.keys() == restored.keys() == {"current", "old", "reference", "average"}
    assert all(torch.equal(a, b) for name in saved for a, b in zip(saved[name], restored[name], strict=True))


def test_an_impossible_number_of_candidates_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be at least group_size"):
        cell(ODE, tmp_path, rollout__candidates=3)
