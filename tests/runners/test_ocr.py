"""The OCR reward on rendered text, and in a cell that trains on it. `pytest -m slow -s` prints the measured table."""

from __future__ import annotations

import hashlib
import json
import socket
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cells import folder_of
from lettering import STYLES, Style, fonts, lettered

from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.recipe import RewardTerm
from ablate.record import Status, read_metrics
from ablate.source import FieldError
from runners import train
from runners.ocr_prompts import OCRPrompts
from runners.prompts import Prompt
from runners.rewards import RewardUnavailable, load_reward, load_term
from runners.rewards import ocr as module
from runners.rewards.ocr import OCRReward
from runners.rewards.protocol import Images
from runners.rewards.text import quoted, text_score
from runners.run import Run, set_up

GRIDS = Path(__file__).parents[2] / "grids"
NAME = "ocr:ppocrv6-small"
SIDE = 256
SMALL_IMAGES = {"name": NAME, "min_side": SIDE}
PLAIN = Style(size=(30, 30))
(FONT,) = (font for font in fonts() if font.name == "DejaVuSans.ttf")


def shown(text: str) -> Images:
    """A small image with this text, [256, 256, 3]."""
    return lettered(text, PLAIN, FONT, np.random.default_rng(0), SIDE)


def asking(text: str) -> Prompt:
    return Prompt(text=f'a shop sign that says "{text}", at dusk')


@pytest.fixture(scope="module")
def reward() -> OCRReward:
    loaded = OCRReward(min_side=SIDE)
    loaded.load("cpu")
    return loaded


def test_the_score_is_the_share_of_the_asked_text_that_was_read(reward: OCRReward) -> None:
    images = np.stack([shown(text) for text in ("Open Daily", "we are OPEN DAILY 24", "Open Dairy", "Zebra", "")])
    output = reward(images, [asking("OPEN DAILY")] * 5)
    assert output.score.tolist() == [1, 1, 1 - 1 / 9, pytest.approx(text_score("OPEN DAILY", "Zebra")), 0]
    assert output.parts["exact"].tolist() == [1, 1, 0, 0, 0]
    assert output.reasons[:3] == ("", "", "expected 'OPEN DAILY', read 'Open Dairy'")
    assert output.reasons[4] == "expected 'OPEN DAILY', read ''"


def test_a_prompt_that_asks_for_no_text_has_no_score(reward: OCRReward) -> None:
    asked = [Prompt(text="a cat"), asking("CAT"), asking(""), asking("  "), Prompt(text='an unclosed "CAT')]
    output = reward(np.stack([shown("CAT")] * 5), asked)
    assert output.missing.tolist() == [True, False, True, True, True]
    assert output.score[1] == output.parts["exact"][1] == 1
    assert np.isnan(output.parts["exact"][output.missing]).all()
    assert ["asks for no text" in reason for reason in output.reasons] == output.missing.tolist()
    assert reward(np.stack([shown("CAT")]), [Prompt(text="a cat")]).missing.all()


def test_scores_depend_on_neither_batch_nor_threads_nor_repetition(reward: OCRReward) -> None:
    generator = np.random.default_rng(0)
    texts = ["golden harbor", "iron comet 24", "mind the velvet engine", "CAT"] * 2
    images = np.stack([lettered(text, STYLES["hard"], FONT, generator, SIDE) for text in texts])
    prompts = [asking(text) for text in [*texts[3:], *texts[:3]]]  # others than are shown, for scores of all kinds
    whole = reward(images, prompts)
    assert len(set(whole.score)) > 1
    for other in (reward, OCRReward(min_side=SIDE, threads=3)):
        again = other(images, prompts)
        np.testing.assert_array_equal(again.score, whole.score)
        assert again.reasons == whole.reasons
    single = [reward(image[None], [prompt]).score[0] for image, prompt in zip(images, prompts, strict=True)]
    np.testing.assert_array_equal(single, whole.score)


def test_colours_are_passed_in_the_order_that_the_models_know(reward: OCRReward) -> None:
    seen: list[Images] = []
    other = OCRReward()
    other.__dict__["_engine"] = lambda image: seen.append(image) or reward._engine(image)
    image = shown("CAT")
    image[..., 0] = 7
    other.read(image[None])
    assert (seen[0][..., 2] == 7).all()
    assert (seen[0][..., 0] == image[..., 2]).all()


def test_the_identity_holds_the_weights_and_what_changes_scores() -> None:
    def digest(name: str) -> str:
        return hashlib.sha256((files("rapidocr") / "models" / name).read_bytes()).hexdigest()[:12]

    weights = f"det={digest('PP-OCRv6_det_small.onnx')} rec={digest('PP-OCRv6_rec_small.onnx')}"
    assert load_reward(NAME).identity == f"ocr:ppocrv6-small-1 {weights}"
    assert OCRReward(threads=4).identity == OCRReward().identity
    assert OCRReward(min_side=512).identity == f"ocr:ppocrv6-small-1 min_side=512 {weights}"
    assert OCRReward().fingerprint().startswith("rapidocr-3.")


