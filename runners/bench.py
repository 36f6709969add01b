"""`ablate bench`: what an epoch of a cell costs on this device, and how much of it is the network's own work."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel
from torch.utils.flop_counter import FlopCounterMode

from ablate.passes import passes
from ablate.plan import Cell
from runners.policy import SD3Policy
from runners.provenance import provenance
from runners.run import Run, set_up
from runners.train import train_epoch


class Bench(BaseModel):
    """An epoch, measured. Times in seconds."""

    cell: str
    device: str
    images: int
    epoch: float
    phases: dict[str, float]
    images_per_second: float
    calls_per_second: float
    forwards_per_image: float
    backwards_per_image: float
    flops_per_call: float
    flops_per_second: float  # over the whole epoch
    bare: float  # of the network calls that the plan needs, at the same batches, and nothing else
    efficiency: float  # bare / epoch
    seconds_per_call: float  # of the network alone
    seconds_per_image: float  # of all but the network
    trained_bytes: int
    peak_memory: int | None  # bytes on the device; None on the CPU


def bench(cell: Cell, policy: SD3Policy | None = None, repeats: int = 3) -> Bench:
    """Train `repeats` epochs of a cell in a temporary folder after one to warm up, and its bare calls after each.

    The median of the repeats: bare calls and epoch alternate, so that a slow moment of the machine hits both.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = set_up(Path(folder), cell, policy)
        train_epoch(run)
        measured = [_measure(run) for _ in range(repeats)]
    measured.sort(key=lambda result: result.efficiency)
    return measured[len(measured) // 2]


def _measure(run: Run) -> Bench:
    recipe, device = run.recipe, run.policy.device
    run.progress.epoch += 1
    before = run.progress.cost
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    train_epoch(run)
    epoch = time.perf_counter() - start
    cost = run.progress.cost
    spent = {name: getattr(cost, name) - getattr(before, name) for name in type(cost).phases()}
    images = recipe.rollout.num_groups * recipe.rollout.group_size
    plan, calls = passes(run.cell), spent["forwards"] + 3 * spent["backwards"]
    rollouts = images * plan.rollout
    bare = _bare(run, rollouts, spent["forwards"] - rollouts, spent["backwards"])
    flops = _flops_per_call(run)
    return Bench(
        cell=run.cell.id,
        device=provenance().device,
        images=images,
        epoch=epoch,
        phases={name: spent[name] for name in ("rollout", "reward", "update")},
        images_per_second=images / epoch,
        calls_per_second=calls / epoch,
        forwards_per_image=spent["forwards"] / images,
        backwards_per_image=spent["backwards"] / images,
        flops_per_call=flops,
        flops_per_second=flops * calls / epoch,
        bare=bare,
        efficiency=bare / epoch,
        seconds_per_call=bare / calls,
        seconds_per_image=max(0.0, epoch - bare) / images,
        trained_bytes=run.policy.trained_bytes,
        peak_memory=torch.cuda.max_memory_allocated() if cuda else None,
    )


def _bare(run: Run, rollouts: float, forwards: float, backwards: float) -> float:
    """Seconds of so many calls: rollouts in rollout batches, the others in micro-batches."""
    batch = run.batch_sizes.get("rollout", run.recipe.rollout.batch_size)
    micro = run.batch_sizes.get("update", run.recipe.update.micro_batch_size)
    without, small, gradient = _call(run, batch), _call(run, micro), _call(run, micro, gradient=True)
    return (
        rollouts / batch * _seconds(run, without)
        + forwards / micro * _seconds(run, small)
        + backwards / micro * _seconds(run, gradient)
    )


def _call(run: Run, size: int, *, gradient: bool = False) -> Callable[[], None]:
    policy = run.policy
    x = torch.randn(size, *policy.latent_shape, device=policy.device)
    sigma = torch.full((size,), 0.5, device=policy.device)
    conditioning = policy.encode(["a bench"]).rows(torch.zeros(size, dtype=torch.long, device=policy.device))

    def call() -> None:
        with torch.set_grad_enabled(gradient):
            velocity = policy.velocity(x, sigma, conditioning)
            if gradient:
                velocity.square().mean().backward()  # type: ignore[no-untyped-call]

    return call


def _seconds(run: Run, call: Callable[[], None], repeats: int = 3) -> float:
    call()
    times = []
    for _ in range(repeats):
        run.wait()
        start = time.perf_counter()
        call()
        run.wait()
        times.append(time.perf_counter() - start)
    run.optimizer.zero_grad()
    return sorted(times)[repeats // 2]


def _flops_per_call(run: Run) -> float:
    """Floating-point operations of one image at one noise level, forward."""
    with FlopCounterMode(display=False) as counter:
        _call(run, 1)()
    return float(counter.get_total_flops())
