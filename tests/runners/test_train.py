"""The training loop on the embedded model: every legal cell, resumption, divergence."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cells import folder_of
from commands import wait_until

from ablate.components import build
from ablate.flow import diffusers_sigmas
from ablate.grid import load_grid
from ablate.part import COMPONENT_AXES
from ablate.passes import passes
from ablate.plan import Cell, make_plan
from ablate.record import Status, read_metrics, read_spent
from runners import checkpoint, stopping, train
from runners import evaluation as evaluation_module
from runners import run as run_module
from runners.collect import Samples
from runners.evaluation import evaluate, generate
from runners.policy import SD3Policy
from runners.run import Run, set_up

GRIDS = Path(__file__).parents[2] / "grids"
SMALL = {
    "rollout.num_groups": 3,
    "rollout.group_size": 4,
    "rollout.num_steps": 5,
    "update.micro_batch_size": 16,
    "evaluation.num_prompts": 6,
    "evaluation.num_steps": 2,
    "budget.epochs": 2,
}
CELLS = make_plan(load_grid(GRIDS / "tiny.yaml", SMALL)).cells
BY_NAME = {f"{c.objective}/{c.estimator}/{c.sampler}": c for c in CELLS if c.seed == 0}


@pytest.mark.parametrize("name", BY_NAME)
def test_every_legal_cell_trains_with_finite_nonzero_gradients(name: str, tmp_path: Path) -> None:
    cell = BY_NAME[name]
    record = train.train_cell(folder_of(cell, tmp_path))
    assert (record.status, record.message) == (Status.DONE, "")
    lines = read_metrics(tmp_path)
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert all(line["train/grad_norm"] > 0 for line in lines[1:])
    panel = {
        f"eval/{kind}/{name}" for kind in ("panel", "panel_se") for name in ("background", "sharpness", "diversity")
    }
    assert {"eval/accuracy", "eval/score", *panel} <= lines[0].keys() & lines[-1].keys()
    # the forward plan is what happened, but that old is current in the very first update
    cost, images = passes(cell), 2 * 3 * 4
    reads_old = "old" in build("objective", cell.components["objective"]).needs
    spared = 4 * 3 * (reads_old and cell.estimator != "trajectory")
    assert record.cost.forwards == images * (cost.rollout + cost.forward) - spared
    assert record.cost.backwards == images * cost.backward
    assert (tmp_path / "samples" / "before.png").exists()
    assert (tmp_path / "samples" / "after.png").exists()


def test_there_are_44_legal_combinations() -> None:
    assert len(BY_NAME) == 44


def comparable(folder: Path) -> list[dict[str, float]]:
    """The metrics without what depends on the clock."""
    lines = read_metrics(folder)
    return [{k: v for k, v in line.items() if not k.startswith("cost/") and k != "device_hours"} for line in lines]


def test_a_killed_cell_resumes_to_the_same_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = BY_NAME["gspo/elbo-adaptive/mixed"]
    budget = cell.recipe.budget.model_copy(update={"epochs": 5})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for path in (whole, parts):
        path.mkdir()
        folder_of(cell, path, budget=budget, checkpoint_every=2)
    train.train_cell(whole)

    real, calls = train.train_epoch, []

    def killed(run):
        calls.append(run.progress.epoch)
        if len(calls) == 4:
            raise SystemExit(9)  # after three epochs, of which two are in the checkpoint
        return real(run)

    monkeypatch.setattr(train, "train_epoch", killed)
    with pytest.raises(SystemExit):
        train.train_cell(parts)
    assert not (parts / "record.json").exists()
    record = train.train_cell(parts)
    assert calls == [0, 1, 2, 3, 2, 3, 4]
    assert record.status is Status.DONE
    assert record.attempts == 2
    assert record.cost.lost > 0
    assert comparable(parts) == comparable(whole)
    assert not (parts / "checkpoint").exists()


def test_nothing_that_was_spent_is_forgotten_by_a_second_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed an epoch after a checkpoint, and again in the repeated epoch, after its rollout; then finished."""
    cell = BY_NAME["grpo/elbo-simple/ode"]
    budget = cell.recipe.budget.model_copy(update={"epochs": 4})
    folder = folder_of(cell, tmp_path, budget=budget, checkpoint_every=2)
    collect, epoch, starts = train.collect, train.train_epoch, []

    def noted(run: Run) -> dict[str, float]:
        if not starts or starts[-1][0] is not run:
            starts.append((run, run.progress.cost.work))
        if len(starts) == 1 and run.progress.epoch == 3:
            raise SystemExit(9)
        return epoch(run)

    def rolled_out(run: Run) -> Samples:
        samples = collect(run)
        if len(starts) == 2:
            raise SystemExit(9)
        return samples

    monkeypatch.setattr(train, "train_epoch", noted)
    monkeypatch.setattr(train, "collect", rolled_out)
    for _ in range(2):
        with pytest.raises(SystemExit):
            train.train_cell(folder)
    record = train.train_cell(folder)
    (first, _), (second, saved), _ = starts
    assert record.status is Status.DONE
    assert saved < second.progress.cost.work
    assert record.cost.lost == pytest.approx(first.progress.cost.work + second.progress.cost.work - 2 * saved)


