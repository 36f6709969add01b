"""Tables and figures of the probe from rows written by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from ablate.probe_rows import BiasRow, GradientRow, LevelRow, LikelihoodRow, Measured, Table
from ablate.source import InputError
from analysis import probe_figures
from analysis.probe import bias_text, gradient_text, profile, read_rows, signal_to_noise, write_probe

COMMON = {"weights": "base", "sampler": "ode", "estimator": "elbo-simple", "axes": {}, "seed": 0}
GRADIENT = {
    "points": 1,
    "groups": 8,
    "group_size": 4,
    "draws": 2,
    "signal": 3.0,
    "noise": 1.0,
    "total_signal": 1.0,
    "total_noise": 4.0,
    "cosine": 0.5,
    "effective_points": 1.0,
    "largest_share": 1.0,
    "rollout_calls": 100.0,
    "update_calls": 300.0,
    "rollout_seconds": 1.0,
    "update_seconds": 2.0,
}
BIAS = {
    "world": "mixture",
    "oracle": "closed form",
    "num_samples": 64,
    "num_dims": 2,
    "truth_error": 0.0,
    "truth_step_error": 0.0,
    "gap_mean": -0.5,
    "gap_sd": 1.0,
    "gap_error": 0.1,
    "point_sd": 2.0,
    "bound": True,
    "bound_holds": True,
    "pearson": 0.9,
    "spearman": 0.8,
    "angle": 12.0,
    "angle_low": 8.0,
    "angle_high": 16.0,
}


def write(folder: Path, kind: type[Measured], *rows: dict[str, Any]) -> None:
    table = Table(folder, kind)
    for row in rows:
        key = row.get("key") or f"k{len(table.keys)}"
        table.replace(key, [kind.model_validate(COMMON | {"key": key} | row)])


def test_snr_is_a_ratio_of_means_over_seeds_with_their_range(tmp_path: Path) -> None:
    seeds = [{"seed": i, "total_signal": s, "total_noise": n} for i, (s, n) in enumerate([(1.0, 4.0), (3.0, 2.0)])]
    write(tmp_path, GradientRow, *(GRADIENT | seed for seed in seeds))
    (row,) = signal_to_noise(read_rows(tmp_path, GradientRow)).to_dict("records")
    assert (row["n"], row["total_snr"]) == (2, pytest.approx(4 / 6))
    assert (row["total_snr_low"], row["total_snr_high"]) == (pytest.approx(0.25), pytest.approx(1.5))
    assert row["calls"] == pytest.approx(400 / (4 / 6))
    assert (row["calls_low"], row["calls_high"]) == (pytest.approx(400 / 1.5), pytest.approx(400 / 0.25))
    assert row["seconds"] == pytest.approx(3 / (4 / 6))


def test_no_signal_costs_without_end_and_no_noise_is_infinite(tmp_path: Path) -> None:
    write(tmp_path, GradientRow, GRADIENT | {"total_signal": -1.0, "noise": 1e-18})
    frame = signal_to_noise(read_rows(tmp_path, GradientRow))
    (row,) = frame.to_dict("records")
    assert row["calls"] == math.inf
    assert row["snr"] == math.inf
    assert math.isnan(row["total_snr_low"])  # one seed has no interval
    (shown,) = gradient_text(frame).to_dict("records")
    assert (shown["SNR given the rollouts"], shown["SNR"], shown["calls for SNR 1"]) == ("∞", "-0.25", "∞")


def test_the_profile_is_a_share_of_all_noise(tmp_path: Path) -> None:
    part = {"signal": 1.0, "noise": 1.0, "total_signal": 1.0, "weight_share": 0.5}
    levels = [part | {"level": i, "sigma": s, "total_noise": n} for i, (s, n) in enumerate([(0.9, 1.0), (0.1, 3.0)])]
    Table(tmp_path, LevelRow).replace("k", [LevelRow.model_validate(COMMON | {"key": "k"} | row) for row in levels])
    frame = profile(read_rows(tmp_path, LevelRow))
    assert frame["noise_share"].tolist() == [0.25, 0.75]
    assert frame["total_snr"].tolist() == [1.0, pytest.approx(1 / 3)]


def test_bias_in_words(tmp_path: Path) -> None:
    other = {"bound": False, "bound_holds": None, "angle": None, "angle_low": None, "angle_high": None}
    write(tmp_path, BiasRow, BIAS, BIAS | {"bound_holds": False}, BIAS | other)
    shown = bias_text(read_rows(tmp_path, BiasRow))
    assert shown["bound"].tolist() == ["holds", "violated", "none claimed"]
    assert shown["angle, degrees"].tolist() == ["12 [8, 16]", "12 [8, 16]", ""]
    assert shown["gap, nats"].tolist() == ["-0.5 ± 0.1"] * 3


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Two estimators, three numbers of points, two seeds, one without a signal; a world and the model."""
    gradients, levels, bias, samples = [], [], [], []
    for estimator, gain in (("elbo-simple", 0.1), ("trajectory", -0.1)):
        for seed in (0, 1):
            name = {"estimator": estimator, "seed": seed}
            gradients += [GRADIENT | name | {"points": k, "total_signal": gain * k * (1 + seed)} for k in (1, 2, 5)]
            levels.append({"level": 0, "sigma": 0.5, "weight_share": 1.0, "signal": 1, "noise": 1} | name)
        for world in ("mixture", "model"):
            key = f"{world}-{estimator}"
            bias.append(BIAS | {"key": key, "world": world, "estimator": f"{estimator} uniform"})
            values = zip(range(8), np.linspace(-3, 1, 8), strict=True)
            samples += [
                {
                    "key": key,
                    "world": world,
                    "estimator": f"{estimator} uniform",
                    "sample": i,
                    "truth": t,
                    "value": t - 40,
                }
                for i, t in values
            ]
    write(tmp_path, GradientRow, *gradients)
    write(tmp_path, LevelRow, *(row | {"total_signal": 1, "total_noise": 2} for row in levels))
    write(tmp_path, BiasRow, *bias)
    for key in dict.fromkeys(row["key"] for row in samples):
        parts = [LikelihoodRow.model_validate(COMMON | row) for row in samples if row["key"] == key]
        Table(tmp_path, LikelihoodRow).replace(key, parts)
    return tmp_path


