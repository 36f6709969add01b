"""`ablate tune`: trials of all families side by side, each an ordinary cell, hopeless ones ended early.

Optuna's storage knows the trials, their folders what became of them. A trial that a kill left behind is continued by
the next `ablate tune`, from its cell's checkpoint, so that nothing is done twice.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from ablate.halving import MEASURES
from ablate.lock import is_locked, lock
from ablate.plan import Cell
from ablate.record import Record, Status, read_cell, read_metrics, read_record
from ablate.source import FieldError, InputError
from runners.halving import stop
from runners.stopping import stop_requests
from runners.studies import adopt, open_study, sampler
from runners.trials import Family, why_failed, write_cell, write_plan

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

ATTEMPTS = 3  # failures of a trial's cell, one per `ablate tune`, until the trial has failed
PATIENCE = 60  # seconds that another tuner may take to choose its next trial


class Process(Protocol):
    """What trains a cell; subprocess.Popen is one."""

    def poll(self) -> int | None: ...

    def terminate(self) -> None: ...

    def wait(self) -> int: ...


Start = Callable[[Path, int], Process]  # the folder of a cell, and the slot that it runs in


@dataclass(kw_only=True)
class _Running:
    family: Family
    study: Study
    trial: Trial
    folder: Path
    slot: int
    claim: contextlib.ExitStack  # held as long as this process is at work on the trial
    process: Process | None = None  # none while another process trains the cell, which a killed tuner has left
    hopeless: str = ""


@dataclass(kw_only=True)
class Tuning:
    """Families with their studies, in the results folder of the tuning."""

    results: Path
    families: Sequence[Family]
    storage: BaseStorage
    trials: int  # of each family
    start: Start
    console: Console
    workers: int = 1
    pause: float = 0.5  # seconds between looks at the cells
    studies: dict[str, Study] = field(init=False)
    running: list[_Running] = field(default_factory=list)
    left: set[tuple[str, int]] = field(default_factory=set)  # trials that failed here; the next start tries them again

    def __post_init__(self) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self.studies = {family.study: open_study(self.storage, family) for family in self.families}

    def run(self) -> bool:
        """Run what is missing of `trials` in each family; whether all have them.

        Raises KeyboardInterrupt when asked to stop, by SIGINT or SIGTERM, once every running cell has saved itself.
        """
        with stop_requests() as requests:
            try:
                while True:
                    if requests:
                        raise KeyboardInterrupt
                    while len(self.running) < self.workers and (begun := self._next()):
                        self.running.append(begun)
                    if not self.running:
                        break
                    self.running = [running for running in self.running if not self._ended(running)]
                    time.sleep(self.pause)
            finally:
                self._stop()
                write_plan(self.results, self._cells())
        return all(len(self.finished(family)) >= self.trials for family in self.families)

    def finished(self, family: Family) -> list[FrozenTrial]:
        """The trials of a family that have come to an end."""
        found = self.studies[family.study].get_trials(deepcopy=False)
        return [trial for trial in found if trial.state.is_finished()]

    def _cells(self) -> list[Cell]:
        """The cells of all trials so far."""
        begun = [trial for family in self.families for trial in self._begun(family)]
        names = dict.fromkeys(trial.user_attrs["cell"] for trial in begun if "cell" in trial.user_attrs)
        return [read_cell(self.results / name) for name in names]

    def _next(self) -> _Running | None:
        """A trial that a kill left behind, or a new one of the family with the fewest."""
        with self._alone():
            begun = {family.study: self._begun(family) for family in self.families}
            for family in self.families:
                for number in (old.number for old in begun[family.study] if not old.state.is_finished()):
                    if claim := self._claim(family, number):
                        return self._running(family, adopt(self.studies[family.study], number), claim)
            for family in sorted(self.families, key=lambda family: len(begun[family.study])):
                while len(self._begun(family)) < self.trials:
                    study = self.studies[family.study]
                    study.sampler = sampler(len(self._begun(family)))
                    trial = study.ask()
                    claim = self._claim(family, trial.number)
                    if claim and (running := self._running(family, trial, claim)):
                        return running
        return None

    def _begun(self, family: Family) -> list[FrozenTrial]:
        found = self.studies[family.study].get_trials(deepcopy=False)
        return [trial for trial in found if trial.state.name != "WAITING"]

    def _running(self, family: Family, trial: Trial, claim: contextlib.ExitStack) -> _Running | None:
        """A trial with its cell; None, and a failed trial, where its values together are not possible."""
        study = self.studies[family.study]
        try:
            cell = family.cell({dimension.field: dimension.suggest(trial) for dimension in family.space})
        except FieldError as error:
            self._tell(study, trial, claim, "FAIL", why=f"not possible: {error}")
            return None
        trial.set_user_attr("cell", cell.id)
        slot = min(set(range(self.workers)) - {other.slot for other in self.running})
        folder = write_cell(self.results, cell)
        return _Running(family=family, study=study, trial=trial, folder=folder, slot=slot, claim=claim)

    def _claim(self, family: Family, number: int) -> contextlib.ExitStack | None:
        """Hold a trial; None if another process does, or if it failed here before."""
        key = (family.study, number)
        if key in self.left or any((r.family.study, r.trial.number) == key for r in self.running):
            return None
        folder, stack = self.results / "claims" / f"{family.study[-9:-1]}-{number}", contextlib.ExitStack()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(lock(folder))
        except InputError:
            return None
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return stack

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the tuning, so that no two processes choose at once."""
        end = time.monotonic() + PATIENCE
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(lock(self.results))
                    break
                except InputError:  # taken; `lock` has waited a moment
                    if time.monotonic() > end:
                        raise InputError(
                            f"{self.results}: another `ablate tune` is choosing a trial, and hangs"
                        ) from None
            yield

    def _ended(self, running: _Running) -> bool:
        """Look at a cell: report what it has evaluated, end it if hopeless, and close its trial when it has ended."""
        record = read_record(running.folder)
        if running.process is None and not (record and record.status.final) and not is_locked(running.folder):
            running.process = self.start(running.folder, running.slot)
            return False
        ended = running.process.poll() is not None if running.process else not is_locked(running.folder)
        self._report(running)
        if not ended:
            return False
        if running.process and is_locked(running.folder):  # what a killed tuner had started was faster
            running.process = None
            return False
        self._close(running, read_record(running.folder))
        return True

    def _report(self, running: _Running) -> None:
        """Report held-out values to the study, and ask the cell to end if they are hopeless."""
        known = running.study.get_trials(deepcopy=False)[running.trial.number].intermediate_values
        for line in read_metrics(running.folder):
            value, epoch = _measured(line), line["epoch"]
            if value is None or epoch == 0 or epoch in known:
                continue
            running.trial.report(value, epoch)
            if not running.hopeless and running.process and running.trial.should_prune():
                running.hopeless = f"hopeless: {value:.4g} at epoch {epoch}, below the median of the trials before"
                running.process.terminate()

    def _close(self, running: _Running, record: Record | None) -> None:
        study, trial, claim = running.study, running.trial, running.claim
        if running.hopeless and record and not record.status.final:
            stop(running.folder, running.hopeless, discard=True)
            record = read_record(running.folder)
        spent = _hours(record)
        value = _measured(record.metrics) if record else None
        if record and record.status is Status.DONE and value is not None:
            self._tell(study, trial, claim, "COMPLETE", value, spent)
        elif record and record.status.final:
            self._tell(study, trial, claim, "PRUNED", why=f"{record.status}: {record.message}", device_hours=spent)
        else:
            self._failed(running, record)

    def _failed(self, running: _Running, record: Record | None) -> None:
        """Leave a trial whose cell failed to the next start, unless it has failed too often."""
        study, trial, claim = running.study, running.trial, running.claim
        why, failures = why_failed(running.folder, record), trial.user_attrs.get("failures", 0) + 1
        trial.set_user_attr("failures", failures)
        if failures >= ATTEMPTS:
            self._tell(study, trial, claim, "FAIL", why=f"failed {failures} times: {why}", device_hours=_hours(record))
            return
        self.left.add((running.family.study, trial.number))
        self.console.print(f"{running.folder}: {why}", style="red", markup=False)
        claim.close()

    def _tell(
        self,
        study: Study,
        trial: Trial,
        claim: contextlib.ExitStack,
        state: str,
        value: float | None = None,
        device_hours: float = 0.0,
        why: str = "",
    ) -> None:
        from optuna.trial import TrialState  # noqa: PLC0415  (an extra)

        trial.set_user_attr("device_hours", device_hours)
        if why:
            trial.set_user_attr("why", why)
        study.tell(trial.number, value, TrialState[state])
        claim.close()
        ending = f"{value:.4g}" if value is not None else why
        self.console.print(f"{study.study_name} trial {trial.number}: {ending}", markup=False, highlight=False)

    def _stop(self) -> None:
        """Ask all cells to save themselves, and wait until they have; their trials go on with the next start."""
        for running in self.running:
            if running.process:
                running.process.terminate()
        for running in self.running:
            if running.process:
                running.process.wait()
            running.claim.close()


def _hours(record: Record | None) -> float:
    """Device-hours of a cell, with what was lost."""
    return record.cost.device_hours + record.cost.lost / 3600 if record else 0.0


def _measured(metrics: Any) -> float | None:
    """The held-out value that trials are judged by."""
    value: float | None = next((metrics[name] for name in MEASURES if name in metrics), None)
    return value
