"""The bench measures what the plan says; SD 3.5 has its real sizes without a download."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from sd35 import write_pipeline
from typer.testing import CliRunner

from ablate.cli import app
from ablate.grid import load_grid
from ablate.passes import passes
from ablate.plan import make_plan
from ablate.recipe import ModelRecipe
from ablate.source import InputError
from runners import bench as bench_module
from runners import random_weights
from runners.bench import bench
from runners.bench_model import grid_of
from runners.policy import SD3Policy
from runners.random_weights import random_policy
from runners.run import set_up
from runners.train import train_epoch

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
    flops = found.forwards_per_image * found.flops_per_call + found.backwards_per_image * found.flops_per_backward
    assert found.flops_per_second == pytest.approx(flops * found.images_per_second)
    assert found.efficiency == pytest.approx(found.bare / found.epoch)
    assert found.peak_memory is None


def test_flops_are_those_of_matrix_products_and_attention() -> None:
    """Two for each weight and each position that it sees; four for each channel of each pair of tokens."""
    cell = make_plan(load_grid(GRIDS / "quickstart.yaml", SMALL)).cells[0]
    policy, seen = SD3Policy(cell.recipe.model, torch.device("cpu")), []

    def count(module: torch.nn.Module, _: object, output: torch.Tensor) -> None:
        seen.append(2 * module.weight.numel() * output.numel() // module.weight.shape[0])

    hooks = [
        module.register_forward_hook(count)
        for module in policy.network.modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    ]
    policy.velocity(torch.randn(1, *policy.latent_shape), torch.tensor([0.5]), policy.encode(["a bench"]))
    for hook in hooks:
        hook.remove()
    tokens, blocks = 16 + policy.encode(["a bench"]).tokens.shape[1], policy.network.transformer_blocks
    found = bench(cell, policy, repeats=1)
    assert found.flops_per_call == sum(seen) + 4 * len(blocks) * tokens**2 * policy.network.inner_dim
    assert found.flops_per_backward == pytest.approx(3 * found.flops_per_call, rel=0.02)


def test_a_backward_through_frozen_weights_counts_once() -> None:
    """The LoRA's own products are small; those of frozen weights have no gradient."""
    cell = make_plan(load_grid(GRIDS / "quickstart.yaml", SMALL | {"model.lora_rank": 1})).cells[0]
    found = bench(cell, repeats=1)
    assert 1.8 * found.flops_per_call < found.flops_per_backward < 2.2 * found.flops_per_call


def test_bare_calls_with_guidance_are_as_large_as_those_of_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    guided = {"rollout.guidance_scale": 4.5, "update.guidance_scale": 4.5, "rollout.batch_size": 6}
    cell = make_plan(load_grid(GRIDS / "quickstart.yaml", SMALL | guided)).cells[0]
    with TemporaryDirectory() as folder:
        run = set_up(Path(folder), cell)
        calls: list[tuple[int, bool]] = []
        real = run.policy._call

        def counted(x: torch.Tensor, *given: object) -> torch.Tensor:
            calls.append((len(x), torch.is_grad_enabled()))
            return real(x, *given)

        monkeypatch.setattr(run.policy, "_call", counted)
        train_epoch(run)
        epoch, calls[:] = set(calls), []
        seconds = {(12, False): 1.0, (32, False): 10.0, (32, True): 100.0}  # of each size

        def timed(_: object, call: Callable[[], None]) -> float:
            call()
            return seconds[calls[-1]]

        monkeypatch.setattr(bench_module, "_seconds", timed)
        cost, images = run.progress.cost, 12
        rollouts = images * passes(cell).rollout
        bare = bench_module._bare(run, rollouts, cost.forwards - rollouts, cost.backwards)
    assert {size for size, _ in epoch} >= {12}
    assert bare == pytest.approx(rollouts / 12 * 1 + (cost.forwards - rollouts) / 32 * 10 + cost.backwards / 32 * 100)


@pytest.mark.slow
def test_an_epoch_of_the_embedded_model_is_network_calls_for_the_most_part() -> None:
    """Decoding, reward and bookkeeping take the rest."""
    assert bench(make_plan(load_grid(GRIDS / "quickstart.yaml")).cells[0]).efficiency >= 0.85


@pytest.mark.parametrize(
    ("build", "size", "dual", "width"),
    [("medium_transformer", 2.243e9, 13, 1536), ("large_transformer", 8.057e9, 0, 2432)],
)
def test_sd35_has_its_published_sizes(build: str, size: float, dual: int, width: int) -> None:
    with torch.device("meta"):
        transformer, autoencoder = getattr(random_weights, build)(), random_weights.autoencoder()
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(size, rel=0.001)
    assert sum(p.numel() for p in autoencoder.parameters()) == pytest.approx(84e6, rel=0.01)
    assert transformer.inner_dim == width
    blocks = transformer.transformer_blocks
    assert [block.attn2 is not None for block in blocks] == [True] * dual + [False] * (len(blocks) - dual)
    assert len(blocks) * 64 == width if dual == 0 else len(blocks) == 24


