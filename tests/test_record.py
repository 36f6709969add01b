"""Files of results/: whole, of this version, or an error with their name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ablate.json_lines import line_of
from ablate.record import (
    Ledger,
    Record,
    Status,
    read_cell,
    read_json,
    read_metrics,
    read_record,
    write_atomic,
)
from ablate.source import InputError, Location


def test_the_ledger_counts_what_training_costs() -> None:
    ledger = Ledger(rollout=3600, reward=900, update=2700, eval=9999, lost=9999, forwards=10, backwards=4)
    assert ledger.device_hours == 2
    assert ledger.nfe == 22


def test_only_results_are_final() -> None:
    assert [status.value for status in Status if status.final] == ["done", "diverged", "stopped"]


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None
    record = Record(id="a", status=Status.DONE, seed=3, cost=Ledger(update=1.5), metrics={"eval/score": 0.5})
    write_atomic(tmp_path / "record.json", record.model_dump_json(indent=1) + "\n")
    assert read_record(tmp_path) == record
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", [":1: cannot be read as JSON"]),
        ('{\n"format": 1,\n"id"', [":3: cannot be read as JSON"]),
        ("[1]", [":1: got [1], expected a JSON object"]),
        ('{"format": 2}', ["results of format 2", "reads format 1", "--results"]),
        ("{}", ["results of format null", "reads format 1"]),
        ('{"format": 1, "id": "a", "status": "fine", "seed": 0}', ["status", "'done'", "got 'fine'"]),
        ('{"format": 1, "id": "a", "status": "done"}', ["seed"]),
    ],
)
def test_a_damaged_record_is_an_error_with_its_name(tmp_path: Path, content: str, parts: list[str]) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(InputError) as caught:
        read_record(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'record.json'}:")
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(b"{\n\xff}")
    with pytest.raises(InputError, match=r"plan.json:2: got the byte 0xff, expected UTF-8"):
        read_json(tmp_path / "plan.json")


def test_a_folder_without_a_cell(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no cell.json here; `ablate run GRID` writes it"):
        read_cell(tmp_path)
    (tmp_path / "cell.json").write_text('{"format": 1, "id": "a"}')
    with pytest.raises(InputError, match=r"cell.json:1: cannot be read: grid: "):
        read_cell(tmp_path)


def test_metrics_without_their_torn_last_line(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 0}\n{"epoch": 1}\n{"epo')
    assert read_metrics(tmp_path) == [{"epoch": 0}, {"epoch": 1}]


@pytest.mark.parametrize(
    ("line", "part"), [("{", ":2: cannot be read as JSON"), ("5", ":2: got 5, expected a JSON object")]
)
def test_other_damage_in_metrics_is_an_error(tmp_path: Path, line: str, part: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"epoch": 0}}\n{line}\n{{"epoch": 2}}\n')
    with pytest.raises(InputError) as caught:
        read_metrics(tmp_path)
    assert part in str(caught.value)


DOCUMENT = """\
{"name": "a \\"b\\" {c",
 "empty": [], "none": {},
 "cells": [
  {"id": 1, "axes":
   {"x": null,
    "y": "]"}},
  {"id": 2,
   "id": 3}
 ]}
"""


@pytest.mark.parametrize(
    ("location", "line"),
    [
        ((), 1),
        (("empty",), 2),
        (("empty", 0), 2),
        (("none", "x"), 2),
        (("cells", 0, "axes", "x"), 5),
        (("cells", 0, "axes", "y"), 6),
        (("cells", 1), 7),
        (("cells", 1, "id"), 8),
        (("cells", 1, "seed"), 7),
        (("cells", 2), 3),
        (("name", 0), 1),
        (("other", "id"), 1),
    ],
)
def test_the_line_of_a_part_of_a_document_or_of_the_deepest_that_is_there(location: Location, line: int) -> None:
    json.loads(DOCUMENT)
    assert line_of(DOCUMENT, location) == line


def test_a_value_that_cannot_be_is_named_with_its_line(tmp_path: Path) -> None:
    text = Record(id="a", status=Status.DONE, seed=0).model_dump_json(indent=1)
    (tmp_path / "record.json").write_text(text.replace('"forwards": 0', '"forwards": "many"'))
    line = 1 + next(i for i, row in enumerate(text.splitlines()) if "forwards" in row)
    with pytest.raises(InputError, match=rf"record.json:{line}: cannot be read: cost.forwards: .* got 'many'"):
        read_record(tmp_path)
