"""The structure of SD 3.5 (three text encoders, dual attention, 16 channels) through all that a cell goes through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from sd35 import SDE, SENTENCES, cell, write_pipeline

from ablate.plan import Cell
from ablate.record import Status, read_metrics, read_record
from runners import train
from runners.cell_evaluation import evaluate_cells

EPOCHS = 4


def placed(cell: Cell, home: Path) -> Path:
    """A cell's folder that evaluates and saves after each epoch."""
    recipe = cell.recipe
    changed = {
        "evaluation": recipe.evaluation.model_copy(update={"every": 1}),
        "budget": recipe.budget.model_copy(update={"epochs": EPOCHS}),
        "checkpoint_every": 1,
    }
    home.mkdir(parents=True)
    (home / "cell.json").write_text(
        cell.model_copy(update={"recipe": recipe.model_copy(update=changed)}).model_dump_json()
    )
    return home


def killed(home: Path, after: int) -> None:
    """Train in a process of its own, which is killed once it has logged so many lines."""
    command = [sys.executable, "-m", "ablate.cli", "cell", str(home)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 300
    while len(read_metrics(home)) < after and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -9


def lines(home: Path) -> list[str]:
    """metrics.jsonl without what the clock decides."""
    kept = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
    return [
        json.dumps({k: v for k, v in line.items() if k != "device_hours" and not k.startswith("cost/")})
        for line in kept
    ]


def image(pipe: StableDiffusion3Pipeline) -> np.ndarray:
    return pipe(
        SENTENCES[0], num_inference_steps=2, guidance_scale=1.0, max_sequence_length=16, height=64, width=64,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images[0]  # fmt: skip


def test_the_structure_of_sd35_is_trained_killed_resumed_exported_and_evaluated(tmp_path: Path) -> None:
    """Killed at work it is scored from its checkpoint; resumed it writes what an uninterrupted cell writes."""
    pipeline = write_pipeline(tmp_path / "sd35")
    parts = json.loads((pipeline / "model_index.json").read_text())
    assert parts["text_encoder_3"][1] == "T5EncoderModel"
    assert json.loads((pipeline / "vae" / "config.json").read_text())["latent_channels"] == 16
    assert json.loads((pipeline / "transformer" / "config.json").read_text())["dual_attention_layers"] == [0]

    chosen = cell(pipeline, SDE, tmp_path, lora_alpha=16)
    whole, home = (placed(chosen, tmp_path / name / chosen.id) for name in ("whole", "parts"))
    assert train.train_cell(whole).status is Status.DONE
    updates = read_metrics(whole)[1:]
    assert all(line["train/grad_norm"] > 0 for line in updates)
    assert updates[0]["train/log_ratio_abs"] < 1e-6  # on-policy

    killed(home, after=3)  # the checkpoint of the first epoch is written before the second is logged
    assert read_record(home) is None
    base, at_work = evaluate_cells(home.parent, [], [None], checkpoints=[home])
    epoch = int(str(at_work["model"]).rsplit("-", 1)[1])
    expected = read_metrics(whole)
    assert base["score"] == pytest.approx(expected[0]["eval/score"])
    assert at_work["score"] == pytest.approx(expected[epoch]["eval/score"])

    record = train.train_cell(home)
    assert (record.status, record.attempts) == (Status.DONE, 2)
    assert lines(home) == lines(whole)
    assert not (home / "checkpoint").exists()

    _, scored = evaluate_cells(home.parent, [], [None])
    assert scored["score"] == pytest.approx(expected[-1]["eval/score"])
    pipes = [StableDiffusion3Pipeline.from_pretrained(pipeline) for _ in range(3)]
    for pipe, trained in zip(pipes, (home, whole, None), strict=True):
        pipe.set_progress_bar_config(disable=True)
        if trained:
            pipe.load_lora_weights(trained / "weights")
    resumed, uninterrupted, untrained = map(image, pipes)
    np.testing.assert_array_equal(resumed, uninterrupted)
    assert np.abs(resumed - untrained).max() > 1e-6
