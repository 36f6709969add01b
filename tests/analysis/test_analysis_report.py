"""Tables, the page, and the whole report where torch cannot be imported."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import Writer

from ablate.record import Status
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


def test_the_page_lists_failures_exclusions_cost_and_samples(results: Results) -> None:
    samples = results.folder / results.cells.loc[0, "id"] / "samples"
    samples.mkdir()
    for name in ("before", "after"):
        (samples / f"{name}.png").touch()
    shown = text(table(results, ["eval/accuracy"]), hours_unit(results))
    html = page(results, [("overview.png", "A < B")], shown, results.folder / "report")
    assert "ValueError: &lt;b&gt; &amp; 100 % | no" in html
    assert "needs &lt;densities&gt;" in html
    assert 'src="overview.png" alt="A &lt; B"' in html
    assert f'src="../{samples.parent.name}/samples/before.png"' in html
    assert "<td>rollout</td><td>1.000</td><td>50.0%</td>" in html  # two cells of one hour, half of it rollout
    assert "network forwards: 21" in html
    assert "<script" not in html


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
    figures = ["overview", "heatmap-accuracy", "curves-accuracy-hours", "curves-accuracy-nfe"]
    expected = {f"{name}.{kind}" for name in figures for kind in ("png", "pdf")}
    expected |= {"index.html", "table.csv", "table.md", "table.tex"}
    assert {path.name for path in out.iterdir()} == expected
    assert {Path(path).name for path in done.stdout.split()} == expected
    html = (out / "index.html").read_text()
    assert all(f'src="{name}.png"' in html for name in figures)
