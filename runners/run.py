"""A cell at work: its parts, its progress, its ledger and its log."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ablate.attempts import book_lost
from ablate.components import build
from ablate.limits import Limits, reached, read_limits
from ablate.part import COMPONENT_AXES
from ablate.plan import Cell
from ablate.recipe import Recipe, reward_terms
from ablate.record import Ledger, read_metrics, read_spent, write_ledger
from ablate.seeding import derive_seed, generator
from ablate.source import InputError
from ablate.stop_rule import StopRule
from runners import checkpoint
from runners.checkpoint import Progress
from runners.compiling import compile_seconds
from runners.distributed import World, join
from runners.memory import in_memory
from runners.policy import SD3Policy
from runners.prompts import PromptSource, check_held_out, load_prompts
from runners.rewards import RewardOutput, RewardUnavailable, WeightedSum, load_reward
from runners.rewards.protocol import joined
from runners.scoring import Scorer, why_missing

BEAT = 10.0  # seconds between notes of what a phase in progress has spent
Result = TypeVar("Result")


class Diverged(Exception):
    """Training has left the numbers: a result, not an error."""


@dataclass(kw_only=True)
class Run:
    """Everything one cell works with."""

    folder: Path
    cell: Cell
    world: World
    policy: SD3Policy
    prompts: PromptSource
    reward: WeightedSum
    panel: dict[str, tuple[WeightedSum, Scorer]]  # each measured on held-out images alone
    scorer: Scorer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss, for float16
    progress: Progress
    limits: Limits = field(default_factory=Limits)
    stopped: str = ""  # why the stop rule ends the cell
    batch_sizes: dict[str, int] = field(default_factory=dict)  # of rollout, update and eval, as they fitted into memory
    halvings: int = 0  # how often batch sizes are halved from the start: attempts before ran out of memory
    objective: Any = field(init=False)
    estimator: Any = field(init=False)
    sampler: Any = field(init=False)
    _rewards_before: dict[str, float] = field(init=False)  # seconds of each reward, of the attempts before

    def __post_init__(self) -> None:
        self._rewards_before = self.progress.cost.rewards
        self.objective, self.estimator, self.sampler = (build(a, self.cell.components[a]) for a in COMPONENT_AXES)

    @property
    def identities(self) -> dict[str, str]:
        """What each reward is, and each of the held-out panel."""
        panel = {name: identity for measure, _ in self.panel.values() for name, identity in measure.identities.items()}
        return self.reward.identities | panel

    @property
    def recipe(self) -> Recipe:
        return self.cell.recipe

    def in_memory(self, phase: str, size: int, attempt: Callable[[int], Result]) -> Result:
        """`attempt(size)`, or with the size that has fitted into memory before."""
        smaller = max(1, size >> self.halvings)
        result, self.batch_sizes[phase] = in_memory(self.batch_sizes.get(phase, smaller), attempt)
        return result

    def shares(self) -> list[Tensor]:
        """The groups of each update of this epoch, ascending: those that this process trains on."""
        order = torch.randperm(
            self.recipe.rollout.num_groups, generator=generator(self.cell.seed, "order", self.progress.epoch)
        )
        updates = order.chunk(self.recipe.update.updates_per_epoch)
        return [groups.sort().values[self.world.rank :: self.world.size] for groups in updates]

    @contextmanager
    def booked(self, phase: str) -> Iterator[None]:
        """Add the seconds of a block to a phase of the cost ledger, and what of it was compiling to `compile`."""
        self.wait()
        start, compiled = time.perf_counter(), compile_seconds()

        def so_far() -> Ledger:
            cost = self.progress.cost
            return cost.model_copy(
                update={phase: getattr(cost, phase) + self.world.size * (time.perf_counter() - start)}
            )

        try:
            with _kept(self.folder, so_far) if self.world.main else nullcontext():
                yield
        finally:
            self.wait()
            compiling = compile_seconds() - compiled
            self.spend(**{phase: time.perf_counter() - start - compiling, "compile": compiling})
            self._book_rewards()
            if self.world.main:
                write_ledger(self.folder, self.progress.cost)

    def wait(self) -> None:
        """Until the device has done what it was asked to do, so that a clock tells the truth."""
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize()

    def spend(self, **amounts: float) -> None:
        """Book seconds and network calls of this process; the others have spent as much."""
        cost, devices = self.progress.cost, self.world.size
        self.progress.cost = cost.model_copy(update={k: getattr(cost, k) + devices * v for k, v in amounts.items()})

    def _book_rewards(self) -> None:
        """What each reward has worked, wherever it worked."""
        rewards = dict(self._rewards_before)
        for every in (self.reward, *(measure for measure, _ in self.panel.values())):
            for name, seconds in every.seconds.items():
                rewards[name] = rewards.get(name, 0.0) + self.world.size * seconds
        self.progress.cost = self.progress.cost.model_copy(update={"rewards": rewards})

    def fetch_rewards(self) -> None:
        """Bring rewards that wait in the memory of the machine back to the device."""
        if self.recipe.scoring.offload:
            self._move_rewards(str(self.policy.device))

    def put_rewards_away(self) -> None:
        """Make room on the device, where the recipe asks for it."""
        if self.recipe.scoring.offload:
            self._move_rewards("cpu")

    def _move_rewards(self, device: str) -> None:
        for every in (self.reward, *(measure for measure, _ in self.panel.values())):
            every.load(device)

    def everyones(self, scores: RewardOutput) -> tuple[RewardOutput, slice]:
        """The scores of all processes, and where those of this one are among them."""
        every = self.world.everyone(scores)
        start = sum(len(of_one.score) for of_one in every[: self.world.rank])
        return joined(every), slice(start, start + len(scores.score))

    def check_missing(self, scores: RewardOutput, unscored: NDArray[np.bool_]) -> None:
        """Raise RewardUnavailable on all processes where more scores are missing than the recipe bears.

        `unscored` are the groups, or images, of this process that have none.
        """
        every = self.world.everyone((int(unscored.sum()), len(unscored), why_missing(scores)))
        lost, number = sum(few for few, _, _ in every), sum(many for _, many, _ in every)
        if lost > self.recipe.scoring.max_missing * number:
            reason = next(reason for *_, reason in every if reason)
            raise RewardUnavailable(f"no score for {lost} of {number} groups or images: {reason}")

    def agreed(self, stop: bool) -> bool:
        """Whether any process asks to stop; all take over the first one's ledger, so that all find it spent at once."""
        asked = self.world.everyone((stop, self.progress.cost))
        self.progress.cost = asked[0][1]
        return any(stop for stop, _ in asked)

    @property
    def spent(self) -> bool:
        """Whether the cell is done: its budget or its target is reached, or its stop rule fulfilled."""
        return self.progress.target_reached or bool(self.stopped) or self._reached(1)

    @property
    def paused(self) -> bool:
        """Whether the share of the budget is spent that the cell may go to for now."""
        return self.limits.share < 1 and self._reached(self.limits.share)

    def _reached(self, share: float) -> bool:
        progress = self.progress
        return reached(self.recipe.budget, share, progress.epoch, progress.cost.device_hours)

    def check_stop_rule(self, metrics: Mapping[str, float]) -> None:
        """Note whether metrics of this epoch fulfil the stop rule; all processes go by the first one's."""
        if self.limits.stop_when is not None and not self.stopped:
            rule = StopRule.parse(self.limits.stop_when)
            self.stopped = self.world.everyone(rule.fulfilled(self._line(metrics)))[0]

    def log(self, metrics: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and remember where it ends."""
        if not self.world.main:
            return
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._line(metrics)) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint relies on it
            self.progress.metrics_bytes = file.tell()

    def _line(self, metrics: Mapping[str, float]) -> dict[str, float]:
        progress, cost = self.progress, self.progress.cost
        return {
            "epoch": progress.epoch,
            "update": progress.update,
            "device_hours": round(cost.device_hours, 7),
            "nfe": cost.nfe,
            **{name: value for name, value in metrics.items() if math.isfinite(value)},  # the rest is missing
            **cost.flat(),
        }


def set_up(
    folder: Path, cell: Cell, policy: SD3Policy | None = None, world: World | None = None, halvings: int = 0
) -> Run:
    """Load the model (or take `policy`), prompts and reward of a cell; continue from its checkpoint if there is one."""
    world = world or join()
    reward, panel = rewards_of(cell.recipe)
    prompts = load_prompts(cell.recipe.prompts)
    check_held_out(prompts, cell.recipe, world.size)
    torch.manual_seed(derive_seed(cell.seed, "initialisation"))
    policy = policy or SD3Policy(cell.recipe.model, world.device)
    scoring = cell.recipe.scoring
    scorer = Scorer(reward, scoring.timeout, meanwhile=_meanwhile(reward, policy), device=str(policy.device))
    measures = {n: (m, Scorer(m, scoring.timeout, device=str(policy.device))) for n, m in panel.items()}
    _check([(reward, scorer), *measures.values()], policy.device, world)
    update = cell.recipe.update
    optimizer = torch.optim.AdamW(
        policy.trainable,
        lr=update.learning_rate,
        betas=update.betas,
        eps=update.epsilon,
        weight_decay=update.weight_decay,
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=cell.recipe.model.dtype == "float16")
    progress = checkpoint.restore(folder, policy, optimizer, scaler) or Progress()
    if len(set(world.everyone((progress.epoch, progress.update, progress.metrics_bytes)))) > 1:
        raise InputError(f"{folder}: the processes of this cell see different checkpoints; is it on a shared disk?")
    world.share([tensor for tensors in policy.state().values() for tensor in tensors])
    if world.main:
        _go_back_to(progress, folder)
    limits = read_limits(folder)
    stopped = world.everyone(_stopped_before(folder, limits) if world.main else "")[0]
    return Run(
        folder=folder,
        cell=cell,
        world=world,
        policy=policy,
        prompts=prompts,
        reward=reward,
        scorer=scorer,
        panel=measures,
        optimizer=optimizer,
        scaler=scaler,
        progress=progress,
        halvings=halvings,
        limits=limits,
        stopped=stopped,
    )


def rewards_of(recipe: Recipe) -> tuple[WeightedSum, dict[str, WeightedSum]]:
    """The reward of a recipe and, each by itself, those of its held-out panel; without their weights."""
    panel = {term.called: load_reward((term,), "evaluation.panel") for term in reward_terms(recipe.evaluation.panel)}
    return load_reward(recipe.reward), panel


def _meanwhile(reward: WeightedSum, policy: SD3Policy) -> bool:
    """Whether images are scored while others are rolled out: not on cores that both would share."""
    return reward.remote or policy.device.type == "cuda"


def _check(rewards: Sequence[tuple[WeightedSum, Scorer]], device: torch.device, world: World) -> None:
    """Load rewards and let each check itself. Raises RewardUnavailable on all processes where one of them fails."""
    problem = ""
    try:
        for reward, scorer in rewards:
            reward.load(str(device))
            scorer.check(reward.self_check)
    except RewardUnavailable as error:
        problem = str(error)
    if problem := next(filter(None, world.everyone(problem)), ""):
        raise RewardUnavailable(problem)


@contextmanager
def _kept(folder: Path, so_far: Callable[[], Ledger]) -> Iterator[None]:
    """Keep what a long phase has spent so far, for a kill in its midst."""
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):  # of which the phase that follows will tell
                write_ledger(folder, so_far())

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _stopped_before(folder: Path, limits: Limits) -> str:
    """Why the stop rule is fulfilled where a cell resumes; empty where it is not. A cell ends with an evaluation."""
    last = (read_metrics(folder) or [{}])[-1]
    return StopRule.parse(limits.stop_when).fulfilled(last) if limits.stop_when and "eval/score" in last else ""


def _go_back_to(progress: Progress, folder: Path) -> None:
    """Cut metrics.jsonl back to the checkpoint, and book as lost what was spent since: it has to be done again."""
    progress.cost = read_spent(folder).undone(progress.cost)
    write_ledger(folder, progress.cost)  # first, so that a kill here books nothing twice
    book_lost(folder, progress.cost.lost, index=-2)  # on the attempt before this one
    path = folder / "metrics.jsonl"
    if path.exists() and path.stat().st_size > progress.metrics_bytes:
        with path.open("rb+") as file:
            file.truncate(progress.metrics_bytes)
