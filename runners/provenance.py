"""Where and with what a cell ran."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from ablate.attempts import Attempt
from ablate.record import Provenance


def this_attempt(num_devices: int = 1) -> Attempt:
    """The start of a cell by this process, the first of as many as it has devices."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_devices)))
    devices = tuple(visible.split(",")) if torch.cuda.is_available() else ("cpu",) * num_devices
    return Attempt(started=time.time(), host=platform.node(), pid=os.getpid(), devices=devices)


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
