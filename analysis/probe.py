"""The report of `ablate probe`: its rows become tables and figures. Needs no torch.

SNR = signal / noise is a ratio of means over seeds, each an unbiased estimate; its interval is a bootstrap over seeds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context

from ablate import probe_rows
from ablate.probe_rows import BiasRow, GradientRow, LevelRow, LikelihoodRow, Measured
from ablate.source import InputError
from analysis import probe_figures as figures
from analysis.bootstrap import Array, shares
from analysis.load import axes_label
from analysis.style import RC, save
from analysis.tables import to_csv, to_markdown

SETTING = ["weights", "sampler", "estimator", "axes"]
NOTHING = 1e-9  # of a signal: noise below it is rounding


def read_rows(folder: Path, kind: type[Measured]) -> pd.DataFrame:
    """One file of rows. Without the file, a frame of its columns without rows."""
    rows = [row.model_dump() for row in probe_rows.read_rows(folder / kind.file, kind)]
    return pd.DataFrame([row | {"axes": axes_label(row["axes"])} for row in rows], columns=list(kind.model_fields))


def signal_to_noise(gradients: pd.DataFrame) -> pd.DataFrame:
    """One row per setting and number of points: means over seeds, SNR with intervals, and what SNR 1 costs.

    `snr`: given the rollouts, infinite where the probe takes every step there is. `total_snr`: over rollouts and
    probes. `calls`, `seconds`: of rollout and update, for a total SNR of 1; infinite without a signal.
    """
    rows = []
    for key, group in gradients.groupby([*SETTING, "points"], sort=False):
        row: dict[str, object] = dict(zip([*SETTING, "points"], key, strict=True))
        row |= {"n": len(group), "draws": int(group["draws"].min()), "groups": int(group["groups"].min())}
        for prefix in ("", "total_"):
            parts = [group[f"{prefix}{name}"].to_numpy(float) for name in ("signal", "noise")]
            for name, value in zip(("snr", "snr_low", "snr_high"), _ratio(*parts), strict=True):
                row[prefix + name] = value
        row |= {name: group[name].mean() for name in ("cosine", "effective_points", "largest_share")}
        for unit in ("calls", "seconds"):
            cost = group[f"rollout_{unit}"].mean() + group[f"update_{unit}"].mean()
            row[f"{unit}_once"] = cost
            for name, end in (("", ""), ("_low", "_high"), ("_high", "_low")):
                snr = float(row[f"total_snr{end}"])  # type: ignore[arg-type]
                row[unit + name] = cost / snr if snr > 0 else np.nan if np.isnan(snr) else np.inf
        rows.append(row)
    return pd.DataFrame(rows)


def profile(levels: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, per setting and level: sigma, shares of weight and of total noise, and the level's total SNR."""
    rows = []
    for key, group in levels.groupby(SETTING, sort=False):
        mean = group.groupby("level")[["sigma", "weight_share", "total_signal", "total_noise"]].mean()
        noise = mean["total_noise"] / mean["total_noise"].sum()
        frame = mean.assign(noise_share=noise, total_snr=mean["total_signal"] / mean["total_noise"]).reset_index()
        rows.append(frame.assign(n=group["seed"].nunique(), **dict(zip(SETTING, key, strict=True))))
    columns = [*SETTING, "level", "sigma", "n", "weight_share", "noise_share", "total_snr"]
    return pd.concat(rows, ignore_index=True)[columns] if rows else pd.DataFrame(columns=columns)


def write_probe(folder: Path) -> list[Path]:
    """Write tables and figures beside the rows in results/<grid>/probe/; returns the files, tables first."""
    gradients, levels, bias, likelihoods = (
        read_rows(folder, kind) for kind in (GradientRow, LevelRow, BiasRow, LikelihoodRow)
    )
    if gradients.empty and bias.empty:
        raise InputError(f"{folder}: holds no rows; `ablate probe GRID` measures them")
    written = []
    for name, frame, shown in (
        ("gradients", signal_to_noise(gradients), gradient_text),
        ("bias", bias, bias_text),
    ):
        if len(frame):
            table = frame.drop(columns=["key"], errors="ignore")
            for kind, text in (("csv", to_csv(table)), ("md", to_markdown(shown(table)))):
                path = folder / f"{name}.{kind}"
                path.write_text(text, encoding="utf-8")
                written.append(path)
    with rc_context(RC):
        drawn = figures.drawings(signal_to_noise(gradients), profile(levels), bias, likelihoods)
        for name, figure in drawn.items():
            written += save(figure, folder / name)
    return written


def gradient_text(table: pd.DataFrame) -> pd.DataFrame:
    """The frame of `signal_to_noise` in words."""
    shown = _named(table)
    shown["points"] = table["points"].astype(str)
    for name, label in (("snr", "SNR given the rollouts"), ("total_snr", "SNR")):
        shown[label] = [interval(row[name], row[f"{name}_low"], row[f"{name}_high"]) for _, row in table.iterrows()]
    shown["cosine"] = [f"{value:.2f}" for value in table["cosine"]]
    shown["effective points"] = [f"{value:.2f}" for value in table["effective_points"]]
    shown["largest share"] = [f"{value:.0%}" for value in table["largest_share"]]
    for unit in ("calls", "seconds"):
        shown[f"{unit} for SNR 1"] = [
            interval(row[unit], row[f"{unit}_low"], row[f"{unit}_high"]) for _, row in table.iterrows()
        ]
    return shown.assign(n=table["n"].astype(str))


def bias_text(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of bias.jsonl in words."""
    shown = pd.DataFrame({"world": table["world"]}).join(_named(table))
    shown["gap, nats"] = [f"{row['gap_mean']:.4g} ± {row['gap_error']:.2g}" for _, row in table.iterrows()]
    shown["sd of gap"] = [f"{value:.3g}" for value in table["gap_sd"]]
    shown["sd of a point"] = [f"{value:.3g}" for value in table["point_sd"]]
    shown["bound"] = [
        "none claimed" if not row["bound"] else "holds" if row["bound_holds"] else "violated"
        for _, row in table.iterrows()
    ]
    for name in ("pearson", "spearman"):
        shown[name.capitalize()] = [f"{value:.2f}" for value in table[name]]
    shown["angle, degrees"] = [
        interval(row["angle"], row["angle_low"], row["angle_high"]) for _, row in table.iterrows()
    ]
    return shown.assign(n=table["num_samples"].astype(str), truth=table["oracle"])


def interval(value: float, low: float, high: float) -> str:
    """`1.2 [0.9, 1.6]`."""
    if pd.isna(value):
        return ""
    return _number(value) if pd.isna(low) else f"{_number(value)} [{_number(low)}, {_number(high)}]"


def _number(value: float) -> str:
    if np.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _named(table: pd.DataFrame) -> pd.DataFrame:
    return table[SETTING if table["axes"].any() else SETTING[:3]].copy()


def _ratio(signal: Array, noise: Array) -> tuple[float, float, float]:
    """mean(signal) / mean(noise) with its bootstrap interval over seeds; infinite where noise is rounding alone."""
    if noise.mean() < NOTHING * abs(signal.mean()):
        return np.inf, np.nan, np.nan
    value = float(signal.mean() / noise.mean())
    if len(signal) == 1:
        return value, np.nan, np.nan
    resampled = shares(len(signal))
    low, high = np.quantile(resampled @ signal / (resampled @ noise), [0.025, 0.975], method="inverted_cdf")
    return value, float(low), float(high)
