"""Whatever is in a file, reading it ends soon, in a value or in a message with file and reason."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from fuzz import damaged
from hypothesis import HealthCheck, given, settings
from ruamel.yaml import YAML

from ablate.attempts import read_attempts
from ablate.forecast import plan_json, read_bench
from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.probe_rows import GradientRow
from ablate.record import Ledger, Record, Status, read_cell, read_metrics, read_record, read_spent
from ablate.source import InputError
from analysis.load import load
from analysis.probe import read_rows, signal_to_noise
from analysis.published import load_published
from runners.cell_state import state_of
from runners.identity import identify
from runners.prompts import read_prompts
from runners.sweep import freeze

ROOT = Path(__file__).parents[1]
SECONDS = 20  # for one input, on a busy machine; most take a millisecond
GRID = """\
name: study
recipe: base
axes:
  objective: [grpo, {name: dpo, beta: 0.1}]
  estimator: [trajectory, {name: elbo, weight: simple}]
  sampler: [ode, sde]
  kl.coef: [0, 1.0e-4]
seeds: [0, 1]
override: {budget: {epochs: 3}}
exclude: [{objective: grpo, estimator: elbo-simple, reason: tried before}]
"""
PROMPT = {
    "prompt": "a red circle above a square",
    "tag": "position",
    "include": [
        {"class": "square", "count": 1},
        {"class": "circle", "count": 1, "color": "red", "position": ["above", 0]},
    ],
}
BENCH = {"seconds_per_call": 0.01, "seconds_per_image": 0.1, "trained_bytes": 4000, "device": "cpu"}
ROW = {
    "key": "a", "weights": "base", "seed": 0, "sampler": "ode", "estimator": "elbo", "axes": {"kl.coef": 0},
    "points": 2, "groups": 1, "group_size": 2, "draws": 2, "signal": 1.0, "noise": 0.5, "total_signal": 1.0,
    "total_noise": 2.0, "cosine": 0.5, "effective_points": 1.5, "largest_share": 0.7, "rollout_calls": 8.0,
    "update_calls": 6.0, "rollout_seconds": 0.1, "update_seconds": 0.2,
}  # fmt: skip
LINE = {"epoch": 1, "update": 3, "device_hours": 0.01, "nfe": 100, "eval/score": 0.5, "rollout/score": 0.5}
PUBLISHED = {
    "title": "A table", "source": "a paper", "protocol": ["As printed."], "columns": {"GenEval": "eval/accuracy"},
    "rows": [{"names": {"method": "grpo"}, "match": {"objective": "grpo"}, "values": [0.5], "note": "x"}],
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of file: where a valid one lies in the fixture's folder, how it is written, and what reads it."""

    file: str
    read: Callable[[Path], object]  # of the fixture's folder
    parse: Callable[[str], Any] = json.loads
    dump: Callable[[Any], str] = json.dumps


