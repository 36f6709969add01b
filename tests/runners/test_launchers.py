"""What is done about cells that end otherwise than they should, by any launcher; cells that others finish."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ablate.attempts import Attempt, begin, complete_last, read_attempts
from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.record import Failure, Ledger, Record, Status, read_record, write_atomic, write_ledger
from ablate.source import InputError
from runners import cell as cell_module
from runners import retries, train
from runners.cell import run_cell
from runners.cell_state import state_of
from runners.closing import Before, close
from runners.identity import identify
from runners.launchers import inline, make_launcher
from runners.launchers.inline import InlineLauncher
from runners.launchers.protocol import Ended, Job
from runners.sweep import freeze, run_cells

PLAN = make_plan(load_grid(Path(__file__).parents[2] / "grids" / "quickstart.yaml"), identify)
FIRST, SECOND = PLAN.cells[:2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    freeze(tmp_path / "g", PLAN.keep(lambda cell: cell in (FIRST, SECOND)), "name: quickstart\n")
    return tmp_path / "g"


class Scripted:
    """A launcher whose cells end as they are told to, one end for each start."""

    places = 1

    def __init__(self, *ends: Ended | Record) -> None:
        self.ends = iter(ends)

    def submit(self, folders: Sequence[Path]) -> list[Job]:
        return [self._submit(folder) for folder in folders]

    def taken_by(self, orphans: Sequence[Path]) -> int:
        return 0

    def close(self) -> None:
        pass

    def _submit(self, folder: Path) -> Job:
        starts, end = begin(folder, Attempt(started=1.0)), next(self.ends)
        if isinstance(end, Ended):
            return inline.Finished(end)
        complete_last(folder, status=end.status, failure=end.failure)
        record = end.model_copy(update={"id": folder.name, "attempts": len(starts)})
        write_atomic(folder / "record.json", record.model_dump_json())
        return inline.Finished(Ended(code=int(not end.status.final)))


def failed(failure: Failure) -> Record:
    return Record(id="", status=Status.FAILED, failure=failure, seed=0)


DONE = Record(id="", status=Status.DONE, seed=0)
KILLED, LOST = Ended(code=-9), Ended(code=1, node_lost="its node was lost")


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ANSWERS", {failure: (0.0, words) for failure, (_, words) in retries.ANSWERS.items()})
    monkeypatch.setattr(retries, "REWARD", (0.0, "at once"))


@pytest.mark.parametrize(
    ("ends", "kinds"),
    [
        ([KILLED, LOST, DONE], [Failure.KILLED, Failure.NODE_LOST, None]),
        ([failed(Failure.OUT_OF_MEMORY), DONE], [Failure.OUT_OF_MEMORY, None]),
        ([Record(id="", status=Status.REWARD_UNAVAILABLE, seed=0), DONE], [None, None]),
        ([KILLED, KILLED, KILLED], [Failure.KILLED] * 3),  # no fourth
        ([failed(Failure.BAD_CONFIG)], [Failure.BAD_CONFIG]),
        ([failed(Failure.ERROR)], [Failure.ERROR]),
        ([Ended(code=2)], [Failure.BAD_CONFIG]),
        ([Record(id="", status=Status.DIVERGED, seed=0)], [None]),
        ([Record(id="", status=Status.INTERRUPTED, seed=0)], [None]),
    ],
)
def test_each_kind_of_failure_has_its_own_answer(
    folder: Path, ends: list[Ended | Record], kinds: list[Failure | None]
) -> None:
    run_cells(folder, [FIRST], console=Console(quiet=True), launcher=Scripted(*ends), attempts=3)
    attempts = read_attempts(folder / FIRST.id)
    assert [attempt.failure for attempt in attempts] == kinds
    record = read_record(folder / FIRST.id)
    assert record is not None
    assert (record.attempts, record.failure) == (len(kinds), kinds[-1])


def test_pauses_double_and_attempts_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "ANSWERS", {Failure.KILLED: (5, "from its checkpoint")})
    found = [retries.answer(failed(Failure.KILLED), failures, 4) for failures in (1, 2, 3, 4)]
    assert [again and again[0] for again in found] == [5, 10, 20, None]


def test_a_cell_that_another_launcher_has_finished_stays_done(folder: Path) -> None:
    """Between the last look at its folder and the start of its process, which then has nothing to do."""
    path = folder / FIRST.id / "record.json"
    write_atomic(path, Record(id=FIRST.id, status=Status.DONE, seed=0).model_dump_json())
    written = path.read_bytes()
    for ended in (Ended(code=0), Ended(code=-9)):
        record = close(folder / FIRST.id, FIRST, ended, Before.of(folder / FIRST.id))
        assert record is not None
        assert record.status is Status.DONE
    assert path.read_bytes() == written


def test_the_record_of_a_killed_cell_says_what_it_had_come_to_and_what_it_has_cost(folder: Path) -> None:
    own = folder / FIRST.id
    before = Before.of(own)
    begin(own, Attempt(started=1.0))
    line = {"epoch": 3, "eval/score": 0.25, "eval/accuracy": 0.5, "rollout/score": 0.1}
    (own / "metrics.jsonl").write_text(json.dumps(line) + "\n" + json.dumps({"epoch": 4}) + "\n")
    write_ledger(own, Ledger(rollout=30, lost=12))
    record = close(own, FIRST, Ended(code=-9), before)
    assert record is not None
    assert (record.epochs, record.cost, record.metrics) == (
        4, Ledger(rollout=30, lost=12), {"eval/score": 0.25, "eval/accuracy": 0.5}
    )  # fmt: skip
    assert state_of(folder, FIRST).lost_device_hours == pytest.approx(12 / 3600)


def test_a_cell_is_looked_at_again_once_it_is_locked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def lock(path: Path) -> Iterator[None]:
        """Another process finishes the cell just before."""
        write_atomic(path / "record.json", Record(id=FIRST.id, status=Status.DONE, seed=0).model_dump_json())
        yield

    monkeypatch.setattr(cell_module, "lock", lock)
    monkeypatch.setattr(train, "train_cell", lambda path: pytest.fail("it was trained twice"))
    assert run_cell(folder / FIRST.id).status is Status.DONE


def test_a_record_whose_metrics_are_cut_short_is_kept_aside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = folder / FIRST.id
    write_atomic(cell / "record.json", Record(id=FIRST.id, status=Status.DONE, seed=0, epochs=3).model_dump_json())
    (cell / "metrics.jsonl").write_text(json.dumps({"epoch": 2}) + "\n")
    trained: list[Path] = []
    monkeypatch.setattr(train, "train_cell", lambda path: trained.append(path) or DONE)
    run_cell(cell)
    assert trained == [cell]
    assert (cell / "damaged-record.json").exists()
    assert not (cell / "record.json").exists()


@pytest.mark.parametrize(
    ("ending", "failure", "word"),
    [
        (InputError("no such prompts"), Failure.BAD_CONFIG, "exit code 2: no such prompts"),
        (ValueError("no luck"), Failure.ERROR, "exit code 1: ValueError: no luck"),
    ],
)
def test_inline_a_cell_that_fails_does_not_end_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ending: Exception, failure: Failure, word: str
) -> None:
    def run(path: Path) -> Record:
        if path.name == FIRST.id:
            raise ending
        record = Record(id=path.name, status=Status.DONE, seed=0)
        write_atomic(path / "record.json", record.model_dump_json())
        return record

    monkeypatch.setattr(inline, "run_cell", run)
    states = run_cells(folder, [FIRST, SECOND], console=Console(quiet=True), launcher=InlineLauncher())
    assert [state.status for state in states] == ["failed", "done"]
    record = read_record(folder / FIRST.id)
    assert record is not None
    assert (record.failure, record.message) == (failure, word)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("slrum", {}, "--launcher slrum: there is no such launcher.*slurm"),
        ("local", {"settings": {"gpus": 1}}, "--launcher-set gpus: the launcher local has no settings"),
        ("inline", {"workers": 2}, "runs one cell at a time in one process"),
        ("inline", {"devices": 2}, "runs one cell at a time in one process"),
        ("ray", {"settings": {"adress": "auto"}}, "--launcher-set adress: there is no such setting.*address"),
    ],
)
def test_a_launcher_that_cannot_be_is_refused(tmp_path: Path, name: str, given: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {"workers": None, "devices": 1, "settings": {}, "attempts": 1, **given}
    with pytest.raises(InputError, match=message):
        make_launcher(name, tmp_path, **options)
