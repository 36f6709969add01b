"""The page of a report: one HTML file, without scripts, with its pictures inside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from ablate.source import counted
from analysis.cell_sections import embedded
from analysis.load import PHASES, STATUSES, Results

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.lead { font-size: 1.1rem; } figcaption, .note { color: #555; font-size: .9rem; } li { margin: .3rem 0; }
figure { margin: 1.5rem 0; overflow-x: auto; } figure img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #e3e3e3; vertical-align: top; }
thead th { border-bottom: 2px solid #767676; } td { font-variant-numeric: tabular-nums; }
details { margin: .4rem 0; } summary { cursor: pointer; padding: .15rem 0; } a { color: #004f8a; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .pair figure { margin: .5rem 0; } .pair img { width: 20rem; }
pre { background: #f6f6f6; padding: .8rem; font-size: .8rem; overflow-x: auto; }
@media print { body { max-width: none; margin: 0; font-size: 10pt; } figure, tr { break-inside: avoid; } }
"""


_BRACKETS = (
    "Brackets: 95 % interval of the mean over the n finished seeds. It covers the seeds, not the choice of held-out "
    "prompts. Gain: last evaluation minus epoch 0 of the same cell, same prompts and noise."
)
_HOW = (
    '<p class="note">Brackets are 95 % intervals over seeds; how each is computed, and where it fails, is in '
    "docs/statistics.md of the project.</p>"
)


def page(
    results: Results,
    pictures: list[tuple[Path, str]],
    shown: pd.DataFrame,
    *,
    said: Sequence[str] = (),
    tables: Mapping[str, tuple[str, pd.DataFrame, Sequence[str]]] | None = None,
    files: Sequence[str] = (),
    sections: str = "",
) -> str:
    """One file: findings, figures, tables, cells.

    `pictures` are PNG files with their captions; `shown` is the table of results in words; `said` are findings;
    `tables` are more of them by name: title, frame in words, footnotes; `files` are the names of files beside the page;
    `sections` is the HTML of the cells.
    """
    parts = [f"<h1>{escape(results.grid)}</h1>", f'<p class="lead">{escape(sentence(results))}</p>']
    if said:
        items = "\n".join(f"<li>{escape(text)}</li>" for text in said)
        parts.append(f"<h2>Findings</h2>\n<ul>\n{items}\n</ul>\n{_HOW}")
    parts.append("<h2>Figures</h2>")
    if not pictures:
        parts.append("<p>Nothing has been evaluated yet, so there are no figures.</p>")
    parts += [_figure(path, caption) for path, caption in pictures]
    parts += ["<h2>Tables</h2>", _table(shown, "Results"), f'<p class="note">{_BRACKETS}</p>']
    for title, frame, notes in (tables or {}).values():
        parts.append(_table(frame, title))
        if notes:
            parts.append('<ol class="note">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ol>")
    links = ", ".join(f'<a href="{quote(name)}">{escape(name)}</a>' for name in files)
    parts.append(f'<p class="note">The same in files, and more: {links}.</p>' if links else "")
    parts += [_unfinished(results), _excluded(results), _cost(results)]
    if sections:
        parts.append(f"<h2>Cells</h2>\n{sections}")
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>{escape(results.grid)}: report</title>\n"
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def sentence(results: Results) -> str:
    """What was run, in plain words: grid, cells by status, seeds, prompts, exclusions."""
    cells = results.cells
    seeds = sorted(cells["seed"].unique())
    counts = cells["status"].value_counts()
    others = [f"{counts[status]} {status.replace('_', ' ')}" for status in STATUSES[1:] if status in counts]
    prompts = sorted(cells["num_prompts"].dropna().astype(int).unique())
    configurations = counted(cells["configuration"].nunique(), "configuration")
    first = (
        f"Grid {results.grid}: {counts.get('done', 0)} of {counted(len(cells), 'cell')} done"
        f"{' (' + ', '.join(others) + ')' if others else ''}; {configurations}, "
        f"{counted(len(seeds), 'seed')} ({', '.join(map(str, seeds))}); "
        f"{counted(len(results.excluded), 'combination')} excluded."
    )
    return first + (f" Evaluated on {' or '.join(map(str, prompts))} held-out prompts per cell." if prompts else "")


def _figure(path: Path, caption: str) -> str:
    alt = f"{path.stem}: {caption.partition('. ')[0]}"
    pdf = quote(path.with_suffix(".pdf").name)
    return (
        f'<figure><img src="{embedded(path)}" alt="{escape(alt)}">'
        f'<figcaption>{escape(caption)} <a href="{pdf}">{escape(path.stem)} as PDF</a></figcaption></figure>'
    )


def _table(frame: pd.DataFrame, title: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in frame.columns)
    caption = f"<caption>{escape(title)}</caption>" if title else ""
    table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{_rows(frame.to_numpy())}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title or "table")}">{table}</div>'


def _rows(rows: Iterable[Iterable[object]]) -> str:
    return "\n".join(f"<tr>{''.join(f'<td>{escape(str(value))}</td>' for value in row)}</tr>" for row in rows)


def _unfinished(results: Results) -> str:
    """Every cell that is not done, with its message, and folders that the plan does not hold."""
    rows = results.cells[results.cells["status"] != "done"][["id", "status", "attempts", "message"]]
    rows = rows.assign(attempts=["" if math.isnan(n) else f"{n:.0f}" for n in rows["attempts"].astype(float)])
    parts = ["<h2>Cells that are not done</h2>", _table(rows) if len(rows) else "<p>None.</p>"]
    if results.strays:
        parts.append(
            f"<p>In the folder but not in the plan, and not in this report: {escape(', '.join(results.strays))}.</p>"
        )
    return "\n".join(parts)


def _excluded(results: Results) -> str:
    frame = results.excluded if results.excluded["axes"].any() else results.excluded.drop(columns="axes")
    return "<h2>Excluded combinations</h2>\n" + (_table(frame) if len(frame) else "<p>None.</p>")


def _cost(results: Results) -> str:
    """Totals of the ledgers, by phase."""
    cost = results.cells[[f"cost/{phase}" for phase in PHASES]].astype(float)
    known = cost.dropna()
    total = dict(zip(PHASES, known.sum(), strict=True))
    calls = [(f"network {phase}", f"{total.pop(phase):,.0f}") for phase in ("forwards", "backwards")]
    seconds = sum(total.values())
    rows = [(phase, f"{s / 3600:,.3f}", f"{s / seconds:.1%}" if seconds else "") for phase, s in total.items()]
    frame = pd.DataFrame([*rows, ("all", f"{seconds / 3600:,.3f}", "")], columns=["phase", "device-hours", "share"])
    note = (
        f"Totals over the {counted(len(known), 'cell')} with a record, of {len(cost)}. Lost: work of killed attempts."
    )
    return f'<h2>Cost</h2>\n{_table(frame)}\n<p class="note">{note} {"; ".join(": ".join(c) for c in calls)}.</p>'