def test_what_a_phase_has_spent_so_far_is_kept_for_a_kill_in_its_midst(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "BEAT", 0.05)
    run = set_up(folder_of(BY_NAME["grpo/elbo-simple/ode"], tmp_path), BY_NAME["grpo/elbo-simple/ode"])
    before = read_spent(tmp_path).rollout
    with run.booked("rollout"):
        assert wait_until(lambda: read_spent(tmp_path).rollout > before + 0.2, 20)
        assert run.progress.cost.rollout == before
    assert read_spent(tmp_path).rollout == pytest.approx(run.progress.cost.rollout, abs=1e-3)


def test_a_signal_saves_after_the_epoch_and_the_next_start_goes_on(tmp_path: Path, monkeypatch) -> None:
    folder = folder_of(BY_NAME["grpo/elbo-simple/ode"], tmp_path)
    real = train.train_epoch

    def interrupted(run):
        if run.progress.epoch == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # one request, passed on by several
                os.kill(os.getpid(), number)
        return real(run)

    monkeypatch.setattr(train, "train_epoch", interrupted)
    first = train.train_cell(folder)
    assert (first.status, first.epochs) == (Status.INTERRUPTED, 1)
    second = train.train_cell(folder)
    assert (second.status, second.epochs) == (Status.DONE, 2)
    assert second.cost.lost == 0


def test_a_second_request_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(BY_NAME["grpo/elbo-simple/ode"], tmp_path)

    def interrupted(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        monkeypatch.setattr(stopping.time, "monotonic", lambda: 1e9)  # later than stopping.ONE_REQUEST
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "train_epoch", interrupted)
    record = train.train_cell(folder)
    assert (record.status, record.epochs) == (Status.INTERRUPTED, 0)


def test_numbers_that_are_not_finite_are_a_divergence(tmp_path: Path) -> None:
    cell = BY_NAME["reinforce/elbo-simple/ode"]
    update = cell.recipe.update.model_copy(update={"learning_rate": 1e30})
    record = train.train_cell(folder_of(cell, tmp_path, update=update))
    assert record.status is Status.DIVERGED
    assert "finite" in record.message


def test_an_error_is_a_record_with_its_last_line(tmp_path: Path) -> None:
    cell = BY_NAME["grpo/elbo-simple/ode"]
    model = cell.recipe.model.model_copy(update={"path": "/no/such/model"})
    record = train.train_cell(folder_of(cell, tmp_path, model=model))
    assert record.status is Status.FAILED
    assert "/no/such/model" in record.message
    assert json.loads((tmp_path / "record.json").read_text())["status"] == "failed"


ON_TRAJECTORIES = ["grpo/trajectory/sde", "reinforce/trajectory/mixed"]  # with and without a ratio of their own


@pytest.mark.parametrize("name", ON_TRAJECTORIES)
def test_on_policy_the_trajectory_ratio_is_one(name: str, tmp_path: Path) -> None:
    """Rollout and update see the same latents in the same type: the first update's log-ratio vanishes."""
    folder = folder_of(BY_NAME[name], tmp_path)
    train.train_cell(folder)
    run = set_up(folder, BY_NAME[name])
    assert train.train_epoch(run)["train/on_policy_log_ratio"] < 1e-5


def test_weights_can_be_exchanged_blended_and_restored() -> None:
    cell = BY_NAME["grpo/elbo-simple/ode"]
    policy = SD3Policy(cell.recipe.model, torch.device("cpu"))
    base = policy.trainable[0].detach().clone()
    with torch.no_grad():
        policy.trainable[0].add_(1)
    with policy.using("reference"):
        torch.testing.assert_close(policy.trainable[0], base)
    torch.testing.assert_close(policy.trainable[0].detach(), base + 1)
    policy.blend("old", 0.25)
    with policy.using("old"):
        torch.testing.assert_close(policy.trainable[0].detach(), base + 0.75)


