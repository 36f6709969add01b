"""Tuning: equal budgets, hopeless trials, kills, failures, several tuners at once; and one for real."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial
from postgresql_server import can_serve, database, postgresql
from rich.console import Console

from ablate import cli
from ablate.grid import load_grid
from ablate.lock import lock
from ablate.plan import Plan, make_plan
from ablate.record import Failure, Ledger, Record, Status, read_cell, read_metrics, read_record, write_atomic
from ablate.source import InputError
from ablate.space import parse_space
from runners import retries
from runners.cell_state import planned_cells, state_of
from runners.launchers.protocol import Ended
from runners.stop_files import ask_launchers
from runners.studies import UNPRUNED, Studies, open_storage
from runners.trials import Family, families, value_of
from runners.tuned_grid import check_target, write_tuned_grid
from runners.tuning import ATTEMPTS, Tuning

GRIDS = Path(__file__).parents[2] / "grids"
GRID = """\
name: mini
recipe: tiny-scenes
axes:
  objective: [{name: grpo, clip_range: 0.016}, reinforce]
  estimator: [{name: elbo, weight: simple}]
  sampler: [ode]
seeds: [0, 1]
override:
  rollout: {num_groups: 3, group_size: 4, num_steps: 5}
  update: {micro_batch_size: 16}
  evaluation: {num_prompts: 6, num_steps: 2, every: 1}
  budget: {epochs: 4, device_hours: null}