@pytest.fixture
def small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of the small pipeline in place of the large ones."""
    folder = write_pipeline(tmp_path / "sd35")
    parts = {
        "medium_transformer": lambda: SD3Transformer2DModel.from_config(
            SD3Transformer2DModel.load_config(folder / "transformer")
        ),
        "large_transformer": lambda: SD3Transformer2DModel.from_config(
            SD3Transformer2DModel.load_config(folder / "transformer"), num_layers=3
        ),
        "autoencoder": lambda: AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")),
    }
    for name, part in parts.items():
        monkeypatch.setattr(random_weights, name, part)


def options(**more: object) -> list[str]:
    settings = SMALL | {"model.resolution": 64} | {key.replace("__", "."): value for key, value in more.items()}
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


@pytest.mark.usefixtures("small_parts")
def test_a_bench_with_random_weights_loads_nothing() -> None:
    given = ["bench", str(GRIDS / "full.yaml"), *options(reward="jpeg"), "--only", "sampler=ode"]
    result = CliRunner().invoke(app, [*given, "--random-weights", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["images"] == 12
    assert found["forwards_per_image"] > 4


@pytest.mark.usefixtures("small_parts")
def test_a_text_has_one_random_embedding() -> None:
    recipe = ModelRecipe(path="sd3.5-medium", max_sequence_length=4)
    first, second = (random_policy(recipe, torch.device("cpu")) for _ in range(2))
    found, again = first.encode(["a", "b", "a"]), second.encode(["b"])
    assert torch.equal(found.tokens[0], found.tokens[2])
    assert torch.equal(found.tokens[1], again.tokens[0])
    assert torch.equal(found.pooled[1], again.pooled[0])
    assert (found.tokens[0] - found.tokens[1]).std() == pytest.approx(2**0.5, rel=0.1)


@pytest.mark.usefixtures("small_parts")
def test_guidance_with_random_weights_is_on_policy() -> None:
    """Rollout and update must see the empty prompt under the same embedding; the loop stops where they do not."""
    words = options(reward="jpeg", rollout__guidance_scale=4.5, update__guidance_scale=4.5)
    given = ["bench", str(GRIDS / "full.yaml"), *words, "--only", "estimator=trajectory", "--only", "objective=grpo"]
    result = CliRunner().invoke(app, [*given, "--random-weights"])
    assert result.exit_code == 0, result.exception
    assert "update efficiency" in result.stdout


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("model", ["sd3.5-medium", "stabilityai/stable-diffusion-3.5-large"])
def test_a_size_is_measured_without_a_grid(model: str) -> None:
    result = CliRunner().invoke(app, ["bench", model, *options(), "--random-weights"])
    assert result.exit_code == 0, result.exception
    assert "epg-elbo-adaptive-ode" in result.stdout
    assert "Epoch of 12 images" in result.stdout


def test_a_local_pipeline_is_measured_without_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABLATE_CACHE", str(tmp_path / "cache"))
    folder = write_pipeline(tmp_path / "it's a pipeline")
    result = CliRunner().invoke(app, ["bench", str(folder), *options(model__max_sequence_length=16), "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert found["images"] == 12
    assert found["trained_bytes"] > 0


@pytest.mark.parametrize(
    ("model", "recipe", "given"),
    [("tiny", "tiny-scenes", "tiny"), ("stabilityai/stable-diffusion-3.5-medium", "sd35-medium", "owner/any")],
)
def test_a_model_without_a_grid_has_the_geometry_of_the_recipe(model: str, recipe: str, given: str) -> None:
    """All that an epoch's time depends on, but for the reward, as in grids/recipes/."""
    with grid_of(given) as path:
        own = make_plan(load_grid(path)).cells[0].recipe
    kept = make_plan(load_grid(GRIDS / ("tiny.yaml" if recipe == "tiny-scenes" else "full.yaml"))).cells[0].recipe
    assert own.model.path == given
    assert own.model.model_copy(update={"path": model}) == kept.model
    assert (own.rollout, own.kl, own.old_policy) == (kept.rollout, kept.kl, kept.old_policy)
    for field in ("updates_per_epoch", "num_points", "group_probe", "guidance_scale", "micro_batch_size"):
        assert getattr(own.update, field) == getattr(kept.update, field)


@pytest.mark.parametrize(
    ("given", "weights", "parts"),
    [
        ("grids/nothing.yaml", False, ["grids/nothing.yaml: no such file"]),
        ("quickstart", False, ["neither a grid file nor a model", "`tiny`", "Allowed: tiny, sd3.5-medium"]),
        ("grids/tinny", False, ["neither a grid file nor a model", "did you mean 'grids/tiny.yaml'?"]),
        ("grids", False, ["a folder without model_index.json"]),
        ("sd3.5-large", False, ["give --random-weights, or stabilityai/stable-diffusion-3.5-large"]),
        ("sd3.5-huge", True, ["got model 'sd3.5-huge', of no known size", "did you mean 'sd3.5-large'?"]),
        ("grids/quickstart.yaml", True, ["got model 'tiny', of no known size"]),
    ],
)
def test_what_is_neither_grid_nor_model_is_one_error(
    given: str, weights: bool, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(GRIDS.parent)
    result = CliRunner().invoke(app, ["bench", given, *(["--random-weights"] if weights else [])])
    assert isinstance(result.exception, InputError)
    for part in parts:
        assert part in str(result.exception)
