"""Optuna's side of tuning: where studies are stored, how they draw values, and what is hopeless."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.seeding import derive_seed
from ablate.source import InputError
from runners.databases import with_driver
from runners.trials import Family

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

JOURNAL = "journal.log"
RANDOM = 5  # trials at random, before the sampler learns from those before
UNPRUNED = 4  # trials of a family that are trained to their end, before any is hopeless


def open_storage(where: str) -> BaseStorage:
    """A journal file, or a PostgreSQL database by its URL. Raises InputError for anything else, and without Optuna."""
    scheme, separator, _ = where.partition("://")
    if where.endswith((".db", ".sqlite", ".sqlite3")) or scheme.startswith("sqlite"):
        raise InputError(
            f"--storage {where}: SQLite hands one trial to two workers; expected a journal file such as {JOURNAL}, or "
            "postgresql://USER@HOST/DATABASE"
        )
    if separator and scheme.partition("+")[0] != "postgresql":
        raise InputError(f"--storage: got {scheme}://..., expected a journal file or postgresql://USER@HOST/DATABASE")
    optuna = _optuna()
    if not separator:
        return _journal(Path(where))
    try:
        storage: BaseStorage = optuna.storages.RDBStorage(with_driver(where))
    except ImportError as error:
        raise InputError(f"--storage postgresql://...: {error}; pip install 'ablate[tune]' has the driver") from None
    except Exception as error:  # the driver's own, of many kinds: no server, no database, no permission
        raise InputError(f"--storage postgresql://...: {type(error).__name__}: {str(error).splitlines()[0]}") from None
    return storage


def _optuna() -> Any:
    try:
        import optuna  # noqa: PLC0415  (an extra)
    except ImportError:
        raise InputError("`ablate tune` needs Optuna: pip install 'ablate[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _journal(path: Path) -> BaseStorage:
    from optuna.storages import JournalStorage  # noqa: PLC0415
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock  # noqa: PLC0415

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalFileSymlinkLock(str(path))
        if path.exists():
            lock.acquire()
            try:
                _drop_unfinished_line(path)
            finally:
                lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except OSError as error:
        raise InputError(f"--storage {path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"--storage {path}: not a journal of Optuna: {error}") from None


def _drop_unfinished_line(path: Path) -> None:
    """Cut what a kill left of a line, which would spoil the next one."""
    with path.open("rb+") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            file.truncate(end)
            os.fsync(file.fileno())


def open_study(storage: BaseStorage, family: Family) -> Study:
    """The study of a family; its first trial has the recipe's own values, where they lie in the space."""
    optuna = _optuna()
    study: Study = optuna.create_study(
        storage=storage,
        study_name=family.study,
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_min_trials=2),
    )
    if not study.get_trials(deepcopy=False) and all(d.holds(family.own[d.field]) for d in family.space):
        study.enqueue_trial(family.own, user_attrs={"own": True})
    return study


def sampler(number: int) -> Any:
    """The sampler of trial `number`: its random numbers depend on nothing else, so that a restart repeats none, and
    random trials are the same in all families."""
    return _optuna().samplers.TPESampler(seed=derive_seed(number, "tune") % 2**32, n_startup_trials=RANDOM)


def adopt(study: Study, number: int) -> Any:
    """A trial that another process began, to be continued here."""
    optuna = _optuna()
    study.sampler = sampler(number)
    frozen = next(trial for trial in study.get_trials(deepcopy=False) if trial.number == number)
    return optuna.trial.Trial(study, frozen._trial_id)
