"""`ablate probe`: what the estimators of a grid are worth, before any training.

For the base model and any other weights: signal and noise of the policy gradient of every estimator and sampler
(probe_gradient.py), and how far values and gradients are from the true likelihood, on flows known in closed form
(probe_worlds.py) and on the model itself (probe_model.py). Rows that are there are not measured again.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ablate.agreement import Agreement, Angle, is_bound
from ablate.flow import NOISE_SCHEDULES
from ablate.lock import lock
from ablate.plan import FORMAT, Cell
from ablate.probe_rows import FOLDER, BiasRow, GradientRow, LevelRow, LikelihoodRow, Table
from ablate.recipe import Recipe
from ablate.sketch import Sketch
from ablate.source import InputError
from runners import checkpoint, probe_gradient, probe_model, probe_worlds
from runners.export import WEIGHTS, load_weights, weights_file
from runners.policy import SD3Policy, this_device
from runners.run import Run, set_up

BASE = "base"
WORLD_SAMPLES, WORLD_POINTS, WORLD_PICTURED = 1024, 128, 64
MODEL_GROUPS, MODEL_GROUP_SIZE, MODEL_SIGNS, MODEL_DRAWS = 6, 4, 2, 6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured."""

    points: tuple[int, ...] = (1, 2, 5, 10)
    draws: int = 2  # probes on the same rollouts
    groups: int | None = None  # prompts of a rollout; by default an epoch's
    bias: bool = True

    def __post_init__(self) -> None:
        if not self.points or min(self.points) < 1:
            raise InputError(f"--points {','.join(map(str, self.points))}: expected whole numbers from 1 on")
        for name, value in (("draws", self.draws), ("groups", self.groups)):
            if value is not None and value < 2:
                raise InputError(f"--{name} {value}: a variance needs at least 2")


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """A policy to be probed: the base model, or what a folder holds."""

    label: str = BASE
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _Task:
    """One measurement."""

    kind: str  # gradient, world or model
    key: str
    cell: Cell
    weights: _Weights
    size: float  # about so many network calls with gradient
    world: tuple[probe_worlds.World, probe_worlds.Subject] | None = None


