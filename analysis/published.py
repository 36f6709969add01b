"""Measured values beside published ones, row by row of a published table. YAML and Results -> text, frame.

A file results/published/<name>.yaml has a table as a paper prints it: its source, its protocol in sentences, columns
with the metric here that measures the same, and rows with `match`, the values that make a configuration this row.
"""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import ValidationError, model_validator

from ablate.recipe import Strict, recipe_fields
from ablate.record import read_cell
from ablate.source import Source, counted, explain
from analysis import effects, pairs
from analysis.load import Results
from analysis.tables import latex_escape, to_latex, to_markdown


class Row(Strict):
    """A row of a published table; `values` in the order of its columns, null where the paper has none."""

    names: dict[str, str]
    match: dict[str, str] = {}
    values: tuple[float | None, ...]
    note: str = ""


class Published(Strict):
    """A published table."""

    title: str
    source: str
    protocol: tuple[str, ...]
    columns: dict[str, str]  # name there, metric here
    rows: tuple[Row, ...]

    @model_validator(mode="after")
    def _is_a_table(self) -> Published:
        if not self.rows or not self.columns or not self.rows[0].names:
            raise ValueError("expected columns, and rows with names")
        for i, row in enumerate(self.rows):
            if len(row.values) != len(self.columns):
                raise ValueError(f"row {i} has {len(row.values)} values, expected {len(self.columns)}, one per column")
            if row.names.keys() != self.rows[0].names.keys():
                raise ValueError(f"row {i} has the names {', '.join(row.names)}, the first has others")
        return self


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A published table with what was measured: numbers, the printed cells, and footnotes."""

    name: str
    published: Published
    numbers: pd.DataFrame  # names, column, published, measured, low, high, n
    shown: pd.DataFrame
    bold: frozenset[tuple[int, str]]  # row and column of `shown`: highest, with paired intervals to all others below 0
    notes: tuple[str, ...]

    def markdown(self) -> str:
        notes = "".join(f"{i}. {note}\n" for i, note in enumerate(self.notes, 1))
        return f"{self.published.title}\n\n{to_markdown(self._marked('**', '**'))}\n{notes}"

    def latex(self) -> str:
        """A tabular with booktabs, and its footnotes as lines below."""
        text = to_latex(self._marked("\x01", "\x02")).replace("\x01", r"\textbf{").replace("\x02", "}")
        text = re.sub(r" \\textasciicircum\{\}(\d+)", r"$^{\1}$", text)
        notes = "".join(rf"$^{{{i}}}$ {latex_escape(note)}\\" + "\n" for i, note in enumerate(self.notes, 1))
        return f"% {self.published.source}\n{text}\\par\\footnotesize\n{notes}"

    def _marked(self, before: str, after: str) -> pd.DataFrame:
        marked = self.shown.copy()
        for row, column in self.bold:
            marked.loc[row, column] = f"{before}{marked.loc[row, column]}{after}"
        return marked


def load_published(folder: Path) -> dict[str, Published]:
    """Tables by name; none where there is no such folder. Raises InputError for a damaged one."""
    tables = {}
    for path in sorted(folder.glob("*.yaml")):
        source = Source.read(path)
        try:
            tables[path.stem] = Published.model_validate(source.data)
        except ValidationError as error:
            raise explain(error, Published, source) from None
    return tables


def compare(results: Results, name: str, published: Published) -> Comparison | None:
    """None where no configuration of the grid is a row of this table."""
    found = [_configuration(results, row.match) for row in published.rows]
    if not any(found):
        return None
    tables = {
        metric: effects.summary(results.cells, results.metrics, metric).set_index("configuration")
        for metric in published.columns.values()
        if metric in set(results.metrics["metric"])
    }
    numbers, notes = [], [*published.protocol, _here(results)]
    shown = pd.DataFrame([row.names for row in published.rows])
    for i, row in enumerate(published.rows):
        if row.note:
            notes.append(row.note) if row.note not in notes else None
            last = list(row.names)[-1]
            shown.loc[i, last] = f"{row.names[last]} ^{notes.index(row.note) + 1}"
        for (column, metric), value in zip(published.columns.items(), row.values, strict=True):
            entry = {**row.names, "column": column, "published": value, "n": 0}
            if found[i] and metric in tables:
                measured = tables[metric].loc[found[i]]
                entry |= {"measured": measured["final"], "low": measured["final_low"], "high": measured["final_high"]}
                entry["n"] = int(measured["n"])
            numbers.append(entry)
    names = list(published.rows[0].names)
    frame = pd.DataFrame(numbers).reindex(columns=[*names, "column", "published", "measured", "low", "high", "n"])
    measured_columns = [column for column, metric in published.columns.items() if metric in tables]
    for column in published.columns:
        part = frame[frame["column"] == column].reset_index(drop=True)
        decimals = [len(str(value).partition(".")[2]) for value in part["published"].dropna()]
        digits = max(decimals, default=0)  # as many as are printed there
        shown[column] = ["" if pd.isna(value) else f"{value:.{digits}f}" for value in part["published"]]
        if column in measured_columns:
            shown[f"{column} here"] = [_measured(row) for _, row in part.iterrows()]
    best = frozenset(
        (i, f"{column} here") for column in measured_columns for i in _best(results, published.columns[column], found)
    )
    return Comparison(name=name, published=published, numbers=frame, shown=shown, bold=best, notes=tuple(notes))


def _configuration(results: Results, match: dict[str, str]) -> str | None:
    """The one configuration with these values; fields that the grid does not vary are looked up in the cells."""
    cells = results.cells
    for axis, value in match.items():
        if axis in cells:
            found = cells[axis].astype(str)
            cells = cells[(found == value) | found.str.startswith(f"{value} ")]  # `ode` is `ode solver=dpm2` too
        else:
            cells = cells.loc[[_fixed(results, id, axis) == value for id in cells["id"]]]
    names = cells["configuration"].unique() if match else []
    return str(names[0]) if len(names) == 1 else None


def _fixed(results: Results, id: str, field: str) -> str | None:
    """A field of a cell's recipe by its dotted path; None if there is none, or the cell was never started."""
    folder = results.folder / id
    if field not in recipe_fields() or "." not in field or not (folder / "cell.json").exists():
        return None
    return str(operator.attrgetter(field)(read_cell(folder).recipe))


