"""Judges behind a chat endpoint, and rewards that compare the images of a prompt."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from servers import Asked, Server, behaving

from ablate.advantages import win_rate
from ablate.recipe import RewardTerm
from runners.prompts import Prompt
from runners.rewards import load_reward, load_term
from runners.rewards.groups import pairs, shares_won
from runners.rewards.judge import JudgeReward, UnifiedReward
from runners.rewards.pairwise import COMPARE, PairwiseJudge, PairwiseReward
from runners.rewards.protocol import RewardOutput, RewardUnavailable

QUICK = {"timeout": 0.3, "retries": 1, "backoff": 0.01, "max_seconds": 2}
LEVELS = (10, 200, 60, 60, 120)
IMAGES = np.stack([np.full((8, 8, 3), level, np.uint8) for level in LEVELS])
PROMPTS = [Prompt(text=text) for text in ("cats {}", "cats {}", "cats {}", "cats {}", "dogs")]


def judging(say: Callable[[list[int], str], str | int]) -> Callable[[Asked], None]:
    """A chat endpoint that says something about the grey levels it sees and the question, or a status."""

    def behave(asked: Asked) -> None:
        if asked.path == "/models":
            return asked.say({"data": [{"id": "critic"}, {"id": "UnifiedReward-7b-v1.5"}]})
        content = asked.body["messages"][0]["content"]
        urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        files = [io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))) for url in urls]
        said = say([int(np.array(Image.open(file))[0, 0, 0]) for file in files], content[-1]["text"])
        if isinstance(said, int):
            return asked.say("busy", said)
        return asked.say({"choices": [{"message": {"role": "assistant", "content": said}}]})

    return behave


def judge(server: Server, kind: type = JudgeReward, **fields: Any) -> Any:
    return kind(url=server.url, **({"model": "critic"} | QUICK | fields))


def test_a_judge_is_asked_about_each_image_with_its_prompt_and_its_score_is_over_five() -> None:
    with behaving(judging(lambda levels, text: f"Nice. Final Score: {1 + levels[0] / 100:.2f}")) as server:
        output = judge(server, UnifiedReward, model="UnifiedReward-7b-v1.5")(IMAGES, PROMPTS)
        bodies = [asked.body for asked in server.asked]
    np.testing.assert_allclose(output.score, [(1 + level / 100) / 5 for level in LEVELS])
    assert output.reasons == ()
    texts = sorted(body["messages"][0]["content"][1]["text"].rsplit("\n")[-1] for body in bodies)
    assert texts == ["Text Caption: [cats {}]"] * 4 + ["Text Caption: [dogs]"]
    assert all(body["messages"][0]["content"][1]["text"].startswith("<image>\nYou are given") for body in bodies)
    assert {(body["model"], body["temperature"]) for body in bodies} == {("UnifiedReward-7b-v1.5", 0)}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("I like it.", "nothing like '(?i)Final Score"),
        ("", "nothing like"),
        ("Final Score: 0.5", "got '0.5' as a score, expected 1 to 5"),
        ("Final Score: 7", "got '7' as a score, expected 1 to 5"),
        ("Final Score: 45", "got '45' as a score"),
        ("Final Score: 8/10", "nothing like"),
        ("Final Score: 4 out of 10", "nothing like"),
        ("Final Score: 4.5/50", "nothing like"),
        ("Final Score: 80%", "nothing like"),
        ("Final Score: -3", "nothing like"),
        ("Final Score: 3.5.1", "nothing like"),
        ("x" * 10**6, "nothing like"),
        (422, "status 422: busy"),
        (503, "status 503: busy (2 tried)"),
    ],
)
def test_an_answer_without_a_score_is_missing_and_says_why(said: str | int, reason: str) -> None:
    with behaving(judging(lambda levels, text: said if levels == [200] else "Final Score: 4")) as server:
        output = judge(server)(IMAGES, PROMPTS)
    assert output.missing.tolist() == [False, True, False, False, False]
    assert np.nanmin(output.score) == 0.8
    assert reason in output.reasons[1]
    assert output.reasons[0] == ""


@pytest.mark.parametrize("answer", [[], {}, {"choices": []}, {"choices": [{"message": {"content": None}}]}, "text", 1])
def test_an_answer_that_is_no_chat_is_missing(answer: Any) -> None:
    with behaving(lambda asked: asked.say([answer])) as server:
        output = judge(server)(IMAGES, PROMPTS)
    assert output.missing.all()
    assert "without choices" in output.reasons[0]


@pytest.mark.parametrize("pattern", [r"Mark (\w+)", r"Mark(?: (\d+))?"])
def test_a_pattern_that_finds_no_number_is_missing(pattern: str) -> None:
    with behaving(judging(lambda levels, text: "Mark one")) as server:
        output = judge(server, pattern=pattern)(IMAGES, PROMPTS)
    assert output.missing.all()
    assert "as a score" in output.reasons[0]


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("Final Score: 4", 4),
        ("**Final Score:** 4.5", 4.5),
        ("final score: **3**/5", 3),
        ("Final Score: 3/5.", 3),
        ("Final Score: 2.25 out of 5", 2.25),
        ("Final Score: 4.", 4),
    ],
)
def test_a_score_is_read_as_models_write_it(said: str, score: float) -> None:
    with behaving(judging(lambda levels, text: said)) as server:
        assert judge(server, scale=1)(IMAGES, PROMPTS).score.tolist() == [score] * 5


def test_a_judge_s_scale_is_what_its_fields_say() -> None:
    with behaving(judging(lambda levels, text: f"Mark {levels[0] / 10}")) as server:
        output = judge(server, pattern=r"Mark (\S+)", lowest=0, highest=10, scale=10)(IMAGES, PROMPTS)
    np.testing.assert_allclose(output.score, [0.1, np.nan, 0.6, 0.6, np.nan])
    assert "got '20.0' as a score, expected 0 to 10" in output.reasons[1]


def test_the_last_score_of_an_answer_counts() -> None:
    with behaving(judging(lambda levels, text: "Final Score: 1? Too low.\nFinal Score: 3.5")) as server:
        assert judge(server, scale=1)(IMAGES, PROMPTS).score.tolist() == [3.5] * 5


def test_bursts_are_waited_for() -> None:
    busy = iter([503, 429, 502])
    with behaving(judging(lambda levels, text: next(busy, "Final Score: 5"))) as server:
        assert judge(server, retries=3)(IMAGES, PROMPTS).score.tolist() == [1] * 5
        assert len(server.asked) == 5 + 3


def test_a_model_that_is_not_there_and_a_judge_that_says_nothing_are_unavailable() -> None:
    with behaving(judging(lambda levels, text: "no")) as server:
        judge(server).load("cpu")
        with pytest.raises(RewardUnavailable, match="did you mean 'critic'"):
            judge(server, model="cirtic").load("cpu")
        with pytest.raises(RewardUnavailable, match="no answer about three test images can be read"):
            judge(server).self_check()
    with behaving(judging(lambda levels, text: "Final Score: 2")) as server:
        judge(server).self_check()


def test_the_identity_holds_the_question_and_how_the_answer_is_read() -> None:
    with behaving(lambda asked: None) as server:
        changed = [{}, {"template": "Mark {prompt}"}, {"pattern": "(.)"}, {"scale": 1.0}, {"model": "m"}, {"lowest": 0}]
        identities = {judge(server, **fields).identity for fields in changed}
        assert len(identities) == len(changed)
        assert judge(server).identity == JudgeReward(url="http://elsewhere/v1", model="critic").identity


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "Mark it"}, "with {prompt} in it"),
        ({"pattern": "("}, "no regular expression"),
        ({"pattern": "1|2"}, "got 0 groups"),
        ({"scale": 0}, "more than 0"),
        ({"lowest": 5}, "less than highest"),
        ({"max_tokens": 0}, "at least 1"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        JudgeReward(url="http://x", model="m", **fields)


# comparisons


def better(levels: list[int], text: str) -> str:
    """The brighter image is better."""
    first, second = levels
    if first == second:
        return "Both images are equally good."
    return f"Image 1 is better in colour, but all in all image {1 if first > second else 2} is better."


def test_a_judge_compares_all_pairs_of_a_prompt_in_both_orders() -> None:
    with behaving(judging(better)) as server:
        output = judge(server, PairwiseJudge)(IMAGES, PROMPTS)
        asked = [asked.body["messages"][0]["content"] for asked in server.asked]
    np.testing.assert_allclose(output.score, [0, 1, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(output.parts["answered"], np.ones(5))
    assert len(asked) == 4 * 3  # the only image of its prompt has nothing to be compared with
    assert {part[2]["text"] for part in asked} == {COMPARE.replace("{prompt}", "cats {}")}


def test_a_judge_who_always_prefers_the_first_image_prefers_none() -> None:
    with behaving(judging(lambda levels, text: "Image 1 is better.")) as server:
        assert judge(server, PairwiseJudge)(IMAGES, PROMPTS).score.tolist() == [0.5] * 5


def test_comparisons_that_are_missing_are_left_out() -> None:
    def say(levels: list[int], text: str) -> str | int:
        if 10 in levels:
            return 422
        return "Hard to say." if levels == [200, 60] else better(levels, text)

    with behaving(judging(say)) as server:
        output = judge(server, PairwiseJudge)(IMAGES, PROMPTS)
    np.testing.assert_allclose(output.score, [np.nan, 1, 1 / 3, 1 / 3, 0.5])
    np.testing.assert_allclose(output.parts["answered"], [0, 2 / 6, 3 / 6, 3 / 6, 1])
    assert "status 422" in output.reasons[0]
    assert output.reasons[1:] == ("",) * 4


@pytest.mark.parametrize("size", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("opponents", [None, 2, 4, 6])
def test_each_image_meets_so_many_others_and_no_pair_twice(size: int, opponents: int | None) -> None:
    chosen = pairs(slice(3, 3 + size), opponents)
    assert len({frozenset(pair) for pair in chosen}) == len(chosen)
    assert all(i != j for i, j in chosen)
    met = np.bincount(np.ravel(chosen).astype(int), minlength=3 + size)
    assert met.tolist() == [0] * 3 + [min(size - 1, opponents or size)] * size


@pytest.mark.parametrize("opponents", [0, 1, 3, -2])
def test_an_odd_number_of_opponents_is_refused(opponents: int) -> None:
    with pytest.raises(ValueError, match="even number"):
        PairwiseJudge(url="http://x", model="m", opponents=opponents)


def test_wins_and_ties_are_counted_for_both() -> None:
    shares, told = shares_won(4, [(0, 1), (1, 2), (2, 0), (3, 0)], [1, 0.5, 0, np.nan])
    np.testing.assert_allclose(shares, [1, 0.25, 0.25, np.nan])
    assert told.tolist() == [2, 2, 2, 0]


def test_the_win_rate_of_scores_is_that_of_the_advantages() -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3)).astype(np.uint8)
    images[1] = images[2]  # a tie
    prompts = [Prompt(text=text) for text in "aaaabbbbb"]
    jpeg = load_reward("jpeg")(images, prompts).score
    output = PairwiseReward(reward={"name": "jpeg", "incompressible": True})(images, prompts)
    expected = win_rate(torch.tensor(-jpeg)[:, None], torch.tensor([0] * 4 + [1] * 5))[:, 0]
    np.testing.assert_allclose(output.score, expected.numpy())
    np.testing.assert_array_equal(output.parts["compared"], -jpeg)


def test_a_score_that_is_missing_is_not_compared() -> None:
    def say(levels: list[int], text: str) -> str:
        return f"Final Score: {1 + levels[0] / 100}" if levels[0] > 50 else "?"

    with behaving(judging(say)) as server:
        inner = {"name": "judge", "url": server.url, "model": "critic", **QUICK}
        reward = PairwiseReward(reward=inner)
        output = reward(IMAGES, PROMPTS)
    np.testing.assert_allclose(output.score, [np.nan, 1, 0.25, 0.25, 0.5])
    assert "nothing like" in output.reasons[0]
    assert reward.remote
    assert reward.identity.startswith("pairwise-1 of judge-1 critic")


def test_an_infinite_score_beats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = PairwiseReward(reward="jpeg")
    scores = np.array([3.0, np.inf, 1.0, np.nan, np.nan])
    monkeypatch.setattr(reward, "_inner", lambda images, prompts: RewardOutput(score=scores))
    output = reward(IMAGES, PROMPTS)
    np.testing.assert_array_equal(output.score, [1, np.nan, 0, np.nan, np.nan])
    monkeypatch.setattr(reward, "_inner", lambda images, prompts: RewardOutput(score=scores[::-1]))
    output = reward(IMAGES, PROMPTS)
    np.testing.assert_array_equal(output.score, [np.nan, np.nan, np.nan, np.nan, 0.5])
    assert output.reasons[2] == "no other image of its prompt has a score"


def test_equal_prompts_of_two_draws_are_not_compared() -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3)).astype(np.uint8)
    images[3] = 128  # the smallest file
    apart = [Prompt(text="a", group=group) for group in (0, 0, 1, 1)]
    reward = PairwiseReward(reward="jpeg")
    assert reward(images, apart).score[2:].tolist() == [0, 1]
    assert set(reward(images, apart).score[:2]) == {0, 1}
    assert reward(images, [Prompt(text="a")] * 4).score[3] == 1


def test_a_comparison_is_named_in_a_grid_with_its_reward_within() -> None:
    reward = load_term(RewardTerm(name="pairwise", reward="jpeg"))
    assert not reward.remote
    assert reward.identity == "pairwise-1 of jpeg-1"
    reward.load("cpu")
    reward.self_check()
    wrong = (("jpgg", "did you mean 'jpeg'"), ({"name": "jpeg", "weight": 2}, "without weight"), ({}, "name"))
    for within, message in wrong:
        with pytest.raises(ValueError, match=message):
            PairwiseReward(reward=within)
