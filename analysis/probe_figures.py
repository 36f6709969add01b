"""Figures of `ablate probe`: signal against points and cost, noise levels, bias, angles. Frames -> Figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from analysis.bootstrap import band_name
from analysis.style import INK, MUTED, Look, palette

LINES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (5, 1.6, 1.2, 1.6)))
MARKERS = ("o", "s", "^", "D", "v", "P")
WIDTH = 7.2  # inches: two columns of a paper


def drawings(
    snr: pd.DataFrame, profile: pd.DataFrame, bias: pd.DataFrame, likelihoods: pd.DataFrame
) -> dict[str, Figure]:
    """What the rows allow, by the name of its files."""
    found: dict[str, Figure] = {}
    for i, (weights, group) in enumerate(snr.groupby("weights", sort=False) if len(snr) else ()):
        end = "" if i == 0 else f"-{weights}"
        looks = looks_of(snr)
        found[f"snr-points{end}"] = against_points(group, looks)
        found[f"snr-cost{end}"] = against_cost(group, looks)
        levels = profile[profile["weights"] == weights]
        if len(levels):
            found[f"profile{end}"] = over_levels(levels, looks)
    if len(likelihoods):
        found["bias"] = scatter(likelihoods, bias)
    if bias["angle"].notna().any() if len(bias) else False:
        found["angle"] = angles(bias)
    return found


def looks_of(frame: pd.DataFrame) -> dict[Any, Look]:
    """Estimator by colour, sampler (and recipe axes) by line and marker."""
    colors = palette(list(dict.fromkeys(frame["estimator"])))
    others = list(dict.fromkeys(zip(frame["sampler"], frame["axes"], strict=True)))
    return {
        (estimator, sampler, axes): Look(
            color=colors[estimator],
            linestyle=LINES[others.index((sampler, axes)) % len(LINES)],
            marker=MARKERS[others.index((sampler, axes)) % len(MARKERS)],
        )
        for estimator, sampler, axes in zip(frame["estimator"], frame["sampler"], frame["axes"], strict=True)
    }


def against_points(snr: pd.DataFrame, looks: dict[Any, Look]) -> Figure:
    """SNR over rollouts and probes, and given the rollouts, against the number of points."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    left, right = figure.subplots(1, 2)
    floor = _floor(snr)
    for ax, column, title in (
        (left, "total_snr", "over rollouts and probes"),
        (right, "snr", "given the rollouts: the probe's own noise"),
    ):
        for key, curve in snr.groupby(["estimator", "sampler", "axes"], sort=False):
            _line(ax, curve.sort_values("points"), "points", column, looks[key], floor)
        ax.set(xscale="log", yscale="log", xlabel="evaluation points per sample", ylabel="signal-to-noise ratio")
        ticks = sorted(snr["points"].unique())
        ax.set_xticks(ticks, [str(k) for k in ticks])
        ax.minorticks_off()
        ax.set_title(title, loc="left", color=INK)
        ax.axhline(1, color=MUTED, linewidth=0.8, zorder=0)
    _legend(figure, snr, looks, _note(snr))
    return figure