"""
SPACE = ("learning_rate=1e-5..1e-3:log", "objective.clip_range=0.01..0.1:log")
BEST = 1e-4  # the learning rate with the highest value


class Killed(BaseException):
    """Stands in for the end of a tuner that nobody asked."""


class Cells:
    """Stands in for the training of cells: each look at one is an epoch, whose value depends on the learning rate."""

    failure: Failure | None = None  # of those that fail

    def __init__(self, *, dies_after: int | None = None, kind: Callable[[float], str] = lambda _: "done") -> None:
        self.dies_after, self.kind = dies_after, kind
        self.epochs: list[tuple[str, int]] = []
        self.starts: list[str] = []
        self.dead = False

    places = 1

    def submit(self, folders: Sequence[Path]) -> list[Training]:
        self.starts += [folder.name for folder in folders]
        return [Training(self, folder) for folder in folders]

    def close(self) -> None:
        pass


class Training:
    """A cell at work, from where its metrics end."""

    def __init__(self, cells: Cells, folder: Path) -> None:
        self.cells, self.folder, self.cell = cells, folder, read_cell(folder)
        self.rate = self.cell.recipe.update.learning_rate
        self.ended: Ended | None = None
        (folder / "record.json").unlink(missing_ok=True)
        (folder / "checkpoint").mkdir(exist_ok=True)

    def poll(self) -> Ended | None:
        if self.ended or self.cells.dead:
            return self.ended or Ended(started=False)
        cells, epoch = self.cells, len(read_metrics(self.folder))
        if cells.dies_after is not None and len(cells.epochs) >= cells.dies_after:
            cells.dead = True
            raise Killed
        cells.epochs.append((self.folder.name, epoch))
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": epoch, "eval/score": value(self.rate, epoch)}) + "\n")
        kind = cells.kind(self.rate)
        if kind != "done" or epoch == 4:
            self._end(Status(kind))
        return self.ended

    def cancel(self, *, force: bool = False) -> None:
        if self.ended is None and not self.cells.dead:
            self._end(Status.INTERRUPTED)

    def _end(self, status: Status) -> None:
        write_record(self.folder, status, self.cells.failure if status is Status.FAILED else None)
        self.ended = Ended(code=0 if status.final else 1)


def write_record(folder: Path, status: Status, failure: Failure | None = None) -> None:
    last = read_metrics(folder)[-1]
    metrics = {name: value for name, value in last.items() if name.startswith("eval/")}
    cost = Ledger(rollout=36.0 * last["epoch"])
    message = "" if status is Status.DONE else "because"
    record = Record(
        id=folder.name, status=status, failure=failure, message=message, seed=2, epochs=last["epoch"], cost=cost,
        metrics=metrics,
    )  # fmt: skip
    write_atomic(folder / "record.json", record.model_dump_json())


def value(rate: float, epoch: int) -> float:
    """The held-out value after so many epochs."""
    return epoch * (1 - abs(rate - BEST) / 1e-3)


def grid_in(folder: Path, text: str = GRID) -> Path:
    (folder / "recipes").symlink_to(GRIDS / "recipes")
    (folder / "mini.yaml").write_text(text)
    return folder / "mini.yaml"


def planned(folder: Path, text: str = GRID, **settings: Any) -> Plan:
    return make_plan(load_grid(grid_in(folder, text), settings))


@pytest.fixture
def found(tmp_path: Path) -> list[Family]:
    return families(planned(tmp_path), parse_space(SPACE))


def tuning(
    found: Sequence[Family], folder: Path, cells: Cells, trials: int = 3, workers: int = 1, storage: str = ""
) -> Tuning:
    opened = open_storage(storage or str(folder / "results" / "journal.log"))
    return Tuning(
        studies=Studies(results=folder / "results", families=found, storage=opened),
        grid_text=GRID,
        trials=trials,
        launcher=cells,
        console=Console(file=io.StringIO(), width=500),
        workers=workers,
        pause=0,
    )


def said(done: Tuning) -> str:
    assert isinstance(done.console.file, io.StringIO)
    return done.console.file.getvalue()


def summary(done: Tuning) -> list[tuple[str, int, str, float | None, dict[str, Any]]]:
    """All that is to be the same however often the tuning was killed."""
    return [
        (family.name, trial.number, trial.state.name, trial.value, trial.params)
        for family in done.studies.families
        for trial in sorted(done.studies.ended(family), key=lambda trial: trial.number)
    ]


def test_families_get_equal_numbers_of_trials_in_turn(found: list[Family], tmp_path: Path) -> None:
    cells = Cells()
    assert tuning(found, tmp_path, cells).run()
    assert [name.partition("-")[0] for name in cells.starts] == ["grpo", "reinforce"] * 3
    assert Counter(name for name, _ in cells.epochs) == dict.fromkeys(cells.starts, 5)


def test_the_first_trial_has_the_recipes_own_values_and_later_ones_are_the_same_for_all(
    found: list[Family], tmp_path: Path
) -> None:
    done = tuning(found, tmp_path, Cells())
    done.run()
    grpo, reinforce = (sorted(done.studies.ended(family), key=lambda trial: trial.number) for family in found)
    assert grpo[0].params == {"update.learning_rate": 5e-4, "objective.clip_range": 0.016}
    rates = [[trial.params["update.learning_rate"] for trial in trials] for trials in (grpo, reinforce)]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 3


def test_a_trial_is_a_cell_of_its_values_on_other_prompts_and_another_seed(found: list[Family], tmp_path: Path) -> None:
    done = tuning(found, tmp_path, Cells())
    done.run()
    for family in found:
        for trial in done.studies.ended(family):
            cell = read_cell(tmp_path / "results" / trial.user_attrs["cell"])
            assert {field: value_of(cell, field) for field in trial.params} == trial.params
            assert (cell.recipe.evaluation.split, cell.seed) == ("development", 2)
            assert trial.value == value(cell.recipe.update.learning_rate, 4)
            assert trial.user_attrs["device_hours"] == pytest.approx(0.04)


def test_hopeless_trials_end_early_and_say_why(
    found: list[Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "BEST", 5e-4)  # the recipe's own: few of the later trials can be better
    done = tuning(found, tmp_path, Cells(), trials=10)
    assert done.run()
    for family in found:
        trials = sorted(done.studies.ended(family), key=lambda trial: trial.number)
        pruned = [trial for trial in trials if trial.state.name == "PRUNED"]
        assert pruned
        assert all(trial.state.name == "COMPLETE" for trial in trials[:UNPRUNED])
        best = max(trial.value for trial in trials if trial.state.name == "COMPLETE")
        for trial in pruned:
            folder = tmp_path / "results" / trial.user_attrs["cell"]
            record = read_record(folder)
            assert record is not None
            assert record.status is Status.STOPPED
            assert record.message.startswith("hopeless: ")
            assert record.message in trial.user_attrs["why"]
            assert record.epochs < 4
            assert value(trial.params["update.learning_rate"], 4) < best
            assert not (folder / "checkpoint").exists()


@pytest.mark.parametrize("steps", range(0, 30, 4))
def test_a_killed_tuner_goes_on_without_repeating_anything(tmp_path: Path, steps: int) -> None:
    (tmp_path / "whole").mkdir()
    plan = planned(tmp_path)
    found = families(plan, parse_space(SPACE))
    whole = tuning(found, tmp_path / "whole", Cells())
    whole.run()
    first, second = Cells(dies_after=steps), Cells()
    with pytest.raises(Killed):
        tuning(found, tmp_path, first).run()
    done = tuning(found, tmp_path, second)
    assert done.run()
    trained = first.epochs + second.epochs
    assert len(trained) == len(set(trained)) == 2 * 3 * 5
    assert summary(done) == summary(whole)


def test_more_trials_can_be_asked_for_later(found: list[Family], tmp_path: Path) -> None:
    tuning(found, tmp_path, Cells(), trials=2).run()
    cells = Cells()
    assert tuning(found, tmp_path, cells, trials=3).run()
    assert len(cells.starts) == 2
    assert tuning(found, tmp_path, cells, trials=3).run()
    assert len(cells.starts) == 2


def test_a_diverged_trial_has_no_value_and_counts(found: list[Family], tmp_path: Path) -> None:
    done = tuning(found, tmp_path, Cells(kind=lambda rate: "diverged" if rate == 5e-4 else "done"))
    assert done.run()
    for family in found:
        first = min(done.studies.ended(family), key=lambda trial: trial.number)
        assert (first.state.name, first.user_attrs["why"]) == ("PRUNED", "diverged: because")


def test_a_failed_trial_is_tried_again_by_the_next_starts_and_then_given_up(
    found: list[Family], tmp_path: Path
) -> None:
    cells = Cells(kind=lambda rate: "failed" if rate == 5e-4 else "done")
    assert [tuning(found, tmp_path, cells).run() for _ in range(ATTEMPTS)] == [*[False] * (ATTEMPTS - 1), True]
    done = tuning(found, tmp_path, cells)
    for family in found:
        first, *others = sorted(done.studies.ended(family), key=lambda trial: trial.number)
        assert (first.state.name, first.user_attrs["why"]) == ("FAIL", "failed 3 times: failed: because")
        assert {trial.state.name for trial in others} == {"COMPLETE"}
    assert sorted(Counter(cells.starts).values()) == [1, 1, 1, 1, ATTEMPTS, ATTEMPTS]


def test_an_interrupted_trial_is_left_to_the_next_start_and_is_no_failure(found: list[Family], tmp_path: Path) -> None:
    cells = Cells(kind=lambda rate: "interrupted" if rate == 5e-4 else "done")
    for _ in range(ATTEMPTS):
        done = tuning(found, tmp_path, cells)
        assert not done.run()
        assert said(done).count("interrupted; left to the next `ablate tune`") == 2
    cells.kind = lambda _: "done"
    assert tuning(found, tmp_path, cells).run()
    assert {trial.state.name for family in found for trial in done.studies.ended(family)} == {"COMPLETE"}


def test_a_trial_that_runs_out_of_memory_goes_on_at_once(
    found: list[Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(retries.ANSWERS, Failure.OUT_OF_MEMORY, (0.2, "with smaller batches"))
    cells = Cells(kind=lambda _: "failed" if len(cells.starts) == 1 else "done")
    cells.failure = Failure.OUT_OF_MEMORY
    done = tuning(found, tmp_path, cells)
    assert done.run()
    assert {trial.state.name for family in found for trial in done.studies.ended(family)} == {"COMPLETE"}
    assert cells.starts[0] == cells.starts[1]
    assert len(cells.starts) == 1 + 2 * 3
    assert "failed: because; again in 0.2 s, with smaller batches" in said(done)


def test_values_that_are_not_possible_together_are_a_trial_without_training(tmp_path: Path) -> None:
    text = GRID.replace("[ode]", "[{name: mixed, window: 1}]").replace("reinforce", "epg")
    space = parse_space(["sampler.window=1..4:int", "rollout.num_steps=3..5:int"])
    found = families(planned(tmp_path, text), space)
    cells = Cells()
    done = tuning(found, tmp_path, cells, trials=12)
    assert done.run()
    failed = [trial for family in found for trial in done.studies.ended(family) if trial.state.name == "FAIL"]
    assert failed
    for trial in failed:
        assert trial.params["sampler.window"] >= trial.params["rollout.num_steps"] - 1
        assert trial.user_attrs["why"].startswith("not possible: ")
    assert len(set(cells.starts)) == len(cells.starts)  # equal values are one cell, which is not trained again


@pytest.mark.parametrize("kept", ["a journal", "PostgreSQL"])
def test_two_tuners_share_the_trials_and_do_none_twice(
    found: list[Family], tmp_path: Path, kept: str, request: pytest.FixtureRequest
) -> None:
    url = database(request.getfixturevalue("postgresql_url"), "trials") if kept == "PostgreSQL" else ""

    class Meeting(Cells):
        """In the midst of its first cell another tuner comes, and does all that is left."""

        def submit(self, folders: Sequence[Path]) -> list[Training]:
            training = super().submit(folders)
            if len(self.starts) == 1:
                assert not tuning(found, tmp_path, other, storage=url).run()
            return training

    other, cells = Cells(), Meeting()
    done = tuning(found, tmp_path, cells, storage=url)
    assert done.run()
    assert (len(cells.starts), len(other.starts)) == (1, 5)
    assert len(set(cells.starts + other.starts)) == 6
    assert [len(done.studies.ended(family)) for family in found] == [3, 3]


def test_workers_train_several_trials_at_a_time(found: list[Family], tmp_path: Path) -> None:
    cells = Cells()
    assert tuning(found, tmp_path, cells, workers=3).run()
    first = [name for name, _ in cells.epochs[:3]]
    assert len(set(first)) == 3


def test_a_cell_that_a_killed_tuner_has_left_at_work_is_waited_for(found: list[Family], tmp_path: Path) -> None:
    first = Cells(dies_after=2)
    with pytest.raises(Killed):
        tuning(found, tmp_path, first).run()
    folder = tmp_path / "results" / first.starts[0]
    at_work = threading.Event()

    def finish() -> None:
        with lock(folder):
            at_work.set()
            time.sleep(0.5)
            for epoch in range(2, 5):
                with (folder / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"epoch": epoch, "eval/score": value(5e-4, epoch)}) + "\n")
            write_record(folder, Status.DONE)

    orphan = threading.Thread(target=finish)
    orphan.start()
    at_work.wait()
    second = Cells()
    assert tuning(found, tmp_path, second).run()
    orphan.join()
    assert folder.name not in second.starts
    assert len(second.starts) == 5


def test_other_commands_see_a_trial_as_soon_as_it_begins(found: list[Family], tmp_path: Path) -> None:
    results = tmp_path / "results"

    class Watched(Cells):
        def submit(self, folders: Sequence[Path]) -> list[Training]:
            seen = {state_of(results, cell).cell.id for cell in planned_cells(results)}
            assert seen == {*self.starts, *(folder.name for folder in folders)}
            assert (results / "grid.yaml").read_text() == GRID
            return super().submit(folders)

    assert tuning(found, tmp_path, Watched()).run()
    plan = json.loads((results / "plan.json").read_text())
    assert (plan["grid"], len(plan["cells"])) == ("mini-tune", 6)
    assert all("update.learning_rate" in cell["axes"] for cell in plan["cells"])


def test_a_request_to_stop_the_tuning_stops_the_tuner(found: list[Family], tmp_path: Path) -> None:
    class Stopped(Cells):
        """Somebody asks while the first trials are at work."""

        def submit(self, folders: Sequence[Path]) -> list[Training]:
            ask_launchers(tmp_path / "results")
            training = super().submit(folders)
            training[0].poll()
            return training

    cells = Stopped()
    done = tuning(found, tmp_path, cells, workers=2)
    with pytest.raises(KeyboardInterrupt):
        done.run()
    assert len(cells.starts) == 2
    assert "Stopping: each running trial finishes its epoch and saves." in said(done)
    assert {record.status for folder in cells.starts if (record := read_record(tmp_path / "results" / folder))} == {
        Status.INTERRUPTED
    }
    assert tuning(found, tmp_path, Cells()).run()


def test_results_that_are_mirrored_meanwhile_do_not_hold_up_the_tuner(found: list[Family], tmp_path: Path) -> None:
    done = tuning(found, tmp_path, Cells())
    with lock(tmp_path / "results"):  # as the one writer of MLflow does
        assert done.run()


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["cell.json", "plan.json", "lock 0", "lock 1", "journal.log", "record.json"])
def test_a_full_disk_is_what_is_said(
    found: list[Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    cells = Cells()
    done = tuning(found, tmp_path, cells)

    def full(*_: object) -> None:
        raise FULL

    def write(path: Path, text: str, **how: bool) -> None:
        full() if path.name == place else write_atomic(path, text, **how)

    for module in ("runners.trials", "ablate.record"):
        monkeypatch.setattr(f"{module}.write_atomic", write)
    if place.startswith("lock"):  # of the studies, or of a trial
        locks = [place == f"lock {number}" for number in (1, 0)]
        monkeypatch.setattr("ablate.lock._write", lambda _, owner: full() if owner and locks and locks.pop() else None)
    if place == "journal.log":
        monkeypatch.setattr(JournalFileBackend, "append_logs", full)
    if place == "record.json":  # the cell could not write its own
        cells.kind = lambda _: "failed"
        monkeypatch.setattr("test_tuning.write_record", lambda *_: None)
    with pytest.raises(InputError, match=f"results.*: .*{FULL.strerror}$") as error:
        done.run()
    assert len(str(error.value).splitlines()) == 1
    monkeypatch.undo()
    assert tuning(found, tmp_path, Cells()).run()


def test_a_database_that_goes_is_a_line_and_nothing_is_lost(found: list[Family], tmp_path: Path) -> None:
    if not can_serve():
        pytest.skip("PostgreSQL is not installed")
    with contextlib.ExitStack() as stack:
        url = database(stack.enter_context(postgresql()), "trials")

        class Last(Cells):
            def submit(self, folders: Sequence[Path]) -> list[Training]:
                if len(self.starts) == 2:
                    stack.close()
                return super().submit(folders)

        cells = Last()
        with pytest.raises(InputError, match=r"^--storage postgresql://\.\.\.: .*; the same command goes on") as error:
            tuning(found, tmp_path, cells, storage=url).run()
    assert len(str(error.value).splitlines()) == 1
    assert len(cells.starts) == 3


def test_a_damaged_record_of_a_trial_is_set_aside_and_the_trial_goes_on(found: list[Family], tmp_path: Path) -> None:
    first = Cells(dies_after=3)
    with pytest.raises(Killed):
        tuning(found, tmp_path, first).run()
    folder = tmp_path / "results" / first.starts[0]
    (folder / "record.json").write_text('{"id": "gr')
    assert tuning(found, tmp_path, Cells()).run()
    assert (folder / "damaged-record.json").exists()


def test_without_its_journal_a_tuning_draws_the_same_trials_and_trains_none_again(
    found: list[Family], tmp_path: Path
) -> None:
    done = tuning(found, tmp_path, Cells(), trials=8)
    done.run()
    before = summary(done)
    (tmp_path / "results" / "journal.log").unlink()
    again = tuning(found, tmp_path, cells := Cells(), trials=8)
    assert again.run()
    assert summary(again) == before
    assert cells.starts == []


def damaged(content: bytes, random: Random) -> bytes:
    """A journal whose lines are cut, overwritten, or no operations."""
    lines = content.split(b"\n")
    place, line = random.randrange(len(content)), random.randrange(len(lines) - 1)
    operation = {**json.loads(lines[line]), **random.choice(DAMAGE)}
    lines[line] = random.choice([b"17", b"[1, 2]", b"", json.dumps(operation).encode()])
    cut, flipped = content[:place], bytes([content[place] ^ 1 << random.randrange(8)])
    return random.choice([cut, cut + b"\n", cut + flipped + content[place + 1 :], b"\n".join(lines)])


DAMAGE = ({"op_code": 99}, {"op_code": None}, {"step": "one"}, {"intermediate_value": {}}, {"param_value_internal": []})


def test_a_damaged_journal_is_read_or_refused_with_file_and_line(found: list[Family], tmp_path: Path) -> None:
    with pytest.raises(Killed):
        tuning(found, tmp_path, Cells(dies_after=12)).run()
    content, refused = (tmp_path / "results" / "journal.log").read_bytes(), []
    for seed in range(60):
        folder = tmp_path / str(seed)
        shutil.copytree(tmp_path / "results", folder / "results")
        (folder / "results" / "journal.log").write_bytes(damaged(content, Random(seed)))
        try:
            tuning(found, folder, Cells()).run()
        except InputError as error:
            refused.append(str(error).removeprefix(f"{folder}/results/"))
    place = re.compile(r"journal\.log:\d+: .*not a journal of Optuna, or a damaged one|.*no cell\.json")
    assert [message for message in refused if not place.match(message)] == []
    assert 20 < len(refused) < 60


@pytest.mark.parametrize(
    ("space", "settings", "part"),
    [
        ("objective.clip_rang=0.1..1", {}, "no objective of these cells has a parameter 'clip_rang', did you mean"),
        ("learning_rate=-1..1e-3", {}, "update.learning_rate -1.0 of grpo"),
        ("objective.clip_range=wide|narrow", {}, "grpo: got 'wide'"),
        ("learning_rate=1e-5..1e-3", {"evaluation.split": "development"}, "expected 'evaluation' to report"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_before_anything_is_trained(
    tmp_path: Path, space: str, settings: dict[str, Any], part: str
) -> None:
    with pytest.raises(InputError) as error:
        families(planned(tmp_path, **settings), parse_space([space]))
    assert part in str(error.value)


def test_an_axis_of_the_grid_is_not_tuned(tmp_path: Path) -> None:
    plan = planned(tmp_path, GRID.replace("seeds:", "  update.learning_rate: [1e-4, 1e-3]\nseeds:"))
    with pytest.raises(InputError, match=r"update\.learning_rate is an axis of this grid"):
        families(plan, parse_space(["learning_rate=1e-5..1e-3"]))


def test_combinations_without_what_is_tuned_are_left_out(tmp_path: Path) -> None:
    (only,) = families(planned(tmp_path), parse_space(["objective.clip_range=0.01..0.1"]))
    assert only.base.objective == "grpo"


def test_a_study_changes_with_all_that_its_trials_depend_on(tmp_path: Path) -> None:
    names = set()
    for i, (space, settings) in enumerate([(SPACE[0], {}), (SPACE[0] + ":int", {}), (SPACE[0], {"kl.coef": 0.5})]):
        (tmp_path / str(i)).mkdir()
        text = space.replace("1e-5..1e-3:log:int", "1e-5..1e-2:log")
        names |= {family.study for family in families(planned(tmp_path / str(i), **settings), parse_space([text]))}
    assert len(names) == 6


def tuned(found: list[Family], folder: Path, cells: Cells) -> tuple[Path, dict[str, list[FrozenTrial]]]:
    done = tuning(found, folder, cells)
    done.run()
    ended = {family.study: (family, done.studies.ended(family)) for family in found}
    path = write_tuned_grid(folder / "mini.yaml", ended, ["kl.coef=0"])
    return path, {family.base.objective: trials for family, trials in ended.values()}


def test_the_tuned_grid_has_the_best_values_of_each_combination(found: list[Family], tmp_path: Path) -> None:
    path, trials = tuned(found, tmp_path, Cells())
    plan = make_plan(load_grid(path))
    assert (path.name, plan.grid, len(plan.cells)) == ("mini-tuned.yaml", "mini-tuned", 4)
    for cell in plan.cells:
        best = max(trials[cell.objective], key=lambda trial: trial.value or 0)
        assert {field: value_of(cell, field) for field in best.params} == best.params
        assert (cell.recipe.evaluation.split, cell.grid) == ("evaluation", "mini-tuned")


def test_the_tuned_grid_shows_its_evidence(found: list[Family], tmp_path: Path) -> None:
    path, trials = tuned(found, tmp_path, Cells(kind=lambda rate: "diverged" if rate == 5e-4 else "done"))
    text = path.read_text()
    for part in (
        "from mini.yaml: 2 combinations, 3 trials each.",
        "# Space: learning_rate=1e-5..1e-3:log, objective.clip_range=0.01..0.1:log.",
        "# Budget of a trial: 4 epochs; seed 2, which this grid does not have.",
        "first 6 development prompts",
        "# Other settings of the trials: kl.coef=0.",
        "# reinforce · elbo-simple · ode: 3 trials (2 to the end, 1 ended early), 0.08 device-hours.",
        "#   0: update.learning_rate=0.0005 -> diverged: because",
    ):
        assert part in text
    for trial in trials["reinforce"]:
        if trial.value is not None:
            assert f"#   {trial.number}: update.learning_rate={trial.params['update.learning_rate']:.4g} -> " in text
            assert f" -> {trial.value:.4f}" in text


def test_the_evidence_tells_trials_that_failed_from_values_that_are_not_possible(tmp_path: Path) -> None:
    text = GRID.replace("[ode]", "[{name: mixed, window: 1}]").replace("reinforce", "epg")
    found = families(planned(tmp_path, text), parse_space(["sampler.window=1..4:int", "rollout.num_steps=3..5:int"]))
    cells = Cells(kind=lambda _: "failed" if cells.starts[-1] == cells.starts[0] else "done")
    while not (done := tuning(found, tmp_path, cells, trials=6)).run():
        pass
    path = write_tuned_grid(tmp_path / "mini.yaml", {f.study: (f, done.studies.ended(f)) for f in found})
    text = path.read_text()
    for result, word in (("not possible: ", "not possible"), ("failed 3 times: failed: because", "failed")):
        counts = [int(count) for count in re.findall(rf"(\d+) {word}[,)]", text)]
        assert sum(counts) == text.count(f"-> {result}") > 0


def test_a_combination_without_a_result_keeps_the_values_of_the_recipe(found: list[Family], tmp_path: Path) -> None:
    path, _ = tuned(found, tmp_path, Cells(kind=lambda _: "diverged"))
    assert "No trial has come to its end: the values stay the recipe's." in path.read_text()
    assert {cell.recipe.update.learning_rate for cell in make_plan(load_grid(path)).cells} == {5e-4}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            GRID + "tuned:\n  - {objective: grpo, estimator: elbo, sampler: ode, set: {kl.coef: 1}}\n",
            "has tuned values",
        ),
        (GRID.replace("name: mini", "{name: mini}").partition("\n")[0] + "\n", "is required"),
        (GRID.replace("name: mini", '"name": mini'), "expected its name in a line of its own"),
    ],
)
def test_a_grid_that_cannot_be_written_back_is_refused(tmp_path: Path, text: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        check_target(grid_in(tmp_path, text))


def test_a_file_that_tuning_has_not_written_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mini-tuned.yaml").write_text("mine: yes\n")
    with pytest.raises(InputError, match="`ablate tune` has not written it"):
        check_target(grid_in(tmp_path))
    assert (tmp_path / "mini-tuned.yaml").read_text() == "mine: yes\n"


def ended() -> Any:
    """The exit code of the command in sys.argv."""
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


def test_a_module_in_the_current_folder_is_imported_if_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "of_a_user.py").write_text("raise RuntimeError('it was run')\n")
    monkeypatch.chdir(tmp_path / "code")
    monkeypatch.setenv("ABLATE_PLUGINS", "")
    grid = grid_in(tmp_path, GRID.replace("reinforce]", "'of_a_user:Mine']"))
    words = ["ablate", "tune", str(grid), "--trials", "1", "--space", "learning_rate=1e-5..1e-3"]
    for option, part in (([], "--allow-plugins trusts the current folder"), (["--allow-plugins"], "it was run")):
        monkeypatch.setattr("sys.argv", [*words, *option])
        assert ended() == 2
        assert part in capsys.readouterr().err


def test_a_real_tuning_ends_with_a_grid_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = grid_in(tmp_path, GRID.replace("epochs: 4", "epochs: 1"))
    words = ["ablate", "tune", str(grid), "--trials", "2", "--only", "objective=reinforce", "--workers", "2"]
    words += ["--space", "learning_rate=1e-5..1e-3:log", "--results", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", words)
    assert ended() == 0
    tuned = grid.with_name("mini-tuned.yaml")
    content = tuned.read_bytes()
    assert str(tuned) in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*words, "--launcher", "ray", "--launcher-set", "address=127.0.0.1:9"])
    assert ended() == 0  # nothing is left for a cluster, which is not there
    assert "all have ended, and nothing is left to train" in " ".join(capsys.readouterr().out.split())
    assert tuned.read_bytes() == content
    monkeypatch.setattr("sys.argv", ["ablate", "status", "mini-tune", "--results", str(tmp_path / "results")])
    assert ended() == 0
    folders = [path.parent for path in (tmp_path / "results" / "mini-tune").glob("*/cell.json")]
    assert len(folders) == 2
    for folder in folders:
        record = read_record(folder)
        assert record is not None
        assert (record.status, record.attempts, record.epochs) == (Status.DONE, 1, 1)
    plan = make_plan(load_grid(grid.with_name("mini-tuned.yaml")))
    rates = {cell.recipe.update.learning_rate for cell in plan.cells if cell.objective == "reinforce"}
    assert rates <= {read_cell(folder).recipe.update.learning_rate for folder in folders}
    assert len(rates) == 1
