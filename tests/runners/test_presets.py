"""The presets of the literature on the embedded model: every cell of baselines.yaml and paper_table.yaml."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ablate.grid import COMPONENT_AXES, load_grid
from ablate.passes import passes
from ablate.plan import make_plan
from ablate.record import Status, read_metrics
from runners import train

GRIDS = Path(__file__).parents[2] / "grids"
SMALL = {
    "rollout.num_groups": 2,
    "rollout.group_size": 4,
    "evaluation.num_prompts": 6,
    "evaluation.num_steps": 2,
    "budget.epochs": 2,
}
CELLS = {
    f"{name}-{i}-{cell.objective}": cell
    for name in ("baselines", "paper_table")
    for i, cell in enumerate(c for c in make_plan(load_grid(GRIDS / f"{name}.yaml", SMALL)).cells if c.seed == 0)
}
PRESETS = [
    "paper-epg", "paper-pepg", "paper-par", "flow-grpo", "flow-grpo-fast", "diffusion-nft", "awm", "ram",
    "dance-grpo", "mix-grpo", "tempflow-grpo", "grpo-guard", "ddpo", "online-dpo",
]  # fmt: skip
MODEL = "{path: tiny, dtype: float32, lora_rank: null, max_sequence_length: 0, resolution: 32}"


@pytest.mark.parametrize("name", CELLS)
def test_every_preset_trains_for_two_epochs(name: str, tmp_path: Path) -> None:
    cell = CELLS[name]
    (tmp_path / "cell.json").write_text(cell.model_dump_json())
    record = train.train_cell(tmp_path)
    assert (record.status, record.message) == (Status.DONE, "")
    lines = read_metrics(tmp_path)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert any(line["train/grad_norm"] > 0 for line in lines[1:])
    cost, images = passes(cell), 2 * 2 * 4
    assert record.cost.backwards == images * cost.backward


def test_the_design_table_has_its_nine_cells() -> None:
    table = [cell for name, cell in CELLS.items() if name.startswith("paper_table")]
    named = [
        (*(cell.components[axis].name for axis in COMPONENT_AXES), cell.recipe.rollout.guidance_scale > 1)
        for cell in table
    ]
    assert named == [
        ("epg", "trajectory", "sde", False),
        ("epg", "trajectory", "sde", True),
        ("epg", "elbo", "sde", False),
        ("epg", "elbo", "ode", False),
        ("pepg", "elbo", "sde", False),
        ("pepg", "elbo", "ode", False),
        ("par", "elbo", "sde", False),
        ("par", "elbo", "ode", False),
        ("grpo", "elbo", "ode", False),
    ]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_for_sd35_and_plans_on_the_embedded_model_by_its_model_block_alone(
    preset: str, tmp_path: Path
) -> None:
    source = GRIDS / "recipes" / f"{preset}.yaml"
    (tmp_path / "g.yaml").write_text(f"name: g\ncells: [{{recipe: {source}}}]\nseeds: [0]\n")
    full = make_plan(load_grid(tmp_path / "g.yaml")).cells[0]
    assert full.recipe.model.path == "stabilityai/stable-diffusion-3.5-medium"
    assert (full.recipe.model.lora_rank, full.recipe.model.lora_alpha) == (32, 64)
    with (tmp_path / "g.yaml").open("a") as file:
        file.write(f"override: {{model: {MODEL}}}\n")
    tiny = make_plan(load_grid(tmp_path / "g.yaml")).cells[0]
    assert tiny.recipe.model_copy(update={"model": full.recipe.model}) == full.recipe
    assert tiny.components == full.components


def test_baselines_are_all_presets() -> None:
    cells = [cell for name, cell in CELLS.items() if name.startswith("baselines")]
    assert sorted(cell.axes["recipe"] for cell in cells) == sorted(PRESETS)
