"""Optuna's side of tuning: where studies are stored, how they draw values, and what is hopeless."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.lock import Taken, lock
from ablate.seeding import derive_seed
from ablate.source import InputError
from runners.databases import with_driver
from runners.trials import Family, writing

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

JOURNAL = "journal.log"
RANDOM = 5  # trials at random, before the sampler learns from those before
UNPRUNED = 4  # trials of a family that are trained to their end, before any is hopeless
PATIENCE = 60  # seconds that another tuner may take to choose its next trial


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
    from runners.journal import Journal  # noqa: PLC0415  (with Optuna)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return Journal(path)
    except OSError as error:
        raise InputError(f"--storage {path}: {error.strerror}") from None


@dataclass(kw_only=True)
class Studies:
    """A study for each family, in one storage that several tuners may share."""

    results: Path  # of the tuning, where its tuners meet
    families: Sequence[Family]
    storage: BaseStorage
    by_name: dict[str, Study] = field(init=False)

    def __post_init__(self) -> None:
        with writing(self.results):
            self.results.mkdir(parents=True, exist_ok=True)
            with self.alone():
                self.by_name = {family.study: _open(self.storage, family) for family in self.families}

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the studies, so that no two tuners choose trials at once. Raises InputError if another one hangs."""
        folder, end = claims(self.results), time.monotonic() + PATIENCE
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(lock(folder))
                    break
                except Taken:  # `lock` has waited a moment
                    if time.monotonic() > end:
                        raise InputError(
                            f"{self.results}: another `ablate tune` is choosing a trial, and hangs"
                        ) from None
            yield

    def begun(self, family: Family) -> list[FrozenTrial]:
        """The trials of a family, without one that was only put forward."""
        found = self.by_name[family.study].get_trials(deepcopy=False)
        return [trial for trial in found if trial.state.name != "WAITING"]

    def ended(self, family: Family) -> list[FrozenTrial]:
        """The trials of a family that have come to an end."""
        return [trial for trial in self.begun(family) if trial.state.is_finished()]

    def complete(self, trials: int) -> bool:
        """Whether so many trials of each family have ended."""
        return all(len(self.ended(family)) >= trials for family in self.families)

    def ask(self, family: Family) -> Trial:
        """A new trial."""
        study = self.by_name[family.study]
        study.sampler = _sampler(len(self.begun(family)))
        return study.ask()

    def adopt(self, family: Family, begun: FrozenTrial) -> Trial:
        """A trial that another process began, to be continued here."""
        study = self.by_name[family.study]
        study.sampler = _sampler(begun.number)
        trial: Trial = _optuna().trial.Trial(study, begun._trial_id)
        return trial


def claims(results: Path) -> Path:
    """The folder of what tuners hold: the studies, and a folder for each trial."""
    folder = results / "claims"
    folder.mkdir(exist_ok=True)
    return folder


def _open(storage: BaseStorage, family: Family) -> Study:
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


def _sampler(number: int) -> Any:
    """The sampler of trial `number`: its random numbers depend on nothing else, so that a restart repeats none, and
    random trials are the same in all families."""
    return _optuna().samplers.TPESampler(seed=derive_seed(number, "tune") % 2**32, n_startup_trials=RANDOM)
