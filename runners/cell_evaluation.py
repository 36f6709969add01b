"""`ablate eval`: images and scores of trained cells, and of their base models, under the frozen protocol."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image
from rich.console import Console

from ablate.flow import diffusers_sigmas
from ablate.plan import Cell
from ablate.recipe import RewardSpec, RewardTerm, reward_terms
from ablate.record import read_cell, read_record, write_atomic
from ablate.source import FieldError, InputError, choices, counted
from runners.checkpoint import read_newest
from runners.distributed import this_device
from runners.evaluation import NUM_PICTURED, contact_sheet, generate, means
from runners.export import WEIGHTS, load
from runners.policy import SD3Policy
from runners.prompts import load_prompts
from runners.rewards import RewardOutput, RewardUnavailable, WeightedSum, load_reward
from runners.rewards.protocol import Images
from runners.scoring import Scorer
from runners.steps import steps

PROTOCOL = {"split", "num_prompts", "num_steps", "guidance_scale", "seed"}  # of an evaluation: what images depend on
Row = dict[str, object]
SILENT = Console(quiet=True)


def evaluate_cells(
    results: Path,
    rewards: Sequence[str],
    guidance_scales: Sequence[float | None],
    ids: Sequence[str] = (),
    checkpoints: Sequence[Path] = (),
    console: Console = SILENT,
) -> Iterator[Row]:
    """One row per model, guidance scale and reward (by default the cell's own): a base, then the cells on it.

    Cells are the finished ones with exported weights, or those of `ids` and of `checkpoints` (cells' folders, or files
    in their checkpoint/) alone. A base is scored once for all cells that share model, prompts and protocol. Writes
    evaluations/<model>-guidance-<scale>.json, a picture of each, and a folder with all of its images into the results.
    A guidance scale of None is the recipe's. How far the work is shows in `console`. Raises InputError for unknown
    rewards and those that cannot score here, unknown cells, and cells without weights or an intact checkpoint.
    """
    trained = [_checkpointed(path) for path in checkpoints]
    if ids or not checkpoints:
        trained = [*_exported(results, ids), *trained]
        if (others := len(list(results.glob("*/cell.json"))) - len(trained)) and not ids:
            console.print(
                f"Left out: {counted(others, 'cell')} without exported weights; --checkpoint scores such a one."
            )
    for name in rewards:
        _check(name)
    for one in trained if not rewards else ():
        _check_own(one)
    patience = max(one.cell.recipe.scoring.timeout for one in trained)
    scoring = _Scoring(target=results / "evaluations", asked=rewards, timeout=patience)
    for spec in scoring.wanted([one.cell for one in trained]):
        scoring.load(spec)
    scoring.target.mkdir(parents=True, exist_ok=True)
    models = _grouped(trained, lambda t: t.cell.recipe.model.model_dump_json())
    bases = [[alike for scale in guidance_scales for alike in _on_a_base(cells, scale)] for cells in models]
    with steps(console, sum(1 + len(alike) for of_a_model in bases for alike in of_a_model)) as work:
        for of_a_model in bases:
            policy = SD3Policy(of_a_model[0][0].cell.recipe.model, this_device())
            for alike in of_a_model:
                with work.step(f"base model, guidance {alike[0].guidance:g}"):
                    yield from scoring.base(policy, [t.cell for t in alike])
                for one in alike:
                    with work.step(f"{one.cell.id}, guidance {one.guidance:g}"):
                        yield from scoring.rows(one.load(policy), one.cell, policy, scoring.wanted([one.cell]))


@dataclass(frozen=True, kw_only=True)
class _Trained:
    """A cell with weights: exported into its folder, or in a checkpoint (the folder, or one of its files)."""

    cell: Cell
    folder: Path
    checkpoint: Path | None = None

    @property
    def guidance(self) -> float:
        return self.cell.recipe.evaluation.guidance_scale

    def under(self, guidance_scale: float | None) -> _Trained:
        """The same with this guidance; None is the recipe's own."""
        if guidance_scale is None:
            return self
        recipe = self.cell.recipe
        evaluation = recipe.evaluation.model_copy(update={"guidance_scale": guidance_scale})
        changed = recipe.model_copy(update={"evaluation": evaluation})
        return replace(self, cell=self.cell.model_copy(update={"recipe": changed}))

    def load(self, policy: SD3Policy) -> str:
        """Make the weights that training would evaluate the current ones; what they are called."""
        if self.checkpoint is None:
            load(self.folder, policy)
            return self.cell.id
        state = read_newest(self.checkpoint, policy.device)
        averaged = self.cell.recipe.evaluation.ema_decay and state["update"]
        for p, kept in zip(policy.trainable, state["policy"]["average" if averaged else "current"], strict=True):
            p.data.copy_(kept)
        return f"{self.cell.id}-epoch-{state['epoch']}"


def _exported(results: Path, ids: Sequence[str]) -> list[_Trained]:
    """The finished cells of some results, or those of `ids`."""
    if not results.is_dir():
        near = choices(results.name, sorted(path.name for path in results.parent.glob("*/")))
        raise InputError(f"{results}: no such folder{near}")
    folders = [path.parent for path in sorted(results.glob("*/cell.json")) if _finished(path.parent)]
    if not folders:
        raise InputError(f"{results}: no finished cell with exported weights; --checkpoint scores one that is at work")
    names = [folder.name for folder in folders]
    if unknown := [name for name in ids if name not in names]:
        raise InputError(
            f"--cell {unknown[0]}: no such finished cell with exported weights{choices(unknown[0], names)}"
        )
    return [_Trained(cell=read_cell(folder), folder=folder) for folder in folders if not ids or folder.name in ids]


def _finished(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and record.status.final and (folder / WEIGHTS).is_dir()


def _checkpointed(path: Path) -> _Trained:
    folder = path.parent.parent if path.is_file() else path
    return _Trained(cell=read_cell(folder), folder=folder, checkpoint=path)


def _check(name: str) -> None:
    try:
        load_reward(name)
    except FieldError as error:
        raise InputError(f"--reward {name}: {error}") from None


def _check_own(trained: _Trained) -> None:
    try:
        load_reward(trained.cell.recipe.reward)
    except FieldError as error:
        raise InputError(f"{trained.folder / 'cell.json'}: recipe.reward: {error}") from None


def _called(spec: RewardSpec) -> str:
    """All that a reward is: a name, or several with their weights; with labels and parameters, where there are any."""

    def named(term: RewardTerm) -> str:
        given = ", ".join(f"{key}={json.dumps(value)}" for key, value in sorted(term.parameters.items()))
        label = f" as {term.label}" if term.label else ""
        return f"{term.name}{f'({given})' if given else ''}{label}"

    terms = reward_terms(spec)
    if len(terms) == 1 and terms[0].weight == 1:
        return named(terms[0])
    return " + ".join(f"{term.weight:g} {named(term)}" for term in terms)


def _or_none(value: float) -> float | None:
    """What JSON can hold."""
    return float(value) if math.isfinite(value) else None


def _grouped(trained: Sequence[_Trained], key: Callable[[_Trained], str]) -> list[list[_Trained]]:
    """Those with equal keys together, in the order of their first."""
    groups: dict[str, list[_Trained]] = {}
    for one in trained:
        groups.setdefault(key(one), []).append(one)
    return list(groups.values())


def _on_a_base(trained: Sequence[_Trained], guidance_scale: float | None) -> list[list[_Trained]]:
    """Those that share a base, under this guidance."""
    return _grouped([one.under(guidance_scale) for one in trained], lambda one: _base(one.cell))


def _base(cell: Cell) -> str:
    """The name of the files of a cell's base: equal for cells whose bases give the same images."""
    recipe = cell.recipe
    protocol = recipe.evaluation.model_dump(mode="json", include=PROTOCOL)
    content = [recipe.model.model_dump(mode="json"), recipe.prompts.model_dump(mode="json"), protocol]
    return f"base-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]}"


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """Scores images by rewards that are loaded once, and writes what it found."""

    target: Path
    asked: Sequence[str]  # rewards; none: each cell's own
    timeout: float  # seconds that the self-check of a reward may take
    loaded: dict[str, WeightedSum] = field(default_factory=dict)  # by what they are called

    def wanted(self, cells: Sequence[Cell]) -> list[RewardSpec]:
        """The rewards that these cells are scored by, each once."""
        specs: list[RewardSpec] = [*self.asked] or [cell.recipe.reward for cell in cells]
        return list({_called(spec): spec for spec in specs}.values())

    def base(self, policy: SD3Policy, cells: Sequence[Cell]) -> Iterator[Row]:
        """The rows of the base that these cells share."""
        with policy.using("reference"):  # never refreshed here, so it is the model's own
            yield from self.rows("base", cells[0], policy, self.wanted(cells))

    def load(self, spec: RewardSpec) -> WeightedSum:
        """A reward with its weights, on the device. Raises InputError where it cannot score here."""
        called = _called(spec)
        if called not in self.loaded:
            reward = load_reward(spec)
            try:
                reward.load(str(this_device()))
                Scorer(reward, self.timeout, device=str(this_device())).check(reward.self_check)
            except RewardUnavailable as error:
                raise InputError(str(error)) from None
            self.loaded[called] = reward
        return self.loaded[called]

    def rows(self, model: str, cell: Cell, policy: SD3Policy, specs: Sequence[RewardSpec]) -> Iterator[Row]:
        """Generate and score the held-out images of the weights in use: a row per reward, a file and all images."""
        recipe, base = cell.recipe.evaluation, _base(cell)
        prompts = load_prompts(cell.recipe.prompts).fixed(recipe.split, recipe.num_prompts)
        asked = [replace(prompt, group=i) for i, prompt in enumerate(prompts)]
        sigmas = diffusers_sigmas(recipe.num_steps, policy.shift)
        images = generate(policy, prompts, range(len(prompts)), recipe, sigmas, cell.recipe.rollout.batch_size)
        label = f"{base if model == 'base' else model}-guidance-{recipe.guidance_scale:g}"
        files = self._keep(images, label)
        found: dict[str, Row] = {}
        outputs: dict[str, RewardOutput] = {}
        for spec in specs:
            called, reward = _called(spec), self.load(spec)
            scores = Scorer(reward, cell.recipe.scoring.timeout, device=str(policy.device))(images, asked)
            values = {k.removeprefix("eval/"): v for k, v in means("eval", scores, prompts).items()}
            outputs[called], missing = scores, int(scores.missing.sum())
            found[called] = {"identities": reward.identities, "missing": missing}
            found[called] |= {key: _or_none(value) for key, value in values.items()}
            shown = {key: value for key, value in values.items() if "/" not in key}
            yield {"model": model, "guidance": recipe.guidance_scale, "reward": called, "missing": missing, **shown}
        content = {
            "model": model,
            "base": base,
            "evaluation": recipe.model_dump(mode="json"),
            "rewards": found,
            "images": [
                {"file": file, "prompt": prompt.text, "scores": {n: _or_none(o.score[i]) for n, o in outputs.items()}}
                for i, (file, prompt) in enumerate(zip(files, prompts, strict=True))
            ],
        }
        text = json.dumps(content, indent=1, allow_nan=False)
        write_atomic(self.target / f"{label}.json", text + "\n")

    def _keep(self, images: Images, label: str) -> list[str]:
        """Write all images, and one picture of the first of them; the files' names."""
        contact_sheet(images[:NUM_PICTURED]).save(self.target / f"{label}.png")
        (self.target / label).mkdir(exist_ok=True)
        files = [f"{label}/{i:04}.png" for i in range(len(images))]
        for file, image in zip(files, images, strict=True):
            Image.fromarray(image).save(self.target / file)
        return files
