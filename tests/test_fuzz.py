"""Whatever is in a file, each command ends soon, in its answer or in a message with file, line and reason."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from commands import Command
from fuzz import damaged, damaged_checkpoint, damaged_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from ablate.grid import load_grid
from ablate.halving import Halving
from ablate.limits import Limits, write_limits
from ablate.plan import make_plan
from ablate.probe_rows import GradientRow
from ablate.record import Status
from ablate.source import InputError
from analysis.probe import read_rows, signal_to_noise
from runners.cell import run_cell
from runners.identity import identify
from runners.sweep import freeze

ROOT = Path(__file__).parents[1]
SECONDS = 20  # for one input, on a busy machine; most take a few milliseconds
GRID = """\
name: study
recipe: base
axes:
  objective: [grpo, {name: dpo, beta: 0.1}]
  estimator: [trajectory, {name: elbo, weight: simple}]
  sampler: [ode, sde]
  kl.coef: [0, 1.0e-4]
seeds: [0, 1]
override:
  budget: {epochs: 2, device_hours: null}
  model: {lora_rank: 1}
  rollout: {num_groups: 2, group_size: 2, num_steps: 2}
  update: {updates_per_epoch: 1}
  evaluation: {num_prompts: 2, num_steps: 2}
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
PUBLISHED = {
    "title": "A table", "source": "a paper", "protocol": ["As printed."], "columns": {"GenEval": "eval/accuracy"},
    "rows": [{"names": {"method": "grpo"}, "match": {"objective": "grpo"}, "values": [0.5], "note": "x"}],
}  # fmt: skip

# commands, as they are typed in the fixture's folder; CELL is the one that is paused
LOOK = ("status results/study", "status results/study --json", "status grid.yaml")
LOOK += ("clean results/study", "clean results/study --strays --yes", "retry results/study", "retry CELL", "logs CELL")
LOOK += ("stop results/study", "stop CELL", "eval results/study", "run grid.yaml --dry-run", "sync results/study")
REPORT = "report results/study --brief"
READ = (*LOOK, *LOOK, REPORT)  # which takes longer
PLAN = ("plan grid.yaml", "plan grid.yaml --json")
PROMPTS = "plan grid.yaml --set prompts.train={0} --set prompts.evaluation={0}"


