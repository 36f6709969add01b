"""Where studies are stored: a journal or PostgreSQL, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import optuna
import pytest
from postgresql_server import database

from ablate.source import InputError
from runners.studies import open_storage


@pytest.mark.parametrize("where", ["sqlite:///studies.db", "sqlite+pysqlite:///studies.db", "studies.db", "a.sqlite3"])
def test_sqlite_is_refused_with_the_reason(where: str) -> None:
    with pytest.raises(InputError, match="SQLite hands one trial to two workers; expected a journal file"):
        open_storage(where)


def test_other_databases_are_refused_without_showing_their_password() -> None:
    with pytest.raises(InputError, match=r"got mysql://\.\.\., expected a journal file or postgresql://") as error:
        open_storage("mysql://me:secret@host/studies")
    assert "secret" not in str(error.value)


def test_a_database_that_does_not_answer_is_one_line_without_its_password() -> None:
    with pytest.raises(InputError) as error:
        open_storage("postgresql://me:secret@127.0.0.1:9/studies")
    assert str(error.value).startswith("--storage postgresql://...: ")
    assert len(str(error.value).splitlines()) == 1
    assert "secret" not in str(error.value)


def test_without_optuna_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"`ablate tune` needs Optuna: pip install 'ablate\[tune\]'"):
        open_storage(str(tmp_path / "journal.log"))


def numbers(storage: optuna.storages.BaseStorage) -> list[int]:
    return [trial.number for trial in optuna.load_study(study_name="a", storage=storage).trials]


def test_a_journal_is_read_by_optuna_itself(tmp_path: Path) -> None:
    path = tmp_path / "new" / "journal.log"
    optuna.create_study(storage=open_storage(str(path)), study_name="a").ask()
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    assert numbers(optuna.storages.JournalStorage(backend)) == [0]


def test_a_line_that_a_kill_cut_short_does_not_spoil_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    study = optuna.create_study(storage=open_storage(str(path)), study_name="a")
    study.ask()
    whole = path.read_bytes()
    study.ask()
    path.write_bytes(path.read_bytes()[: len(whole) + 7])
    again = open_storage(str(path))
    assert path.read_bytes() == whole
    optuna.load_study(study_name="a", storage=again).ask()
    assert numbers(open_storage(str(path))) == [0, 1]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"two", "cannot be read as JSON: Expecting value"),
        (b'{"op_code":4\xff}', "got the byte 0xff, expected UTF-8"),
        (b"17", "got 17, expected a JSON object"),
        (b"[4]", r"got \[4\], expected a JSON object"),
        (b'{"op_code":99}', r"not a journal .*\(AssertionError: Should not reach\.\)"),
        (b'{"op_code":4}', r"not a journal .*\(KeyError: 'study_id'\)"),
        (b'{"op_code":7,"trial_id":0,"step":1,"intermediate_value":"x","worker_id":""}', "intermediate_value: got 'x'"),
    ],
)
@pytest.mark.parametrize("where", ["in the middle", "at the end"])
def test_a_line_that_is_no_operation_is_named(tmp_path: Path, line: bytes, problem: str, where: str) -> None:
    path = tmp_path / "journal.log"
    optuna.create_study(storage=open_storage(str(path)), study_name="a").ask()
    lines = path.read_bytes().splitlines()
    number = 2 if where == "in the middle" else len(lines) + 1
    path.write_bytes(b"\n".join([*lines[: number - 1], line, *lines[number - 1 :], b""]))
    with pytest.raises(InputError, match=rf"^{path}:{number}: {problem}") as error:
        open_storage(str(path))
    assert "not a journal of Optuna, or a damaged one" in str(error.value)


def test_a_journal_that_is_damaged_while_it_is_used_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    study = optuna.create_study(storage=open_storage(str(path)), study_name="a")
    number = len(path.read_bytes().splitlines()) + 1
    with path.open("ab") as file:
        file.write(b'{"op_code":4,"stu\n')
    with pytest.raises(InputError, match=rf"^{path}:{number}: cannot be read as JSON"):
        study.ask()


def test_studies_are_kept_in_postgresql(postgresql_url: str) -> None:
    where = database(postgresql_url, "studies")
    optuna.create_study(storage=open_storage(where), study_name="a").ask()
    assert numbers(open_storage(where)) == [0]
    with pytest.raises(InputError, match=r'--storage postgresql://\.\.\.: .*database "none" does not exist'):
        open_storage(f"{postgresql_url}/none")
