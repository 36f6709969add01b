"""The probe on the embedded model and in closed form: gradients add up, sketches are checked, rows are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from ablate.cli import app
from ablate.flow import diffusers_sigmas
from ablate.grid import load_grid
from ablate.objectives.reinforce import Reinforce
from ablate.plan import Cell, make_plan
from ablate.probe_rows import BiasRow, GradientRow, LevelRow, Table
from ablate.sketch import Sketch
from ablate.snr import signal_and_noise
from ablate.source import InputError
from runners import probe_gradient, probe_model, probe_worlds, train
from runners.probe_worlds import Subject
from runners.run import Run, set_up
from runners.surrogate import Batch, accumulate_gradient
from runners.train import train_cell

GRIDS = Path(__file__).parents[2] / "grids"
SMALL = {
    "rollout.num_groups": 3,
    "rollout.group_size": 4,
    "rollout.num_steps": 4,
    "update.updates_per_epoch": 1,
    "evaluation.num_prompts": 6,
    "evaluation.num_steps": 2,
    "budget.epochs": 1,
}
CELLS = {c.estimator: c for c in make_plan(load_grid(GRIDS / "quickstart.yaml", SMALL)).cells if c.seed == 0}


def exact(blocks: list[Tensor]) -> Tensor:
    return torch.cat([b.detach().flatten() for b in blocks])


def run_of(name: str, folder: Path) -> Run:
    return set_up(folder, CELLS[name])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, probe_gradient.Rollouts]:
    run = run_of("elbo-adaptive", tmp_path_factory.mktemp("cell"))
    return run, probe_gradient.roll_out(run)


def test_the_mean_of_the_groups_gradients_is_that_of_the_update(drawn: tuple[Run, probe_gradient.Rollouts]) -> None:
    """Whatever is measured is the gradient that training takes, on-policy, of the whole batch at once."""
    run, rollouts = drawn
    parts = probe_gradient.draw(run, rollouts, 2, 0, exact)
    probe = probe_gradient.probe_of(run, rollouts, 2, 0)
    policy, given = run.policy, rollouts.samples.conditioning

    def ask(_: Any, rows: slice, columns: slice) -> Tensor:
        x, sigma = probe.x[rows, columns], probe.sigma[rows, columns]
        index = torch.arange(12)[rows].repeat_interleave(x.shape[1])
        return policy.velocity(x.flatten(0, 1), sigma.flatten(), given.rows(index)).reshape(x.shape)

    batch = Batch(probe=probe, advantage=rollouts.advantage, group=rollouts.samples.group, group_size=4)
    run.optimizer.zero_grad()
    accumulate_gradient(Reinforce(), run.estimator, batch, ask, micro_batch_size=24)
    whole = exact(probe_gradient.gradient_of(run))
    run.optimizer.zero_grad()
    torch.testing.assert_close(parts.gradient.mean(0), whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_levels_add_up_to_the_gradient(drawn: tuple[Run, probe_gradient.Rollouts]) -> None:
    run, rollouts = drawn
    whole = probe_gradient.draw(run, rollouts, 4, 0, exact).gradient
    levels = probe_gradient.draw(run, rollouts, 4, 0, exact, by_level=True)
    assert levels.gradient.shape[:2] == (3, 4)
    torch.testing.assert_close(levels.gradient.mean(1), whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))
    assert (levels.sigma.diff(dim=1) < 0).all()


def test_sketches_agree_with_the_exact_gradients(drawn: tuple[Run, probe_gradient.Rollouts]) -> None:
    """The same draws, projected and not: within a few per cent of the squared norms that are subtracted."""
    run, rollouts = drawn
    exactly, sketched = (
        torch.stack([probe_gradient.draw(run, rollouts, 2, i, project).gradient for i in range(3)], 1)
        for project in (exact, Sketch())
    )
    a, b = signal_and_noise(exactly), signal_and_noise(sketched)
    scale = float(exactly.square().sum(-1).mean())
    for name in ("signal", "noise", "total_signal", "total_noise"):
        assert getattr(b, name) == pytest.approx(getattr(a, name), abs=0.04 * scale), name


def test_a_trajectory_with_all_its_steps_has_no_noise_of_its_own(tmp_path: Path) -> None:
    run = run_of("trajectory", tmp_path)
    rollouts = probe_gradient.roll_out(run)
    points = probe_gradient.numbers_of_points(run, [1, 10])
    assert points == [1, 3]
    found, levels = probe_gradient.measure(run, rollouts, points, 2, Sketch(), lambda _: None)
    one, every = (at.total for at in found)
    assert one.noise > 1e-3 * one.total_noise
    assert every.noise < 1e-9 * every.total_noise
    assert len(levels) == 3
    assert sum(level.weight_share for level in levels) == pytest.approx(1)
    assert found[1].calls == 3 * 12 * 3


def test_the_oracle_of_the_model_is_the_ode_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With zero velocity log p is that of N(0, I), in nats in all; its gradient is not zero all the same."""
    run = run_of("elbo-adaptive", tmp_path)
    rollouts = probe_gradient.roll_out(run)
    monkeypatch.setattr(probe_model, "NUM_STEPS", 4)
    with torch.no_grad():
        for p in run.policy.network.proj_out.parameters():
            p.zero_()
    truth = probe_model.true_values(run, rollouts, 2, exact)
    x0 = rollouts.samples.rollout.x0.flatten(1)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(x0).sum(1)
    torch.testing.assert_close(truth.nats, normal, rtol=1e-4, atol=1e-2)
    assert (truth.error, truth.step_error) == (pytest.approx(0, abs=1e-3), pytest.approx(0, abs=1e-2))
    assert truth.gradient.shape[:2] == (2, 3)
    assert truth.gradient.abs().max() > 0
    found = probe_model.compare(run, rollouts, truth, 1, exact)
    assert found.agreement.gap_sd > 0