def from_yaml(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(StringIO(text))


def to_yaml(data: Any) -> str:
    """JSON, and YAML's words for what JSON does not have."""
    return re.sub(r"\bNaN\b", ".nan", re.sub(r"\bInfinity\b", ".inf", json.dumps(data)))


def from_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def to_lines(data: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in (data if isinstance(data, list) else [data]))


def documents(parse: Callable[[str], Any], dump: Callable[[Any], str]) -> Callable[[bytes], st.SearchStrategy[bytes]]:
    return lambda valid: damaged(valid.decode(), parse, dump)


as_json = documents(json.loads, json.dumps)
as_lines = documents(from_lines, to_lines)
as_yaml = documents(from_yaml, to_yaml)


def as_text(valid: bytes) -> st.SearchStrategy[bytes]:
    return damaged_text(valid.decode())


@dataclass(frozen=True)
class Kind:
    """A kind of file: where a valid one lies in the fixture's folder, how it is damaged, what reads it, how often."""

    file: str
    damage: Callable[[bytes], st.SearchStrategy[bytes]]
    number: int
    commands: tuple[str, ...]
    lined: bool = True  # whether a message says the line
    held: bool = False  # whether a process holds it, as a lock


KINDS = {
    "grid": Kind("grid.yaml", as_yaml, 220, PLAN),
    "recipe": Kind("recipes/base.yaml", as_yaml, 220, PLAN),
    "bench": Kind("bench.json", as_json, 60, ("plan grid.yaml --bench bench.json",)),
    "prompts": Kind("prompts.jsonl", as_lines, 60, (PROMPTS.format("prompts.jsonl"),)),
    "sentences": Kind("prompts.txt", as_text, 40, (PROMPTS.format("prompts.txt"),)),
    "plan": Kind("results/study/plan.json", as_json, 220, READ),
    "grid of results": Kind("results/study/grid.yaml", as_yaml, 60, LOOK),
    "cell": Kind("CELL/cell.json", as_json, 220, READ),
    "record": Kind("CELL/record.json", as_json, 220, READ),
    "metrics": Kind("CELL/metrics.jsonl", as_lines, 220, READ),
    "attempts": Kind("CELL/attempts.jsonl", as_lines, 180, LOOK),
    "ledger": Kind("CELL/checkpoint/ledger.json", as_json, 100, LOOK),
    "halving": Kind("results/study/halving.json", as_json, 15, (REPORT,)),
    "limits": Kind("CELL/limits.json", as_json, 24, ("cell CELL",)),
    "request to launchers": Kind("results/study/.stop", as_text, 40, LOOK, lined=False),
    "request to a cell": Kind("CELL/.stop", as_text, 40, (*LOOK, "cell CELL"), lined=False),
    "lock": Kind("CELL/.lock", as_json, 60, LOOK, lined=False),
    "lock that is held": Kind("CELL/.lock", as_json, 60, LOOK, lined=False, held=True),
    "newest checkpoint": Kind("CELL/checkpoint/state.pt", damaged_checkpoint, 24, ("cell CELL",), lined=False),
    "checkpoint before": Kind("CELL/checkpoint/before.pt", damaged_checkpoint, 10, ("cell CELL",), lined=False),
    "published": Kind("results/published/table.yaml", as_yaml, 8, (REPORT,)),
}

# of what is no damage, a message names no line
REFUSED = (
    r"results/study/[\w.-]+: no cell\.json here; `ablate run GRID` writes it",
    r"results/study/[\w.-]+/\.lock: does not say which process has the cell; .*",
    r"results/study: no finished cell with exported weights; --checkpoint scores one that is at work",
    r"--halving 1: results/study/halving\.json compares \d+ cells, and \d+ other ones are asked for; .*",
    r"results/study/halving\.json: these results are chosen by successive halving; go on with --halving \d+, .*",
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid file of every kind; its one cell is paused at half of its budget, as halving does."""
    folder = tmp_path_factory.mktemp("fuzz")
    recipe = (ROOT / "grids" / "recipes" / "tiny-scenes.yaml").read_text()
    for name, text in {
        "recipes/base.yaml": re.sub(r" *#.*", "", recipe),
        "grid.yaml": GRID,
        "bench.json": json.dumps(BENCH),
        "prompts.jsonl": to_lines([PROMPT, {"prompt": "a clock"}]),
        "prompts.txt": "a clock\na red square\n",
        "results/published/table.yaml": to_yaml(PUBLISHED),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    planned = make_plan(load_grid(folder / "grid.yaml"), identify)
    study, cell = folder / "results" / "study", planned.cells[-1]
    freeze(study, planned.keep(lambda one: one == cell), GRID)
    write_limits(study / cell.id, Limits(share=0.5))
    assert run_cell(study / cell.id).status is Status.PAUSED
    (study / cell.id / "log.txt").write_text("epoch 1\n")
    (study / ".stop").write_text("a1")
    (study / cell.id / ".stop").write_text("b2")
    compared = (cell.objective, cell.seed, cell.estimator)
    lock = {"host": "node", "pid": 7, "started": 1.7e9, "machine": "x", "token": "c3"}
    (study / cell.id / ".lock").write_text(json.dumps(lock))
    judged = (one.id for one in planned.cells if (one.objective, one.seed, one.estimator) == compared)
    choice = Halving(halvings=1, splits=("evaluation",), cells=tuple(judged))
    (study / "halving.json").write_text(choice.model_dump_json(indent=1))
    return folder


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    class Hang(BaseException):
        """Not an Exception, which a command could take for a problem of a file."""

    def stop(*_: object) -> None:
        raise Hang(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Keep a lock's file as its owner does."""
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def renew(home: Path, valid: Path) -> None:
    """Make a folder a copy again, but for checkpoints, which programs replace and never change, and the mirror."""
    shutil.rmtree(home / "results" / "study", ignore_errors=True)

    def copy(source: str, target: str) -> None:
        (os.link if source.endswith(".pt") else shutil.copy2)(source, target)

    shutil.copytree(valid, home, copy_function=copy, dirs_exist_ok=True)


def explained(line: str, name: str, *, lined: bool) -> bool:
    """Whether a line of an error names a file, the line where it has lines, and the reason."""
    if any(re.fullmatch(pattern, line) for pattern in REFUSED):
        return True
    number = r":\d+" if lined or not line.startswith(name) else ""
    return bool(re.match(rf"(--set [\w.=]+: )?[\w./-]+{number}: \S", line)) and len(line) < 3000


def attack(kind: Kind, home: Path, valid: Path, ablate: Command, number: int) -> None:
    """Run commands over so many damaged files of a kind."""
    (cell,) = (path.parent.relative_to(valid) for path in valid.glob("results/study/*/cell.json"))
    name = kind.file.replace("CELL", str(cell))
    commands = [command.replace("CELL", str(cell)).split() for command in kind.commands]

    @settings(
        max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(kind.damage((valid / name).read_bytes()), st.sampled_from(commands))
    def read(content: bytes, words: list[str]) -> None:
        renew(home, valid)
        (home / name).unlink()  # which may be a link
        (home / name).write_bytes(content)
        with at_most(SECONDS), held(home / name) if kind.held else nullcontext():
            code, out, err = ablate(*words)
        assert "Traceback" not in out + err
        if (failure := home / cell / "traceback.txt").exists():
            assert failure.read_text().splitlines()[-1].startswith("ablate.source.InputError: ")
        assert code in (0, 1, 2)
        if code == 2:
            assert err
            for line in err.splitlines():
                assert explained(line, name, lined=kind.lined), line

    read()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where files are damaged."""
    return tmp_path_factory.mktemp("home")


@pytest.mark.parametrize("command", dict.fromkeys(command for kind in KINDS.values() for command in kind.commands))
def test_files_that_are_not_damaged_are_read(
    command: str, home: Path, valid: Path, ablate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    renew(home, valid)
    (cell,) = home.glob("results/study/*/cell.json")
    code, _, err = ablate(*command.replace("CELL", str(cell.parent)).split())
    if command.startswith("eval"):
        assert re.fullmatch(REFUSED[2], err.strip())  # the one cell is not finished
    else:
        assert (code, err) == (int(command.startswith("status")), "")


@pytest.mark.parametrize("times", [1, pytest.param(5, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_file_ends_in_a_message(
    name: str, times: int, home: Path, valid: Path, ablate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr("runners.stop_files.PATIENCE", 0.01)
    attack(KINDS[name], home, valid, ablate, times * KINDS[name].number)


def test_a_damaged_row_of_a_probe_ends_in_a_message(tmp_path: Path) -> None:
    """Rows are read again by a probe that measures, which takes minutes: here by what it reads them with."""
    path = tmp_path / "gradients.jsonl"

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(as_lines(to_lines([ROW, {**ROW, "seed": 1}]).encode()))
    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            with at_most(SECONDS):
                signal_to_noise(read_rows(tmp_path, GradientRow))
        except InputError as error:
            for line in str(error).splitlines():
                assert re.match(rf"{re.escape(str(path))}:\d+: \S", line), line

    read()
