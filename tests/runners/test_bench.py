"""The bench measures what the plan says; SD 3.5 Medium has its real size without a download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sd35 import write_pipeline
from typer.testing import CliRunner

from ablate.cli import app
from ablate.grid import load_grid
from ablate.passes import passes
from ablate.plan import make_plan
from runners import random_weights
from runners.bench import bench

GRIDS = Path(__file__).parents[2] / "grids"
SMALL = {
    "rollout.num_groups": 3,
    "rollout.group_size": 4,
    "rollout.num_steps": 4,
    "update.updates_per_epoch": 1,
    "update.micro_batch_size": 16,
}


def test_the_bench_counts_what_the_plan_says() -> None:
    cell = next(c for c in make_plan(load_grid(GRIDS / "quickstart.yaml", SMALL)).cells if c.estimator == "trajectory")
    found, plan = bench(cell, repeats=1), passes(cell)
    assert found.images == 12
    assert found.forwards_per_image == plan.rollout + plan.forward
    assert found.backwards_per_image == plan.backward
    assert 0 < sum(found.phases.values()) <= found.epoch
    assert found.flops_per_second == pytest.approx(found.flops_per_call * found.calls_per_second)
    assert found.efficiency == pytest.approx(found.bare / found.epoch)
    assert found.peak_memory is None


def test_flops_are_those_of_the_matrix_products() -> None:
    """The embedded transformer's parameters, times two, times the tokens they see: the bulk of its operations."""
    cell = make_plan(load_grid(GRIDS / "quickstart.yaml", SMALL)).cells[0]
    assert 1e7 < bench(cell, repeats=1).flops_per_call < 5e7


def test_sd35_medium_has_its_published_size() -> None:
    with torch.device("meta"):
        transformer, autoencoder = random_weights.medium_transformer(), random_weights.medium_autoencoder()
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(2.24e9, rel=0.01)
    assert sum(p.numel() for p in autoencoder.parameters()) == pytest.approx(84e6, rel=0.01)
    dual = [block.attn2 is not None for block in transformer.transformer_blocks]
    assert dual == [True] * 13 + [False] * 11


def test_a_bench_with_random_weights_loads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command line, with the small pipeline's parts in place of the large ones."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel  # noqa: PLC0415

    folder = write_pipeline(tmp_path / "sd35")
    parts = {
        "medium_transformer": lambda: SD3Transformer2DModel.from_config(
            SD3Transformer2DModel.load_config(folder / "transformer")
        ),
        "medium_autoencoder": lambda: AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
    }
    for name, part in parts.items():
        monkeypatch.setattr(random_weights, name, part)
    settings = SMALL | {"model.resolution": 64, "reward": "jpeg"}
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    given = ["bench", str(GRIDS / "full.yaml"), *options, "--only", "sampler=ode", "--random-weights", "--json"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["images"] == 12
    assert found["forwards_per_image"] > 4
