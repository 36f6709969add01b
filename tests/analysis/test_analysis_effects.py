"""Numbers against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from written import Writer

from ablate.record import Status
from analysis import effects
from analysis.load import Results, load

ODE, SDE = ("epg", "elbo-adaptive", "ode"), ("epg", "trajectory", "sde")
ACCURACY = "eval/accuracy"


def summary(results: Results) -> dict[str, object]:
    return effects.summary(results.cells, results.metrics, ACCURACY).iloc[0].to_dict()


def test_gain_is_paired_within_a_cell(write: Writer) -> None:
    write.cell(ODE, 0, {0: 0.1, 10: 0.9, 20: 0.5})
    write.cell(ODE, 1, {0: 0.3, 10: 0.9, 20: 0.8})
    row = summary(load(write.plan()))
    # gains 0.4 and 0.5; minus the mean of the bases they would be 0.3 and 0.6
    t = 12.706205  # Student's 97.5 % quantile with one degree of freedom; half the range is the standard error
    assert [row["gain"], row["gain_low"], row["gain_high"]] == pytest.approx([0.45, 0.45 - t * 0.05, 0.45 + t * 0.05])
    assert [row["final"], row["final_low"], row["final_high"]] == pytest.approx(
        [0.65, 0.65 - t * 0.15, 0.65 + t * 0.15]
    )
    assert (row["base"], row["final_iqm"]) == pytest.approx((0.2, 0.65))
    assert (row["n"], row["planned"], row["nfe"], row["device_hours"]) == (2, 2, 20000, 2.0)


def test_only_finished_cells_count_and_diverged_ones_do(write: Writer) -> None:
    write.cell(ODE, 0, {0: 0.2, 10: 0.6})
    write.cell(ODE, 1, {0: 0.2, 5: 0.4, 6: float("nan")}, Status.DIVERGED)
    write.cell(ODE, 2, {0: 0.2, 5: 0.9}, Status.FAILED)
    write.cell(ODE, 3, {0: 0.2, 5: 0.9}, None)
    row = summary(load(write.plan()))
    assert (row["n"], row["planned"]) == (2, 4)
    assert row["final"] == pytest.approx(0.5)
    assert row["states"] == "1 done, 1 diverged, 1 failed, 1 interrupted"


def test_a_configuration_without_results_stays_in_the_summary(write: Writer) -> None:
    write.cell(ODE, 0, None)
    row = summary(load(write.plan()))
    assert row["n"] == 0
    assert np.isnan(row["final"])


def test_curves_are_interpolated_and_end_at_the_final_mean(write: Writer) -> None:
    write.cell(ODE, 0, {0: 0.0, 10: 1.0}, hours=0.1)  # reaches 1 at one hour and stays
    write.cell(ODE, 1, {0: 0.0, 10: 0.5}, hours=0.2)  # reaches 0.5 at two hours
    write.cell(SDE, 0, {0: 0.0, 10: 0.5})
    results = load(write.plan())
    curves = effects.curves(results.cells, results.metrics, ACCURACY, "device_hours")
    curve = curves[curves["configuration"] == "epg · elbo-adaptive · ode"]
    assert curve["x"].tolist() == [0, 1, 2]
    assert curve["mean"].tolist() == pytest.approx([0, 0.625, 0.75])
    assert curve["low"].tolist() == pytest.approx([0, 0.25, 0.5])
    assert curve["high"].tolist() == pytest.approx([0, 1, 1])
    assert set(curve["n"]) == {2}
    alone = curves[curves["configuration"] == "epg · trajectory · sde"]
    assert alone["low"].isna().all()


def test_unfinished_cells_are_strands_and_done_ones_are_not(write: Writer) -> None:
    write.cell(ODE, 0, {0: 0.0, 10: 1.0})
    write.cell(ODE, 1, {0: 0.0, 5: 0.5}, Status.FAILED)
    results = load(write.plan())
    strands = effects.strands(results.cells, results.metrics, ACCURACY, "nfe")
    assert strands[["status", "x", "value"]].to_numpy().tolist() == [["failed", 0, 0], ["failed", 5000, 0.5]]


def test_best_is_per_group_and_needs_a_result(write: Writer) -> None:
    for objective, final in (("grpo", 0.4), ("epg", 0.6)):
        write.cell((objective, "trajectory", "sde"), 0, {0: 0.2, 10: final})
    write.cell(ODE, 0, {0: 0.2}, None)
    results = load(write.plan())
    best = effects.best(effects.summary(results.cells, results.metrics, ACCURACY), ["estimator", "sampler"])
    assert list(best["configuration"]) == ["epg · trajectory · sde"]