def test_lora_trains_adapters_alone_and_starts_at_the_base(tmp_path: Path) -> None:
    cell = BY_NAME["grpo/elbo-adaptive/ode"]
    model = cell.recipe.model.model_copy(update={"lora_rank": 2, "lora_alpha": 4.0})
    policies = [SD3Policy(m, torch.device("cpu")) for m in (cell.recipe.model, model)]
    assert 0 < sum(p.numel() for p in policies[1].trainable) < 0.1 * sum(p.numel() for p in policies[0].trainable)
    x, sigma = torch.randn(2, *policies[0].latent_shape), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        a, b = (p.velocity(x, sigma, p.encode(["a circle", "two squares"])) for p in policies)
    torch.testing.assert_close(a, b)
    record = train.train_cell(folder_of(cell, tmp_path, model=model))
    assert record.status is Status.DONE


def test_guidance_extrapolates_from_the_empty_prompt() -> None:
    cell = BY_NAME["grpo/elbo-adaptive/ode"]
    policy = SD3Policy(cell.recipe.model, torch.device("cpu"))
    x, sigma = torch.randn(1, *policy.latent_shape), torch.tensor([0.5])
    with torch.no_grad():
        given, empty = (policy.velocity(x, sigma, policy.encode([text])) for text in ("a red circle", ""))
        guided = policy.velocity(x, sigma, policy.encode(["a red circle"]), 3.5)
    torch.testing.assert_close(guided, empty + 3.5 * (given - empty), atol=1e-5, rtol=1e-4)


def test_components_round_trip_through_cell_json() -> None:
    for cell in BY_NAME.values():
        again = Cell.model_validate_json(cell.model_dump_json())
        for axis in COMPONENT_AXES:
            assert build(axis, again.components[axis]) == build(axis, cell.components[axis])


def test_checkpoints_of_nothing_are_none(tmp_path: Path) -> None:
    assert checkpoint.restore(tmp_path, SimpleNamespace(device="cpu"), None, None) is None


def test_a_target_ends_the_cell(tmp_path: Path) -> None:
    cell = BY_NAME["grpo/elbo-simple/ode"]
    budget = cell.recipe.budget.model_copy(update={"epochs": 50, "target": 0.0})
    evaluation = cell.recipe.evaluation.model_copy(update={"every": 2})
    record = train.train_cell(folder_of(cell, tmp_path, budget=budget, evaluation=evaluation))
    assert (record.status, record.epochs) == (Status.DONE, 0)


