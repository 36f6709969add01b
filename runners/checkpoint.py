"""Checkpoints of a cell: written whole or not at all; the newest intact one counts, and the one before is kept."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ablate.record import Ledger
from runners.policy import SD3Policy


@dataclass(kw_only=True)
class Progress:
    """Where a cell stands. All its randomness derives from the seed and these counters."""

    epoch: int = 0
    update: int = 0
    metrics_bytes: int = 0  # length of metrics.jsonl at this point
    target_reached: bool = False  # of the last evaluation
    cost: Ledger = field(default_factory=Ledger)
    pending: dict[str, float] = field(default_factory=dict)  # metrics of an epoch whose evaluation had no rewards


def save(
    folder: Path, progress: Progress, policy: SD3Policy, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> None:
    """Write a checkpoint beside the last one, which is kept as the one before."""
    target = folder / "checkpoint"
    target.mkdir(exist_ok=True)
    state = {
        "epoch": progress.epoch,
        "update": progress.update,
        "metrics_bytes": progress.metrics_bytes,
        "target_reached": progress.target_reached,
        "cost": progress.cost.model_dump(),
        "pending": progress.pending,
        "policy": policy.state(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    partial, newest = target / "state.partial", target / "state.pt"
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    if newest.exists():
        newest.replace(target / "before.pt")
    partial.replace(newest)


def restore(
    folder: Path, policy: SD3Policy, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress | None:
    """Continue from the newest intact checkpoint of a cell; None where there is none. Damaged ones are named."""
    for path in (folder / "checkpoint" / "state.pt", folder / "checkpoint" / "before.pt"):
        if not path.exists():
            continue
        try:
            state: dict[str, Any] = torch.load(path, map_location=policy.device, weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            print(f"{path} is damaged and left out ({type(error).__name__})", file=sys.stderr)
            continue
        policy.load_state(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        return Progress(
            epoch=state["epoch"],
            update=state["update"],
            metrics_bytes=state["metrics_bytes"],
            target_reached=state.get("target_reached", False),  # checkpoints of before have none
            cost=Ledger(**state["cost"]),
            pending=state["pending"],
        )
    return None


def discard(folder: Path) -> None:
    """Remove a finished cell's checkpoint."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
