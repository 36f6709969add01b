"""Every start of a cell and how it ended, whatever became of the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablate.attempts import Attempt, begin, book_lost, complete_last, read_attempts, write_attempts
from ablate.record import Failure, Record, Status, read_record, write_atomic


def test_a_start_that_nobody_saw_end_was_killed(tmp_path: Path) -> None:
    begin(tmp_path, Attempt(started=1.0, host="a"))
    begin(tmp_path, Attempt(started=2.0, host="b"))
    complete_last(tmp_path, status=Status.DONE, ended=3.0, exit_code=0)
    first, second = read_attempts(tmp_path)
    assert (first.status, first.failure, first.ended, first.failed) == (Status.FAILED, Failure.KILLED, None, True)
    assert (second.status, second.ended, second.exit_code, second.failed) == (Status.DONE, 3.0, 0, False)


def test_batches_are_halved_once_for_each_time_that_memory_was_too_small(tmp_path: Path) -> None:
    for failure in (Failure.OUT_OF_MEMORY, Failure.OUT_OF_MEMORY, Failure.KILLED):
        begin(tmp_path, Attempt())
        complete_last(tmp_path, status=Status.FAILED, failure=failure)
    begin(tmp_path, Attempt())
    assert [attempt.halvings for attempt in read_attempts(tmp_path)] == [0, 1, 2, 2]


def test_what_attempts_have_lost_adds_up_to_what_the_cell_has_lost(tmp_path: Path) -> None:
    write_attempts(tmp_path, [Attempt(), Attempt(), Attempt()])
    book_lost(tmp_path, 3600.0, index=-3)
    book_lost(tmp_path, 5400.0, index=-2)
    book_lost(tmp_path, 5400.0)
    assert [attempt.lost_device_hours for attempt in read_attempts(tmp_path)] == [1.0, 0.5, 0.0]
    book_lost(tmp_path, 9e9, index=-4)  # there is none
    assert sum(attempt.lost_device_hours for attempt in read_attempts(tmp_path)) == 1.5


@pytest.mark.parametrize("line", ["{", '{"pid": "none"}', "[]", "\udcff"])
def test_a_damaged_line_is_a_start_of_which_nothing_is_known(tmp_path: Path, line: str) -> None:
    write_attempts(tmp_path, [Attempt(started=1.0)])
    with (tmp_path / "attempts.jsonl").open("ab") as file:
        file.write(line.encode("utf-8", "surrogateescape") + b"\n")
    assert read_attempts(tmp_path) == [Attempt(started=1.0), Attempt()]


@pytest.mark.parametrize(("status", "there"), [(Status.DONE, True), (Status.DIVERGED, True), (Status.FAILED, False)])
def test_the_record_of_an_unfinished_cell_counts_until_it_starts_again(
    tmp_path: Path, status: Status, there: bool
) -> None:
    begin(tmp_path, Attempt())
    record = Record(id="c", status=status, seed=0, attempts=1)
    write_atomic(tmp_path / "record.json", record.model_dump_json())
    assert read_record(tmp_path) == record
    begin(tmp_path, Attempt())
    assert read_record(tmp_path) == (record if there else None)
