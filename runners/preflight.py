"""What can be said of a grid's memory and disk before anything is loaded; `ablate doctor` and `ablate run` ask here.

Torch-free until a model other than the embedded one is to be estimated.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ablate.forecast import disk_bytes
from ablate.geometry import possible_devices
from ablate.plan import Cell
from ablate.recipe import ModelRecipe
from ablate.source import set_path
from runners.cell import is_open
from runners.identity import model_path

if TYPE_CHECKING:
    from runners.memory_estimate import MemoryEstimate

USABLE = 0.92  # of the memory that is free; the rest goes into holes between tensors
PATIENCE = 60  # seconds that a process has to import torch and ask the driver
# in a process of its own: the context that asking makes takes half a gigabyte for as long as the process lives
ASK_FREE = "import torch; print(min(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())))"
EMBEDDED = "tiny"  # its cells take less than a gigabyte of memory
MEMINFO = Path("/proc/meminfo")
ROLLOUT, UPDATE = "rollout.batch_size", "update.micro_batch_size"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "warning", "problem"]
    what: str
    remedy: str = ""


def preflight(cells: Sequence[Cell], folder: Path, *, workers: int = 1) -> Iterator[Finding]:
    """What speaks against starting these cells in a grid's folder: memory or disk that will not do."""
    todo = [cell for cell in cells if is_open(folder / cell.id)]
    large = [cell for cell in todo if cell.recipe.model.path != EMBEDDED]
    found = []
    trained = _weights_file() if len(large) < len(todo) else 0
    if large:
        from runners.memory_estimate import COPIES  # noqa: PLC0415  (the embedded model does not wait for torch)

        there, num_devices = device_memory()
        for cell in alike_in_memory(large):
            needed = estimated(cell)
            if isinstance(needed, Finding):
                found.append(needed)
                continue
            trained = max(trained, needed.trained // COPIES)
            shared = -(-workers * cell.recipe.devices // num_devices)  # cells on one device
            if shared * needed.peak >= USABLE * there:
                hint = "`ablate doctor` on this grid says what fits"
                found.append(Finding("warning", _in_words(needed, there, shared), hint))
            found += host(needed, workers * cell.recipe.devices)
    found.append(disk(todo, folder, trained, workers))
    yield from (finding for finding in found if finding.level != "ok")


def alike_in_memory(cells: Sequence[Cell]) -> list[Cell]:
    """Of cells whose network calls take the same memory, the one that keeps most of an epoch."""
    from runners.memory_estimate import latents_per_sample  # noqa: PLC0415

    def kept(cell: Cell) -> int:
        rollout = cell.recipe.rollout
        return rollout.num_groups * (rollout.candidates or rollout.group_size) * sum(latents_per_sample(cell))

    most: dict[str, Cell] = {}
    for cell in cells:
        recipe = cell.recipe
        guided = [part.guidance_scale > 1 for part in (recipe.rollout, recipe.update, recipe.evaluation)]
        rewards = [recipe.reward, recipe.evaluation.panel, recipe.scoring.offload]
        key = str([recipe.model, recipe.rollout.batch_size, recipe.update.micro_batch_size, guided, rewards])
        if key not in most or kept(cell) > kept(most[key]):
            most[key] = cell
    return list(most.values())


def estimated(cell: Cell) -> MemoryEstimate | Finding:
    """What each of the cell's devices needs, or why that cannot be said."""
    from runners.memory_estimate import estimate, read_architecture  # noqa: PLC0415

    try:
        return estimate(cell, read_architecture(cell.recipe.model))
    except OSError as error:
        return Finding("warning", f"no estimate of memory: {error}", "it needs the model's configuration files")
    except (ValueError, RuntimeError) as error:  # the network's own: a size it cannot have, a kernel that is not there
        return Finding("problem", f"a call of the network: {error}", "change model.resolution or model.attention")


def memory(cell: Cell) -> Finding:
    """The most that the cell needs of one device, or of each of several, against what there is."""
    there, num_devices = device_memory()
    needed = estimated(cell)
    if isinstance(needed, Finding):
        return needed
    limit = USABLE * there
    what, remedies = _in_words(needed, there), []
    together = max(n for n in possible_devices(cell.recipe) if n <= num_devices)
    if together > cell.recipe.devices and isinstance(
        each := estimated(with_fields(cell, {"devices": together})), type(needed)
    ):
        what += f"; {each.peak / 2**30:.2g} GiB on each of {together} devices"
        remedies = [f"devices={together} fits, with the same result"] if each.peak < limit else []
    if needed.peak < limit:
        return Finding("ok", what)
    if sizes := batches_that_fit(cell, needed, limit):
        given = " and ".join(f"{field} {size}" for field, size in sizes.items())
        remedies.insert(0, f"{given} {'fits' if len(sizes) == 1 else 'fit'}, with the same result")
    if remedies:
        return Finding("warning", what, "; or ".join(remedies))
    return Finding("problem", what, "model.gradient_checkpointing, model.offload_encoders or model.vae_tiling")


def batches_that_fit(cell: Cell, needed: MemoryEstimate, limit: float) -> dict[str, int]:
    """The batch sizes to change so that the cell stays below `limit` bytes, the larger halved first; or none."""
    given = {ROLLOUT: cell.recipe.rollout.batch_size, UPDATE: cell.recipe.update.micro_batch_size}
    sizes = dict(given)
    while needed.peak >= limit:
        work = {ROLLOUT: max(needed.rollout, needed.evaluation - needed.samples), UPDATE: needed.probe + needed.update}
        largest = max(work, key=lambda field: work[field])
        if sizes[largest] == 1 or work[largest] < needed.work:
            return {}
        sizes[largest] //= 2
        smaller = estimated(with_fields(cell, sizes))
        if isinstance(smaller, Finding):
            return {}
        needed = smaller
    return {field: size for field, size in sizes.items() if size != given[field]}


def with_fields(cell: Cell, fields: Mapping[str, object]) -> Cell:
    """The cell with other values of recipe fields, by dotted path."""
    data = cell.recipe.model_dump()
    for path, value in fields.items():
        data = set_path(data, path.split("."), value)
    return cell.model_copy(update={"recipe": type(cell.recipe).model_validate(data)})


def host(needed: MemoryEstimate, processes: int = 1) -> Iterator[Finding]:
    """What speaks against so many processes in the memory of a machine with GPUs; without them there is one memory."""
    import torch  # noqa: PLC0415

    if torch.cuda.is_available() and processes * needed.host >= USABLE * (there := host_memory()):
        each = f", for each of {processes} processes" if processes > 1 else ""
        what = f"memory of the machine: about {needed.host / 2**30:.2g} GiB{each}, of {there / 2**30:.0f} free"
        yield Finding("warning", what, "fewer workers, or model.offload_encoders and scoring.offload set to false")


def device_memory() -> tuple[int, int]:
    """Bytes free on the fullest device, and how many devices there are; without a GPU, those of the machine."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return host_memory(), 1
    try:
        command = [sys.executable, "-c", ASK_FREE]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
        return int(answer), torch.cuda.device_count()
    except (OSError, subprocess.SubprocessError, ValueError):
        return torch.cuda.get_device_properties(0).total_memory, torch.cuda.device_count()


def host_memory() -> int:
    """Bytes of the machine's memory that can be had, caches of files included; all of it where that is not told."""
    try:
        (kilobytes,) = re.findall(r"^MemAvailable: +(\d+) kB$", MEMINFO.read_text(), re.MULTILINE)
        return 1024 * int(kilobytes)
    except (OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def downloads(models: Sequence[ModelRecipe]) -> Finding | None:
    """Weights still to come from the hub, against what is free where its cache is; None where all are there."""
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415

    from runners.hub import download_bytes  # noqa: PLC0415

    sizes: dict[tuple[str, str | None], int] = {}
    for model in models:
        of = (model.path, model.revision)
        sizes[of] = max(sizes.get(of, 0), download_bytes(model))
    if not (needed := sum(sizes.values())):
        return None
    home, free = _free(Path(HF_HUB_CACHE))
    text = f"{needed / 2**30:.3g} GiB of models to download, {free / 2**30:.0f} GiB free at {home}"
    if needed < 0.9 * free:
        return Finding("ok", text)
    return Finding("problem", text, "set HF_HOME to a folder on another disk")


def disk(cells: Sequence[Cell], results: Path, trained_bytes: int, workers: int = 1) -> Finding:
    """Two checkpoints of each cell at work and the weights of finished ones, against what is free."""
    home, free = _free(results)
    kept, at_work = disk_bytes(cells, trained_bytes)
    needed = kept + min(workers, len(cells)) * at_work
    text = f"{needed / 2**30:.2f} GiB for weights and checkpoints, {free / 2**30:.0f} GiB free at {home}"
    if needed < 0.9 * free:
        return Finding("ok", text)
    return Finding("problem", text, "give --results another disk, or set export_weights to false")


def _free(folder: Path) -> tuple[Path, int]:
    """The nearest folder that exists, and the bytes that are free there."""
    home = next(p for p in [folder.resolve(), *folder.resolve().parents] if p.exists())
    return home, shutil.disk_usage(home).free


def _in_words(needed: MemoryEstimate, there: int, shared: int = 1) -> str:
    names = ("weights", "encoders", "rewards", "trained", "prompts", "samples", "work")
    listed = ", ".join(f"{name} {getattr(needed, name) / 2**30:.2g}" for name in names)
    of_each = f" for each of {shared} cells" if shared > 1 else ""
    return f"memory: about {needed.peak / 2**30:.2g} GiB{of_each} of {there / 2**30:.0f} free ({listed})"


def _weights_file() -> int:
    """Bytes of the embedded transformer, all of whose weights are trained at most."""
    path = Path(model_path(EMBEDDED)) / "transformer" / "diffusion_pytorch_model.safetensors"
    return path.stat().st_size
