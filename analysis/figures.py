"""Which figures a report has, and what each shows, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.figure import Figure

from analysis import effects
from analysis.dumbbells import dumbbells
from analysis.heatmap import heatmap
from analysis.load import Results
from analysis.overview import overview
from analysis.panels import panels
from analysis.style import Unit, hours_unit, metric_label, nfe_unit

METRICS = ("eval/accuracy", "eval/score")
BAND = (
    "Bands and brackets: 95 % bootstrap interval of the mean over seeds (with 2 or 3 seeds, their range); one seed has "
    "none. A finished cell keeps its last evaluation to the right, so a curve ends at the value in the table. "
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


def drawings(results: Results) -> Iterator[Drawing]:
    """The overview, then per metric the heat map and the curves against device time and NFE, or the results alone."""
    hours, nfe = hours_unit(results), nfe_unit(results)
    for i, metric in enumerate(measured(results)):
        table = effects.summary(results.cells, results.metrics, metric)
        name, word = metric.removeprefix("eval/"), metric_label(metric).capitalize()
        if i == 0:
            figure = overview(results, table, metric, hours)
            yield Drawing(name="overview", figure=figure, caption=f"{word} against {_axis(hours)}. {BAND}")
        if results.listed:  # a product with a few combinations of many is mostly holes
            yield Drawing(
                name=f"results-{name}",
                figure=dumbbells(table, metric),
                caption=f"{word} before and after training, by combination. Brackets and bars: 95 % bootstrap interval "
                f"over the n finished seeds (with 2 or 3, their range).",
            )
            continue
        yield Drawing(
            name=f"heatmap-{name}",
            figure=heatmap(results, table, metric),
            caption=f"{word} at the end, by objective, estimator and sampler. Brackets: 95 % bootstrap interval over "
            f"the n finished seeds (with 2 or 3, their range). A diverged seed counts with its last evaluation.",
        )
        for unit in (hours, nfe):
            yield Drawing(
                name=f"curves-{name}-{'hours' if unit is hours else 'nfe'}",
                figure=panels(results, metric, unit),
                caption=f"{word} against {_axis(unit)}: a column per estimator, a row per sampler. {BAND}"
                f"Thin lines are cells without a result yet, or failed.",
            )


def _axis(unit: Unit) -> str:
    if unit.column == "nfe":
        return "network calls (a backward counts as two forwards beside its own)"
    return f"{unit.short} (rollout, reward and update, without evaluation)"
