"""`ablate rewards` and `ablate rewards check`, with and without weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny_rewards import WRITERS

from ablate import cli
from runners.rewards import REWARDS, reward_class

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def rewards(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`ablate rewards` with some words: its exit code, what it prints, and what it complains of."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ablate", "rewards", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


def test_all_rewards_are_listed_with_what_they_need(rewards: Command) -> None:
    code, out, _ = rewards()
    start = out.index("scores")
    name, listed = "", dict[str, str]()
    for line in out.splitlines()[1:]:  # an entry goes on below
        name = line[:start].strip() or name
        listed[name] = listed.get(name, "") + line[start:]
    assert (code, list(listed)) == (0, list(REWARDS))
    about = reward_class("pickscore").about
    for part in (f"Units: {about.units}.", f"Weights: {about.weights}, {about.licence}, 3.7 GiB", about.source):
        assert "".join(part.split()) in "".join(listed["pickscore"].split())
    assert "Weights" not in listed["jpeg"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_check_finds_weights_and_shows_a_score_for_each_image(name: str, rewards: Command, tmp_path: Path) -> None:
    folder = WRITERS[name](tmp_path)
    code, out, _ = rewards("check", name, "--set", f"folder={folder}")
    assert code == 0
    first, second, header, *rows = out.splitlines()
    assert first.startswith(f"{name}: {name}-1 ")
    assert second.startswith("loaded in ")
    assert second.endswith("self-check passed")
    assert header.split() == ["image", "score", "prompt", "reason"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]
    assert len({float(row.split()[1]) for row in rows}) > 1


def test_a_check_shows_the_inputs_that_a_reward_has_for_itself(rewards: Command) -> None:
    code, out, _ = rewards("check", "ocr:ppocrv6-small")
    word, blank = out.splitlines()[-2:]
    assert code == 0
    assert word.split()[:3] == ["1", "1.0000", "1.0000"]
    assert blank.split()[:3] == ["2", "0.0000", "0.0000"]
    assert "a sign that says" in word
    assert "expected 'ABLATE', read ''" in blank


def test_a_score_that_is_missing_is_shown_as_missing(rewards: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runners.rewards.function.FunctionReward.self_check", lambda _: None)
    code, out, _ = rewards("check", "own_rewards:not_of_grey")
    assert code == 0
    assert "1 of 3 images have no score" in out
    grey, square, _ = (line.split() for line in out.splitlines()[-3:])
    assert grey[:2] == ["1", "missing"]
    assert float(square[1]) > 0
    code, _, err = rewards("check", "own_rewards:undefined")
    assert code == 2
    assert "no image has a score" in err


def test_a_check_without_weights_and_network_says_what_to_put_where(
    rewards: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("runners.rewards.weights.snapshot_download", no_network)
    for name, parts in {
        "pickscore": (
            "hf download yuvalkirstain/PickScore_v1 --include 'config.json' --include 'model.safetensors'",
            "hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include 'preprocessor_config.json'",
            "--local-dir FOLDER",
            "{name: ..., folder: FOLDER}",
        ),
        "geneval-hf": (
            "hf download facebook/mask2former-swin-small-coco-instance",
            "hf download openai/clip-vit-large-patch14",
            "Mask2Former in FOLDER/detector and CLIP in FOLDER/classifier",
        ),
    }.items():
        code, out, err = rewards("check", name)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert f"reward {name}: " in err
        assert all(part in err for part in parts)
    code, _, err = rewards("check", "clipscore", "--set", f"folder={tmp_path}")
    assert code == 2
    assert f"folder {tmp_path}: no config.json of openai/clip-vit-large-patch14 in it" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pikscore"], "did you mean 'pickscore'"),
        (["jpeg", "--set", "quality=3"], "no parameter 'quality'"),
        (["jpeg", "--set", "weight=3"], "not a parameter of a reward"),
        (["own_rewards:undefined"], "reward own_rewards:undefined: own_rewards:undefined@"),
        (["own_rewards:raises"], "ConnectionError: no server at port 18085"),
        (["own_rewards:of_five"], "expected 3 finite scores"),
    ],
)
def test_a_check_that_fails_is_one_line(words: list[str], message: str, rewards: Command) -> None:
    code, out, err = rewards("check", *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err
