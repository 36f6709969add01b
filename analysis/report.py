"""`ablate report`: results/<grid>/ becomes figures, tables and a page. Needs no torch, no GPU and no server."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from matplotlib import rc_context

from analysis.cell_sections import cell_sections
from analysis.effect_tables import effect_tables, in_words
from analysis.figures import drawings, measured
from analysis.findings import findings
from analysis.load import Results, load
from analysis.page import page
from analysis.published import Comparison, compare, load_published
from analysis.study import study
from analysis.style import RC, hours_unit, save
from analysis.tables import table, text, to_csv, to_latex, to_markdown

LARGE = 500  # cells, above which a report is brief unless it is asked for in full


def write_report(
    results: Path, out: Path | None = None, target: float | None = None, *, brief: bool | None = None
) -> list[Path]:
    """Write figures (PNG, PDF), tables (CSV, Markdown, LaTeX), findings.md and index.html to `out`, or results/report/.

    `target` is the value of the first metric that times are taken to. `brief`: the table, the overview and the cells
    that are not done alone, by default of more than LARGE cells. Returns the files written, the page first. Raises
    InputError if `results` is not a results folder.
    """
    loaded = load(results)
    out = out or results / "report"
    out.mkdir(parents=True, exist_ok=True)
    metrics, hours = measured(loaded), hours_unit(loaded)
    brief = len(loaded.cells) > LARGE if brief is None else brief
    main = study(loaded, metrics[0], hours, target) if metrics and not brief else None
    pictures, written = [], []
    with rc_context(RC):
        for drawing in islice(drawings(loaded, main), 1 if brief else None):
            png, pdf = save(drawing.figure, out / drawing.name)
            pictures.append((png, drawing.caption))
            written += [png, pdf]
    frame = table(loaded, metrics)
    shown = text(frame, hours)
    said = findings(loaded, main) if main else []
    comparisons = _comparisons(loaded)
    contents = {"table.csv": to_csv(frame), "table.md": to_markdown(shown), "table.tex": to_latex(shown)}
    more = {c.name: (c.published.title, c.shown, c.notes) for c in comparisons}
    if main and len(main.runs):
        effects = effect_tables(loaded, main)
        contents |= {"findings.md": "".join(f"- {sentence}\n" for sentence in said)}
        contents |= {f"{name}.csv": to_csv(numbers) for name, numbers in effects.items()}
        if "effects" in effects:
            words = in_words(effects["effects"])
            contents |= {"effects.md": to_markdown(words), "effects.tex": to_latex(words)}
            more = {"effects": ("Share of the variance between runs, omega squared", words, ())} | more
    for c in comparisons:
        names = (f"published-{c.name}.csv", f"published-{c.name}.md", f"published-{c.name}.tex")
        contents |= dict(zip(names, (to_csv(c.numbers), c.markdown(), c.latex()), strict=True))
    sections = _BRIEF if brief else cell_sections(loaded, metrics[0] if metrics else None, hours)
    html = page(loaded, pictures, shown, said=said, tables=more, files=list(contents), sections=sections)
    contents = {"index.html": html, **contents}
    for name, content in contents.items():
        (out / name).write_text(content, encoding="utf-8")
    return [*(out / name for name in contents), *written]


_BRIEF = "<p>This report is brief: <code>ablate report --full</code> adds all figures, effects and cells.</p>"


def _comparisons(results: Results) -> list[Comparison]:
    """Published tables that rows of this grid belong to: from results/published/, beside the grid or in the sources."""
    beside, own = results.folder.parent / "published", Path(__file__).parents[1] / "results" / "published"
    tables = load_published(beside if beside.exists() else own)
    found = [compare(results, name, published) for name, published in tables.items()]
    return [comparison for comparison in found if comparison is not None]
