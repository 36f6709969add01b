"""`ablate probe`: what the estimators of a grid are worth, before any training.

For the base model and any other weights: signal and noise of the policy gradient of every estimator and sampler
(probe_gradient.py), and how far values and gradients are from the true likelihood, on flows known in closed form
(probe_worlds.py) and on the model itself (probe_model.py). Rows that are there are not measured again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from ablate.agreement import Agreement, Angle, is_bound
from ablate.flow import NOISE_SCHEDULES
from ablate.lock import lock
from ablate.plan import Cell
from ablate.probe_rows import FOLDER, BiasRow, GradientRow, LevelRow, LikelihoodRow, Table
from ablate.sketch import Sketch
from ablate.source import InputError
from runners import checkpoint, probe_gradient, probe_model, probe_worlds
from runners.distributed import this_device
from runners.export import WEIGHTS, load_weights
from runners.policy import SD3Policy
from runners.probe_tasks import (
    MODEL_DRAWS,
    MODEL_SIGNS,
    WORLD_POINTS,
    WORLD_SAMPLES,
    Settings,
    Task,
    Weights,
    digest,
    file_of,
    identity,
    tasks_of,
)
from runners.run import Run, set_up
from runners.steps import steps

PICTURED = 64  # samples of a world


def probe(cells: Sequence[Cell], results: Path, settings: Settings, folders: Sequence[Path], console: Console) -> Path:
    """Measure what is missing in results/probe/ and return that folder."""
    target = results / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    weights = [Weights(), *(Weights(label=folder.resolve().name, folder=folder) for folder in folders)]
    with lock(target):
        prober = _Prober(target, settings)
        tasks = [task for task in tasks_of(cells, weights, settings) if not prober.has(task)]
        with steps(console, sum(task.size for task in tasks)) as work:
            for task in tasks:
                what = task.world[0].name if task.world else f"{task.cell.estimator} {task.cell.sampler}"
                with work.step(f"{task.kind}: {what}", task.size):
                    prober.measure(task, work.advance)
    return target


class _Prober:
    """Holds what successive tasks share: the loaded policy, and truths that several estimators are compared with."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.settings = settings
        self.gradients, self.levels = Table(folder, GradientRow), Table(folder, LevelRow)
        self.bias, self.likelihoods = Table(folder, BiasRow), Table(folder, LikelihoodRow)
        self._policy: tuple[str, SD3Policy] | None = None
        self._truth: tuple[str, Any] | None = None
        self._sketch = Sketch()

    def has(self, task: Task) -> bool:
        return task.key in (self.gradients if task.kind == "gradient" else self.bias).keys

    def measure(self, task: Task, advance: Callable[[int], object]) -> None:
        """Do a task and write its rows, those that mark it as done last."""
        if task.world:
            self._world(task, *task.world)
            return
        with tempfile.TemporaryDirectory() as folder:
            run = self._run(Path(folder), task)
            rollouts = probe_gradient.roll_out(run)
            if task.kind == "gradient":
                self._gradient(task, run, rollouts, advance)
            else:
                self._model(task, run, rollouts)

    def _run(self, folder: Path, task: Task) -> Run:
        """The cell, with the weights of the task as its current and its old policy."""
        wanted = digest(task.cell.recipe.model.model_dump(), str(task.weights.folder))
        kept = self._policy[1] if self._policy and self._policy[0] == wanted else None
        run = set_up(folder, task.cell, kept or SD3Policy(task.cell.recipe.model, this_device()))
        if kept is None:
            if task.weights.folder:
                _load(task.weights.folder, run)
            run.policy.blend("old", 0)
        self._policy = (wanted, run.policy)
        return run

    def _gradient(
        self, task: Task, run: Run, rollouts: probe_gradient.Rollouts, advance: Callable[[int], object]
    ) -> None:
        points, draws = probe_gradient.numbers_of_points(run, self.settings.points), self.settings.draws
        found, levels = probe_gradient.measure(run, rollouts, points, draws, self._sketch, advance)
        common = _columns(task)
        self.levels.replace(
            task.key,
            [
                LevelRow(level=i, sigma=at.sigma, weight_share=at.weight_share, **_parts(at.part), **common)
                for i, at in enumerate(levels)
            ],
        )
        self.gradients.replace(
            task.key,
            [
                GradientRow(
                    points=at.points,
                    groups=rollouts.num_groups,
                    group_size=rollouts.group_size,
                    draws=self.settings.draws,
                    cosine=at.cosine,
                    effective_points=at.effective_points,
                    largest_share=at.largest_share,
                    rollout_calls=rollouts.calls,
                    update_calls=at.calls,
                    rollout_seconds=rollouts.seconds,
                    update_seconds=at.seconds,
                    **_parts(at.total),
                    **common,
                )
                for at in found
            ],
        )

    def _world(self, task: Task, world: probe_worlds.World, subject: probe_worlds.Subject) -> None:
        rollout, seed = task.cell.recipe.rollout, task.cell.seed
        wanted = digest(world.name, subject.sampler)
        if self._truth is None or self._truth[0] != wanted:
            sigmas = NOISE_SCHEDULES[rollout.noise_schedule](rollout.num_steps, 3.0)
            truth = probe_worlds.true_values(world, subject.sampler, sigmas, WORLD_SAMPLES, seed)
            self._truth = (wanted, truth)
        truth = self._truth[1]
        found = probe_worlds.compare(world, subject, truth, WORLD_POINTS, seed)
        common = _columns(task) | {
            "weights": "exact" if world.factor == 1 else "5% off",
            "sampler": subject.sampler,
            "estimator": subject.label,
            "axes": {},
            "world": world.name,
        }
        values = list(zip(truth.nats.tolist(), found.value.tolist(), strict=True))[: PICTURED * subject.pictured]
        self._compared(
            task.key, common, found, subject.estimator, values, num_samples=WORLD_SAMPLES,
            num_dims=truth.rollout.x0.shape[1], oracle=world.oracle, truth_error=0.0, truth_step_error=0.0,
        )  # fmt: skip

    def _model(self, task: Task, run: Run, rollouts: probe_gradient.Rollouts) -> None:
        known = identity(task.cell)
        sampled = (known["components"]["sampler"], known["recipe"], known["seed"])
        wanted = digest(str(task.weights.folder), *sampled)
        if self._truth is None or self._truth[0] != wanted:
            self._truth = (wanted, probe_model.true_values(run, rollouts, MODEL_SIGNS, self._sketch))
        truth = self._truth[1]
        found = probe_model.compare(run, rollouts, truth, MODEL_DRAWS // 2, self._sketch)
        values = list(zip(truth.nats.tolist(), found.value.tolist(), strict=True))
        self._compared(
            task.key, _columns(task) | {"world": "model"}, found, run.estimator, values, num_samples=len(values),
            num_dims=rollouts.samples.rollout.x0[0].numel(), oracle=truth.oracle, truth_error=truth.error,
            truth_step_error=truth.step_error,
        )  # fmt: skip

    def _compared(
        self, key: str, common: dict[str, Any], found: Any, estimator: Any, values: list[Any], **columns: Any
    ) -> None:
        agreement: Agreement = found.agreement
        angle: Angle | None = found.angle
        bound = is_bound(estimator)
        self.likelihoods.replace(
            key, [LikelihoodRow(sample=i, truth=t, value=v, **common) for i, (t, v) in enumerate(values)]
        )
        self.bias.replace(
            key,
            [
                BiasRow(
                    point_sd=found.point_sd,
                    bound=bound,
                    bound_holds=agreement.gap_mean <= 2 * agreement.gap_error if bound else None,
                    angle=angle and angle.degrees,
                    angle_low=angle and angle.low,
                    angle_high=angle and angle.high,
                    **asdict(agreement),
                    **columns,
                    **common,
                )
            ],
        )


def _columns(task: Task) -> dict[str, Any]:
    """What the rows of a task have in common."""
    cell = task.cell
    return {
        "key": task.key,
        "weights": task.weights.label,
        "seed": cell.seed,
        "sampler": cell.sampler,
        "estimator": cell.estimator,
        "axes": cell.axes,
    }


def _parts(found: Any) -> dict[str, float]:
    return {name: float(value) for name, value in asdict(found).items()}


def _load(folder: Path, run: Run) -> None:
    """Make the weights of a folder the current ones of a run."""
    path = file_of(folder, run.cell)
    if path.name != "state.pt":
        load_weights(folder / WEIGHTS if (folder / WEIGHTS).is_dir() else folder, run.policy)
        return
    try:
        restored = checkpoint.restore(folder, run.policy, run.optimizer, run.scaler)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"--weights {folder}: its checkpoint is of another recipe: {error}") from None
    if restored is None:
        raise InputError(f"--weights {folder}: its checkpoint is damaged")
