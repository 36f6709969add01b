"""Reading results: every cell is counted, and what cannot be read is said."""

from __future__ import annotations

import shutil

import pytest
from written import Writer, line

from ablate.lock import lock
from ablate.record import Status
from ablate.source import InputError
from analysis.load import load, values

ODE, SDE = ("epg", "elbo-adaptive", "ode"), ("epg", "trajectory", "sde")


def test_every_planned_cell_has_a_row_whatever_became_of_it(write: Writer) -> None:
    for seed, status in enumerate([*(s for s in Status if s is not Status.EXCLUDED), None]):
        write.cell(ODE, seed, {0: 0.2, 10: 0.3}, status, "ValueError: no" if status == Status.FAILED else "")
    write.cell(SDE, 0, None)
    write.exclude(("epg", "trajectory", "ode"))
    results = load(write.plan())
    assert list(results.cells["status"]) == [
        *(status.value for status in Status if status is not Status.EXCLUDED),
        *["interrupted", "not started"],
    ]
    assert results.cells.loc[2, "message"] == "ValueError: no"
    assert results.cells.loc[0, "configuration"] == "epg · elbo-adaptive · ode"
    assert results.cells.loc[0, "num_prompts"] == 600
    assert list(results.excluded["reason"]) == ["no densities"]
    assert values(results, "estimator") == ["elbo-adaptive", "trajectory"]
    assert results.metrics["id"].nunique() == 8


def test_metrics_are_tidy_numbers(write: Writer) -> None:
    write.cell(ODE, 0, {0: 0.2, 10: 0.3})
    metrics = load(write.plan()).metrics
    row = metrics[(metrics["epoch"] == 10) & (metrics["metric"] == "eval/accuracy/counting")]
    assert row[["device_hours", "nfe", "value"]].to_numpy().tolist() == [[1.0, 10000.0, 0.15]]
    assert "note" not in set(metrics["metric"])


def test_a_line_cut_short_is_left_out(write: Writer) -> None:
    folder = write.cell(ODE, 0, {0: 0.2, 10: 0.3}, status=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line(20, 0.4, 2)[:-9])
    assert load(write.plan()).metrics["epoch"].max() == 10


def test_a_resumed_cell_replaces_what_it_did_before_the_kill(write: Writer) -> None:
    folder = write.cell(ODE, 0, {0: 0.2, 10: 0.3, 20: 0.9, 30: 0.9}, status=None)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line(20, 0.4, 2))
    metrics = load(write.plan()).metrics
    assert metrics.loc[metrics["metric"] == "eval/accuracy", "value"].tolist() == [0.2, 0.3, 0.4]


def test_a_cell_runs_while_a_process_holds_its_folder(write: Writer) -> None:
    folder = write.cell(ODE, 0, None)
    assert list(load(write.plan()).cells["status"]) == ["not started"]
    (folder / "attempts.jsonl").write_text("{}\n")
    with lock(folder):
        assert list(load(write.folder).cells["status"]) == ["running"]
    assert list(load(write.folder).cells["status"]) == ["interrupted"]


def test_recipe_axes_make_configurations(write: Writer) -> None:
    for coef in (0.0, 1e-4):
        write.cell(ODE, 0, {0: 0.2}, axes={"kl.coef": coef})
    assert list(load(write.plan()).cells["configuration"]) == [
        "epg · elbo-adaptive · ode · kl.coef=0.0",
        "epg · elbo-adaptive · ode · kl.coef=0.0001",
    ]


def test_a_folder_the_plan_does_not_hold_is_named(write: Writer) -> None:
    folder = write.cell(ODE, 0, {0: 0.2})
    shutil.copytree(folder, write.folder / "old")
    assert load(write.plan()).strays == ("old",)


def test_a_folder_that_is_not_results_says_which_are(write: Writer) -> None:
    write.plan()
    with pytest.raises(InputError, match=r"not a results folder.*results/little"):
        load(write.folder.parent)


@pytest.mark.parametrize("name", ["plan.json", "record.json"])
def test_another_format_is_refused(write: Writer, name: str) -> None:
    folder = write.cell(ODE, 0, {0: 0.2})
    write.plan()
    path = (write.folder if name == "plan.json" else folder) / name
    path.write_text(path.read_text().replace('"format": 1', '"format": 2').replace('"format":1', '"format":2'))
    with pytest.raises(InputError, match=rf"{name}:[12]: results of format 2"):
        load(write.folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"epoch": 0, "upd{"epoch": 1}\n', "metrics.jsonl:1: cannot be read as JSON"),
        ("metrics.jsonl", '{"epoch": 0, "eval/score": 1}\n', "1: has no 'device_hours'"),
        ("record.json", '{"format": 1, "id": "x", "status": "fine", "seed": 0}', "status: Input should be"),
        ("record.json", '{"format": 1, "id": "x", "status": "done", "seed": 0}', "1: is of the cell 'x'"),
    ],
)
def test_a_damaged_file_is_an_error_with_its_name(write: Writer, name: str, content: str, message: str) -> None:
    (write.cell(ODE, 0, {0: 0.2}) / name).write_text(content)
    with pytest.raises(InputError, match=message):
        load(write.plan())
