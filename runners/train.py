"""One cell, top to bottom: roll out, score, estimate, update. The file to read first.

`train_cell(folder)` needs nothing but the folder's cell.json, resumes from its checkpoint, and ends by writing
record.json, whatever happens.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ablate.advantages import advantages
from ablate.flow import NOISE_SCHEDULES
from ablate.plan import COMPONENT_AXES, Cell, build
from ablate.record import Ledger, Provenance, Record, Status, read_json, read_metrics, write_atomic
from ablate.recipe import Recipe
from ablate.rollout import Rollout, concatenate, take
from ablate.samplers.ode import ODE
from ablate.seeding import derive_seed, generator, streams
from runners import checkpoint
from runners.checkpoint import Progress
from runners.policy import Conditioning, Policy, SD3Policy
from runners.prompts import Prompt, PromptSource, load_prompts
from runners.rewards import REWARDS, Reward, RewardOutput
from runners.surrogate import Batch, accumulate_gradient
from runners.tiny.scenes import FAMILIES

EMA_WARMUP = 10  # decay min(ema_decay, (1 + t) / (10 + t)) after t updates


class Diverged(Exception):
    """Training has left the numbers: a result, not an error."""


@dataclass(kw_only=True)
class Run:
    """Everything one cell works with."""

    folder: Path
    cell: Cell
    policy: Policy
    prompts: PromptSource
    reward: Reward
    optimizer: torch.optim.Optimizer
    progress: Progress
    objective: Any = field(init=False)
    estimator: Any = field(init=False)
    sampler: Any = field(init=False)

    def __post_init__(self) -> None:
        self.objective, self.estimator, self.sampler = (build(a, self.cell.components[a]) for a in COMPONENT_AXES)

    @property
    def recipe(self) -> Recipe:
        return self.cell.recipe

    @contextmanager
    def booked(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to a phase of the cost ledger."""
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        yield
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()
        self.spend(**{phase: time.perf_counter() - start})

    def spend(self, **amounts: float) -> None:
        cost = self.progress.cost
        self.progress.cost = cost.model_copy(update={k: getattr(cost, k) + v for k, v in amounts.items()})


def train_cell(folder: Path) -> Record:
    """Train the cell of a folder to its end and write its record. Bad states are records, not exceptions."""
    cell = Cell.model_validate(read_json(folder / "cell.json"))
    attempts = _attempts(folder)
    progress, status, message = Progress(), Status.FAILED, ""
    try:
        with _interruption() as interrupted:
            run = set_up(folder, cell)
            progress = run.progress
            status = Status.INTERRUPTED if not _train(run, interrupted) else Status.DONE
            progress = run.progress
    except Diverged as divergence:
        status, message = Status.DIVERGED, str(divergence)
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        (folder / "traceback.txt").write_text(traceback.format_exc())
    evaluated = [line for line in read_metrics(folder) if "eval/score" in line]
    last = evaluated[-1] if evaluated else {}
    record = Record(
        id=cell.id,
        status=status,
        message=message.splitlines()[-1] if message else "",
        seed=cell.seed,
        attempts=attempts,
        epochs=progress.epoch,
        cost=progress.cost,
        metrics={k: v for k, v in last.items() if k.startswith("eval/")},
        provenance=provenance(),
    )
    write_atomic(folder / "record.json", record.model_dump_json(indent=1) + "\n")
    if status.final:
        checkpoint.discard(folder)
    return record


