"""Successive halving: who goes on, what is kept of it, and that a kill decides nothing twice."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from rich.console import Console

from ablate.grid import load_grid
from ablate.halving import arrived, check_choice, judge, read_halving, shares
from ablate.limits import read_limits
from ablate.plan import Cell, make_plan
from ablate.record import Ledger, Record, Status, read_record
from ablate.source import InputError
from runners.halving import run_halving
from runners.sweep import freeze

GRID = Path(__file__).parents[2] / "grids" / "tiny.yaml"
SETTINGS = {"budget.epochs": 8, "budget.device_hours": None}
PLAN = make_plan(load_grid(GRID, SETTINGS))
FIVE = [
    cell for cell in PLAN.cells if (cell.objective, cell.sampler) == ("reinforce", "sde") or cell.objective == "dpo"
]
NAMES = list(dict.fromkeys((c.objective, c.estimator, c.sampler) for c in FIVE))[:5]
CELLS = [cell for cell in FIVE if (cell.objective, cell.estimator, cell.sampler) in NAMES and cell.seed < 2]
VALUE = dict(zip(NAMES, (0.3, 0.5, 0.1, 0.4, 0.2), strict=True))  # of a configuration, plus or minus 0.25 by seed


def value(cell: Cell) -> float:
    return VALUE[cell.objective, cell.estimator, cell.sampler] + (0.25 if cell.seed else -0.25)


class Trainer:
    """Stands in for the training of cells: each goes as far as its limits let it, at once."""

    def __init__(self, results: Path, *, dies_after: int | None = None, fails: Sequence[str] = ()) -> None:
        self.results, self.dies_after, self.fails = results, dies_after, fails
        self.trained: list[tuple[str, int]] = []  # cells with the epoch that they went to

    def __call__(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            if self.dies_after is not None and len(self.trained) >= self.dies_after:
                raise KeyboardInterrupt
            folder = self.results / cell.id
            share = read_limits(folder).share
            status = Status.DONE if share == 1 else Status.PAUSED
            status = Status.FAILED if cell.id in self.fails else status
            record = Record(
                id=cell.id, status=status, seed=cell.seed, epochs=int(8 * share), metrics={"eval/accuracy": value(cell)}
            )
            (folder / "record.json").write_text(record.model_dump_json())
            self.trained.append((cell.id, record.epochs))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    freeze(tmp_path, PLAN.keep(lambda cell: cell in CELLS), GRID.read_text())
    return tmp_path


def halve(results: Path, trainer: Trainer) -> str:
    out = io.StringIO()
    run_halving(results, CELLS, 2, trainer, Console(file=out, width=500))
    return out.getvalue()


def statuses(results: Path) -> Mapping[tuple[str, str, str], list[str]]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for cell in CELLS:
        record = read_record(results / cell.id)
        name = (cell.objective, cell.estimator, cell.sampler)
        found.setdefault(name, []).append(record.status.value if record else "none")
    return found


def test_rungs_double_up_to_the_whole_budget() -> None:
    assert shares(3) == [1 / 8, 1 / 4, 1 / 2]


def test_the_better_half_goes_on_judged_over_seeds(results: Path) -> None:
    trainer = Trainer(results)
    halve(results, trainer)
    epochs = [epoch for _, epoch in trainer.trained]
    assert [epochs.count(n) for n in (2, 4, 8)] == [10, 6, 4]  # 5, 3 and 2 configurations with two seeds each
    by_value = sorted(NAMES, key=lambda name: -VALUE[name])
    assert statuses(results) == {name: ["done" if name in by_value[:2] else "stopped"] * 2 for name in NAMES}


def test_what_was_decided_is_kept_with_its_numbers(results: Path) -> None:
    halve(results, Trainer(results))
    kept = read_halving(results)
    assert kept is not None
    assert (kept.halvings, kept.splits, [rung.share for rung in kept.rungs]) == (2, ("evaluation",), [0.25, 0.5])
    assert [j.score for j in kept.rungs[0].configurations] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    last = next(cell for cell in CELLS if (cell.objective, cell.estimator, cell.sampler) == NAMES[2])
    record = read_record(results / last.id)
    assert record is not None
    assert record.message == ("successive halving: eval/accuracy 0.1 after 1/4 of the budget, place 5 of 5; 3 went on")


@pytest.mark.parametrize("steps", range(0, 20, 3))
def test_a_kill_repeats_nothing_and_changes_no_decision(results: Path, steps: int) -> None:
    first, second = Trainer(results, dies_after=steps), Trainer(results)
    with pytest.raises(KeyboardInterrupt):
        halve(results, first)
    halve(results, second)
    trained = first.trained + second.trained
    assert len(trained) == len(set(trained)) == 20
    assert sorted(set(map(tuple, statuses(results).values()))) == [("done", "done"), ("stopped", "stopped")]


def test_a_rung_waits_for_a_cell_that_failed(results: Path) -> None:
    said = halve(results, Trainer(results, fails=[CELLS[3].id]))
    assert f"waits for 1 cell: {CELLS[3].id}" in said
    halving = read_halving(results)
    assert halving is not None
    assert halving.rungs == ()
    assert "stopped" not in {status for found in statuses(results).values() for status in found}


def test_a_seed_that_diverged_before_its_first_evaluation_puts_its_configuration_last() -> None:
    records = {
        cell.id: Record(id=cell.id, status=Status.PAUSED, seed=cell.seed, metrics={"eval/score": value(cell)})
        for cell in CELLS
    }
    best = next(cell for cell in CELLS if (cell.objective, cell.estimator, cell.sampler) == NAMES[1])
    records[best.id] = Record(id=best.id, status=Status.DIVERGED, seed=best.seed)
    rung = judge(CELLS, records, 0.5)
    assert rung.metric == "eval/score"
    assert best.id in rung.configurations[-1].cells
    assert rung.configurations[-1].score is None
    assert not rung.configurations[-1].goes_on


def test_a_pause_at_an_earlier_rung_is_no_arrival() -> None:
    cell = CELLS[0]
    record = Record(id=cell.id, status=Status.PAUSED, seed=0, epochs=2, cost=Ledger(rollout=1.0))
    assert arrived(cell, record, 0.25)
    assert not arrived(cell, record, 0.5)
    assert not arrived(cell, record.model_copy(update={"status": Status.INTERRUPTED}), 0.25)
    assert arrived(cell, record.model_copy(update={"status": Status.DIVERGED}), 0.5)


def test_results_go_on_only_as_they_were_begun(results: Path) -> None:
    check_choice(results, None, CELLS)
    check_choice(results, 2, CELLS)
    halve(results, Trainer(results))
    check_choice(results, 2, CELLS)
    for halvings, cells, part in [
        (None, CELLS, "go on with --halving 2"),
        (3, CELLS, "go on with --halving 2"),
        (2, CELLS[1:], "compares 10 cells, and 9 other ones are asked for"),
    ]:
        with pytest.raises(InputError) as error:
            check_choice(results, halvings, cells)
        assert part in str(error.value)


def test_results_begun_without_halving_are_not_halved(results: Path) -> None:
    (results / CELLS[0].id / "metrics.jsonl").write_text(json.dumps({"epoch": 0}) + "\n")
    with pytest.raises(InputError, match="has been trained without it"):
        check_choice(results, 2, CELLS)