def from_yaml(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(StringIO(text))


def to_yaml(data: Any) -> str:
    """JSON, and YAML's words for what JSON does not have."""
    return re.sub(r"\bNaN\b", ".nan", re.sub(r"\bInfinity\b", ".inf", json.dumps(data)))


def from_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def to_lines(data: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in (data if isinstance(data, list) else [data]))


def plan(folder: Path) -> object:
    return plan_json(make_plan(load_grid(folder / "grid.yaml"), identify), None)


def results(folder: Path) -> object:
    """All that reads a folder of results without drawing it."""
    study = folder / "results" / "study"
    loaded = load(study)
    cell = next(path.parent for path in study.glob("*/cell.json"))
    read_record(cell), read_metrics(cell), read_spent(cell), read_attempts(cell)
    return loaded, state_of(study, read_cell(cell))


def probe(folder: Path) -> object:
    return signal_to_noise(read_rows(folder / "probe", GradientRow))


CELL = "results/study/*/"
lines = partial(Kind, parse=from_lines, dump=to_lines)
KINDS = {
    "grid": Kind("grid.yaml", plan, from_yaml, to_yaml),
    "recipe": Kind("recipes/base.yaml", plan, from_yaml, to_yaml),
    "plan": Kind("results/study/plan.json", results),
    "cell": Kind(f"{CELL}cell.json", results),
    "record": Kind(f"{CELL}record.json", results),
    "ledger": Kind(f"{CELL}checkpoint/ledger.json", results),
    "metrics": lines(f"{CELL}metrics.jsonl", results),
    "attempts": lines(f"{CELL}attempts.jsonl", results),
    "probe": lines("probe/gradients.jsonl", probe),
    "bench": Kind("bench.json", lambda folder: read_bench(folder / "bench.json")),
    "prompts": lines("prompts.jsonl", lambda folder: read_prompts(folder / "prompts.jsonl")),
    "sentences": Kind("prompts.txt", lambda folder: read_prompts(folder / "prompts.txt"), str, str),
    "published": Kind("published/table.yaml", lambda folder: load_published(folder / "published"), from_yaml, to_yaml),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid file of every kind."""
    folder = tmp_path_factory.mktemp("fuzz")
    for name in ("recipes", "probe", "published"):
        (folder / name).mkdir()
    recipe = (ROOT / "grids" / "recipes" / "tiny-scenes.yaml").read_text()
    (folder / "recipes" / "base.yaml").write_text(re.sub(r" *#.*", "", recipe))
    (folder / "grid.yaml").write_text(GRID)
    whole = make_plan(load_grid(folder / "grid.yaml"), identify)
    planned = whole.keep(lambda cell: cell.seed == 0 and cell.objective == "dpo")
    study = folder / "results" / "study"
    study.parent.mkdir()
    freeze(study, planned.keep(lambda cell: cell == planned.cells[0]), GRID)
    (cell,) = study.glob("*/")
    line = LINE | Ledger(rollout=2.0, rewards={"scenes": 0.1}).flat()
    (cell / "metrics.jsonl").write_text(to_lines([{**line, "epoch": epoch} for epoch in (0, 1, 2)]))
    (cell / "attempts.jsonl").write_text(to_lines([{"started": 1700000000.5, "host": "here"}]))
    record = Record(id=cell.name, status=Status.INTERRUPTED, seed=0, cost=Ledger(rollout=2.0), metrics={"eval/a": 1})
    (cell / "record.json").write_text(record.model_dump_json(indent=1))
    (cell / "checkpoint").mkdir()
    (cell / "checkpoint" / "ledger.json").write_text(Ledger(rollout=1.0).model_dump_json())
    (folder / "probe" / "gradients.jsonl").write_text(to_lines([ROW, {**ROW, "seed": 1}]))
    (folder / "bench.json").write_text(json.dumps(BENCH))
    (folder / "prompts.jsonl").write_text(to_lines([PROMPT, {"prompt": "a clock"}]))
    (folder / "prompts.txt").write_text("a clock\na red square\n")
    (folder / "published" / "table.yaml").write_text(to_yaml(PUBLISHED))
    return folder


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def attack(name: str, home: Path, number: int) -> None:
    """Read so many damaged files of a kind."""
    kind = KINDS[name]
    (path,) = home.glob(kind.file)
    valid = path.read_bytes()

    @settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(damaged(valid.decode(), kind.parse, kind.dump))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            with at_most(SECONDS):
                kind.read(home)
        except InputError as error:
            for line in str(error).splitlines():
                assert re.match(rf"{re.escape(str(home))}/[^:]*:\d+: \S", line), line
                assert len(line) < 3000

    try:
        kind.read(home)
        read()
    finally:
        path.write_bytes(valid)


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_ends_in_a_message(name: str, home: Path) -> None:
    attack(name, home, 40)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", KINDS)
def test_thousands_of_damaged_files_end_in_messages(name: str, home: Path) -> None:
    attack(name, home, 300)
