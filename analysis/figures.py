"""Which figures a report has, and what each shows, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from analysis import effects, hacking, ranks
from analysis.arrival_bars import arrival_bars
from analysis.dumbbells import dumbbells
from analysis.hacking_plot import hacking_plot
from analysis.heatmap import heatmap
from analysis.level_panels import level_panels
from analysis.load import Results
from analysis.overview import overview
from analysis.panels import panels
from analysis.rank_plot import rank_plot
from analysis.sample_grid import sample_grid, sheets
from analysis.share_bars import share_bars
from analysis.strip import numeric_axes, strip
from analysis.study import Study
from analysis.style import Unit, hours_unit, metric_label, nfe_unit

METRICS = ("eval/accuracy", "eval/score")
BAND = (
    "Bands: 95 % bootstrap interval of the mean over seeds, with 2 or 3 seeds their range. Brackets: 95 % interval "
    "by Student's t. One seed has neither. A finished cell keeps its last evaluation to the right, so a curve ends "
    "at the value in the table. "
)


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A figure with the name of its files and its caption."""

    name: str
    figure: Figure
    caption: str


def measured(results: Results) -> list[str]:
    """Held-out metrics that this grid has; accuracy first, as what is reported."""
    found = set(results.metrics["metric"])
    return [metric for metric in METRICS if metric in found]


def drawings(results: Results, study: Study | None) -> Iterator[Drawing]:
    """The overview and what follows from it, then per metric heat map and curves, or the results alone."""
    hours, nfe = hours_unit(results), nfe_unit(results)
    for i, metric in enumerate(measured(results)):
        table = effects.summary(results.cells, results.metrics, metric)
        name, word = metric.removeprefix("eval/"), metric_label(metric).capitalize()
        if i == 0:
            figure = overview(results, table, metric, hours)
            yield Drawing(name="overview", figure=figure, caption=f"{word} against {_axis(hours)}. {BAND}")
            if study is not None and len(study.runs):
                yield from _claims(results, study)
        if results.listed:  # a product with a few combinations of many is mostly holes
            yield Drawing(
                name=f"results-{name}",
                figure=dumbbells(table, metric),
                caption=f"{word} before and after training, by combination. Brackets and bars: 95 % interval over the "
                "n finished seeds.",
            )
            continue
        yield Drawing(
            name=f"heatmap-{name}",
            figure=heatmap(results, table, metric),
            caption=f"{word} at the end, by objective, estimator and sampler. Brackets: 95 % interval over the n "
            "finished seeds. A diverged seed counts with its last evaluation.",
        )
        for unit in (hours, nfe):
            yield Drawing(
                name=f"curves-{name}-{'hours' if unit is hours else 'nfe'}",
                figure=panels(results, metric, unit),
                caption=f"{word} against {_axis(unit)}: a column per estimator, a row per sampler. {BAND}Thin lines "
                "are cells without a result yet, or failed.",
            )


def _claims(results: Results, study: Study) -> Iterator[Drawing]:
    """Effect sizes, levels, times to target, strips, hacking, rank stability, samples: as far as there are any."""
    word = metric_label(study.metric)
    if study.separable:
        yield Drawing(
            name="effects",
            figure=share_bars(study),
            caption=f"What explains the variance of {word} between runs: omega squared of each axis, interaction and "
            "the seeds, type-II sums of squares. Bars: 95 % interval. Circles: axes; diamonds: interactions; "
            "square: seeds.",
        )
    if study.separable:  # else a level is a configuration, and the overview has them
        yield Drawing(
            name="levels",
            figure=level_panels(results, study),
            caption=f"Above: interquartile mean of {word} by level of each axis, over values of the other axes that "
            "all levels have. Below: performance profile, the share of those runs that end above a value. "
            "Bands: 95 % bootstrap interval over seeds, stratified by configuration.",
        )
    if study.arrives:
        yield Drawing(
            name="time-to-target",
            figure=arrival_bars(study),
            caption=f"{study.unit.short.capitalize()} to {word} {study.target:.3g}: restricted mean up to the dashed "
            "line, which counts cells that do not arrive; whiskers: 95 % interval. Of a large grid, the "
            "fastest for each estimator and sampler.",
        )
    for field in numeric_axes(results, study):
        yield Drawing(
            name=f"strip-{field}", figure=strip(study, field),
            caption=f"Final {word} against {field}; bands: 95 % interval over seeds.",
        )  # fmt: skip
    changed = hacking.changes(results.cells, results.metrics)
    if len(changed):
        yield Drawing(
            name="hacking",
            figure=hacking_plot(results, changed),
            caption="Reward hacking: change of the training reward against the change of held-out measures that "
            "training does not see, a mark per cell. Filled: the reward rises and the measure falls by more "
            "than its noise. Grey: one deviation of noise.",
        )
    stability = ranks.stability(results.cells, results.metrics, study.metric, study.unit.column)
    if len(stability):
        yield Drawing(
            name="ranks",
            figure=rank_plot(stability, study.metric),
            caption="What a short grid is worth: rank correlation of configuration means at a share of the budget "
            "with those at the end (band: 95 % interval over seeds), and what is lost by taking the leader "
            "there.",
        )
    pictures = sheets(results, study.table)
    if pictures:
        yield Drawing(
            name="samples",
            figure=sample_grid(pictures),
            caption="The same prompts and noise before training and after, first seed of each configuration, best "
            "above.",
        )


def _axis(unit: Unit) -> str:
    if unit.column == "nfe":
        return "network calls (a backward counts as two forwards beside its own)"
    return f"{unit.short} (rollout, reward and update, without evaluation)"
