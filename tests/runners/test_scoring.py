"""Scores that are missing: which images they are, what an epoch does without them, and when a cell stops."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cells import folder_of
from own_rewards import brightness

from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.record import Status, read_metrics
from ablate.source import FieldError
from runners import scoring, train
from runners.collect import Samples, collect
from runners.evaluation import evaluate
from runners.prompts import Prompt
from runners.rewards import RewardOutput, RewardUnavailable, load_reward
from runners.rewards.protocol import fixed_inputs
from runners.run import set_up
from runners.scoring import AT_ONCE, Scorer, score

GRID = Path(__file__).parents[2] / "grids" / "tiny.yaml"
SMALL = {
    "rollout.num_groups": 6,
    "rollout.group_size": 4,
    "rollout.num_steps": 4,
    "rollout.batch_size": 5,
    "update.updates_per_epoch": 2,
    "update.micro_batch_size": 16,
    "evaluation.num_prompts": 6,
    "evaluation.num_steps": 2,
    "evaluation.panel": [],
    "budget.epochs": 3,
}
PROMPTS = [Prompt(text=text) for text in ("a circle", "a square", "a triangle") for _ in range(2)]
IMAGES = np.arange(6, dtype=np.uint8)[:, None, None, None].repeat(3, 3)  # [6, 1, 1, 3]


def cell(reward: object, **settings: object):
    """The grpo cell of a small grid with this reward."""
    planned = make_plan(load_grid(GRID, {**SMALL, "reward": reward, **settings}))
    return next(c for c in planned.cells if (c.objective, c.estimator, c.sampler) == ("grpo", "elbo-simple", "ode"))


class Bare:
    """A function as a reward."""

    def __init__(self, function, *, compares: bool = False) -> None:
        self.function, self.compares = function, compares

    def __call__(self, images, prompts):
        return self.function(images, prompts)


def seen(images, prompts):
    return RewardOutput(score=images[:, 0, 0, 0].astype(float))


@pytest.mark.parametrize("compares", [False, True])
def test_only_the_images_that_a_reward_fails_on_have_no_score(compares: bool) -> None:
    """Or the prompts, where it compares the images of each."""

    def fails_at_one(images, prompts):
        if 4 in images:
            raise ValueError(f"got {prompts[-1].text}")
        return seen(images, prompts)

    output = score(Bare(fails_at_one, compares=compares), IMAGES, PROMPTS)
    lost = [4, 5] if compares else [4]
    assert np.flatnonzero(output.missing).tolist() == lost
    assert output.score[:4].tolist() == [0, 1, 2, 3]
    assert output.reasons[4] == "ValueError: got a triangle"


def test_a_reward_that_is_out_of_reach_is_asked_once() -> None:
    asked = []

    def down(images, prompts):
        asked.append(len(images))
        raise RewardUnavailable("no server")

    output = score(Bare(down), IMAGES, PROMPTS)
    assert asked == [6]
    assert output.missing.all()
    assert set(output.reasons) == {"no server"}


@pytest.mark.parametrize("meanwhile", [False, True])
def test_images_of_one_prompt_are_scored_together_and_in_order(meanwhile: bool) -> None:
    pieces = []

    def recorded(images, prompts):
        pieces.append([p.text for p in prompts])
        return seen(images, prompts)

    scorer = Scorer(Bare(recorded), timeout=60, meanwhile=meanwhile)
    scorer.begin()
    for rows in (slice(0, 3), slice(3, 5), slice(5, 6)):
        scorer.hand_over(IMAGES[rows], PROMPTS[rows])
    assert scorer.finish().score.tolist() == list(range(6))
    assert [text for piece in pieces for text in piece] == [p.text for p in PROMPTS]
    assert all(piece.count(text) == 2 for piece in pieces for text in piece)
    assert len(pieces) == (3 if meanwhile else 1)


def test_scoring_goes_on_while_the_caller_does_something_else() -> None:
    begun = threading.Event()

    def waits(images, prompts):
        begun.set()
        return seen(images, prompts)

    scorer = Scorer(Bare(waits), timeout=60, meanwhile=True)
    scorer.begin()
    scorer.hand_over(IMAGES, PROMPTS)
    assert begun.wait(10)  # before anybody asked for the scores
    assert scorer.finish().score.tolist() == list(range(6))


def test_many_images_are_scored_in_pieces() -> None:
    sizes = []

    def recorded(images, prompts):
        sizes.append(len(images))
        return seen(images, prompts)

    prompts = [Prompt(text=str(i // 24)) for i in range(24 * 24)]
    images = np.zeros((len(prompts), 1, 1, 3), np.uint8)
    assert len(Scorer(Bare(recorded), timeout=60)(images, prompts).score) == len(prompts)
    assert len(sizes) > 1
    assert all(size % 24 == 0 and size <= AT_ONCE for size in sizes)


def test_a_reward_that_hangs_is_given_up_and_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(scoring, "hung", [])  # of this process, which goes on

    def hangs(images, prompts):
        let_go.wait()
        return seen(images, prompts)

    scorer = Scorer(Bare(hangs), timeout=0.2)
    start = time.monotonic()
    assert scorer(IMAGES, PROMPTS).reasons[0] == "no answer within 0.2 s"
    assert scorer(IMAGES, PROMPTS).missing.all()  # at once
    assert time.monotonic() - start < 10
    assert scoring.hung == ["no answer within 0.2 s"]
    let_go.set()


def test_a_scorer_has_one_thread_which_ends_with_it() -> None:
    threads = set()

    def noticed(images, prompts):
        threads.add(threading.current_thread())
        return seen(images, prompts)

    scorer = Scorer(Bare(noticed), timeout=60)
    for _ in range(3):
        scorer(IMAGES, PROMPTS)
    (thread,) = threads
    assert thread.is_alive()
    del scorer
    thread.join(60)
    assert not thread.is_alive()


@pytest.mark.parametrize("name", ["not_of_circles", "raises_at_circles"])
def test_groups_without_a_score_are_left_out_and_counted(name: str, tmp_path: Path) -> None:
    run = set_up(tmp_path, cell(f"own_rewards:{name}", **{"scoring.max_missing": 0.9}))
    run.prompts = OneCircle()
    samples = collect(run)
    assert samples.group.unique().tolist() == [0, 1, 3, 4, 5]
    assert samples.score.isfinite().all()
    assert len(samples.rollout.x0) == len(samples.conditioning.tokens) == 20
    assert samples.metrics["rollout/missing_groups"] == pytest.approx(1 / 6)
    kept = [json.loads(line) for line in (tmp_path / "unscored" / "epoch-0-0-0.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in kept] == ["a circle"] * 4
    assert all((tmp_path / "unscored" / line["image"]).exists() for line in kept)
    reasons = {"not_of_circles": "not a finite number", "raises_at_circles": "ValueError: no circles, please"}
    assert kept[0]["reason"] == f"own_rewards:{name}: {reasons[name]}"


class OneCircle:
    """Six prompts, the third with a circle."""

    def __init__(self, circles=(2,)) -> None:
        self.circles = circles

    def train(self, num_prompts, generator):
        return [Prompt(text="a circle" if i in self.circles else f"a square {i}") for i in range(num_prompts)]

    def fixed(self, split, num_prompts):
        return self.train(num_prompts, None)


def test_an_update_without_a_group_is_that_of_the_other_groups(tmp_path: Path, monkeypatch) -> None:
    """The gradient of what is left is a mean over what is left."""

    def epoch(name: str) -> dict[str, float]:
        run = set_up(tmp_path, cell(f"own_rewards:{name}", **{"scoring.max_missing": 0.9}))
        run.prompts = OneCircle()
        return train.train_epoch(run)

    without_a_score = epoch("not_of_circles")
    monkeypatch.setattr(train, "collect", lambda run: all_but(collect(run), 2))
    taken_out_by_hand = epoch("brightness")
    assert without_a_score["train/grad_norm"] > 0
    for key in ("train/grad_norm", "train/loss", "train/kl"):
        assert without_a_score[key] == pytest.approx(taken_out_by_hand[key], rel=1e-6)


def all_but(samples: Samples, group: int) -> Samples:
    return samples.rows((samples.group != group).nonzero()[:, 0])


def test_an_epoch_without_any_score_takes_no_step(tmp_path: Path) -> None:
    run = set_up(tmp_path, cell("own_rewards:not_of_circles", **{"scoring.max_missing": 0.99}))
    run.prompts = OneCircle()
    run.scorer = Scorer(Bare(lambda images, prompts: RewardOutput(score=np.full(len(images), np.nan))), 60)
    run.check_missing = lambda *_: None
    before = [p.clone() for p in run.policy.trainable]
    metrics = train.train_epoch(run)
    assert metrics["rollout/missing_groups"] == 1
    assert all(torch.equal(p, q) for p, q in zip(run.policy.trainable, before, strict=True))
    run.log(metrics)
    assert "rollout/score" not in read_metrics(tmp_path)[0]  # missing, not NaN


@pytest.mark.parametrize("calls", [2, 3, 5, 7])
def test_a_cell_whose_reward_goes_away_resumes_to_the_same_metrics(calls: int, tmp_path: Path) -> None:
    """Down in the self-check, the first evaluation, an epoch or the last evaluation."""
    left = tmp_path / "left"
    spec = [{"name": "own_rewards:until_told", "file": str(left)}]
    whole, parts = (folder_of(cell(spec), tmp_path / name) for name in ("whole", "parts"))
    left.write_text("1000")
    assert train.train_cell(whole).status is Status.DONE
    left.write_text(str(calls - 1))
    record = train.train_cell(parts)
    assert (record.status, record.status.final) == (Status.REWARD_UNAVAILABLE, False)
    assert "the server is down" in record.message
    left.write_text("1000")
    record = train.train_cell(parts)
    assert record.status is Status.DONE
    assert (record.cost.lost > 0) == (calls in (3, 5, 7))  # an evaluation or a rollout that had to be repeated

    def comparable(folder: Path) -> list[dict[str, float]]:
        lines = read_metrics(folder)
        return [{k: v for k, v in line.items() if not k.startswith("cost/") and k != "device_hours"} for line in lines]

    assert comparable(parts) == comparable(whole)


def test_a_record_says_what_the_rewards_were_and_what_each_took(tmp_path: Path) -> None:
    spec = [{"name": "own_rewards:brightness", "label": "bright", "scale": 2.0, "weight": 0.5}, "jpeg"]
    record = train.train_cell(folder_of(cell(spec), tmp_path))
    assert (record.status, record.message) == (Status.DONE, "")
    assert record.rewards["jpeg"] == "jpeg-1"
    assert record.rewards["bright"].startswith("own_rewards:brightness@")
    assert record.rewards["bright"].endswith(" scale=2.0")
    last = read_metrics(tmp_path)[-1]
    assert last["rollout/score"] == pytest.approx(0.5 * last["rollout/bright"] + last["rollout/jpeg"])
    assert record.cost.rewards.keys() == {"bright", "jpeg"}
    assert last["cost/rewards/jpeg"] == pytest.approx(record.cost.rewards["jpeg"], abs=1e-3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_rewards:brihtness", "is no function of own_rewards"),
        ("no_such_module:f", "cannot be imported"),
        ([{"name": "own_rewards:brightness", "sclae": 2}], "unexpected keyword argument 'sclae'"),
        ([{"name": "jpeg", "incompresible": True}], "did you mean 'incompressible'"),
        ([{"name": "jpeg", "incompressible": "yes"}], "jpeg: "),
        (["jpeg", "jpeg"], "give each a label of its own"),
    ],
)
def test_impossible_rewards_are_refused(spec: object, message: str) -> None:
    from ablate.recipe import Recipe  # noqa: PLC0415

    recipe = Recipe.model_validate({"reward": spec, "budget": {"epochs": 1}})
    with pytest.raises(FieldError, match=message):
        load_reward(recipe.reward)


def test_a_panel_that_fails_is_missing_and_ends_nothing(tmp_path: Path) -> None:
    panel = ["own_rewards:brightness", "own_rewards:raises_at_circles"]
    run = set_up(tmp_path, cell("scenes", **{"evaluation.panel": panel}))
    run.prompts = OneCircle()
    some = evaluate(run)
    (line,) = (tmp_path / "unscored" / "panel-own_rewards-raises_at_circles-0-0.jsonl").read_text().splitlines()
    assert json.loads(line)["prompt"] == "a circle"
    run.prompts = OneCircle(circles=range(6))
    none = evaluate(run)
    brightness, circles = ("own_rewards:brightness", "own_rewards:raises_at_circles")
    for found, missing in ((some, 1 / 6), (none, 1)):
        assert found[f"eval/panel_missing/{circles}"] == pytest.approx(missing)
        assert f"eval/panel_missing/{brightness}" not in found
        assert np.isfinite(found[f"eval/panel/{brightness}"])
    assert some[f"eval/panel/{circles}"] == pytest.approx(some[f"eval/panel/{brightness}"], rel=0.5)
    assert np.isnan(none[f"eval/panel/{circles}"])


def test_a_reward_with_another_number_of_scores_is_an_error_with_its_name() -> None:
    reward = load_reward({"own_rewards:brightness": 1.0, "own_rewards:of_five": 0.5})
    output = score(reward, IMAGES, PROMPTS)
    assert output.missing.all()
    assert output.reasons[0] == "own_rewards:of_five: ValueError: got scores of shape (5,) for 2 images"
    assert all(seconds > 0 for seconds in reward.seconds.values())  # that of the failure too


def test_equal_terms_are_one_instance() -> None:
    one, other = load_reward("jpeg"), load_reward({"scenes": 1, "jpeg": 0.1})
    assert one.rewards["jpeg"] is other.rewards["jpeg"]


def test_a_self_check_finds_a_reward_that_is_not_deterministic() -> None:
    rewards = load_reward("own_rewards:brightness")
    rewards.self_check()
    images, prompts = fixed_inputs()
    assert rewards(images, prompts).score.tolist() == brightness(images, prompts).tolist()
    noise = np.random.default_rng(0)
    rewards.rewards["own_rewards:brightness"].__dict__["_function"] = lambda images, prompts: noise.random(len(images))
    with pytest.raises(RewardUnavailable, match="scored the same images"):
        rewards.self_check()
    load_reward.__globals__["_instance"].cache_clear()
