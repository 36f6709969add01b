"""The estimate of a cell's memory, against known sizes, and against what SD 3.5 Medium really takes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from sd35 import write_pipeline

from ablate.grid import load_grid
from ablate.plan import Cell, make_plan
from ablate.recipe import ModelRecipe
from ablate.rollout import concatenate
from runners import collect, memory_estimate
from runners.embeddings import MOST
from runners.memory import in_memory
from runners.memory_estimate import Architecture, MemoryEstimate, estimate, read_architecture
from runners.policy import SD3Policy
from runners.preflight import with_fields
from runners.random_weights import autoencoder, medium_transformer, random_policy
from runners.run import set_up
from runners.train import train_epoch

GRIDS = Path(__file__).parents[2] / "grids"
CELL = next(c for c in make_plan(load_grid(GRIDS / "tiny.yaml")).cells if c.estimator == "trajectory")


def with_model(cell: Cell, micro_batch_size: int | None = None, **model: object) -> Cell:
    recipe = cell.recipe.model_copy(update={"model": cell.recipe.model.model_copy(update=model)})
    if micro_batch_size:
        update = recipe.update.model_copy(update={"micro_batch_size": micro_batch_size})
        recipe = recipe.model_copy(update={"update": update})
    return cell.model_copy(update={"recipe": recipe})


def of(cell: Cell, num_devices: int = 1) -> MemoryEstimate:
    return estimate(with_fields(cell, {"devices": num_devices}), read_architecture(cell.recipe.model))


def test_storages_are_counted_while_they_live() -> None:
    def work() -> None:
        a = torch.empty(1000)
        b = a.view(10, 100) + 1  # a view is no storage
        del a
        (b * 2).sum()

    assert memory_estimate._peak(work) == pytest.approx(8000, abs=8)


def test_weights_of_the_embedded_model_are_counted_exactly() -> None:
    cell, policy = with_model(CELL), SD3Policy(CELL.recipe.model, torch.device("cpu"))
    found = of(cell)
    assert found.trained == 4 * 7 * sum(p.numel() for p in policy.trainable)
    frozen = [*policy.pipe.vae.parameters(), *policy.network.buffers()]
    assert found.weights == 4 * sum(t.numel() for t in frozen)
    encoders = (policy.pipe.text_encoder, policy.pipe.text_encoder_2)
    assert found.encoders == 4 * sum(p.numel() for encoder in encoders for p in encoder.parameters())


def test_all_encoders_of_sd35_are_counted(tmp_path: Path) -> None:
    model = ModelRecipe(path=str(write_pipeline(tmp_path / "sd35")), resolution=64, max_sequence_length=16)
    policy = SD3Policy(model, torch.device("cpu"))
    encoders = (policy.pipe.text_encoder, policy.pipe.text_encoder_2, policy.pipe.text_encoder_3)
    expected = sum(p.numel() for encoder in encoders for p in set(encoder.parameters()))
    assert read_architecture(model).num_encoder_parameters == expected


def test_what_saves_memory_is_seen_to() -> None:
    plain = of(CELL)
    assert of(with_model(CELL, micro_batch_size=CELL.recipe.update.micro_batch_size // 2)).update == pytest.approx(
        plain.update / 2, rel=0.1
    )
    assert of(with_model(CELL, gradient_checkpointing=True)).update < 0.6 * plain.update
    longer = [
        estimate(cell, replace(read_architecture(CELL.recipe.model), num_clip_tokens=77)).update
        for cell in (CELL, with_model(CELL, attention="math"))
    ]
    assert longer[1] > 1.1 * longer[0] > 2 * plain.update
    assert of(with_model(CELL, lora_rank=4)).trained < 0.2 * plain.trained
    assert of(CELL, num_devices=4).samples == plain.samples // 4


TOGETHER = MemoryEstimate(
    weights=1, trained=2, prompts=1, samples=3, joining=2, probe=1, rollout=4, evaluation=4, update=6, step=1, decode=5,
    encoders=100, rewards=0, host=0, offloaded=False, rewards_offloaded=False,
)  # fmt: skip


def test_offloaded_encoders_take_the_place_of_the_work() -> None:
    assert TOGETHER.peak == 1 + 2 + 1 + 100 + 3 + 7
    assert replace(TOGETHER, offloaded=True).peak == 1 + 2 + 1 + 100
    assert replace(TOGETHER, offloaded=True, encoders=5).peak == 1 + 2 + 1 + 3 + 7
    assert replace(TOGETHER, joining=50).peak == 1 + 2 + 1 + 100 + 3 + 50


def test_rewards_are_there_while_images_are_made_and_else_where_they_are_not_offloaded() -> None:
    scored = replace(TOGETHER, rewards=10)
    assert scored.peak == TOGETHER.peak + 10
    assert replace(scored, rewards_offloaded=True).peak == 1 + 2 + 1 + 100 + 3 + 5 + 10
    assert replace(scored, rewards_offloaded=True, update=20).peak == 1 + 2 + 1 + 100 + 3 + 1 + 20
    assert replace(scored, offloaded=True).peak == 1 + 2 + 1 + 100 + 10


def test_an_evaluation_comes_when_the_samples_are_gone() -> None:
    assert replace(TOGETHER, evaluation=10).peak == TOGETHER.peak
    assert replace(TOGETHER, evaluation=12).peak == 1 + 2 + 1 + 100 + 12


def test_the_optimizer_takes_a_copy_of_what_is_trained_for_a_moment() -> None:
    """As torch steps on a GPU, all tensors at once; counted on the CPU."""
    weights = [torch.nn.Parameter(torch.randn(100, n)) for n in (10, 20, 30)]
    optimizer = torch.optim.AdamW(weights, foreach=True)
    for p in weights:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert memory_estimate._peak(optimizer.step) == pytest.approx(4 * 6000, rel=0.01)
    assert replace(TOGETHER, step=30).peak == 1 + 2 + 1 + 100 + 3 + 1 + 30
    assert of(CELL).step == of(CELL).trained // 7


def test_guidance_of_an_evaluation_doubles_its_calls() -> None:
    plain, doubled = of(CELL), of(with_fields(CELL, {"evaluation.guidance_scale": 4.5}))
    embeddings = plain.evaluation - plain.rollout
    assert embeddings > 0
    assert doubled.rollout == plain.rollout
    assert doubled.evaluation - embeddings == pytest.approx(2 * plain.rollout, rel=0.05)


def test_rewards_count_once_with_the_memory_that_they_state() -> None:
    rewards = {"reward": {"clipscore": 1, "geneval-hf": 0.5}, "evaluation.panel": ["clipscore", "jpeg"]}
    kept, away = (of(with_fields(CELL, rewards | {"scoring.offload": offload})) for offload in (False, True))
    assert kept.rewards == away.rewards == pytest.approx((1.6 + 1.9) * 2**30)
    assert away.host - kept.host >= 3 * 2**30
    assert (kept.rewards_offloaded, away.rewards_offloaded) == (False, True)


def test_the_machine_holds_what_is_loaded_what_is_offloaded_and_images() -> None:
    plain, many = of(with_model(CELL, lora_rank=4)), of(with_fields(CELL, {"rollout.group_size": 4096}))
    assert plain.host >= plain.weights + plain.encoders
    assert many.host == CELL.recipe.rollout.num_groups * 4096 * 3 * 32 * 32


SMALL = {
    "rollout.num_groups": 6,
    "rollout.group_size": 16,
    "rollout.batch_size": 16,
    "rollout.num_steps": 8,
    "update.updates_per_epoch": 1,
    "update.micro_batch_size": 8,
    "evaluation.num_prompts": 1,
    "model.lora_rank": 4,
    "budget.epochs": 1,
}


def small(estimator: str, sampler: str, **settings: object) -> Cell:
    plan = make_plan(load_grid(GRIDS / "tiny.yaml", SMALL | {k.replace("__", "."): v for k, v in settings.items()}))
    return next(c for c in plan.cells if (c.objective, c.estimator, c.sampler) == ("grpo", estimator, sampler))


@pytest.mark.parametrize(
    ("estimator", "sampler"), [("trajectory", "sde"), ("trajectory", "mixed"), ("elbo-simple", "ode")]
)
def test_joining_the_batches_of_a_rollout_takes_what_was_estimated(
    estimator: str, sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All samples of an epoch come in batches, which are still there when the whole is: counted, to the byte."""
    cell = small(estimator, sampler)
    run, parts = set_up(tmp_path, cell), []
    monkeypatch.setattr(collect, "concatenate", lambda given: parts.extend(given) or concatenate(given))
    texts = ["a red circle"] * 96
    collect.roll_out(run, run.policy.encode(texts), range(96))
    assert len(parts) == 6
    assert memory_estimate._peak(lambda: concatenate(parts)) == of(cell).joining
    assert of(small(estimator, sampler, rollout__batch_size=96)).joining == 0
    assert of(small(estimator, sampler, evaluation__num_prompts=6), num_devices=6).joining == 0


