"""`ablate doctor`: what stands between a grid and its first cell, each finding with its remedy."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch

from ablate.components import build
from ablate.forecast import disk_bytes
from ablate.geometry import possible_devices
from ablate.part import COMPONENT_AXES
from ablate.plan import Cell
from ablate.recipe import reward_terms
from ablate.source import InputError
from runners.hub import check_model
from runners.memory_estimate import estimate, read_architecture
from runners.prompts import load_prompts
from runners.rewards import load_reward
from runners.run import Run, set_up
from runners.train import train_epoch

LATENT_MULTIPLE = 16  # pixels of one patch of latents: the autoencoder's 8, times a patch of 2
FREE = 0.92  # of a device's memory; the rest is its context, and holes between tensors


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "warning", "problem"]
    what: str
    remedy: str = ""


def examine(cells: Sequence[Cell], results: Path, *, dry_run: bool = True) -> Iterator[Finding]:
    """Findings on everything the cells of a plan need, the cheap ones first; the dry run needs the model."""
    yield _versions()
    yield _device(cells)
    recipes = {cell.recipe.model_dump_json(): cell for cell in cells}.values()
    found = [finding for cell in recipes for finding in (*_model(cell), *_prompts(cell))]
    found += [finding for cell in cells for finding in _geometry(cell)]
    if not any(finding.level == "problem" for finding in found):
        sizes = {str([cell.recipe.model, cell.recipe.rollout, cell.recipe.update]): cell for cell in cells}
        found += [_memory(cell) for cell in sizes.values()]
    yield from dict.fromkeys(found)
    available = all(finding.level != "problem" for finding in found)
    if not dry_run or not available:
        yield Finding("warning", "no dry run", "it needs the model" if dry_run else "leave out --no-dry-run")
        yield _disk(cells, results, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = set_up(Path(folder), smallest(cells[0]))
            train_epoch(run)
        except Exception as error:  # whatever would end a cell
            remedy = "`ablate cell` on its folder shows the whole traceback"
            yield Finding("problem", f"dry run of {cells[0].id}: {type(error).__name__}: {error}", remedy)
            yield _disk(cells, results, None)
            return
    yield Finding("ok", f"dry run of {cells[0].id}: rolled out, scored and updated once{_peak()}")
    yield _disk(cells, results, run)


def smallest(cell: Cell) -> Cell:
    """The cell with one group of two images per update, and as few steps as its sampler can run."""
    recipe, sampler = cell.recipe, build("sampler", cell.components["sampler"])
    steps = next((n for n in range(2, recipe.rollout.num_steps) if not sampler.problem(n)), recipe.rollout.num_steps)
    rollout = {
        "num_groups": recipe.update.updates_per_epoch,
        "group_size": 2,
        "candidates": None,
        "resample_rounds": 0,
        "num_steps": steps,
    }
    changed = recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update=rollout)})
    return cell.model_copy(update={"recipe": changed})


def _versions() -> Finding:
    names = ("ablate", "torch", "diffusers", "transformers", "peft")
    return Finding("ok", ", ".join(f"{name} {version(name)}" for name in names))


def _device(cells: Sequence[Cell]) -> Finding:
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Finding("ok", f"{torch.cuda.get_device_name()}, {memory:.0f} GiB, CUDA {torch.version.cuda}")
    cores = f"no GPU; {len(os.sched_getaffinity(0))} cores"
    if all(cell.recipe.model.path == "tiny" for cell in cells):
        return Finding("ok", f"{cores}, enough for the embedded model")
    why = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no device"
    return Finding("warning", f"{cores}: {why}", "a model of this size needs a GPU; see pytorch.org for a CUDA build")


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
    reward = load_reward(recipe.reward)
    scenes = [term.name for term in reward_terms(recipe.reward) if term.name == "scenes"]
    if scenes and recipe.model.resolution != 32:
        yield Finding(
            "warning",
            f"reward {scenes[0]} looks for shapes of the embedded world, 32 pixels wide, in images of "
            f"{recipe.model.resolution}: it is 0 nearly everywhere",
            "choose a reward that can judge these images",
        )
    else:
        yield Finding("ok", f"reward {reward.identity}")
    wanted = recipe.evaluation.num_prompts
    there = len(load_prompts(recipe.prompts).fixed(recipe.evaluation.split, wanted))
    if there < wanted:
        remedy = f"set evaluation.num_prompts to {there}, or add prompts"
        yield Finding("warning", f"{there} prompts in split {recipe.evaluation.split}, of {wanted} asked for", remedy)


def _geometry(cell: Cell) -> Iterator[Finding]:
    recipe = cell.recipe
    possible = possible_devices(recipe)
    if (there := torch.cuda.device_count()) > 1 and there not in possible:
        nearest = max(n for n in possible if n <= there)
        yield Finding("warning", f"{there} GPUs cannot share a cell's groups evenly", f"--processes {nearest} can")
    else:
        yield Finding("ok", f"a cell can use {', '.join(map(str, possible))} devices, with the same result")
    estimator, sampler = (build(axis, cell.components[axis]) for axis in COMPONENT_AXES[1:])
    steps, asked = recipe.rollout.num_steps, recipe.update.num_points
    points = estimator.num_points(asked, steps, sampler.num_scored(steps))
    if asked is not None and points < asked:
        what = f"update.num_points {asked}: {cell.estimator} and {cell.sampler} have {points}"
        yield Finding("warning", what, "cells of this grid differ in evaluation points, and so in cost")


def _memory(cell: Cell) -> Finding:
    """The estimate of the most that the cell needs, against what the device has."""
    if torch.cuda.is_available():
        there = torch.cuda.get_device_properties(0).total_memory
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        needed = estimate(cell, read_architecture(cell.recipe.model))
    except OSError as error:
        return Finding("warning", f"no estimate of memory: {error}", "it needs the model's configuration files")
    except (ValueError, RuntimeError) as error:  # the network's own: a size it cannot have, a kernel that is not there
        return Finding("problem", f"a call of the network: {error}", "change model.resolution or model.attention")
    parts = {name: getattr(needed, name) for name in ("weights", "encoders", "trained", "samples")}
    parts["work"] = max(needed.rollout, needed.update, needed.decode)
    listed = ", ".join(f"{name} {size / 2**30:.2g}" for name, size in parts.items())
    what = f"memory: about {needed.peak / 2**30:.2g} GiB of {there / 2**30:.0f} ({listed})"
    if needed.peak < FREE * there:
        return Finding("ok", what)
    update = cell.recipe.update
    for size in (update.micro_batch_size // 2**i for i in range(1, update.micro_batch_size.bit_length())):
        changed = cell.recipe.model_copy(update={"update": update.model_copy(update={"micro_batch_size": size})})
        if estimate(cell.model_copy(update={"recipe": changed}), read_architecture(changed.model)).peak < FREE * there:
            return Finding("warning", what, f"update.micro_batch_size {size} fits, with the same result")
    return Finding(
        "problem", what, "model.gradient_checkpointing, model.offload_encoders or a smaller rollout.batch_size"
    )


def _disk(cells: Sequence[Cell], results: Path, run: Run | None) -> Finding:
    """Two checkpoints of the cell at work and the weights of finished ones, against what is free."""
    home = next(p for p in [results.resolve(), *results.resolve().parents] if p.exists())
    free = shutil.disk_usage(home).free
    if run is None:
        return Finding("ok", f"{free / 2**30:.0f} GiB free at {home}")
    needed = sum(disk_bytes(cells, run.policy.trained_bytes))
    text = f"{needed / 2**30:.2f} GiB for weights and checkpoints, {free / 2**30:.0f} GiB free at {home}"
    if needed < 0.9 * free:
        return Finding("ok", text)
    return Finding("problem", text, "give --results another disk, or set export_weights to false")


def _peak() -> str:
    if not torch.cuda.is_available():
        return ""
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory with two images"