def bias(world: str, subject: Subject, num_steps: int = 10, num_samples: int = 1024) -> probe_worlds.Found:
    (chosen,) = [w for w in probe_worlds.worlds() if w.name == world]
    truth = probe_worlds.true_values(chosen, subject.sampler, diffusers_sigmas(num_steps), num_samples, 0)
    return probe_worlds.compare(chosen, subject, truth, 64, 0)


SUBJECTS = {f"{s.label}/{s.sampler}": s for s in probe_worlds.subjects()}


def test_path_kl_is_the_likelihood_and_its_gradient_the_true_one_where_others_are_off() -> None:
    bound = bias("mixture", SUBJECTS["elbo-path_kl uniform/exact"])
    assert bound.agreement.gap_mean == pytest.approx(0, abs=3 * bound.agreement.gap_error + 0.02)
    assert bound.angle.degrees < 8
    simple = bias("mixture", SUBJECTS["elbo-simple uniform/exact"])
    assert abs(simple.agreement.gap_mean) > 20 * simple.agreement.gap_error
    assert simple.angle.low > bound.angle.degrees


def test_the_gradient_of_the_trajectory_turns_to_the_true_one_as_steps_get_finer() -> None:
    coarse, fine = (bias("mixture", SUBJECTS["trajectory/sde"], steps).angle for steps in (10, 80))
    assert coarse.low > 35
    assert fine.degrees < 0.5 * coarse.degrees


