"""Tables, the page, and the whole report where torch cannot be imported."""

from __future__ import annotations

import csv
import io
import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from written import Writer

from ablate.record import Status
from analysis.cell_sections import cell_sections
from analysis.load import Results, load
from analysis.page import page, sentence
from analysis.report import write_report
from analysis.style import hours_unit
from analysis.tables import latex_escape, table, text, to_csv, to_latex, to_markdown

ODE, SDE, IMPOSSIBLE = ("epg", "elbo-path_kl", "ode"), ("epg", "trajectory", "sde"), ("epg", "trajectory", "ode")
ROOT = Path(__file__).parents[2]
BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers", "mlflow", "runners"}:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from pathlib import Path
from analysis.report import write_report
for path in write_report(Path(sys.argv[1])):
    print(path)
"""


@pytest.fixture
def results(write: Writer) -> Results:
    write.cell(ODE, 0, {0: 0.2, 10: 0.59})
    write.cell(ODE, 1, {0: 0.2, 10: 0.61})
    write.cell(SDE, 0, {0: 0.2}, Status.FAILED, "ValueError: <b> & 100 % | no")
    write.exclude(IMPOSSIBLE, "needs <densities>")
    return load(write.plan())


def test_one_frame_three_formats(results: Results) -> None:
    frame = table(results, ["eval/accuracy", "eval/score"])
    shown = text(frame, hours_unit(results))
    rows = list(csv.DictReader(io.StringIO(to_csv(frame))))
    assert [row["n"] for row in rows] == ["2", "0", "0"]
    assert [float(rows[0][f"accuracy{end}"]) for end in ("", "_low", "_high", "_gain")] == [
        0.6,
        0.472938,
        0.727062,
        0.4,
    ]
    assert rows[2]["states"] == "excluded: needs <densities>"
    markdown = to_markdown(shown).splitlines()
    assert len(markdown) == 5
    assert "| elbo-path_kl | ode | 0.600 [0.473, 0.727] | +0.400 [+0.273, +0.527] |" in markdown[2]
    assert markdown[3].endswith("| 0 |  |  | 1 failed |")
    latex = to_latex(shown)
    assert r"epg & elbo-path\_kl & ode & 0.600 [0.473, 0.727]" in latex
    assert r"excluded: needs \textless{}densities\textgreater{} \\" in latex
    assert latex.count(r"\\") == 4
    assert r"\toprule" in latex


def test_latex_escapes_each_special_character_once() -> None:
    assert latex_escape(r"a_b & 5% {x} \y") == r"a\_b \& 5\% \{x\} \textbackslash{}y"


def test_markdown_keeps_its_columns() -> None:
    assert to_markdown(pd.DataFrame({"a": ["x|y"]})).splitlines()[-1] == r"| x\|y |"


def test_the_first_line_says_what_was_run(results: Results) -> None:
    assert sentence(results) == (
        "Grid little: 2 of 3 cells done (1 failed); 2 configurations, 2 seeds (0, 1); 1 combination excluded. "
        "Evaluated on 600 held-out prompts per cell."
    )


def test_the_page_has_findings_failures_exclusions_cost_and_cells(results: Results, tmp_path: Path) -> None:
    samples = results.folder / results.cells.loc[0, "id"] / "samples"
    samples.mkdir()
    for name in ("before", "after"):
        (samples / f"{name}.png").write_bytes(name.encode())
    picture = tmp_path / "overview.png"
    picture.write_bytes(b"png")
    unit = hours_unit(results)
    shown = text(table(results, ["eval/accuracy"]), unit)
    sections = cell_sections(results, "eval/accuracy", unit)
    html = page(results, [(picture, "A < B. More")], shown, said=["x < y"], files=["table.csv"], sections=sections)
    assert "<li>x &lt; y</li>" in html
    assert "ValueError: &lt;b&gt; &amp; 100 % | no" in html
    assert "needs &lt;densities&gt;" in html
    assert 'src="data:image/png;base64,cG5n" alt="overview: A &lt; B"' in html
    assert '<a href="table.csv">' in html
    assert "base64,YmVmb3Jl" in html  # the samples before training
    assert "<td>rollout</td><td>1.000</td><td>50.0%</td>" in html  # two cells of one hour, half of it rollout
    assert "network forwards: 21" in html
    assert "learning_rate: " in html  # the recipe card
    assert 'aria-label="from 0.200 to 0.590 in 2 evaluations"' in html
    assert "<script" not in html
    assert not re.findall(r'(?:src|href)="(?:https?:|//|\.\./)', html)  # it works offline, and moved elsewhere


class Outline(HTMLParser):
    """What a screen reader needs: images with words, headers with a scope, one main heading."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.headings: list[int] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag == "img" and not named.get("alt"):
            self.problems.append("an image without alt")
        if tag == "th" and not named.get("scope"):
            self.problems.append("a header without scope")
        if tag == "svg" and not (named.get("role") == "img" and named.get("aria-label")):
            self.problems.append("a drawing without a label")
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))


def test_a_report_is_the_same_twice_and_can_be_read_aloud(results: Results, tmp_path: Path) -> None:
    first, second = (write_report(results.folder, tmp_path / name) for name in ("first", "second"))
    texts = [path for path in first if path.suffix != ".pdf"]
    assert {path.suffix for path in texts} == {".html", ".csv", ".md", ".tex", ".png"}
    assert [p.name for p, q in zip(first, second, strict=True) if p.read_bytes() != q.read_bytes()] == []
    outline = Outline()
    outline.feed(first[0].read_text())
    assert outline.problems == []
    assert outline.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(outline.headings))


def test_the_target_can_be_said(results: Results) -> None:
    write_report(results.folder, target=0.3)
    report = results.folder / "report"
    assert "Target 0.3 (as asked for): reached by 2 of 3 cells" in (report / "findings.md").read_text()
    row = next(csv.DictReader((report / "time-to-target.csv").open()))
    assert float(row["time"]) == pytest.approx((1 / 3.9 + 1 / 4.1) / 2, rel=1e-4)  # of one hour, linear from 0.2


def test_a_grid_that_has_not_begun_has_a_report(write: Writer, tmp_path: Path) -> None:
    write.cell(ODE, 0, None)
    written = write_report(write.plan(), tmp_path / "elsewhere")
    assert {path.name for path in written} == {"index.html", "table.csv", "table.md", "table.tex"}
    assert "1 not started" in (tmp_path / "elsewhere" / "index.html").read_text()


def test_report_runs_without_torch(write: Writer) -> None:
    write.cell(ODE, 0, {0: 0.2, 10: 0.5}, score=False)
    write.cell(ODE, 1, {0: 0.2, 5: 0.4}, None, score=False)
    write.exclude(IMPOSSIBLE)
    folder = write.plan()
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    out = folder / "report"
    figures = ["overview", "time-to-target", "heatmap-accuracy", "curves-accuracy-hours", "curves-accuracy-nfe"]
    expected = {f"{name}.{kind}" for name in figures for kind in ("png", "pdf")}
    expected |= {
        "index.html",
        "table.csv",
        "table.md",
        "table.tex",
        "findings.md",
        "time-to-target.csv",
        "nfe-to-target.csv",
    }
    assert {path.name for path in out.iterdir()} == expected
    assert {Path(path).name for path in done.stdout.split()} == expected
    html = (out / "index.html").read_text()
    assert all(f'alt="{name}: ' in html for name in figures)
