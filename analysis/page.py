"""The page of a report: one HTML file without scripts, pictures referenced relatively."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from ablate.source import counted
from analysis.load import PHASES, STATUSES, Results

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.lead { font-size: 1.1rem; } figcaption, .note { color: #555; font-size: .9rem; }
figure { margin: 1.5rem 0; overflow-x: auto; } figure img { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .25rem .7rem; border-bottom: 1px solid #e3e3e3; vertical-align: top; }
thead th { border-bottom: 2px solid #999; } td { font-variant-numeric: tabular-nums; }
.pair { display: inline-block; margin: 0 1.5rem 1rem 0; vertical-align: top; } .pair img { width: 17rem; }
.pair div { display: inline-block; margin-right: .4rem; font-size: .85rem; color: #555; }
"""


def page(results: Results, pictures: list[tuple[str, str]], shown: pd.DataFrame, out: Path) -> str:
    """`pictures` are file names in `out` with their captions; `shown` is the table in words."""
    parts = [f"<h1>{escape(results.grid)}</h1>", f'<p class="lead">{escape(sentence(results))}</p>']
    if not pictures:
        parts.append("<p>Nothing has been evaluated yet, so there are no figures.</p>")
    parts += [_figure(name, caption) for name, caption in pictures]
    parts += [_samples(results, out), "<h2>Table</h2>", _table(shown)]
    parts.append(
        '<p class="note">Brackets: 95 % bootstrap interval of the mean over the n finished seeds; with 2 or 3 seeds it '
        "is no more than their range. It covers the seeds, not the choice of held-out prompts. Gain: last evaluation "
        "minus epoch 0 of the same cell, same prompts and noise. The same table: "
        '<a href="table.csv">CSV</a>, <a href="table.md">Markdown</a>, '
        '<a href="table.tex">LaTeX</a>.</p>'
    )
    parts += [_unfinished(results), _excluded(results), _cost(results)]
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(results.grid)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
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


def _figure(name: str, caption: str) -> str:
    pdf = name.removesuffix("png") + "pdf"
    return (
        f'<figure><img src="{quote(name)}" alt="{escape(caption)}">'
        f'<figcaption>{escape(caption)} <a href="{quote(pdf)}">PDF</a></figcaption></figure>'
    )


def _table(frame: pd.DataFrame) -> str:
    head = "".join(f"<th>{escape(str(name))}</th>" for name in frame.columns)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{_rows(frame.to_numpy())}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _rows(rows: Iterable[Iterable[object]]) -> str:
    return "\n".join(f"<tr>{''.join(f'<td>{escape(str(value))}</td>' for value in row)}</tr>" for row in rows)


def _samples(results: Results, out: Path) -> str:
    """Images of the same prompts and noise before and after, for the first seed of each configuration that has them."""
    pairs = []
    for _, group in results.cells.groupby("configuration", sort=False):
        folders = [results.folder / cell / "samples" for cell in group["id"]]
        for folder in folders:
            if (folder / "before.png").exists() and (folder / "after.png").exists():
                sources = [
                    quote(Path(os.path.relpath(folder / f"{w}.png", out)).as_posix()) for w in ("before", "after")
                ]
                images = "".join(
                    f'<div>{word}<br><img loading="lazy" src="{source}" alt="samples {word} training"></div>'
                    for word, source in zip(("before", "after"), sources, strict=True)
                )
                pairs.append(f'<div class="pair"><b>{escape(folder.parent.name)}</b><br>{images}</div>')
                break
    if not pairs:
        return ""
    text = "\n".join(pairs)
    if len(pairs) > 6:
        text = f"<details><summary>{len(pairs)} configurations</summary>\n{text}\n</details>"
    return f"<h2>Samples</h2>\n<p>The same prompts and the same noise, before and after training.</p>\n{text}"


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