def test_a_velocity_that_is_off_has_a_density_of_its_own() -> None:
    off = next(w for w in probe_worlds.worlds() if w.factor != 1)
    x = off.flow.sample(32, torch.Generator().manual_seed(0))
    difference = (off.log_likelihood(x) - off.flow.log_density(x)).detach()
    assert difference.abs().max() > 0.05


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished cell with its weights."""
    folder = tmp_path_factory.mktemp("trained") / CELLS["elbo-adaptive"].id
    folder.mkdir()
    (folder / "cell.json").write_text(CELLS["elbo-adaptive"].model_dump_json())
    train_cell(folder)
    return folder


OPTIONS = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]


def command(results: Path, *words: object) -> Any:
    given = ["probe", GRIDS / "quickstart.yaml", *OPTIONS, "--seeds", "0", "--results", results, *words]
    return CliRunner().invoke(app, [str(word) for word in given])


def rows(results: Path, kind: type) -> list[dict[str, Any]]:
    path = results / "quickstart" / "probe" / kind.file
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_command_measures_draws_keeps_and_mirrors(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["--points", "1,2", "--no-bias", "--only", "estimator=elbo-adaptive"]
    result = command(tmp_path, *few, "--weights", trained)
    assert result.exit_code == 0, result.output
    found = rows(tmp_path, GradientRow)
    assert [(row["weights"], row["points"]) for row in found] == [
        (name, k) for name in ("base", trained.name) for k in (1, 2, 4)
    ]
    assert found[0]["signal"] != found[3]["signal"]
    assert [row["level"] for row in rows(tmp_path, LevelRow)] == [0, 1, 2, 3] * 2
    folder = tmp_path / "quickstart" / "probe"
    names = {"gradients.csv", "gradients.md", "snr-points.png", "snr-cost.pdf", "profile.png"}
    assert names <= {path.name for path in folder.iterdir()}

    from mlflow import MlflowClient  # noqa: PLC0415

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("quickstart")
    (mirrored,) = client.search_runs([experiment.experiment_id])
    assert mirrored.data.tags["ablate.kind"] == "probe"
    history = client.get_metric_history(mirrored.info.run_id, "effective_points/base/elbo-adaptive/ode")
    assert [point.step for point in history] == [1, 2, 4]
    assert history[0].value == 1

    def never(*_: object) -> None:
        raise AssertionError("what is there is measured again")

    monkeypatch.setattr(probe_gradient, "roll_out", never)
    assert command(tmp_path, *few, "--weights", trained, "--no-tracking").exit_code == 0
    assert rows(tmp_path, GradientRow) == found
    again = command(tmp_path, "--points", "1,3", "--no-bias", "--no-tracking")
    assert isinstance(again.exception, AssertionError)


def test_a_checkpoint_is_a_policy_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cell that was interrupted: its current weights, and none of its files is touched."""
    folder = tmp_path / CELLS["elbo-adaptive"].id
    folder.mkdir()
    cell: Cell = CELLS["elbo-adaptive"]
    (folder / "cell.json").write_text(cell.model_copy(update={"recipe": _often(cell)}).model_dump_json())
    monkeypatch.setattr(train.checkpoint, "discard", lambda _: None)
    train_cell(folder)
    before = (folder / "metrics.jsonl").read_bytes()
    few = ["--points", "1", "--no-bias", "--no-tracking", "--only", "estimator=elbo-adaptive"]
    for path in (folder / "weights").rglob("*.safetensors"):
        path.unlink()
    result = command(tmp_path / "results", *few, "--weights", folder)
    assert result.exit_code == 0, result.output
    assert {row["weights"] for row in rows(tmp_path / "results", GradientRow)} == {"base", cell.id}
    assert (folder / "metrics.jsonl").read_bytes() == before


def _often(cell: Cell) -> Any:
    return cell.recipe.model_copy(update={"checkpoint_every": 1})


def test_the_command_compares_with_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_model, "NUM_STEPS", 4)
    kept = [SUBJECTS["elbo-path_kl uniform/exact"], SUBJECTS["trajectory/sde"]]
    monkeypatch.setattr(probe_worlds, "subjects", lambda: kept)
    monkeypatch.setattr("runners.probe.WORLD_SAMPLES", 128)
    result = command(tmp_path, "--points", "1", "--no-tracking", "--only", "estimator=elbo-adaptive")
    assert result.exit_code == 0, result.output
    found = rows(tmp_path, BiasRow)
    assert [row["world"] for row in found] == [
        *["gaussian"] * 2, *["mixture"] * 2, *["mixture, velocity 5% off"] * 2, "model"
    ]  # fmt: skip
    assert [row["bound"] for row in found] == [True, False] * 3 + [False]
    assert found[-1]["num_dims"] == 256
    assert found[-1]["truth_error"] > 0
    folder = tmp_path / "quickstart" / "probe"
    assert {"bias.png", "angle.png", "bias.md"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--points", "1,x"], "--points '1,x': expected whole numbers"),
        (["--points", "0,1"], "--points 0,1: expected whole numbers from 1 on"),
        (["--draws", "1"], "--draws 1: a variance needs at least 2"),
        (["--groups", "1"], "--groups 1: a variance needs at least 2"),
        (["--weights", "nowhere"], "--weights nowhere: holds neither weights/ nor a checkpoint"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: list[str], problem: str, tmp_path: Path) -> None:
    error = command(tmp_path, *words).exception
    assert isinstance(error, InputError)
    assert problem in str(error)


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "gradients.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(InputError, match=r"gradients.jsonl:1: cannot be read"):
        Table(tmp_path, GradientRow)
