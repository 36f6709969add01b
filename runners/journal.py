"""Optuna's journal, a line of JSON per operation: what a kill left of a line is cut, other damage is named."""

from __future__ import annotations

import os
from pathlib import Path

from optuna.exceptions import OptunaError
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from pydantic import BaseModel, ConfigDict, ValidationError

from ablate.source import InputError, dotted, parse_json, shown, text_of

REASON = "not a journal of Optuna, or a damaged one"


class _Operation(BaseModel):
    """What Optuna takes as it is, and fails at later, when it computes with it."""

    model_config = ConfigDict(strict=True)
    step: int = 0
    intermediate_value: float | None = None
    param_value_internal: float = 0.0
    values: list[float] | None = None


class Journal(JournalStorage):
    """Studies in a file. Whatever reads it raises InputError, with file and line, for what Optuna cannot follow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lock = JournalFileSymlinkLock(str(path))
        if path.exists():
            lock.acquire()
            try:
                _drop_unfinished_line(path)
            finally:
                lock.release()
            _check_lines(path)  # Optuna itself looks at the last line only once there is another
        super().__init__(JournalFileBackend(str(path), lock_obj=lock))

    def _sync_with_backend(self) -> None:
        try:
            super()._sync_with_backend()
        except (OptunaError, OSError):
            raise
        except Exception as error:  # of any kind, as Optuna trusts its file
            _check_lines(self._path)
            line, problem = self._replay_result.log_number_read, " ".join(str(error).split())
            raise InputError(f"{self._path}:{line}: {REASON} ({type(error).__name__}: {problem})") from None


def _check_lines(path: Path) -> None:
    """Raises InputError for a line that is no operation; one that is still being written is none yet."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            _Operation.model_validate(parse_json(text_of(line, path, number), str(path), first=number))
        except ValidationError as error:
            problem = error.errors()[0]
            what = f"{dotted(problem['loc'])}: got {shown(problem['input'])}"
            raise InputError(f"{path}:{number}: {what}; {REASON}") from None
        except InputError as error:
            raise InputError(f"{error}; {REASON}") from None


def _drop_unfinished_line(path: Path) -> None:
    """Cut what a kill left of a line, which would spoil the next one."""
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)
            os.fsync(file.fileno())
