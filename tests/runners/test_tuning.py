"""Tuning: equal budgets, hopeless trials, kills, failures, several tuners at once; and one for real."""

from __future__ import annotations

import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial
from postgresql_server import database
from rich.console import Console

from ablate import cli
from ablate.grid import load_grid
from ablate.lock import lock
from ablate.plan import Plan, make_plan
from ablate.record import Failure, Ledger, Record, Status, read_cell, read_metrics, read_record, write_atomic
from ablate.source import InputError
from ablate.space import parse_space
from runners import retries
from runners.launchers.protocol import Ended
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
    assert isinstance(done.console.file, io.StringIO)
    assert "failed: because; again in 0.2 s, with smaller batches" in done.console.file.getvalue()


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


def test_the_plan_of_the_trials_is_there_for_reports(found: list[Family], tmp_path: Path) -> None:
    tuning(found, tmp_path, Cells()).run()
    plan = json.loads((tmp_path / "results" / "plan.json").read_text())
    assert (plan["grid"], len(plan["cells"])) == ("mini-tune", 6)
    assert all("update.learning_rate" in cell["axes"] for cell in plan["cells"])


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


def test_a_real_tuning_ends_with_a_grid_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = grid_in(tmp_path, GRID.replace("epochs: 4", "epochs: 1"))
    words = ["ablate", "tune", str(grid), "--trials", "2", "--only", "objective=reinforce", "--workers", "2"]
    words += ["--space", "learning_rate=1e-5..1e-3:log", "--results", str(tmp_path / "results")]
    monkeypatch.setattr("sys.argv", words)
    for _ in range(2):  # the second time there is nothing left to train
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
    assert str(grid.with_name("mini-tuned.yaml")) in capsys.readouterr().out
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
