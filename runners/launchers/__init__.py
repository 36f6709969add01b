"""Where cells run: here, in a pool of this machine, on a Ray cluster, or on SLURM."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablate.source import InputError, choices, shown
from runners.launchers.protocol import Launcher

LAUNCHERS = ("local", "inline", "ray", "slurm")


def make_launcher(
    name: str, results: Path, *, workers: int | None, devices: int, settings: Mapping[str, Any], attempts: int
) -> Launcher:
    """A launcher by its name.

    `workers`: cells at a time; None: one, and on a cluster as many as it has room for. `devices`: the most that a cell
    has by its recipe. `settings`: those of a cluster.
    Raises InputError for a name or a setting that does not exist, where the library of a cluster is missing, and for
    cells with more devices than there are in one machine.
    """
    if name not in LAUNCHERS:
        raise InputError(f"--launcher {name}: there is no such launcher{choices(name, LAUNCHERS)}")
    if name == "ray":
        from runners.launchers.ray import RayLauncher  # noqa: PLC0415

        return RayLauncher(workers, devices, settings, attempts)
    if name == "slurm":
        from runners.launchers.slurm import SlurmLauncher  # noqa: PLC0415

        return SlurmLauncher(results, workers, settings)
    if settings:
        raise InputError(f"--launcher-set {next(iter(settings))}: the launcher {name} has no settings")
    if name == "local":
        from runners.launchers.local import LocalLauncher, check_gpus  # noqa: PLC0415

        check_gpus(devices)
        return LocalLauncher(workers or 1, devices)
    from runners.launchers.inline import InlineLauncher  # noqa: PLC0415

    if (workers or 1) > 1 or devices > 1:
        raise InputError(
            "--launcher inline: runs one cell at a time in one process; leave out --workers, and set devices=1"
        )
    return InlineLauncher()


def check_settings(settings: Mapping[str, Any], known: Mapping[str, type]) -> None:
    """Raises InputError for a setting that is not known, or not of its type."""
    for key, value in settings.items():
        if key not in known:
            raise InputError(f"--launcher-set {key}: there is no such setting{choices(key, known)}")
        if not isinstance(value, known[key]):
            raise InputError(f"--launcher-set {key}: got {shown(value)}, expected {known[key].__name__}")