def against_cost(snr: pd.DataFrame, looks: dict[Any, Look]) -> Figure:
    """SNR of one update against what it costs; along a line of slope 1 more groups would do as well."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    floor = _floor(snr)
    for ax, unit, label in zip(
        figure.subplots(1, 2), ("calls_once", "seconds_once"), ("network calls", "seconds"), strict=True
    ):
        for key, curve in snr.groupby(["estimator", "sampler", "axes"], sort=False):
            ordered = curve.sort_values("points")
            _line(ax, ordered, unit, "total_snr", looks[key], floor)
            for _, row in ordered.iterrows():
                at = (row[unit], max(row["total_snr"], floor))
                ax.annotate(
                    str(row["points"]),
                    at,
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=7,
                    color=looks[key].color,
                )
        low, high = snr[unit].min(), snr[unit].max()
        top = max(snr["total_snr"].max(), floor)
        for k in (1, 10, 100):
            ax.plot([low, high], np.array([low, high]) / high * top / k, color="#d0d0d0", linewidth=0.8, zorder=0)
        ax.set(xscale="log", yscale="log", xlabel=f"{label} of rollout and update", ylabel="signal-to-noise ratio")
        ax.set_ylim(floor * 0.8, None)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:,g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    _legend(figure, snr, looks, f"{_note(snr)}\nNumbers: points per sample. Grey lines: equal SNR per cost.")
    return figure


def over_levels(profile: pd.DataFrame, looks: dict[Any, Look]) -> Figure:
    """Where the noise of the gradient comes from, and where the weight lies."""
    figure = Figure(figsize=(WIDTH, 3.3), layout="constrained")
    for ax, column, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("noise_share", "weight_share"),
        ("share of the gradient's noise", "share of the estimator's weight"),
        strict=True,
    ):
        for key, curve in profile.groupby(["estimator", "sampler", "axes"], sort=False):
            look = looks[key]
            ax.plot(
                curve["sigma"],
                curve[column],
                color=look.color,
                linestyle=look.linestyle,
                marker=look.marker,
                markersize=4,
            )
        ax.set(xlim=(1.02, -0.02), ylim=(0, None), xlabel="noise level sigma (1 = noise, 0 = data)")
        ax.set_title(title, loc="left", color=INK)
        ax.yaxis.set_major_formatter("{x:.0%}")
    _legend(figure, profile, looks, f"A point at every level; mean over n = {profile['n'].max()} seeds.")
    return figure


def scatter(likelihoods: pd.DataFrame, bias: pd.DataFrame) -> Figure:
    """Value against truth, sample by sample: a row per world, a column per estimator; the line is equality."""
    worlds = list(dict.fromkeys(likelihoods["world"]))
    most = max(likelihoods[likelihoods["world"] == w].groupby(_PANEL, sort=False).ngroups for w in worlds)
    columns = min(most, 6)
    rows = [(w, i) for w in worlds for i in range(-(-_panels(likelihoods, w) // columns))]
    figure = Figure(figsize=(1.55 * columns + 0.3, 1.75 * len(rows) + 0.3), layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_visible(False)
    for world in worlds:
        first = rows.index((world, 0))
        chosen = likelihoods[likelihoods["world"] == world]
        for i, (key, group) in enumerate(chosen.groupby(_PANEL, sort=False)):
            ax = axes[first + i // columns, i % columns]
            ax.set_visible(True)
            _scatter(ax, group, bias[bias["key"] == group["key"].iloc[0]].iloc[0])
            weights, sampler, estimator, _ = key
            where = f"{world}, {weights}" if world == "model" else world
            ax.set_title(f"{where}\n{estimator}\n{sampler}".replace("sampler_grid", "grid"), fontsize=6.5, loc="left")
    figure.supxlabel("true log-likelihood, nats", fontsize=9)
    figure.supylabel("estimate, nats", fontsize=9)
    return figure


def angles(bias: pd.DataFrame) -> Figure:
    """Degrees between each estimator's policy gradient and the true one: a panel per world."""
    shown = bias[bias["angle"].notna()].copy()
    worlds = list(dict.fromkeys(shown["world"]))
    closed = [w for w in worlds if w != "model"]
    shown["row"] = [_row(row) for _, row in shown.iterrows()]
    shown["law"] = [
        row["estimator"].partition(" ")[2] if row["world"] != "model" else "" for _, row in shown.iterrows()
    ]
    laws = [law for law in dict.fromkeys(shown["law"]) if law]
    colors = palette(laws) | {"": INK}
    heights = [len(dict.fromkeys(shown.loc[shown["world"].isin(part), "row"])) for part in (closed, ["model"])]
    used = [(part, h) for part, h in zip((closed, ["model"]), heights, strict=True) if h]
    figure = Figure(figsize=(WIDTH, 0.9 + sum(0.34 * h + 0.5 for _, h in used)), layout="constrained")
    grids = figure.add_gridspec(len(used), 1, height_ratios=[h + 1.2 for _, h in used])
    for place, (part, _) in enumerate(used):
        names = list(dict.fromkeys(shown.loc[shown["world"].isin(part), "row"]))
        panels = grids[place].subgridspec(1, len(part)).subplots(sharey=True, squeeze=False)[0]
        for ax, world in zip(panels, part, strict=True):
            _angles(ax, shown[shown["world"] == world], names, colors, laws)
            ax.set_title(world if world != "model" else "the model, against its ODE", loc="left", color=INK)
    handles = [
        Line2D([], [], linestyle="", marker=_marker(law, laws), color=colors[law], label=law.replace("_", " "))
        for law in laws
    ]
    if handles:
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=8)
    figure.supxlabel("degrees to the true policy gradient; marker: law of sigma; bars: 95 % interval", fontsize=9)
    return figure


_PANEL = ["weights", "sampler", "estimator", "axes"]


def _panels(likelihoods: pd.DataFrame, world: str) -> int:
    return int(likelihoods[likelihoods["world"] == world].groupby(_PANEL).ngroups)