def test_everything_is_written_twice_with_the_same_bytes(rows: Path) -> None:
    written = write_probe(rows)
    assert [path.name for path in written[:4]] == ["gradients.csv", "gradients.md", "bias.csv", "bias.md"]
    stems = {path.stem for path in written[4:]}
    assert stems == {"snr-points", "snr-cost", "profile", "bias", "angle"}
    before = {path: path.read_bytes() for path in written}
    assert {path: path.read_bytes() for path in write_probe(rows)} == before


def figures(rows: Path) -> dict[str, Figure]:
    snr = signal_to_noise(read_rows(rows, GradientRow))
    others = [read_rows(rows, kind) for kind in (BiasRow, LikelihoodRow)]
    return probe_figures.drawings(snr, profile(read_rows(rows, LevelRow)), *others)


def test_what_has_no_signal_is_drawn_as_an_open_triangle_on_the_floor(rows: Path) -> None:
    ax = figures(rows)["snr-points"].axes[0]
    triangles = [line for line in ax.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in triangles] == [[1, 2, 5]]
    assert triangles[0].get_markerfacecolor() == "white"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "2", "5"]


def test_the_scatter_says_when_the_line_is_not_equality(rows: Path) -> None:
    """A gap of 40 nats: the line of slope one is dashed and shifted, and the gap is written."""
    ax = figures(rows)["bias"].axes[0]
    (line,) = ax.lines
    assert line.get_linestyle() == "--"
    assert np.diff(line.get_ydata()) == pytest.approx(np.diff(line.get_xdata()))
    assert "gap" in ax.texts[0].get_text()


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no rows"):
        write_probe(tmp_path)
