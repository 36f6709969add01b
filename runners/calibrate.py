"""How fast a model is on this device, from a few network calls of the grid's own batch size."""

from __future__ import annotations

import time

import torch

from ablate.recipe import Recipe
from runners.distributed import this_device
from runners.policy import SD3Policy


@torch.no_grad()
def calls_per_second(recipe: Recipe, seconds: float = 3.0) -> float:
    """Network calls (one image, one noise level, no gradient) per second on this device."""
    policy = SD3Policy(recipe.model, this_device())
    batch = recipe.rollout.batch_size
    x = torch.randn(batch, *policy.latent_shape, device=policy.device)
    sigma = torch.full((batch,), 0.5, device=policy.device)
    conditioning = policy.encode(["calibration"] * batch)
    policy.velocity(x, sigma, conditioning)
    start, calls = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or calls == 0:
        policy.velocity(x, sigma, conditioning).sum().item()  # waits for the device
        calls += batch
    return calls / elapsed