def _row(row: pd.Series) -> str:
    name = row["estimator"].partition(" ")[0] if row["world"] != "model" else row["estimator"]
    place = "" if row["sampler"] == "exact" else f", {row['sampler']}"
    return f"{name}{place}" + (f" ({row['weights']})" if row["world"] == "model" else "")


def _marker(law: str, laws: list[str]) -> str:
    return MARKERS[laws.index(law) % len(MARKERS)] if law else "o"


def _angles(ax: Axes, rows: pd.DataFrame, names: list[str], colors: dict[str, str], laws: list[str]) -> None:
    for _, row in rows.iterrows():
        place = laws.index(row["law"]) if row["law"] else (len(laws) - 1) / 2
        y = names.index(row["row"]) + (0.14 * (place - (len(laws) - 1) / 2) if laws else 0)
        color = colors[row["law"]]
        ax.plot([row["angle_low"], row["angle_high"]], [y, y], color=color, linewidth=1.2, alpha=0.6)
        ax.plot(row["angle"], y, marker=_marker(row["law"], laws), markersize=4, color=color)
    ax.axvline(90, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)))
    ax.set_yticks(range(len(names)), names)
    ax.set(ylim=(len(names) - 0.5, -0.5), xlim=(-3, 183), xticks=range(0, 181, 45))


def _scatter(ax: Axes, group: pd.DataFrame, found: pd.Series) -> None:
    ax.scatter(group["truth"], group["value"], s=5, color="#0072B2", alpha=0.6, linewidths=0)
    both = pd.concat([group["truth"], group["value"]])
    centre, half = group["value"].median(), 0.55 * (group["truth"].max() - group["truth"].min())
    inside = both.min() > centre - 6 * half and both.max() < centre + 6 * half
    ends = np.array([group["truth"].min(), group["truth"].max()])
    ax.plot(ends, ends if inside else ends - ends.mean() + centre, color=INK, linewidth=0.9,
            linestyle="-" if inside else (0, (3, 2)))  # fmt: skip
    ax.tick_params(labelsize=6)
    ax.locator_params(nbins=3)
    text = f"r = {found['pearson']:.2f}" + ("" if inside else f"\ngap {found['gap_mean']:.3g}")
    ax.text(0.03, 0.97, text, transform=ax.transAxes, va="top", fontsize=6.5, color=MUTED)


def _line(ax: Axes, curve: pd.DataFrame, x: str, y: str, look: Look, floor: float) -> None:
    """A curve with its intervals; what is not above the floor lies on it, as an open triangle."""
    finite = curve[np.isfinite(curve[y])]
    value = finite[y].clip(lower=floor)
    ax.plot(finite[x], value, color=look.color, linestyle=look.linestyle, linewidth=1.4)
    ends = finite[[f"{y}_low", f"{y}_high"]].clip(lower=floor)
    ax.vlines(finite[x], ends[f"{y}_low"], ends[f"{y}_high"], color=look.color, linewidth=3, alpha=0.3)
    above = finite[y] > floor
    ax.plot(finite.loc[above, x], value[above], linestyle="", marker=look.marker, color=look.color, markersize=4.5)
    ax.plot(
        finite.loc[~above, x], value[~above], linestyle="", marker="v", color=look.color, markersize=6,
        markerfacecolor="white",
    )  # fmt: skip


def _floor(snr: pd.DataFrame) -> float:
    """Where values are drawn that are not distinguishable from none: below the smallest that is."""
    positive = snr.loc[snr["total_snr"] > 1e-3, "total_snr"]
    return float(10 ** np.floor(np.log10(max(positive.min() / 1.5, 1e-3)))) if len(positive) else 1e-3


def _note(snr: pd.DataFrame) -> str:
    return (
        f"Updates on {snr['groups'].max()} groups; n = {snr['n'].max()} seeds, bars: {band_name(snr['n'].max())}. "
        "Open triangles: no signal to be told from noise."
    )


def _legend(figure: Figure, frame: pd.DataFrame, looks: dict[Any, Look], note: str) -> None:
    several = frame["axes"].nunique() > 1
    handles = []
    for key in dict.fromkeys(zip(frame["estimator"], frame["sampler"], frame["axes"], strict=True)):
        look = looks[key]
        label = f"{key[0]}, {key[1]}" + (f", {key[2]}" if several and key[2] else "")
        handles.append(
            Line2D([], [], color=look.color, linestyle=look.linestyle, marker=look.marker, markersize=4.5, label=label)
        )
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), fontsize=8)
    figure.supxlabel(note, fontsize=7.5, color=MUTED, x=0.01, ha="left")