@pytest.mark.parametrize(("estimator", "sampler"), [("trajectory", "sde"), ("elbo-simple", "ode")])
def test_an_epoch_takes_what_was_estimated(estimator: str, sampler: str, tmp_path: Path) -> None:
    """All storages of an epoch on the embedded model, against the estimate without what is there before."""
    cell = small(estimator, sampler)
    run, found = set_up(tmp_path, cell), of(cell)
    before = found.weights + found.encoders + found.trained * 4 // 7  # neither gradients nor moments yet
    assert memory_estimate._peak(lambda: train_epoch(run)) == pytest.approx(found.peak - before, rel=0.15)


def test_embeddings_of_prompts_are_kept_up_to_a_number() -> None:
    one = of(small("elbo-simple", "ode")).prompts / (1 + 6)  # of an evaluation and an epoch
    assert of(small("elbo-simple", "ode", budget__epochs=3)).prompts == 19 * one
    assert of(small("elbo-simple", "ode", budget__epochs=10**6)).prompts == MOST * one
    without_end = {"budget__epochs": None, "budget__device_hours": 1}
    assert of(small("elbo-simple", "ode", **without_end)).prompts == MOST * one


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def most_resident(work: Callable[[], object]) -> int:
    """The most memory of this process while it worked."""
    Path("/proc/self/clear_refs").write_text("5")
    work()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.slow
