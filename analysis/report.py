"""`ablate report`: results/<grid>/ becomes figures, tables and a page. Needs no torch, no GPU and no server."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context

from analysis.figures import drawings, measured
from analysis.load import load
from analysis.page import page
from analysis.style import RC, hours_unit, save
from analysis.tables import table, text, to_csv, to_latex, to_markdown


def write_report(results: Path, out: Path | None = None) -> list[Path]:
    """Write figures (PNG, PDF), table.{csv,md,tex} and index.html to `out`, by default results/report/.

    Returns the files written, the page first. Raises InputError if `results` is not a results folder.
    """
    loaded = load(results)
    out = out or results / "report"
    out.mkdir(parents=True, exist_ok=True)
    pictures, written = [], []
    with rc_context(RC):
        for drawing in drawings(loaded):
            png, pdf = save(drawing.figure, out / drawing.name)
            pictures.append((png.name, drawing.caption))
            written += [png, pdf]
    frame = table(loaded, measured(loaded))
    shown = text(frame, hours_unit(loaded))
    contents = {
        "index.html": page(loaded, pictures, shown, out),
        "table.csv": to_csv(frame),
        "table.md": to_markdown(shown),
        "table.tex": to_latex(shown),
    }
    for name, content in contents.items():
        (out / name).write_text(content, encoding="utf-8")
    return [*(out / name for name in contents), *written]
