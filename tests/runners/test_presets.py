"""The presets of the literature on the embedded model: every cell of baselines.yaml and paper_table.yaml."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ablate.grid import load_grid
from ablate.part import COMPONENT_AXES
from ablate.passes import passes
from ablate.plan import Cell, make_plan
from ablate.record import Status, read_metrics
from runners import train

GRIDS = Path(__file__).parents[2] / "grids"
SMALL = {
    "rollout.num_groups": 2,
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
MODEL = (
    "{path: tiny, dtype: float32, lora_rank: null, max_sequence_length: 0, resolution: 32, offload_encoders: false, "
    "cache_embeddings: false}"
)


def small(cell: Cell) -> Cell:
    """With four images per prompt."""
    rollout = cell.recipe.rollout
    smaller = {"candidates": 4} if rollout.candidates else {"group_size": 4}
    return cell.model_copy(
        update={"recipe": cell.recipe.model_copy(update={"rollout": rollout.model_copy(update=smaller)})}
    )


@pytest.mark.parametrize("name", CELLS)
def test_every_preset_trains_for_two_epochs(name: str, tmp_path: Path) -> None:
    cell = small(CELLS[name])
    (tmp_path / "cell.json").write_text(cell.model_dump_json())
    record = train.train_cell(tmp_path)
    assert (record.status, record.message) == (Status.DONE, "")
    lines = read_metrics(tmp_path)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert any(line["train/grad_norm"] > 0 for line in lines[1:])
    cost, images = passes(cell), 2 * 2 * cell.recipe.rollout.group_size
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


COMMON = {
    "update.learning_rate": 3e-4,
    "update.weight_decay": 1e-4,
    "update.updates_per_epoch": 1,
    "rollout.num_groups": 48,
    "rollout.group_size": 24,
    "rollout.guidance_scale": 1.0,
    "kl.coef": 0.0,
    "old_policy.rate": 0.0,
}
PAPER = {
    "rollout.num_steps": 10,
    "advantage.coef": 0.1,
    "advantage.scale": "none",
    "kl.kind": "velocity",
    "kl.coef": 1e-4,
    "old_policy.rate": 0.001,
    "old_policy.limit": 0.5,
    "update.max_grad_norm": 5.0,
    "sampler.solver": "dpm2",
    "estimator.weight": "adaptive",
}
FLOW = {
    "rollout.num_steps": 10,
    "rollout.guidance_scale": 4.5,
    "update.guidance_scale": 4.5,
    "update.updates_per_epoch": 2,
    "update.max_grad_norm": 1.0,
    "advantage.scale": "batch",
    "advantage.clip": 5,
    "kl.kind": "released_gaussian_step",
    "kl.coef": 0.04,
    "sampler.noise_level": 0.7,
}
NUMBERS = {  # what the sources publish
    "paper-epg": PAPER,
    "paper-pepg": PAPER,
    "paper-par": PAPER,
    "flow-grpo": {**FLOW, "objective.clip_range": 1e-4},
    "grpo-guard": {**FLOW, "objective.clip_range": 2e-6, "objective.per_dt": True},
    "tempflow-grpo": {**FLOW, "objective.clip_range": 1e-4, "sampler.policy": "branch", "rollout.noise": "group"},
    "flow-grpo-fast": {
        "rollout.num_steps": 10,
        "update.updates_per_epoch": 2,
        "objective.clip_range": 1e-5,
        "sampler.window": 3,
        "sampler.until": 0.5,
        "sampler.step": "cps",
        "sampler.noise_level": 0.8,
    },
    "diffusion-nft": {
        "rollout.num_steps": 10,
        "objective.beta": 1.0,
        "advantage.scale": "batch",
        "advantage.clip": 5,
        "kl.coef": 1e-4,
        "old_policy.rate": 0.001,
        "old_policy.limit": 0.5,
        "sampler.solver": "dpm2",
    },
    "awm": {
        "rollout.num_groups": 72,
        "rollout.num_steps": 14,
        "objective.clip_range": 1.0,
        "objective.ema_coef": 1.0,
        "advantage.coef": 0.2,
        "advantage.clip": 1,
        "kl.coef": 1e-3,
        "old_policy.rate": 0.001,
        "old_policy.limit": 0.3,
        "update.num_points": 6,
        "estimator.power": 0.25,
        "evaluation.ema_decay": 0.99,
    },
    "ram": {
        "objective.scale": 100,
        "update.num_points": 8,
        "update.max_grad_norm": None,
        "old_policy.rate": 0.01,
        "old_policy.limit": 0.9,
        "estimator.sigma_law": "linear",
    },
    "dance-grpo": {
        "rollout.num_groups": 96,
        "rollout.group_size": 12,
        "rollout.num_steps": 16,
        "rollout.noise_schedule": "linear",
        "update.num_points": 9,
        "update.learning_rate": 1e-5,
        "objective.clip_range": 1e-4,
        "sampler.noise_level": 0.3,
    },
    "mix-grpo": {
        "rollout.num_groups": 96,
        "rollout.group_size": 12,
        "rollout.num_steps": 25,
        "update.learning_rate": 1e-5,
        "objective.clip_range": 1e-4,
        "advantage.clip": 5,
        "sampler.window": 4,
        "sampler.epochs_per_place": 25,
        "sampler.policy": "progressive",
    },
    "ddpo": {
        "rollout.num_steps": 50,
        "rollout.guidance_scale": 5.0,
        "objective.clip_range": 1e-4,
        "advantage.clip": 5,
        "sampler.eta": 1.0,
    },
    "online-dpo": {
        "rollout.num_steps": 40,
        "rollout.guidance_scale": 4.5,
        "rollout.group_size": 2,
        "rollout.candidates": 24,
        "update.guidance_scale": 1.0,
        "objective.beta": 50,
        "reference.refresh_every": 40,
        "estimator.sigma_law": "logit_normal",
    },
}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_the_numbers_of_its_source(preset: str, tmp_path: Path) -> None:
    (tmp_path / "g.yaml").write_text(
        f"name: g\ncells: [{{recipe: {GRIDS / 'recipes' / f'{preset}.yaml'}}}]\nseeds: [0]\n"
    )
    cell = make_plan(load_grid(tmp_path / "g.yaml")).cells[0]
    for path, number in (COMMON | NUMBERS[preset]).items():
        group, _, name = path.partition(".")
        of = cell.components[group].parameters if group in cell.components else dict(getattr(cell.recipe, group))
        assert (path, of[name]) == (path, number)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_for_sd35_and_plans_on_the_embedded_model_by_its_model_block_alone(
    preset: str, tmp_path: Path
) -> None:
    source = GRIDS / "recipes" / f"{preset}.yaml"
    (tmp_path / "g.yaml").write_text(f"name: g\ncells: [{{recipe: {source}}}]\nseeds: [0]\n")
    full = make_plan(load_grid(tmp_path / "g.yaml")).cells[0]
    assert full.recipe.model.path == "stabilityai/stable-diffusion-3.5-medium"
    assert (full.recipe.model.lora_rank, full.recipe.model.lora_alpha) == (32, 64)
    assert full.recipe.model.offload_encoders
    assert full.recipe.model.cache_embeddings
    with (tmp_path / "g.yaml").open("a") as file:
        file.write(f"override: {{model: {MODEL}}}\n")
    tiny = make_plan(load_grid(tmp_path / "g.yaml")).cells[0]
    assert tiny.recipe.model_copy(update={"model": full.recipe.model}) == full.recipe
    assert tiny.components == full.components


def test_baselines_are_all_presets() -> None:
    cells = [cell for name, cell in CELLS.items() if name.startswith("baselines")]
    assert sorted(cell.axes["recipe"] for cell in cells) == sorted(PRESETS)
