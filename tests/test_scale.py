"""A thousand cells: what is read for them is bounded, however long their metrics are. Work is counted, not time."""

from __future__ import annotations

import builtins
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from rich.console import Console
from scale import write_grid, write_results

from ablate import metric_ends
from ablate.metric_ends import Ends, read_ends
from ablate.plan import Cell
from ablate.record import read_metrics
from ablate.source import InputError
from analysis import report
from runners import cell_state
from runners.cell_state import planned_cells, state_of
from runners.live import live_table

NUM_EPOCHS = 100


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Cell]]:
    folder = tmp_path_factory.mktemp("thousand")
    cells = write_results(write_grid(folder, 1000), folder / "results", NUM_EPOCHS)
    assert len(cells) == 1000
    return folder / "results" / "synthetic", cells


@contextmanager
def counted_opens() -> Iterator[Counter[str]]:
    """How often files of each name are opened."""
    opens: Counter[str] = Counter()
    before = io.open

    def count(file: Any, *args: Any, **options: Any) -> Any:
        opens[Path(file).name if isinstance(file, str | Path) else str(file)] += 1
        return before(file, *args, **options)

    with mock.patch.object(io, "open", count), mock.patch.object(builtins, "open", count):
        yield opens


def test_a_look_at_a_thousand_cells_opens_each_file_once_and_a_second_look_none(
    thousand: tuple[Path, list[Cell]],
) -> None:
    results, cells = thousand
    for cache in (cell_state._record, cell_state._ends, cell_state._attempts):
        cache.cache_clear()
    with counted_opens() as opens:
        states = [state_of(results, cell) for cell in cells]
    with_files = sum((results / cell.id / "metrics.jsonl").exists() for cell in cells)
    assert 900 < with_files < 1000
    assert opens == dict.fromkeys(("record.json", "metrics.jsonl", "attempts.jsonl"), with_files)
    with counted_opens() as again:
        assert [state_of(results, cell) for cell in cells] == states
    assert not again
    done, failed = (sum(state.status == status for state in states) for status in ("done", "failed"))
    assert (done, failed) == (900, 34)
    assert [cell.id for cell in planned_cells(results)] == [cell.id for cell in cells]


def test_the_bytes_read_of_metrics_do_not_grow_with_them(tmp_path: Path) -> None:
    read: dict[int, int] = {}
    before = Path.open

    for epochs in (500, 5000):
        folder = tmp_path / str(epochs)
        folder.mkdir()
        lines = [{"epoch": 0, "eval/score": 0.25}, *({"epoch": n, "rollout/score": 0.5} for n in range(1, epochs))]
        lines += [{"epoch": epochs, "rollout/score": 0.75, "eval/score": 0.5, "filler": "x" * 1000}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        files = []

        def opened(path: Path, *args: Any, **options: Any) -> Any:
            files.append(mock.Mock(wraps=before(path, *args, **options)))  # noqa: B023
            found = mock.MagicMock()
            found.__enter__.return_value = files[-1]  # noqa: B023
            return found

        with mock.patch.object(Path, "open", opened):
            ends = read_ends(folder)
        (file,) = files
        read[epochs] = sum(call.args[0] for call in file.read.call_args_list)
        assert (ends.first["epoch"], ends.last["epoch"], ends.evaluated["epoch"]) == (0, epochs, epochs)
    assert read[500] == read[5000] == metric_ends.BLOCK


def test_the_table_of_a_run_lists_thirty_cells_and_all_failed_ones(thousand: tuple[Path, list[Cell]]) -> None:
    results, cells = thousand
    screen = Console(width=160)
    with screen.capture() as captured:
        screen.print(live_table(screen, [state_of(results, cell) for cell in cells]))
    lines = captured.get().splitlines()
    assert len(lines) == 1 + 34 + 34 + 1  # a header, failed cells, their errors, the summary
    assert "1000 cells: 34 failed, 33 interrupted, 900 done, 33 waiting (966 more not shown)" in lines[-1]


def test_a_large_report_draws_one_figure_and_reads_each_file_once(
    thousand: tuple[Path, list[Cell]], tmp_path: Path
) -> None:
    results, _ = thousand
    with counted_opens() as opens:
        written = report.write_report(results, tmp_path)
    assert {path.name for path in written if path.suffix in (".png", ".pdf")} == {"overview.png", "overview.pdf"}
    with_files = len(list(results.glob("*/metrics.jsonl")))
    assert (opens["metrics.jsonl"], opens["record.json"]) == (with_files, with_files)
    assert 1000 <= opens["cell.json"] < 1100  # once more for some that a published table may have
    page = (tmp_path / "index.html").read_text()
    assert "This report is brief" in page
    for path in results.glob("*/record.json"):
        if json.loads(path.read_text())["status"] != "done":
            assert path.parent.name in page  # no cell that is not done is left out


# the ends of metrics


LINES = [
    {"epoch": 0, "eval/score": 0.25},
    {"epoch": 1, "rollout/score": 0.5},
    {"epoch": 2, "rollout/score": 0.6, "eval/score": 0.3},
    {"epoch": 3, "rollout/score": 0.7},
    {"epoch": 4},
]


@pytest.mark.parametrize("number", range(len(LINES) + 1))
@pytest.mark.parametrize("block", [1, 7, 40, 1 << 14])
@pytest.mark.parametrize("cut", ["", '{"epoch": 9, "eval/sc'])
def test_ends_are_those_of_all_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, block: int, cut: str
) -> None:
    monkeypatch.setattr(metric_ends, "BLOCK", block)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES[:number]) + cut)
    lines = read_metrics(tmp_path)
    assert read_ends(tmp_path) == metric_ends._ends_of(lines)
    assert len(lines) == number


def test_ends_of_a_file_that_is_damaged_or_missing(tmp_path: Path) -> None:
    assert read_ends(tmp_path) == Ends()
    for damaged in ('{"epoch": 0}\n{"epo\n', '[]\n{"epoch": 1}\n', '{"epoch": 0}\n\xff\xfe}\n'):
        (tmp_path / "metrics.jsonl").write_text(damaged)
        with pytest.raises(InputError, match=r"metrics\.jsonl"):
            read_ends(tmp_path)
