"""Cells that ended before their budget did: censored, said so, and in no mean."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from written import Combination, Writer

from ablate.halving import Halving, Judged, Rung
from ablate.record import Status
from analysis import arrival
from analysis.findings import findings
from analysis.load import Results, load
from analysis.report import write_report
from analysis.study import Study, study
from analysis.style import hours_unit

FAST, SLOW, WEAK = (("epg", name, "ode") for name in ("adaptive", "simple", "path_kl"))
CURVES = {FAST: {0: 0.1, 2: 0.5, 4: 0.7}, SLOW: {0: 0.1, 2: 0.3, 4: 0.6}, WEAK: {0: 0.1, 2: 0.2}}


def halved(write: Writer) -> tuple[Results, Study]:
    """Three configurations with two seeds, one of which is stopped at half of the budget."""
    ids: dict[Combination, tuple[str, ...]] = {}
    for combination, curve in CURVES.items():
        status = Status.STOPPED if combination == WEAK else Status.DONE
        ids[combination] = tuple(write.cell(combination, seed, curve, status).name for seed in (0, 1))
    judged = (
        Judged(configuration=" · ".join(c), cells=ids[c], score=CURVES[c][2], goes_on=c != WEAK)
        for c in (FAST, SLOW, WEAK)
    )
    rung = Rung(share=0.5, metric="eval/accuracy", configurations=tuple(judged))
    choice = Halving(halvings=1, splits=("evaluation",), cells=sum(ids.values(), ()), rungs=(rung,))
    folder = write.plan()
    (folder / "halving.json").write_text(choice.model_dump_json())
    results = load(folder)
    return results, study(results, "eval/accuracy", hours_unit(results), target=0.4)


def test_stopped_cells_are_in_no_mean_and_counted(write: Writer) -> None:
    _, found = halved(write)
    table = found.table.set_index("estimator")
    assert table.loc["path_kl", "n"] == 0
    assert table.loc["path_kl", "states"] == "2 stopped"
    assert table.loc["simple", "final"] == pytest.approx(0.6)


def test_a_stopped_configuration_is_followed_to_its_rung_and_a_lower_bound(write: Writer) -> None:
    _, found = halved(write)
    frame = arrival.times_to_target(found.times, found.end).set_index("estimator")
    assert found.end == pytest.approx(0.2 + 0.2 * (0.1 / 0.3))  # of those that finished: the last arrival
    assert frame.loc["path_kl", "time"] == pytest.approx(0.2)
    assert frame.loc["path_kl", "bound"]
    assert not frame.loc[["adaptive", "simple"], "bound"].any()
    assert frame.loc["adaptive", "ratio"] == 1  # the fastest is one whose time is known
    assert frame.loc["path_kl", "ratio"] == pytest.approx(0.2 / frame.loc["adaptive", "time"])


def test_the_survival_curve_is_known_up_to_the_last_censored_cell() -> None:
    def group(*cells: tuple[float, bool, str]) -> pd.DataFrame:
        return pd.DataFrame(cells, columns=["time", "arrived", "status"])

    assert arrival.followed(group((1, True, "done"), (2, False, "stopped")), 5) == 2
    assert arrival.followed(group((3, True, "done"), (2, False, "stopped")), 5) == 5
    assert arrival.followed(group((np.inf, False, "diverged"), (2, False, "stopped")), 5) == 2
    assert arrival.followed(group((np.inf, False, "diverged")), 5) == 5
    assert arrival.followed(group((9, False, "done")), 5) == 5


def test_findings_say_what_was_stopped_and_by_what(write: Writer) -> None:
    (sentence,) = (text for text in findings(*halved(write)) if text.startswith("Successive halving"))
    assert "of 3 configurations, 1 after 1/2 of the budget were stopped" in sentence
    assert "mean of eval/accuracy over seeds on the evaluation prompts" in sentence
    assert "flatters them a little" in sentence


def test_findings_count_cells_that_a_rule_ended(write: Writer) -> None:
    message = "stopped by its rule rollout/score >= 0.95: 0.96 at epoch 2"
    for seed in (0, 1):
        write.cell(FAST, seed, {0: 0.1, 2: 0.5}, message=message if seed else "")
        write.cell(SLOW, seed, {0: 0.1, 2: 0.4})
    results = load(write.plan())
    found = study(results, "eval/accuracy", hours_unit(results))
    (sentence,) = (text for text in findings(results, found) if text.startswith("Stop rules"))
    assert sentence.startswith("Stop rules ended 1 of 4 finished cells")
    assert "(rollout/score >= 0.95 by 1 cell)" in sentence


def test_a_report_of_a_halved_grid_says_so(write: Writer) -> None:
    results, _ = halved(write)
    page, *_ = write_report(results.folder)
    assert "Successive halving: of 3 configurations" in page.read_text(encoding="utf-8")
