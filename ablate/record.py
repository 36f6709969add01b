"""What a cell leaves behind, and where. Torch-free: reports read it anywhere.

results/<grid>/grid.yaml          the grid as it was run
results/<grid>/plan.json          its cells and excluded combinations
results/<grid>/<cell id>/cell.json       the resolved cell
                         metrics.jsonl   append-only, one flat object per epoch
                         attempts.jsonl  one object per start of the cell's process
                         record.json     written last, atomically
                         limits.json     what may end the cell before its budget does; see limits.py
                         samples/        before.png and after.png, same prompts and noise
                         checkpoint/     ignored by git; removed when the cell is done; ledger.json: spent so far
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from ablate.plan import FORMAT, Cell
from ablate.recipe import Strict
from ablate.source import InputError, dotted, read_text, shown

M = TypeVar("M", bound=Strict)
LEDGER = Path("checkpoint", "ledger.json")


class Status(StrEnum):
    DONE = "done"
    DIVERGED = "diverged"  # a result: censored in time-to-target
    FAILED = "failed"  # with the last line of the traceback
    INTERRUPTED = "interrupted"  # resumes from its last checkpoint
    PAUSED = "paused"  # at a rung of successive halving, until it is decided whether the cell goes on
    STOPPED = "stopped"  # by successive halving or as a hopeless trial: censored in time-to-target
    REWARD_UNAVAILABLE = "reward_unavailable"
    EXCLUDED = "excluded"

    @property
    def final(self) -> bool:
        """Whether the cell is never run again."""
        return self in (Status.DONE, Status.DIVERGED, Status.STOPPED)

    @property
    def settled(self) -> bool:
        """Whether starting the cell again under the same limits would change nothing."""
        return self.final or self is Status.PAUSED


class Ledger(Strict):
    """Seconds x devices by phase, network calls, and what killed attempts had to do again."""

    rollout: float = 0.0
    reward: float = 0.0
    update: float = 0.0
    eval: float = 0.0
    checkpoint: float = 0.0
    compile: float = 0.0
    lost: float = 0.0
    forwards: int = 0
    backwards: int = 0
    rewards: dict[str, float] = {}  # by reward, wherever it worked; `reward` is what training waited for them

    def undone(self, before: Ledger) -> Ledger:
        """The ledger from before, where what was spent since has to be done again."""
        return before.model_copy(update={"lost": self.lost + max(0.0, self.work - before.work)})

    @classmethod
    def phases(cls) -> tuple[str, ...]:
        """The amounts that are one number."""
        return tuple(name for name in cls.model_fields if name != "rewards")

    def flat(self) -> dict[str, float]:
        """As a line of metrics.jsonl has it: cost/rollout, ..., cost/rewards/<name>."""
        amounts = self.model_dump(exclude={"rewards"}) | {f"rewards/{name}": v for name, v in self.rewards.items()}
        return {f"cost/{name}": round(value, 4) for name, value in amounts.items()}

    @classmethod
    def of_line(cls, line: Mapping[str, Any]) -> Ledger:
        """The ledger in a line of metrics.jsonl."""
        amounts = {key.removeprefix("cost/"): v for key, v in line.items() if key.startswith("cost/")}
        rewards = {key.removeprefix("rewards/"): v for key, v in amounts.items() if key.startswith("rewards/")}
        return cls(rewards=rewards, **{key: v for key, v in amounts.items() if not key.startswith("rewards/")})

    @property
    def device_hours(self) -> float:
        """Hours of rollout, reward and update: the x-axis of every figure."""
        return (self.rollout + self.reward + self.update) / 3600

    @property
    def work(self) -> float:
        """Seconds x devices of what has to be done again where no checkpoint holds it."""
        return self.rollout + self.reward + self.update + self.eval + self.compile

    @property
    def nfe(self) -> int:
        """Network calls, a backward counted as two forwards beside its own."""
        return self.forwards + 3 * self.backwards


class Provenance(Strict):
    """Where and with what a cell ran."""

    versions: dict[str, str]
    commit: str | None
    python: str
    platform: str
    device: str
    num_devices: int
    num_threads: int


class Record(Strict):
    """The end of a cell. `metrics` are the last evaluation's."""

    format: int = FORMAT
    id: str
    status: Status
    message: str = ""
    seed: int
    attempts: int = 1
    epochs: int = 0
    cost: Ledger = Ledger()
    metrics: dict[str, float] = {}
    rewards: dict[str, str] = {}  # what each reward was: its identity, and a digest of the weights that were loaded
    provenance: Provenance | None = None


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_record(folder: Path) -> Record | None:
    """The record of a cell's folder; None while it has none. Raises InputError for one of another version."""
    path = folder / "record.json"
    if not path.exists():
        return None
    return read_validated(Record, path)


def read_cell(folder: Path) -> Cell:
    """The cell of a folder. Raises InputError if it has none, or one of another version."""
    path = folder / "cell.json"
    if not path.exists():
        raise InputError(f"{folder}: no cell.json here; `ablate run GRID` writes it")
    return read_validated(Cell, path)


def write_ledger(folder: Path, spent: Ledger) -> None:
    """Keep what an unfinished cell has spent so far, lest a kill forgets it."""
    path = folder / LEDGER
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, spent.model_dump_json() + "\n")


def read_spent(folder: Path) -> Ledger:
    """What a cell has spent so far, with what was lost: by its ledger, its record, or its last line of metrics."""
    try:
        return Ledger.model_validate_json((folder / LEDGER).read_text(encoding="utf-8"))
    except (OSError, ValidationError):  # there is none, or the machine went down as it was written
        record = read_record(folder)
    if record and record.status.final:
        return record.cost
    last = (read_metrics(folder) or [{}])[-1]
    return Ledger.of_line(last)


def read_validated(model: type[M], path: Path) -> M:
    """A JSON file of results/ as a model. Raises InputError if it is damaged, or of another format version."""
    data = read_json(path)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = f"{path}: cannot be read: {dotted(problem['loc'])}"
        raise InputError(f"{where}: {problem['msg']}, got {shown(problem['input'])}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of results/. Raises InputError if it is damaged or of another format version."""
    try:
        data = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: cannot be read as JSON: {error.msg}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}:1: got {shown(data)}, expected a JSON object")
    found = data.get("format")
    if found != FORMAT:
        raise InputError(
            f"{path}: results of format {shown(found)}, this version of ablate reads format {FORMAT}; "
            "choose another folder with --results, or read it with the version that wrote it"
        )
    return data


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a kill is left out. Raises InputError for other damage."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    metrics = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}: a line is not JSON: line {number}: {error.msg}") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}:{number}: got {shown(values)}, expected a JSON object")
        metrics.append(values)
    return metrics
