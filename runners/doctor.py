"""`ablate doctor`: what stands between a grid and its first cell, each finding with its remedy."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from ablate.components import build
from ablate.geometry import possible_devices
from ablate.part import COMPONENT_AXES
from ablate.plan import Cell
from ablate.recipe import RewardTerm, reward_terms
from ablate.source import InputError, counted
from runners.distributed import this_device
from runners.dry_run import dry_run as go_through
from runners.hub import check_model
from runners.memory_estimate import COPIES
from runners.preflight import EMBEDDED, Finding, alike_in_memory, disk, downloads, estimated, host, memory
from runners.prompts import load_prompts
from runners.rewards import RewardUnavailable, load_term

LATENT_MULTIPLE = 16  # pixels of one patch of latents: the autoencoder's 8, times a patch of 2
PATIENCE = 10  # seconds that the driver has to say its version


def examine(cells: Sequence[Cell], results: Path, *, dry_run: bool = True) -> Iterator[Finding]:
    """Findings on everything the cells of a plan need, the cheap ones first; the dry run needs the model."""
    yield _versions()
    yield _device(cells)
    yield from _driver()
    recipes = {cell.recipe.model_dump_json(): cell for cell in cells}.values()
    found = [finding for cell in recipes for finding in (*_model(cell), *_prompts(cell))]
    models = {cell.recipe.model.model_dump_json(): cell.recipe.model for cell in cells}.values()
    found += filter(None, [downloads(list(models))])
    found += [finding for cell in cells for finding in _geometry(cell)]
    needed = None
    if all(finding.level != "problem" for finding in found):
        found += [memory(cell) for cell in alike_in_memory(cells)]  # before rewards take some of it in this process
        needed = estimated(cells[0])
        found += [needed] if isinstance(needed, Finding) else host(needed, cells[0].recipe.devices)
    found += _rewards(recipes)
    yield from dict.fromkeys(found)
    available = all(finding.level != "problem" for finding in found)
    if dry_run and available:
        yield _dry_run(cells[0])
    else:
        yield Finding("warning", "no dry run", "it needs the model" if dry_run else "leave out --no-dry-run")
    if available and needed is not None and not isinstance(needed, Finding):
        yield disk(cells, results, needed.trained // COPIES)


def _versions() -> Finding:
    names = ("ablate", "torch", "diffusers", "transformers", "peft")
    return Finding("ok", ", ".join(f"{name} {version(name)}" for name in names))


def _device(cells: Sequence[Cell]) -> Finding:
    if torch.cuda.is_available():
        memory_there = torch.cuda.get_device_properties(0).total_memory / 2**30
        count = torch.cuda.device_count()
        several = f"{count} x " if count > 1 else ""
        return Finding("ok", f"{several}{torch.cuda.get_device_name()}, {memory_there:.0f} GiB")
    cores = f"no GPU; {counted(len(os.sched_getaffinity(0)), 'core')}"
    if all(cell.recipe.model.path == EMBEDDED for cell in cells):
        return Finding("ok", f"{cores}, enough for the embedded model")
    why = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no device"
    return Finding("warning", f"{cores}: {why}", "a model of this size needs a GPU; see pytorch.org for a CUDA build")


def _driver() -> Iterator[Finding]:
    """Versions of the driver and of torch's CUDA; nothing where there is neither."""
    if torch.version.cuda is None:
        return
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    built = f"torch is built for CUDA {torch.version.cuda}"
    available = torch.cuda.is_available()
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        if available:
            what = f"driver version unknown, nvidia-smi does not answer ({type(error).__name__}); {built}"
            yield Finding("warning", what, "run nvidia-smi by hand; a driver that hangs would stop cells too")
        return
    versions = " and ".join(dict.fromkeys(answer.split()))
    what = f"NVIDIA driver {versions}; {built}"
    if available:
        yield Finding("ok", what)
    else:
        yield Finding("warning", f"{what}, and sees no device", "update the driver, or take torch for an older CUDA")