def probe(cells: Sequence[Cell], results: Path, settings: Settings, folders: Sequence[Path], console: Console) -> Path:
    """Measure what is missing in results/probe/ and return that folder."""
    target = results / FOLDER
    target.mkdir(parents=True, exist_ok=True)
    weights = [_Weights(), *(_Weights(label=folder.resolve().name, folder=folder) for folder in folders)]
    with lock(target):
        prober = _Prober(target, settings)
        tasks = [task for task in prober.tasks(cells, weights) if not prober.has(task)]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task("probe", total=round(sum(task.size for task in tasks)))
            done = 0.0
            for task in tasks:
                what = task.world[0].name if task.world else f"{task.cell.estimator} {task.cell.sampler}"
                progress.update(bar, description=f"{task.kind}: {what}")
                prober.measure(task, lambda calls: progress.advance(bar, calls))
                done += task.size
                progress.update(bar, completed=round(done))
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

    def has(self, task: _Task) -> bool:
        return task.key in (self.gradients if task.kind == "gradient" else self.bias).keys

    def tasks(self, cells: Sequence[Cell], weights: Sequence[_Weights]) -> Iterator[_Task]:
        """Each estimator, sampler and rollout once, whatever the objective: on-policy they have one gradient."""
        settings = self.settings
        distinct = {_digest(_identity(cell)): _resized(cell, settings.groups) for cell in cells}
        for chosen in weights:
            mark = _mark(chosen, cells[0])
            for cell in distinct.values():
                rollout = cell.recipe.rollout
                num_points = sum({*settings.points, rollout.num_steps})
                yield _Task(
                    kind="gradient",
                    key=_digest(_identity(cell), mark, settings.points, settings.draws),
                    cell=cell,
                    weights=chosen,
                    size=num_points * settings.draws * rollout.num_groups * rollout.group_size,
                )
        if not settings.bias:
            return
        lowest = min(cells, key=lambda cell: cell.seed)
        for world in probe_worlds.worlds():
            for subject in probe_worlds.subjects():
                given = (world.name, subject.label, asdict(subject.estimator), subject.sampler)
                rollout = lowest.recipe.rollout
                schedule = (rollout.num_steps, rollout.noise_schedule, WORLD_SAMPLES, WORLD_POINTS)
                yield _Task(
                    kind="world",
                    key=_digest(given, schedule, lowest.seed),
                    cell=lowest,
                    weights=_Weights(),
                    size=200,
                    world=(world, subject),
                )
        small = {
            _digest(_identity(cell)): _resized(cell, MODEL_GROUPS, MODEL_GROUP_SIZE)
            for cell in sorted(cells, key=lambda cell: cell.sampler)  # those of one sampler share the truth
            if cell.seed == lowest.seed
        }
        for chosen in weights:
            mark = _mark(chosen, cells[0])
            for cell in small.values():
                yield _Task(
                    kind="model",
                    key=_digest(_identity(cell), mark, MODEL_SIGNS, MODEL_DRAWS),
                    cell=cell,
                    weights=chosen,
                    size=8 * MODEL_GROUPS * MODEL_GROUP_SIZE * 2 * MODEL_SIGNS * probe_model.NUM_STEPS,
                )

    def measure(self, task: _Task, advance: Callable[[int], object]) -> None:
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

    def _run(self, folder: Path, task: _Task) -> Run:
        """The cell, with the weights of the task as its current and its old policy."""
        wanted = _digest(task.cell.recipe.model.model_dump(), str(task.weights.folder))
        kept = self._policy[1] if self._policy and self._policy[0] == wanted else None
        run = set_up(folder, task.cell, kept or SD3Policy(task.cell.recipe.model, this_device()))
        if kept is None:
            if task.weights.folder:
                _load(task.weights.folder, run)
            run.policy.blend("old", 0)
        self._policy = (wanted, run.policy)
        return run

    def _gradient(
        self, task: _Task, run: Run, rollouts: probe_gradient.Rollouts, advance: Callable[[int], object]
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

    def _world(self, task: _Task, world: probe_worlds.World, subject: probe_worlds.Subject) -> None:
        rollout, seed = task.cell.recipe.rollout, task.cell.seed
        wanted = _digest(world.name, subject.sampler)
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
        values = list(zip(truth.nats.tolist(), found.value.tolist(), strict=True))[: WORLD_PICTURED * subject.pictured]
        self._compared(
            task.key, common, found, subject.estimator, values, num_samples=WORLD_SAMPLES,
            num_dims=truth.rollout.x0.shape[1], oracle=world.oracle, truth_error=0.0, truth_step_error=0.0,
        )  # fmt: skip

    def _model(self, task: _Task, run: Run, rollouts: probe_gradient.Rollouts) -> None:
        identity = _identity(task.cell)
        sampled = (identity["components"]["sampler"], identity["recipe"], identity["seed"])
        wanted = _digest(str(task.weights.folder), *sampled)
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


def _columns(task: _Task) -> dict[str, Any]:
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


def _resized(cell: Cell, groups: int | None, group_size: int | None = None) -> Cell:
    """The cell with so many prompts and images in its rollout, all of them kept."""
    rollout = cell.recipe.rollout
    size = {"group_size": group_size, "candidates": None} if group_size else {}
    update = {"num_groups": groups or rollout.num_groups, "resample_rounds": 0, **size}
    changed = cell.recipe.model_copy(update={"rollout": rollout.model_copy(update=update)})
    return cell.model_copy(update={"recipe": changed})


def _identity(cell: Cell) -> dict[str, Any]:
    """All that a probe of a cell depends on; the objective and the optimizer are not among it."""
    recipe: Recipe = cell.recipe
    parts = {"model", "prompts", "reward", "rollout", "advantage"}
    return {
        "format": FORMAT,
        "components": {axis: cell.components[axis].model_dump() for axis in ("estimator", "sampler")},
        "recipe": recipe.model_dump(include=parts)
        | {"update": recipe.update.model_dump(include={"group_probe", "guidance_scale"})},
        "seed": cell.seed,
        "versions": cell.versions,
    }


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _mark(weights: _Weights, cell: Cell) -> str:
    """What tells weights from others: the digest of their file."""
    if weights.folder is None:
        return BASE
    with _file(weights.folder, cell).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _file(folder: Path, cell: Cell) -> Path:
    """The file of weights in a cell's folder, finished or not, or in an exported folder. Raises InputError."""
    candidates = [
        weights_file(folder / WEIGHTS, cell.recipe.model),
        folder / "checkpoint" / "state.pt",
        weights_file(folder, cell.recipe.model),
    ]
    if found := next((path for path in candidates if path.exists()), None):
        return found
    raise InputError(f"--weights {folder}: holds neither {WEIGHTS}/ nor a checkpoint nor exported weights")


def _load(folder: Path, run: Run) -> None:
    """Make the weights of a folder the current ones of a run."""
    path = _file(folder, run.cell)
    if path.name != "state.pt":
        load_weights(folder / WEIGHTS if (folder / WEIGHTS).is_dir() else folder, run.policy)
        return
    try:
        restored = checkpoint.restore(folder, run.policy, run.optimizer, run.scaler)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"--weights {folder}: its checkpoint is of another recipe: {error}") from None
    if restored is None:
        raise InputError(f"--weights {folder}: its checkpoint is damaged")