def _measured(row: pd.Series) -> str:
    if not row["n"] or pd.isna(row["measured"]):
        return ""
    ends = "" if pd.isna(row["low"]) else f" [{row['low']:.3f}, {row['high']:.3f}]"
    return f"{row['measured']:.3f}{ends}, n = {row['n']}"


def _best(results: Results, metric: str, found: list[str | None]) -> list[int]:
    """The row of the highest mean, if its difference to every other row has an interval that excludes 0."""
    finals = effects.finals(results.cells, results.metrics, metric)
    finals = finals[finals["configuration"].isin([name for name in found if name])]
    if finals["configuration"].nunique() < 2:
        return []
    distances = pairs.to_best(finals, "final")
    behind = distances["high"] < 0
    if behind.sum() < len(distances) - 1:
        return []
    return [found.index(distances.loc[~behind, "configuration"].iloc[0])]


def _here(results: Results) -> str:
    """The protocol of the measured values, in a sentence."""
    said = {}
    for name in ("model", "reward", "num_prompts"):
        found = sorted(set(results.cells[name].dropna().astype(str)))
        said[name] = " or ".join(value.removesuffix(".0") for value in found) or "unknown"
    return (
        f"Here: model {said['model']}, reward {said['reward']}, {said['num_prompts']} held-out prompts, "
        f"{counted(results.cells['seed'].nunique(), 'seed')}; mean of the last evaluation with its 95 % interval. "
        "Values of another model or reward are not comparable with published ones; orders and differences may be."
    )