def test_sd35_medium_takes_what_was_estimated() -> None:
    """At its real size: a call at 512 x 512, and forward and backward of the LoRA at 128 x 128."""
    model = ModelRecipe(path="sd3.5-medium", dtype="bfloat16", lora_rank=32, lora_alpha=64)
    small = CELL.recipe.model_copy(
        update={
            "model": model,
            "rollout": CELL.recipe.rollout.model_copy(update={"batch_size": 1}),
            "update": CELL.recipe.update.model_copy(update={"micro_batch_size": 1}),
        }
    )

    def estimated(resolution: int) -> MemoryEstimate:
        with torch.device("meta"):
            parts = Architecture(transformer=medium_transformer(), autoencoder=autoencoder(), num_encoder_parameters=0)
        recipe = small.model_copy(update={"model": model.model_copy(update={"resolution": resolution})})
        return estimate(CELL.model_copy(update={"recipe": recipe}), parts)

    forward, backward = estimated(512), estimated(128)
    gc.collect()
    before = resident()
    policy = random_policy(model, torch.device("cpu"))
    assert sum(p.numel() for p in policy.network.parameters()) == pytest.approx(2.262e9, rel=0.001)
    assert sum(p.numel() for p in policy.trainable) == pytest.approx(18.8e6, rel=0.01)

    def call(side: int) -> torch.Tensor:
        return policy.velocity(torch.randn(1, 16, side, side), torch.tensor([0.5]), policy.encode(["a bench"]))

    with torch.no_grad():
        most = most_resident(lambda: call(64)) - before
    copies = forward.trained * 4 // 7  # before the first update there are neither gradients nor moments
    assert most == pytest.approx(forward.weights + copies + forward.rollout, rel=0.15)
    most = most_resident(lambda: call(16).square().mean().backward()) - before
    assert most == pytest.approx(backward.weights + backward.trained * 5 // 7 + backward.update, rel=0.15)


@pytest.mark.parametrize("kernel", ["efficient", "cudnn"])
def test_kernels_of_a_gpu_are_seen_to_keep_less_than_the_plain_one(kernel: str) -> None:
    plain, less = (
        estimate(with_model(CELL, attention=name), replace(read_architecture(CELL.recipe.model), num_clip_tokens=77))
        for name in ("math", kernel)
    )
    assert plain.update > 1.1 * less.update


def test_a_kernel_with_checkpointing_is_estimated() -> None:
    for kernel in ("auto", "math"):
        plain, less = (of(with_model(CELL, attention=kernel, gradient_checkpointing=c)).update for c in (False, True))
        assert less < 0.6 * plain


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    ],
    ids=str,
)
def test_every_way_of_running_out_of_memory_halves_the_batch(error: RuntimeError) -> None:
    asked: list[int] = []

    def attempt(size: int) -> int:
        asked.append(size)
        if size > 3:
            raise error
        return size

    assert in_memory(12, attempt, note=lambda _: None) == (3, 3)
    assert asked == [12, 6, 3]
    with pytest.raises(type(error)):
        in_memory(1, lambda _: attempt(4))


def test_another_error_is_no_matter_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        in_memory(4, Mock(side_effect=RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