def test_the_self_check_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("it asks the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    reward = OCRReward()
    reward.load("cpu")
    reward.self_check()


@pytest.mark.parametrize("read", [["", ""], ["ABLATE", "ABLATE"], ["ABLAT", ""]])
def test_the_self_check_fails_where_reading_does(read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OCRReward, "read", lambda *_: read)
    with pytest.raises(RewardUnavailable, match="expected 1 for a word and 0 for a blank image, got"):
        OCRReward().self_check()


def test_missing_weights_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECOGNISER", "PP-OCRv9_rec.onnx")
    for attempt in (lambda: OCRReward().identity, lambda: OCRReward().load("cpu")):
        with pytest.raises(RewardUnavailable, match=r"has no PP-OCRv9_rec.onnx in .*models: run `pip install"):
            attempt()


@pytest.mark.parametrize(("given", "message"), [({"threads": 0}, "at least 1"), ({"min_side": 5}, "32 to 2000")])
def test_impossible_parameters_are_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        load_term(RewardTerm(name=NAME, **given))


# how well it reads


def measured(style: str, number: int, reward: OCRReward) -> tuple[float, float, float]:
    """Mean score, share read exactly, and CPU seconds per image of texts that are rendered in all fonts in turn."""
    generator = np.random.default_rng(list(STYLES).index(style))
    prompts = OCRPrompts().fixed("evaluation", number)
    order = generator.permutation(len(fonts()))
    chosen = [fonts()[order[i % len(order)]] for i in range(number)]
    images = np.stack(
        [lettered(quoted(p.text), STYLES[style], font, generator) for p, font in zip(prompts, chosen, strict=True)]
    )
    start = time.process_time()
    output = reward(images, prompts)
    return output.score.mean(), output.parts["exact"].mean(), (time.process_time() - start) / number


@pytest.mark.parametrize(("style", "floor"), [("clean", 0.98), ("medium", 0.98), ("hard", 0.8)])
def test_rendered_text_is_read(style: str, floor: float) -> None:
    score, exact, _ = measured(style, 6, OCRReward())
    assert score >= floor
    assert exact >= floor - 0.2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_table_of_the_documentation() -> None:
    print(f"\n{len(fonts())} fonts, 120 images of each kind")
    for min_side in (736, 512):
        reward = OCRReward(min_side=min_side)
        reward.self_check()
        for style, floor in (("clean", 0.99), ("medium", 0.99), ("hard", 0.85)):
            score, exact, seconds = measured(style, 120, reward)
            print(f"| {min_side} | {style} | {score:.3f} | {exact:.2f} | {seconds:.2f} |")
            assert score >= floor


# in a cell


def spelt(text: str, number: int) -> str:
    """In turn the text, the text without its last letter, and nothing."""
    return (text, text[:-1], "")[number % 3]


def drawing_in_place_of_decoding(run: Run) -> Run:
    """The policy's decoder returns drawings for the prompts that were encoded last, spelt in turn as `spelt` does."""
    encode, drawings = run.policy.encode, []

    def remembering(texts: list[str]) -> Any:
        drawings[:] = [shown(spelt(quoted(text), i)) for i, text in enumerate(texts)]
        return encode(texts)

    run.policy.encode = remembering
    run.policy.decode = lambda latents: np.stack([drawings.pop(0) for _ in latents])
    return run


def test_a_cell_trains_on_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups, size = 2, 3
    axes = "objective: [grpo], estimator: [elbo], sampler: [ode]"
    text = f"name: g\nrecipe: {GRIDS / 'recipes' / 'tiny-scenes.yaml'}\naxes: {{{axes}}}\nseeds: [0]\n"
    (tmp_path / "g.yaml").write_text(text)
    settings = {
        "reward": [SMALL_IMAGES],
        "prompts.train": "ocr",
        "rollout.num_groups": groups,
        "rollout.group_size": size,
        "rollout.num_steps": 2,
        "update.updates_per_epoch": 1,
        "evaluation.num_prompts": 6,
        "evaluation.num_steps": 1,
        "evaluation.every": 1,
        "evaluation.panel": [],
        "budget.epochs": 1,
    }
    cell = make_plan(load_grid(tmp_path / "g.yaml", settings)).cells[0]
    monkeypatch.setattr(train, "set_up", lambda *given, **more: drawing_in_place_of_decoding(set_up(*given, **more)))
    real, ranked = train.advantages, []

    def watched(rewards, group, *rest):
        ranked.append((rewards, group, real(rewards, group, *rest)))
        return ranked[-1][-1]

    monkeypatch.setattr(train, "advantages", watched)
    record = train.train_cell(folder_of(cell, tmp_path / "cell"))
    assert (record.status, record.message) == (Status.DONE, "")
    assert list(record.rewards) == [NAME]
    assert " rapidocr-" in record.rewards[NAME]

    ((rewards, group, advantage),) = ranked
    assert group.tolist() == [0] * size + [1] * size
    scores = rewards.reshape(groups, size)
    right, misspelt, blank = scores.T
    assert right.tolist() == [1, 1]
    assert ((misspelt > 0.7) & (misspelt < 1)).all()  # of texts of at least four characters
    assert blank.tolist() == [0, 0]
    assert (advantage.reshape(groups, size).diff(dim=1) < 0).all()

    before, after = read_metrics(tmp_path / "cell")
    assert after["rollout/score"] == pytest.approx(float(scores.mean()))
    assert after["rollout/exact"] == pytest.approx(1 / 3)
    assert before["eval/exact"] == after["eval/exact"] == pytest.approx(1 / 3)
    assert {f"eval/exact/{family}" for family in ("one_word", "two_words", "three_words", "four_words")} <= after.keys()
    assert after["train/grad_norm"] > 0
    assert record.cost.rewards[NAME] > 0

    held_out = OCRPrompts().fixed(cell.recipe.evaluation.split, 6)
    lines = [json.loads(line) for line in (tmp_path / "cell" / "samples" / "after.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == [prompt.text for prompt in held_out]
    expected = [text_score(t, spelt(t, i)) for i, t in enumerate(quoted(p.text) for p in held_out)]
    assert [line["score"] for line in lines] == pytest.approx(expected)
    assert after["eval/score"] == pytest.approx(np.mean(expected))
    assert lines[2]["reason"] == f"expected {quoted(held_out[2].text)!r}, read ''"
    assert (tmp_path / "cell" / "samples" / "after.png").exists()
    assert not (tmp_path / "cell" / "unscored").exists()
