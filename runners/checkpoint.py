"""Checkpoints of a cell: written whole or not at all; the newest intact one counts, and the one before is kept.

Tensors and plain values in a file of torch.save, as safetensors has no place for the state of an optimizer. It is read
with weights_only=True, which knows no other types and so runs no code; weights for others are safetensors (export.py).
Each ends with the SHA-256 of all that comes before it, which PyTorch does not look at, and goes where the file goes.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, TypeAdapter

from ablate.record import Ledger
from ablate.source import InputError
from runners.policy import SD3Policy

NEWEST_FIRST = ("state.pt", "before.pt")
KEYS = {"epoch", "update", "metrics_bytes", "target_reached", "cost", "pending", "policy", "optimizer", "scaler"}
DIGEST_BYTES = hashlib.sha256().digest_size
Count = Annotated[int, Field(ge=0)]


@dataclass(kw_only=True)
class Progress:
    """Where a cell stands. All its randomness derives from the seed and these counters."""

    epoch: Count = 0
    update: Count = 0
    metrics_bytes: Count = 0  # length of metrics.jsonl at this point
    target_reached: bool = False  # of the last evaluation
    cost: Ledger = field(default_factory=Ledger)
    pending: dict[str, float] = field(default_factory=dict)  # metrics of an epoch whose evaluation had no rewards


_PROGRESS = TypeAdapter(Progress)


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
    with partial.open("w+b") as file:
        torch.save(state, file)
        file.seek(0)
        file.write(hashlib.file_digest(file, "sha256").digest())  # which has read to the end
        file.flush()
        os.fsync(file.fileno())
    if newest.exists():
        newest.replace(target / "before.pt")
    partial.replace(newest)


def restore(
    folder: Path, policy: SD3Policy, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress | None:
    """Continue from the newest intact checkpoint of a cell; None where there is none. Damaged ones are named.

    One whose epochs metrics.jsonl does not have, as its end was lost, does not count: they are trained again. Raises
    InputError for the tensors of another model.
    """
    metrics = folder / "metrics.jsonl"
    length = metrics.stat().st_size if metrics.exists() else 0
    state = _intact([folder / "checkpoint" / name for name in NEWEST_FIRST], policy.device, length)
    if state is None:
        return None
    try:
        policy.load_state(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{folder / 'checkpoint'}: is of another model: {error}") from None
    return _progress(state)


def read_newest(path: Path, device: torch.device) -> dict[str, Any]:
    """What `save` wrote last: the newest intact checkpoint of a cell's folder, or the one in this file.

    Damaged ones are named. Raises InputError where none is intact.
    """
    state = _intact([path] if path.is_file() else [path / "checkpoint" / name for name in NEWEST_FIRST], device)
    if state is None:
        rule = "a cell writes one every checkpoint_every epochs, and removes them when it is done"
        raise InputError(f"{path}: no intact checkpoint; {rule}")
    return state


def _intact(files: Sequence[Path], device: torch.device, length: float = math.inf) -> dict[str, Any] | None:
    """The first of the files that can be read, and knows of at most so many bytes of metrics.jsonl."""
    for file in files:
        if not file.exists():
            continue
        try:
            _check_digest(file)
            state: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
            if not isinstance(state, dict) or not state.keys() >= KEYS:
                raise ValueError("not the state of a cell")
            beyond = _progress(state).metrics_bytes > length
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:  # whatever has become of it, the one before may do
            print(f"{file} is damaged and left out ({type(error).__name__}: {error})", file=sys.stderr)
            continue
        if beyond:
            print(f"{file} is left out: metrics.jsonl ends before it", file=sys.stderr)
            continue
        return state
    return None


def _progress(state: dict[str, Any]) -> Progress:
    """Raises ValueError where a value is none that `save` writes."""
    return _PROGRESS.validate_python({field.name: state[field.name] for field in fields(Progress)})


def _check_digest(path: Path) -> None:
    """Raises ValueError if a byte has changed, which torch.load would take for a weight."""
    digest, left = hashlib.sha256(), path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(left, 1 << 20))):
            digest.update(part)
            left -= len(part)
        if file.read() != digest.digest():
            raise ValueError("its SHA-256 does not match")


def discard(folder: Path) -> None:
    """Remove a finished cell's checkpoint."""
    shutil.rmtree(folder / "checkpoint", ignore_errors=True)
