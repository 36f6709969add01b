"""Where and with what a cell ran."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from ablate.record import Provenance


def note_attempt(folder: Path) -> int:
    """Note this start in attempts.jsonl; returns how many there were."""
    path = folder / "attempts.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"started": time.time(), "host": platform.node()}) + "\n")
    return len(path.read_text(encoding="utf-8").splitlines())


def provenance(num_devices: int = 1) -> Provenance:
    """Versions, commit and device of this process, and how many devices its cell has."""
    cuda = torch.cuda.is_available()
    return Provenance(
        versions={name: version(name) for name in ("ablate", "torch", "diffusers", "transformers", "peft", "numpy")},
        commit=_commit(Path(__file__).parent.parent),
        python=platform.python_version(),
        platform=platform.platform(),
        device=f"cuda: {torch.cuda.get_device_name()}" if cuda else f"cpu: {platform.machine()}",
        num_devices=num_devices,
        num_threads=torch.get_num_threads(),
    )


def _commit(root: Path) -> str | None:
    """The commit of the sources in `root`, marked where they differ from it; None for an installed package."""
    if not (root / ".git").exists():
        return None
    describe = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(describe, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
