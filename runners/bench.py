"""`ablate bench`: what an epoch of a cell costs on this device, and how much of it is the network's own work."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import BaseModel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ablate.passes import passes
from ablate.plan import Cell
from runners.policy import SD3Policy
from runners.provenance import provenance
from runners.run import Run, set_up
from runners.train import train_epoch

_aten = torch.ops.aten
# kernels of a CPU that torch's counter does not know, and those of a GPU that do as much
LIKE = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _aten._scaled_dot_product_flash_attention_backward,
}


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
    flops_per_call: float  # of one network input, without gradient
    flops_per_backward: float  # of one with gradient, its forward and what is recomputed included
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
    flops, flops_backward = _flops(run), _flops(run, gradient=True)
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
        flops_per_backward=flops_backward,
        flops_per_second=(spent["forwards"] * flops + spent["backwards"] * flops_backward) / epoch,
        bare=bare,
        efficiency=bare / epoch,
        seconds_per_call=bare / calls,
        seconds_per_image=max(0.0, epoch - bare) / images,
        trained_bytes=run.policy.trained_bytes,
        peak_memory=torch.cuda.max_memory_allocated() if cuda else None,
    )


def _bare(run: Run, rollouts: float, forwards: float, backwards: float) -> float:
    """Seconds of so many network inputs: rollouts in rollout batches, the others in micro-batches.

    With guidance, a batch is twice as many inputs.
    """
    rollout, update = run.recipe.rollout, run.recipe.update
    batch = run.batch_sizes.get("rollout", rollout.batch_size)
    micro = run.batch_sizes.get("update", update.micro_batch_size)
    sampling, training = (1 + (scale > 1) for scale in (rollout.guidance_scale, update.guidance_scale))
    return (
        rollouts / (sampling * batch) * _seconds(run, _call(run, batch, rollout.guidance_scale))
        + forwards / (training * micro) * _seconds(run, _call(run, micro, update.guidance_scale))
        + backwards / (training * micro) * _seconds(run, _call(run, micro, update.guidance_scale, gradient=True))
    )


def _call(run: Run, size: int, guidance_scale: float = 1.0, *, gradient: bool = False) -> Callable[[], None]:
    policy = run.policy
    x = torch.randn(size, *policy.latent_shape, device=policy.device)
    sigma = torch.full((size,), 0.5, device=policy.device)
    conditioning = policy.encode(["a bench"]).rows(torch.zeros(size, dtype=torch.long, device=policy.device))

    def call() -> None:
        with torch.set_grad_enabled(gradient):
            velocity = policy.velocity(x, sigma, conditioning, guidance_scale)
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


def _flops(run: Run, *, gradient: bool = False) -> float:
    """Floating-point operations of one image at one noise level; compiled blocks are counted as they are written."""
    call = _call(run, 1, gradient=gradient)
    counter = FlopCounterMode(display=False)
    counter.flop_registry |= {kernel: flop_registry[known] for kernel, known in LIKE.items()}
    with torch.compiler.set_stance("force_eager"), counter:
        call()
    run.optimizer.zero_grad()
    return float(counter.get_total_flops())
