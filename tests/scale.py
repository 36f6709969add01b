"""How `plan`, `status` and `report` grow with the number of cells, on records that are made up, not trained.

python tests/scale.py                  10, 100, 1000 and 3000 cells, each command in a process of its own: seconds, of
                                           which of CPU time, and peak memory
python tests/scale.py 500 --epochs 200
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate.grid import load_grid
from ablate.plan import Cell, make_plan
from ablate.record import Ledger, Provenance, Record, Status
from runners.identity import identify
from runners.sweep import freeze

ROOT = Path(__file__).parents[1]
OBJECTIVES = ("reinforce", "grpo", "gspo", "dpo", "epg")
ESTIMATORS = ("elbo", "{name: elbo, weight: simple}", "{name: elbo, weight: path_kl}", "{name: elbo, weight: x0}")
SAMPLERS = ("ode", "sde", "mixed")
SHAPES = {10: (2, 1, 1, 1), 100: (5, 2, 2, 1), 1000: (5, 4, 2, 5), 3000: (5, 4, 3, 10)}  # values per axis, 5 seeds
EVALUATIONS = 10  # epochs between them


def write_grid(folder: Path, num_cells: int) -> Path:
    """A grid of at least so many cells, with its recipe, in this folder."""
    shape = next((shape for size, shape in SHAPES.items() if size >= num_cells), None)
    objectives, estimators, samplers, rates = shape or (5, 4, 3, math.ceil(num_cells / 300))
    axes = {
        "objective": OBJECTIVES[:objectives],
        "estimator": ESTIMATORS[:estimators],
        "sampler": SAMPLERS[:samplers],
        "update.learning_rate": [f"{1e-4 * (i + 1):.4g}" for i in range(rates)],
    }
    lines = [f"  {name}: [{', '.join(values)}]" for name, values in axes.items()]
    text = "\n".join(["name: synthetic", f"recipe: {ROOT / 'grids/recipes/tiny-scenes.yaml'}", "axes:", *lines])
    path = folder / "synthetic.yaml"
    path.write_text(f"{text}\nseeds: [0, 1, 2, 3, 4]\noverride: {{budget: {{device_hours: null, epochs: 100}}}}\n")
    return path


def write_results(grid: Path, results: Path, num_epochs: int = 100) -> list[Cell]:
    """Records and metrics of a grid: nine cells of ten are done, the tenth failed, was interrupted, or waits."""
    loaded = load_grid(grid)
    plan = make_plan(loaded, identify)
    folder = results / plan.grid
    freeze(folder, plan, loaded.source.text)
    for number, cell in enumerate(plan.cells):
        ending = (Status.FAILED, Status.INTERRUPTED, None)[number // 10 % 3] if number % 10 == 9 else Status.DONE
        if ending is not None:
            _fill(folder / cell.id, cell, ending, num_epochs if ending is Status.DONE else num_epochs // 2)
    return list(plan.cells)


def _fill(folder: Path, cell: Cell, status: Status, num_epochs: int) -> None:
    """The files that a cell leaves behind; its curve rises from 0.3 to a value of its own."""
    draw = random.Random(cell.id)
    end = draw.uniform(0.35, 0.8)
    lines = [
        _line(epoch, 0.3 + (end - 0.3) * (1 - math.exp(-4 * epoch / num_epochs))) for epoch in range(num_epochs + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "attempts.jsonl").write_text(json.dumps({"started": 1.7e9, "host": "node"}) + "\n")
    (folder / "log.txt").write_text(f"{cell.id} {status}\n")
    record = Record(
        id=cell.id,
        status=status,
        message="RuntimeError: the device is gone" if status is Status.FAILED else "",
        seed=cell.seed,
        epochs=num_epochs,
        cost=Ledger.of_line(lines[-1]),
        metrics={name: value for name, value in lines[-1].items() if name.startswith("eval/")},
        provenance=Provenance(
            versions={}, commit=None, python="3", platform="", device="cpu: x86_64", num_devices=1, num_threads=1
        ),
    )
    (folder / "record.json").write_text(record.model_dump_json(indent=1) + "\n")


def _line(epoch: int, accuracy: float) -> dict[str, Any]:
    """A line of metrics.jsonl with all that an objective of the paper logs."""
    cost = Ledger(rollout=8.0 * epoch, reward=0.4 * epoch, update=12.0 * epoch, eval=0.5 * epoch, forwards=9000 * epoch)
    line = {"epoch": epoch, "update": 3 * epoch, "device_hours": round(cost.device_hours, 7), "nfe": cost.nfe}
    trained = ("loss", "grad_norm", "kl", "log_ratio_abs", "clip_fraction", "overflow", "velocity_change")
    if epoch:
        line |= {"rollout/score": accuracy + 0.1, "rollout/accuracy": accuracy, "rollout/informative_groups": 0.9}
        line |= {f"train/{name}": accuracy / (1 + epoch) for name in trained}
    if epoch % EVALUATIONS == 0:
        line |= {"eval/score": accuracy + 0.1, "eval/accuracy": accuracy}
        line |= {f"eval/accuracy/{family}": accuracy for family in ("counting", "colors", "position", "two_object")}
    return line | cost.flat()


# The peak of a process starts at that of the process it was forked from: a small one in between.
_MEASURE = """
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss, code)
"""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a command took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    code: int


def measure(*words: object) -> Measured:
    """Run `ablate` in a process of its own."""
    command = [sys.executable, "-m", "ablate.cli", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command], env=environment, check=True, capture_output=True, text=True
    )
    seconds, cpu_seconds, kib, code = ended.stdout.split()
    found = Measured(seconds=float(seconds), cpu_seconds=float(cpu_seconds), peak_bytes=1024 * int(kib), code=int(code))
    if found.code not in (0, 1):  # 1: not all cells are done
        raise RuntimeError(ended.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", type=int, default=list(SHAPES))
    parser.add_argument("--epochs", type=int, default=100)
    options = parser.parse_args()
    print(
        "| cells | `plan` | `status GRID` | `status RESULTS` | `report` | `report --full` |\n|---|---|---|---|---|---|"
    )
    for number in options.cells:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            grid = write_grid(folder, number)
            cells = write_results(grid, folder / "results", options.epochs)
            results = folder / "results" / "synthetic"
            commands = [
                ("plan", grid),
                ("status", grid, "--results", folder / "results"),
                ("status", results),
                ("report", results),
                ("report", results, "--full"),
            ]
            found = [measure(*words) for words in commands]
            shown = " | ".join(
                f"{one.seconds:.1f} s ({one.cpu_seconds:.1f}), {one.peak_bytes / 2**20:.0f} MiB" for one in found
            )
            print(f"| {len(cells)} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
