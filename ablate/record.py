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
import math
import os
import re
import uuid
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, ValidationError, field_validator

from ablate.json_lines import line_of
from ablate.part import COMPONENT_AXES
from ablate.plan import FORMAT, Cell, Excluded, FolderName
from ablate.recipe import Strict, recipe_fields
from ablate.secrets import redacted
from ablate.source import InputError, dotted, parse_json, read_text, shown

M = TypeVar("M", bound=Strict)
AXES = {"recipe", *recipe_fields()}  # that a cell may have beside its components
NUMBERS = {int, float, type(None)}
HUGE = re.compile(r"(?<![\d.eE+])\d{19,}(?![\d.eE])")
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


class Failure(StrEnum):
    """Of which kind a failure is, as each has another answer."""

    OUT_OF_MEMORY = "out_of_memory"  # of a device: again with smaller batches
    BAD_CONFIG = "bad_config"  # the message says what to change
    KILLED = "killed"  # by a signal: again from the checkpoint
    NODE_LOST = "node_lost"  # with its machine: again, elsewhere
    ERROR = "error"


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
    def all_hours(self) -> float:
        """Device-hours, with those of what was lost: what a cell has taken of a budget."""
        return self.device_hours + self.lost / 3600

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
    failure: Failure | None = None  # where the status is `failed`
    message: Annotated[str, AfterValidator(redacted)] = ""
    seed: int
    attempts: int = 1
    epochs: int = 0
    cost: Ledger = Ledger()
    metrics: dict[str, float] = {}
    rewards: dict[str, str] = {}  # what each reward was: its identity, and a digest of the weights that were loaded
    provenance: Provenance | None = None


class PlannedCell(Strict):
    """What plan.json says of a cell."""

    model_config = ConfigDict(extra="ignore")
    id: FolderName
    objective: str
    estimator: str
    sampler: str
    seed: int
    axes: dict[str, Any] = {}

    @field_validator("axes")
    @classmethod
    def _known(cls, axes: dict[str, Any]) -> dict[str, Any]:
        if unknown := sorted(axis for axis in axes.keys() - AXES if axis.partition(".")[0] not in COMPONENT_AXES):
            raise ValueError(f"{unknown[0]!r} is no recipe field")
        return axes


class PlanFile(Strict):
    """plan.json in a grid's results."""

    model_config = ConfigDict(extra="ignore")
    grid: FolderName
    order: dict[str, tuple[str, ...]] = {}
    listed: bool = False
    cells: tuple[PlannedCell, ...]
    excluded: tuple[Excluded, ...] = ()

    @field_validator("cells")
    @classmethod
    def _different(cls, cells: tuple[PlannedCell, ...]) -> tuple[PlannedCell, ...]:
        if len({cell.id for cell in cells}) < len(cells):
            raise ValueError("two cells have the same id")
        return cells


def write_atomic(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a file so that it is there whole or not at all; `durable`: after a power cut too, once this returns."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")  # pids are equal in containers of two machines
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # a full disk
        error.filename = error.filename or str(path)
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_record(folder: Path, record: Record) -> None:
    """Write a cell's record, to stay."""
    write_atomic(folder / "record.json", record.model_dump_json(indent=1) + "\n", durable=True)


def read_record(folder: Path) -> Record | None:
    """The record of a cell's folder; None while it has none, and once an unfinished one has been followed by a start.

    Raises InputError for one that is damaged or of another version.
    """
    record = last_record(folder)
    return record if record and (record.status.final or _starts(folder) <= record.attempts) else None


def last_record(folder: Path) -> Record | None:
    """The record that a cell's last end has left, even where the cell has been started since; raises as read_record."""
    path = folder / "record.json"
    return read_validated(Record, path) if path.exists() else None


def _starts(folder: Path) -> int:
    """Lines of attempts.jsonl."""
    path = folder / "attempts.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_damaged(path: Path) -> bool:
    """Whether a file of a JSON object was cut short or overwritten; one that is not there is not."""
    try:
        return not isinstance(json.loads(path.read_bytes()), dict)
    except FileNotFoundError:
        return False
    except ValueError:
        return True


def set_aside(path: Path) -> Path:
    """Rename a damaged file; its new path."""
    return path.replace(path.with_name(f"damaged-{path.name}"))


def read_plan(results: Path) -> PlanFile:
    """The plan of results/<grid>/. Raises InputError if there is none, or one of another version."""
    return read_validated(PlanFile, results / "plan.json")


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
    except (OSError, ValueError):  # there is none, or the machine went down as it was written
        record = _readable_record(folder)
    if record and record.status.final:
        return record.cost
    lines = read_metrics(folder)
    try:
        return Ledger.of_line(lines[-1] if lines else {})
    except ValidationError as error:
        where = f"{folder / 'metrics.jsonl'}:{len(lines)}"
        raise InputError(f"{where}: the last line has no ledger: {error.errors()[0]['msg']}") from None


def _readable_record(folder: Path) -> Record | None:
    try:
        return read_record(folder)
    except InputError:
        return None


def read_validated(model: type[M], path: Path) -> M:
    """A JSON file of results/ as a model. Raises InputError if it is damaged, or of another format version."""
    text = read_text(path)
    try:
        return model.model_validate(_of_this_format(text, path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = f"{path}:{line_of(text, problem['loc'])}: cannot be read: {dotted(problem['loc'])}"
        raise InputError(f"{where}: {problem['msg']}, got {shown(problem['input'])}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of results/. Raises InputError if it is damaged or of another format version."""
    return _of_this_format(read_text(path), path)


def _of_this_format(text: str, path: Path) -> dict[str, Any]:
    data = parse_json(text, str(path))
    found = data.get("format")
    if found != FORMAT:
        where = f"{path}:{line_of(text, ('format',))}"
        raise InputError(
            f"{where}: results of format {shown(found)}, this version of ablate reads format {FORMAT}; "
            "choose another folder with --results, or read it with the version that wrote it"
        )
    return data


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut short by a kill is left out. Raises InputError for other damage."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    lines = read_text(path).split("\n")[:-1]
    return [parse_metrics(line, path, number) for number, line in enumerate(lines, start=1)]


def parse_metrics(line: str, path: Path, number: int) -> dict[str, Any]:
    """A line of metrics.jsonl: numbers by name, an epoch among them. Raises InputError with file and line."""
    values = parse_json(line, str(path), first=number)
    if HUGE.search(line):
        raise InputError(f"{path}:{number}: got a whole number of 19 digits or more")
    for name, value in values.items():
        if type(value) not in NUMBERS:
            raise InputError(f"{path}:{number}: {dotted((name,))}: got {shown(value)}, expected a number")
    for name in ("epoch", "device_hours", "nfe"):
        value = values.get(name, 0)
        if value is None or not 0 <= value < math.inf or (name == "epoch" and type(value) is not int):
            raise InputError(f"{path}:{number}: {name}: got {shown(value)}, expected a number from 0 on")
    if "epoch" not in values:
        raise InputError(f"{path}:{number}: epoch: is missing")
    return values
