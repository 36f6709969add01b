"""The embedded model is a genuine pipeline, and what the card says of it is so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import nn

from ablate.flow import diffusers_sigmas
from ablate.recipe import EvaluationRecipe, ModelRecipe
from ablate.seeding import streams
from runners.evaluation import generate
from runners.identity import model_path
from runners.policy import SD3Policy
from runners.prompts import Prompt
from runners.rewards.scenes import ScenesReward
from runners.tiny import pretrain
from runners.tiny.scenes import ScenePrompts, all_prompts

FOLDER = Path(model_path("tiny"))


@pytest.fixture(scope="module")
def policy() -> SD3Policy:
    return SD3Policy(ModelRecipe(path="tiny", max_sequence_length=0, resolution=32), torch.device("cpu"))


def test_it_fits_into_a_package() -> None:
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) < 8_000_000


@pytest.mark.parametrize("guidance_scale", [1.0, 3.5])
def test_the_pipelines_own_sampling_is_ours(policy: SD3Policy, guidance_scale: float) -> None:
    """diffusers' call and our Euler sampler draw the same image from the same noise."""
    pipe = StableDiffusion3Pipeline.from_pretrained(FOLDER, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    texts = ["a red circle", "three squares"]
    recipe = EvaluationRecipe(guidance_scale=guidance_scale)
    prompts = [Prompt(text=text, tag="") for text in texts]
    ours = generate(policy, prompts, range(len(texts)), recipe, diffusers_sigmas(8), batch_size=2)
    noise = torch.stack([torch.from_numpy(n) for n in fixed_noise(policy, len(texts))])
    theirs = pipe(
        texts,
        latents=noise,
        num_inference_steps=8,
        guidance_scale=guidance_scale,
        max_sequence_length=0,
        output_type="np",
    ).images
    np.testing.assert_allclose(theirs, ours / 255, atol=2 / 255)


def fixed_noise(policy: SD3Policy, n: int) -> list[np.ndarray]:
    own = streams(0, "evaluation", samples=range(n))
    return list(own.normal(policy.latent_shape, torch.empty(())).numpy())


def test_the_card_tells_the_accuracy_without_guidance(policy: SD3Policy) -> None:
    prompts = ScenePrompts().fixed("evaluation", 600)
    wanted = range(len(prompts))
    images = generate(policy, prompts, wanted, EvaluationRecipe(), diffusers_sigmas(8), batch_size=120)
    accuracy = ScenesReward()(images, prompts).parts["accuracy"].mean()
    (row,) = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("| 1 |")]
    assert accuracy == pytest.approx(float(row.split("|")[2]), abs=0.015)
    assert 0.15 <= accuracy <= 0.35


def test_every_word_is_one_token(policy: SD3Policy) -> None:
    tokenizer = policy.pipe.tokenizer
    for family in all_prompts().values():
        for prompt in family:
            assert len(tokenizer.tokenize(prompt.text)) == len(prompt.text.split())
            assert len(tokenizer(prompt.text).input_ids) <= tokenizer.model_max_length


def test_its_settings_are_those_of_the_script() -> None:
    assert json.loads((FOLDER / "pretraining.json").read_text()) == pretrain.asdict(pretrain.Settings())


def test_pretraining_continues_to_the_same_weights(tmp_path: Path) -> None:
    """Stopped after a save and started again, a stage ends with the weights of an uninterrupted one."""
    settings = pretrain.Settings(batch_size=4, ema_decay=0.9)

    def stage(path: Path, num_steps: int, stop: int | None = None) -> nn.Linear:
        torch.manual_seed(0)
        model, steps = nn.Linear(3, 3), []

        def loss(generator: torch.Generator) -> torch.Tensor:
            steps.append(None)
            if stop is not None and len(steps) > stop:
                raise KeyboardInterrupt
            return model(torch.randn(4, 3, generator=generator)).square().mean()

        return pretrain.train("test", model, loss, num_steps, 1e-2, settings, path)

    whole = stage(tmp_path / "whole.pt", 700)
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path / "parts.pt", 700, stop=600)
    torch.testing.assert_close(stage(tmp_path / "parts.pt", 700).weight, whole.weight, rtol=0, atol=0)