def set_up(folder: Path, cell: Cell) -> Run:
    """Load the model, prompts and reward of a cell; continue from its checkpoint where there is one."""
    torch.manual_seed(derive_seed(cell.seed, "initialisation"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy = SD3Policy(cell.recipe.model, device)
    update = cell.recipe.update
    optimizer = torch.optim.AdamW(
        policy.trainable,
        lr=update.learning_rate,
        betas=update.betas,
        eps=update.epsilon,
        weight_decay=update.weight_decay,
    )
    progress = checkpoint.restore(folder, policy, optimizer) or Progress()
    _drop_lines_after(folder, progress)
    return Run(
        folder=folder,
        cell=cell,
        policy=policy,
        prompts=load_prompts(cell.recipe.prompts),
        reward=REWARDS[cell.recipe.reward](),
        optimizer=optimizer,
        progress=progress,
    )


def _train(run: Run, interrupted: list[int]) -> bool:
    """Epochs until the budget is spent; False when a signal asked to stop."""
    recipe, progress = run.recipe, run.progress
    if progress.epoch == 0:
        _log(run, evaluate(run, "before"))
    while not _spent(run):
        metrics = train_epoch(run)
        progress.epoch += 1
        if progress.epoch % recipe.evaluation.every == 0 or _spent(run):
            metrics |= evaluate(run, "after" if _spent(run) else None)
        _log(run, metrics)
        if interrupted or progress.epoch % recipe.checkpoint_every == 0:
            with run.booked("checkpoint"):
                checkpoint.save(run.folder, progress, run.policy, run.optimizer)
        if interrupted and not _spent(run):
            return False
    return True


def train_epoch(run: Run) -> dict[str, float]:
    """Roll out from the old policy, score, and update on the images' likelihoods under the shared probe."""
    recipe, cell, epoch = run.recipe, run.cell, run.progress.epoch
    groups, size = recipe.rollout.num_groups, recipe.rollout.group_size
    prompts = [
        prompt
        for prompt in run.prompts.train(groups, np.random.default_rng(derive_seed(cell.seed, "prompts", epoch)))
        for _ in range(size)
    ]
    conditioning = run.policy.encode([p.text for p in prompts])
    with run.booked("rollout"):
        rollout = roll_out(run, conditioning)
        images = run.policy.decode(rollout.x0)
    with run.booked("reward"):
        scores = run.reward(images, prompts)
    _check("reward", torch.from_numpy(scores.score))
    group = torch.arange(groups).repeat_interleave(size)
    advantage = advantages(torch.from_numpy(scores.score), group, recipe.advantage)
    with run.booked("update"):
        trained = update(run, rollout, conditioning, advantage.float(), group)
    deviation = torch.from_numpy(scores.score).view(groups, size).std(1, correction=0)
    return {
        **_means("rollout", scores),
        "rollout/informative_groups": float((deviation > 0).double().mean()),
        **{f"train/{name}": value for name, value in trained.items()},
    }


@torch.no_grad()
def roll_out(run: Run, conditioning: Conditioning) -> Rollout:
    """Images of an epoch under the old policy, batch by batch; a sample's noise depends on its index alone."""
    recipe, policy = run.recipe.rollout, run.policy
    sigmas = _sigmas(run, recipe.num_steps)
    rollouts = []
    with policy.using("old"):
        for rows in _batches(len(conditioning.tokens), recipe.batch_size):
            samples = range(rows.start, rows.stop)
            own = streams(run.cell.seed, "rollout", run.progress.epoch, samples=samples)
            noise = own.normal(policy.latent_shape, torch.empty((), device=policy.device))
            given = conditioning.rows(rows)
            rollouts.append(
                run.sampler.sample(
                    lambda x, sigma, given=given: policy.velocity(x, sigma, given, recipe.guidance_scale),
                    noise,
                    sigmas=sigmas,
                    epoch=run.progress.epoch,
                    streams=own,
                )
            )
            run.spend(forwards=len(samples) * recipe.num_steps * (1 + (recipe.guidance_scale > 1)))
    return concatenate(rollouts)


def update(
    run: Run, rollout: Rollout, conditioning: Conditioning, advantage: Tensor, group: Tensor
) -> dict[str, float]:
    """The optimizer steps of an epoch, each on its own share of the groups; then the old policy follows."""
    recipe, policy, progress = run.recipe.update, run.policy, run.progress
    size = run.recipe.rollout.group_size
    # samples that an objective compares with each other are probed at the same noise
    samples = group.tolist() if run.objective.level == "group" else range(len(group))
    probe = run.estimator.probe(
        rollout,
        num_points=recipe.num_points,
        streams=streams(run.cell.seed, "probe", progress.epoch, samples=samples),
    )
    if run.recipe.rollout.guidance_scale != recipe.guidance_scale and probe.rollout_velocity is not None:
        raise ValueError("trajectory with different guidance in rollout and update is not a density of the rollout")
    order = torch.randperm(int(group.max()) + 1, generator=generator(run.cell.seed, "order", progress.epoch))
    shares = order.chunk(recipe.updates_per_epoch)
    old_decay = _old_decay(run.recipe.old_policy.decay, progress.update)
    metrics: list[dict[str, float]] = []
    for i, share in enumerate(shares):
        rows = (share.sort().values[:, None] * size + torch.arange(size)).flatten()
        given = conditioning.rows(rows.to(policy.device))
        part = take_rows(probe, rows)

        def ask(weights: Any, samples: slice, points: slice, part: Any = part, given: Conditioning = given) -> Tensor:
            chosen = take(part, samples, points)
            n, m = chosen.sigma.shape
            repeated = given.rows(torch.arange(len(part.sigma), device=policy.device)[samples].repeat_interleave(m))
            with policy.using(weights):
                velocity = policy.velocity(
                    chosen.x.flatten(0, 1), chosen.sigma.flatten(), repeated, recipe.guidance_scale
                )
            calls = n * m * (1 + (recipe.guidance_scale > 1))
            run.spend(**{"backwards" if torch.is_grad_enabled() else "forwards": calls})
            return velocity.unflatten(0, (n, m))

        run.optimizer.zero_grad()
        values = accumulate_gradient(
            run.objective,
            run.estimator,
            Batch(probe=part, advantage=advantage[rows].to(policy.device), group=group[rows], group_size=size),
            ask,
            micro_batch_size=recipe.micro_batch_size,
            kl_coef=run.recipe.kl.coef,
            old_is_current=i == 0 and old_decay == 0,
        )
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable, recipe.max_grad_norm)
        _check("gradient", norm)
        run.optimizer.step()
        decay = run.recipe.evaluation.ema_decay
        policy.blend("average", min(decay, (1 + progress.update) / (EMA_WARMUP + progress.update)))
        progress.update += 1
        metrics.append({name: float(value) for name, value in values.items()} | {"grad_norm": float(norm)})
    policy.blend("old", _old_decay(run.recipe.old_policy.decay, progress.update))
    return {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}


@torch.no_grad()
def evaluate(run: Run, picture: str | None) -> dict[str, float]:
    """Score the fixed prompts at their fixed noise, by Euler steps; optionally keep the first images as a picture."""
    recipe, policy = run.recipe.evaluation, run.policy
    prompts = run.prompts.fixed(recipe.split, recipe.num_prompts)
    conditioning = policy.encode([p.text for p in prompts])
    images = []
    with run.booked("eval"), policy.using("average" if recipe.ema_decay and run.progress.update else "current"):
        for rows in _batches(len(prompts), run.recipe.rollout.batch_size):
            own = streams(recipe.seed, "evaluation", samples=range(rows.start, rows.stop))
            noise = own.normal(policy.latent_shape, torch.empty((), device=policy.device))
            given = conditioning.rows(rows)
            rollout = ODE().sample(
                lambda x, sigma, given=given: policy.velocity(x, sigma, given, recipe.guidance_scale),
                noise,
                sigmas=_sigmas(run, recipe.num_steps),
                epoch=0,
                streams=own,
            )
            images.append(policy.decode(rollout.x0))
    scores = run.reward(np.concatenate(images), prompts)
    if picture:
        (run.folder / "samples").mkdir(exist_ok=True)
        contact_sheet(images[0][:24]).save(run.folder / "samples" / f"{picture}.png")
    return _means("eval", scores, prompts)


def contact_sheet(images: NDArray[np.uint8], columns: int = 6) -> Image.Image:
    """A grid of images [b, h, w, 3], small ones enlarged, with a thin margin."""
    zoom = max(1, 96 // images.shape[1])
    tiles = images.repeat(zoom, 1).repeat(zoom, 2)
    tiles = np.pad(tiles, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=90)
    rows = [np.concatenate(list(tiles[i : i + columns]), 1) for i in range(0, len(tiles) - columns + 1, columns)]
    return Image.fromarray(np.concatenate(rows or [np.concatenate(list(tiles), 1)], 0))


def take_rows(probe: Any, rows: Tensor) -> Any:
    """The samples of a probe with these indices."""
    return take(probe, rows.to(probe.x.device))  # type: ignore[arg-type]


def _sigmas(run: Run, num_steps: int) -> Tensor:
    shift = float(run.policy.shift)
    return NOISE_SCHEDULES[run.recipe.rollout.noise_schedule](num_steps, shift)


def _old_decay(kind: str, num_updates: int) -> float:
    """How slowly the rollout policy follows; see OldPolicyRecipe. DiffusionNFT (arXiv 2509.16117), `return_decay`."""
    if kind == "slow":
        return min(0.001 * num_updates, 0.5)
    if kind == "late":
        return 0.0 if num_updates < 75 else min(0.0075 * (num_updates - 75), 0.999)
    return 0.0


def _batches(num_samples: int, batch_size: int) -> Iterator[slice]:
    for start in range(0, num_samples, batch_size):
        yield slice(start, min(start + batch_size, num_samples))


def _means(phase: str, scores: RewardOutput, prompts: Sequence[Prompt] = ()) -> dict[str, float]:
    values = {"score": scores.score, **scores.parts}
    means = {f"{phase}/{name}": float(v.mean()) for name, v in values.items()}
    tags = np.array([p.tag for p in prompts])
    for tag in FAMILIES if len(tags) else ():
        if (tags == tag).any():
            means |= {f"{phase}/{name}/{tag}": float(v[tags == tag].mean()) for name, v in scores.parts.items()}
    return means


def _check(what: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise Diverged(f"{what} is no longer finite")


def _spent(run: Run) -> bool:
    budget, progress = run.recipe.budget, run.progress
    if budget.epochs is not None and progress.epoch >= budget.epochs:
        return True
    return budget.device_hours is not None and progress.cost.device_hours >= budget.device_hours


def _log(run: Run, metrics: dict[str, float]) -> None:
    """Append one line to metrics.jsonl and remember where it ends."""
    progress, cost = run.progress, run.progress.cost
    line = {
        "epoch": progress.epoch,
        "update": progress.update,
        "device_hours": round(cost.device_hours, 7),
        "nfe": cost.nfe,
        **metrics,
        **{f"cost/{name}": round(value, 4) for name, value in cost.model_dump().items()},
    }
    with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        progress.metrics_bytes = file.tell()


def _drop_lines_after(folder: Path, progress: Progress) -> None:
    """Cut metrics.jsonl back to the checkpoint; the seconds of the epochs to be done again are booked as lost."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    lines = read_metrics(folder)
    if lines:
        spent = Ledger(**{k.removeprefix("cost/"): v for k, v in lines[-1].items() if k.startswith("cost/")})
        lost = 3600 * (spent.device_hours - progress.cost.device_hours)
        total = progress.cost.lost + max(lost, 0.0)
        progress.cost = progress.cost.model_copy(update={"lost": max(total, spent.lost)})
    with path.open("rb+") as file:
        file.truncate(progress.metrics_bytes)


def _attempts(folder: Path) -> int:
    """Note this start in attempts.jsonl; returns how many there were."""
    path = folder / "attempts.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"started": time.time(), "host": platform.node()}) + "\n")
    return len(path.read_text(encoding="utf-8").splitlines())


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM: the first asks to stop after this epoch, the second stops at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def provenance() -> Provenance:
    """Versions, commit and device of this process."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    cuda = torch.cuda.is_available()
    return Provenance(
        versions={name: version(name) for name in ("ablate", "torch", "diffusers", "transformers", "peft", "numpy")},
        commit=commit or None,
        python=platform.python_version(),
        platform=platform.platform(),
        device=f"cuda: {torch.cuda.get_device_name()}" if cuda else f"cpu: {platform.machine()}",
        num_devices=1,
        num_threads=torch.get_num_threads(),
    )


if __name__ == "__main__":
    sys.exit(0 if train_cell(Path(sys.argv[1])).status.final else 1)