def test_a_target_that_was_reached_before_a_kill_is_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its last checkpoint and its record."""
    cell = BY_NAME["grpo/elbo-simple/ode"]
    budget = cell.recipe.budget.model_copy(update={"epochs": 50, "target": 0.5})
    evaluation = cell.recipe.evaluation.model_copy(update={"every": 2})
    folder = folder_of(cell, tmp_path, budget=budget, evaluation=evaluation, checkpoint_every=1)
    monkeypatch.setattr(evaluation_module, "means", lambda *_: {"eval/score": measured[-1]})
    monkeypatch.setattr(train, "train_epoch", lambda _: measured.append(0.6) or {"train/loss": 0.0})
    measured = [0.4]

    def killed(*_: object) -> None:
        raise SystemExit(9)

    with monkeypatch.context() as patched:
        patched.setattr(train, "export", killed)
        with pytest.raises(SystemExit):
            train.train_cell(folder)
    record = train.train_cell(folder)
    assert (record.status, record.epochs, len(measured)) == (Status.DONE, 2, 3)


def cut_to(length: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:length]


def with_bit_flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize("damaged", [cut_to(0), cut_to(100), cut_to(5000), cut_to(-1), with_bit_flipped])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_counts(
    tmp_path: Path, damaged: Callable[[bytes], bytes], capsys
) -> None:
    cell = BY_NAME["grpo/elbo-simple/ode"]
    run = set_up(folder_of(cell, tmp_path), cell)
    for epoch in (1, 2):
        run.progress.epoch = epoch
        checkpoint.save(tmp_path, run.progress, run.policy, run.optimizer, run.scaler)
    newest = tmp_path / "checkpoint" / "state.pt"
    newest.write_bytes(damaged(newest.read_bytes()))
    assert set_up(tmp_path, cell).progress.epoch == 1
    assert f"{newest} is damaged and left out" in capsys.readouterr().err
    (tmp_path / "checkpoint" / "before.pt").unlink()
    assert set_up(tmp_path, cell).progress.epoch == 0


def test_what_does_not_fit_into_memory_is_done_in_smaller_batches_with_the_same_result(tmp_path: Path, capsys) -> None:
    """A device that holds 5 images at most: rollout and update go on with smaller batches, and so do later ones."""
    cell = BY_NAME["gspo/elbo-simple/ode"]
    metrics = {}
    for limit in (1000, 5):
        run = set_up(folder_of(cell, tmp_path), cell)
        run.policy.velocity = limited(run.policy.velocity, limit)
        metrics[limit] = train.train_epoch(run)
        assert run.batch_sizes == ({"rollout": 128, "update": 16} if limit > 100 else {"rollout": 4, "update": 4})
    assert "out of memory; going on with batches of 4" in capsys.readouterr().out
    assert metrics[5] == pytest.approx(metrics[1000], rel=1e-3)


def test_evaluation_that_does_not_fit_into_memory_goes_on_with_smaller_batches(tmp_path: Path, capsys) -> None:
    """A device that holds 2 images at most, for the network or for the decoder: the images are the same."""
    cell = BY_NAME["gspo/elbo-simple/ode"]
    recipe, found = cell.recipe.evaluation, []
    for network, decoder in ((1000, 1000), (2, 1000), (1000, 2)):
        run = set_up(folder_of(cell, tmp_path), cell)
        run.batch_sizes["rollout"] = 5
        policy = run.policy
        policy.velocity = limited(policy.velocity, network)
        policy.pipe.vae.decode = limited(policy.pipe.vae.decode, decoder)
        scores = evaluate(run)
        assert run.batch_sizes["eval"] == min(network, 5)
        assert ("going on with batches of 2" in capsys.readouterr().out) == (min(network, decoder) == 2)
        prompts = run.prompts.fixed(recipe.split, recipe.num_prompts)
        images = generate(policy, prompts, range(6), recipe, diffusers_sigmas(recipe.num_steps, policy.shift), 6)
        found.append((scores, images.astype(int)))
    for scores, images in found[1:]:
        assert scores == pytest.approx(found[0][0], rel=0.05, abs=1e-3)
        assert abs(images - found[0][1]).max() <= 1  # rounding, of 255


def limited(real: Callable[..., Any], limit: int) -> Callable[..., Any]:
    """A function that runs out of memory where its first argument [b, ...] is more than `limit` long."""

    def call(x: torch.Tensor, *rest: object, **named: object) -> Any:
        if len(x) > limit:
            raise torch.OutOfMemoryError("too many")
        return real(x, *rest, **named)

    return call


def test_even_one_image_can_be_too_many(tmp_path: Path) -> None:
    cell = BY_NAME["gspo/elbo-simple/ode"]
    run = set_up(folder_of(cell, tmp_path), cell)

    def full(*_):
        raise torch.OutOfMemoryError("too many")

    run.policy.velocity = full
    with pytest.raises(torch.OutOfMemoryError):
        train.train_epoch(run)


@pytest.mark.parametrize("name", ON_TRAJECTORIES)
def test_a_ratio_that_is_not_one_on_policy_stops_the_cell_with_the_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell, real = BY_NAME[name], train.collect

    def shaken(run):
        samples = real(run)
        samples.rollout.transitions.x.mul_(1.2)
        return samples

    monkeypatch.setattr(train, "collect", shaken)
    record = train.train_cell(folder_of(cell, tmp_path))
    assert record.status is Status.FAILED
    assert "on-policy, the log-ratio of the trajectory is" in record.message


def test_an_export_that_fails_keeps_the_checkpoint_and_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(BY_NAME["grpo/elbo-simple/ode"], tmp_path, checkpoint_every=1)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(train, "export", full)
        first = train.train_cell(folder)
    assert (first.status, first.message) == (Status.FAILED, "OSError: no space left on device")
    assert (folder / "checkpoint" / "state.pt").exists()
    second = train.train_cell(folder)
    assert (second.status, second.epochs, second.attempts) == (Status.DONE, 2, 2)
    assert (folder / "weights").is_dir()