def _model(cell: Cell) -> Iterator[Finding]:
    model = cell.recipe.model
    try:
        check_model(model)
    except InputError as error:
        yield Finding("problem", str(error))
        return
    if model.resolution % LATENT_MULTIPLE:
        nearest = max(1, round(model.resolution / LATENT_MULTIPLE)) * LATENT_MULTIPLE
        yield Finding("problem", f"model.resolution {model.resolution} is no multiple of 16", f"such as {nearest}")
    else:
        yield Finding("ok", f"model {model.path}")


def _prompts(cell: Cell) -> Iterator[Finding]:
    recipe = cell.recipe
    wanted = recipe.evaluation.num_prompts
    there = len(load_prompts(recipe.prompts).fixed(recipe.evaluation.split, wanted))
    if there < wanted:
        remedy = f"set evaluation.num_prompts to {there}, or add prompts"
        yield Finding("warning", f"{there} prompts in split {recipe.evaluation.split}, of {wanted} asked for", remedy)


def _rewards(cells: Iterable[Cell]) -> Iterator[Finding]:
    """Each reward and each member of a panel checks itself, with its weights."""
    wanted: dict[tuple[str, int], RewardTerm] = {}
    for cell in cells:
        recipe = cell.recipe
        for term in (*reward_terms(recipe.reward), *reward_terms(recipe.evaluation.panel)):
            wanted.setdefault((term.model_dump_json(exclude={"weight", "label"}), recipe.model.resolution), term)
    for (_, resolution), term in wanted.items():
        yield _reward(term, resolution)


def _reward(term: RewardTerm, resolution: int) -> Finding:
    if term.name == "scenes" and resolution != 32:
        what = f"reward scenes looks for shapes of the embedded world, 32 pixels wide, in images of {resolution}: "
        return Finding("warning", f"{what}it is 0 nearly everywhere", "choose a reward that can judge these images")
    try:
        reward = load_term(term)
        reward.load(str(this_device()))
        reward.self_check()
    except RewardUnavailable as error:  # which says what to do
        return Finding("problem", f"reward {term.name}: {error}")
    except Exception as error:  # of whatever the reward is made of
        remedy = "give it what it needs, or take it out of `reward` and `evaluation.panel`"
        return Finding("problem", f"reward {term.name}: {type(error).__name__}: {error}", remedy)
    return Finding("ok", f"reward {reward.identity} passes its self-check")


def _geometry(cell: Cell) -> Iterator[Finding]:
    recipe = cell.recipe
    possible = possible_devices(recipe)
    there = torch.cuda.device_count()
    if 0 < there < recipe.devices:
        nearest = max(n for n in possible if n <= there)
        what = f"devices = {recipe.devices}: this machine has {there}"
        yield Finding("warning", what, f"devices={nearest}, with the same result, or a launcher with larger machines")
    elif there > 1 and there not in possible:
        nearest = max(n for n in possible if n <= there)
        yield Finding("warning", f"{there} GPUs cannot share a cell's groups evenly", f"devices={nearest} can")
    else:
        yield Finding("ok", f"a cell can use {', '.join(map(str, possible))} devices, with the same result")
    estimator, sampler = (build(axis, cell.components[axis]) for axis in COMPONENT_AXES[1:])
    steps, asked = recipe.rollout.num_steps, recipe.update.num_points
    points = estimator.num_points(asked, steps, sampler.num_scored(steps))
    if asked is not None and points < asked:
        what = f"update.num_points {asked}: {cell.estimator} and {cell.sampler} have {points}"
        yield Finding("warning", what, "cells of this grid differ in evaluation points, and so in cost")


def _dry_run(cell: Cell) -> Finding:
    with tempfile.TemporaryDirectory() as folder:
        try:
            go_through(Path(folder), cell)
        except Exception as error:  # whatever would end a cell
            remedy = "`ablate cell` on its folder shows the whole traceback"
            return Finding("problem", f"dry run of {cell.id}: {type(error).__name__}: {error}", remedy)
    peak = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory" if torch.cuda.is_available() else ""
    return Finding("ok", f"dry run of {cell.id}: two epochs of two images, evaluation, a restart and the export{peak}")
