"""What a grid says, in plain sentences, every number with its interval and its n. Study -> sentences."""

from __future__ import annotations

import numpy as np

from ablate.source import counted
from analysis import arrival, hacking, levels, pairs, ranks
from analysis.design import ALL
from analysis.early_ends import early_ends
from analysis.effect_tables import percent
from analysis.factorial import SEEDS
from analysis.load import Results
from analysis.study import Study
from analysis.style import metric_label


def findings(results: Results, study: Study) -> list[str]:
    """Sentences on: the best configuration, each axis, times to target, reward hacking, short grids, early ends."""
    if study.runs.empty:
        return []
    return [
        *_best(study),
        *_axes(study),
        *_times(study),
        *_hacking(results),
        *_ranks(results, study),
        *early_ends(results),
    ]


def between(value: float, low: float, high: float, sign: str = "") -> str:
    """`0.61 [0.58, 0.64]`; `0.61 (no interval)` where there is none."""
    return f"{value:{sign}.3f} " + ("(no interval)" if np.isnan(low) else f"[{low:{sign}.3f}, {high:{sign}.3f}]")


def _best(study: Study) -> list[str]:
    ranked = study.table[study.table["n"] > 0].sort_values("final", ascending=False, kind="stable")
    first = ranked.iloc[0]
    said = between(first["final"], first["final_low"], first["final_high"])
    text = f"Highest {metric_label(study.metric)}: {first['configuration']}, {said}, {counted(first['n'], 'seed')}."
    if len(ranked) > 1:
        distances = pairs.to_best(study.runs, "final").set_index("configuration")
        others = distances.drop(index=first["configuration"], errors="ignore")
        tied = int((~(others["high"] < 0)).sum())
        text += (
            " Every other is below it: all paired differences have an interval below 0."
            if not tied
            else " The other one cannot be told from it: the paired interval holds 0."
            if len(others) == 1
            else f" {tied} of the other {len(others)} cannot be told from it: their paired intervals hold 0."
        )
    return [text]


def _axes(study: Study) -> list[str]:
    if not study.axes:
        return []
    shape, sentences = study.design, []
    most = int(shape.num_seeds.max())
    seeds = counted(most, "seed") if shape.num_seeds.min() == most else f"{shape.num_seeds.min():.0f} to {most} seeds"
    for response, words in study.responses().items():
        found = study.explained[response].set_index("term")
        if found["omega2"].isna().all():
            continue
        known = found.loc[[axis for axis in study.axes if found.loc[axis, "df"] > 0]]
        parts = [
            f"{axis} explains {percent(row)}" for axis, row in known.sort_values("omega2", ascending=False).iterrows()
        ]
        if not parts:
            parts = [f"the axes together explain {percent(found.loc[ALL])}"]
        parts[1:] = [part.replace("explains ", "") for part in parts[1:]]
        crossed = found[found.index.str.contains(" x ") & (found["low"] > 0)]
        parts += [f"the interaction {term} {percent(row)}" for term, row in crossed.iterrows()]
        rest = f"and {'seeds' if shape.replicated else 'noise'} {percent(found.loc[SEEDS])}"
        label = metric_label(study.metric)
        sentences.append(f"Of the variance of the {words} ({label}), {', '.join(parts)}, {rest}; {seeds}.")
    if study.confounded:
        sentences.append(
            f"In this grid {' and '.join(study.confounded)} change together: their effects cannot be told apart."
        )
    if shape.num_missing:
        sentences.append(
            f"{counted(shape.num_missing, 'combination')} of {shape.num_missing + len(shape.levels)} excluded or "
            "without a finished cell: sums of squares are of type II, and shares need not add up to 100 %."
        )
    if not shape.replicated:
        sentences.append(f"One seed each: what counts as noise is {shape.noise}, not the spread over seeds.")
    return [*sentences, *_levels(study)]


def _levels(study: Study) -> list[str]:
    """The highest and the lowest level of each axis, over what they share."""
    sentences = []
    for axis in study.axes:
        means = levels.means(study.runs, study.axes, axis, "final").sort_values("mean", kind="stable")
        low, high = means["level"].iloc[0], means["level"].iloc[-1]
        found = pairs.levels(study.runs[study.runs[axis].isin([low, high])], study.axes, axis, "final")
        if found.empty or not found["pairs"].iloc[0]:
            continue
        row = found.iloc[0]
        sign = 1 if row["first"] == high else -1
        ends = sorted((sign * row["low"], sign * row["high"])) if row["low"] == row["low"] else (np.nan, np.nan)
        chance = (row["probability"], row["probability_low"], row["probability_high"])
        if sign < 0:
            chance = (1 - chance[0], 1 - chance[2], 1 - chance[1])
        sentences.append(
            f"{axis}: {high} ends {between(sign * row['difference'], ends[0], ends[1], '+')} above {low} over "
            f"{counted(row['pairs'], 'pair')} of configurations that differ in nothing else; a run of it is the higher "
            f"with probability {chance[0]:.2f} [{chance[1]:.2f}, {chance[2]:.2f}]."
        )
    return sentences


def _times(study: Study) -> list[str]:
    if not study.arrives:
        return []
    frame = arrival.times_to_target(study.times, study.end)
    arrived = f"{frame['arrived'].sum()} of {frame['n'].sum()} cells"
    how = (
        "half of the way from the base to the best configuration, chosen after the fact"
        if study.chosen
        else "as asked for"
    )
    sentences = [f"Target {study.target:.3g} ({how}): reached by {arrived} within {_time(study.end, study)}."]
    for axis in study.axes:
        found = arrival.ratios(study.times, study.axes, axis, study.end)
        slower = found[(found["low"] > 1) | (found["bound"] & (found["ratio"] > 1.2))]
        fastest = slower.groupby("second").size()
        if slower.empty:
            continue
        reference = fastest.idxmax()
        parts = [
            f"{row['first']} {'at least ' if row['bound'] else ''}{row['ratio']:.2g} times"
            + ("" if row["low"] != row["low"] else f" [{row['low']:.2g}, {row['high']:.2g}]")
            for _, row in slower[slower["second"] == reference].iterrows()
        ]
        sentences.append(f"{axis}: to the target, {', '.join(parts)} as long as {reference}.")
    return sentences


def _time(hours: float, study: Study) -> str:
    return f"{hours / study.unit.size:.3g} {study.unit.short}"


def _hacking(results: Results) -> list[str]:
    changed = hacking.changes(results.cells, results.metrics)
    if changed.empty:
        return []
    flagged, num = hacking.hacked(changed), changed["id"].nunique()
    names = changed["measure"].unique()
    text = f"Reward hacking: in {len(flagged)} of {counted(num, 'cell')} the training reward rises while a held-out "
    text += f"measure falls below the base by more than its noise ({', '.join(names)}; 5 % over the panel of each cell)"
    if len(flagged):
        most = flagged["measures"].str.split(", ").explode().value_counts()
        text += ": " + ", ".join(f"{name} in {count}" for name, count in most.items())
    return [text + "."]


def _ranks(results: Results, study: Study) -> list[str]:
    found = ranks.stability(results.cells, results.metrics, study.metric, study.unit.column, shares=(0.1,))
    if found.empty or np.isnan(found["tau"].iloc[0]):
        return []
    row = found.iloc[0]
    ends = "" if np.isnan(row["low"]) else f" [{row['low']:.2f}, {row['high']:.2f}]"
    return [
        f"A tenth of the budget orders the {row['configurations']:.0f} configurations as the end does with Kendall's "
        f"tau {row['tau']:.2f}{ends}; taking its leader loses {row['regret']:.3f} at the end."
    ]
