"""`ablate tune`: trials of all families side by side, each an ordinary cell, hopeless ones ended early.

Optuna's storage knows the trials, their folders what became of them. A trial that a kill left behind is continued by
the next `ablate tune`, from its cell's checkpoint, so that nothing is done twice.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.text import Text

from ablate.halving import MEASURES
from ablate.lock import is_locked, lock
from ablate.plan import Cell
from ablate.record import Record, Status, read_cell, read_metrics, read_record
from ablate.source import FieldError, InputError
from runners.cell_state import state_of
from runners.closing import Before, close
from runners.halving import stop
from runners.launchers.protocol import Job, Launcher
from runners.live import live, live_table
from runners.retries import answer
from runners.stopping import stop_jobs, stop_requests
from runners.studies import adopt, open_study, sampler
from runners.trials import Family, write_cell, write_plan

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

ATTEMPTS = 3  # failures of a trial's cell until the trial has failed
PATIENCE = 60  # seconds that another tuner may take to choose its next trial


@dataclass(kw_only=True)
class _Running:
    family: Family
    study: Study
    trial: Trial
    cell: Cell
    folder: Path
    claim: contextlib.ExitStack  # held as long as this process is at work on the trial
    job: Job | None = None  # none while it waits, or another process trains the cell, which a killed tuner has left
    before: Before
    due: float = 0.0  # time.monotonic() before which it is not handed over again
    hopeless: str = ""


@dataclass(kw_only=True)
class Tuning:
    """Families with their studies, in the results folder of the tuning."""

    results: Path
    families: Sequence[Family]
    storage: BaseStorage
    trials: int  # of each family
    launcher: Launcher
    console: Console
    workers: int = 1  # trials at a time
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
        with live(self.console, self._table) as refresh, stop_requests() as requests:
            try:
                while True:
                    if requests:
                        raise KeyboardInterrupt
                    while len(self.running) < self.workers and (begun := self._next()):
                        self.running.append(begun)
                    if not self.running:
                        break
                    self.running = [running for running in self.running if not self._ended(running)]
                    refresh()
                    time.sleep(self.pause)
            finally:
                self._stop(requests)
                self.launcher.close()
                write_plan(self.results, self._cells())
        return all(len(self.finished(family)) >= self.trials for family in self.families)

    def finished(self, family: Family) -> list[FrozenTrial]:
        """The trials of a family that have come to an end."""
        found = self.studies[family.study].get_trials(deepcopy=False)
        return [trial for trial in found if trial.state.is_finished()]

    def _table(self, height: int | None = None) -> Group:
        """The trials at work, and how many have ended."""
        states = [state_of(self.results, running.cell) for running in self.running]
        ended = sum(len(self.finished(family)) for family in self.families)
        said = Text(f"{ended} of {self.trials * len(self.families)} trials have ended", style="bold")
        return Group(live_table(self.console, states, height=height), said) if states else Group(said)

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
        folder = write_cell(self.results, cell)
        before = Before.of(folder)
        return _Running(family=family, study=study, trial=trial, cell=cell, folder=folder, claim=claim, before=before)

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
        if running.job is None:
            return self._hand_over(running)
        ended = running.job.poll()
        self._report(running)
        if ended is None:
            return False
        record = close(running.folder, running.cell, ended, running.before)
        running.job = None
        return record is not None and self._close(running, record)  # without one, another process has the cell

    def _hand_over(self, running: _Running) -> bool:
        """Hand a cell over, unless another process has it, or had it and has finished it: then close its trial."""
        self._report(running)
        if is_locked(running.folder) or time.monotonic() < running.due:
            return False
        record = read_record(running.folder)
        if record and record.status.final:
            return self._close(running, record)
        running.before = Before.of(running.folder)
        (running.job,) = self.launcher.submit([running.folder])
        return False

    def _report(self, running: _Running) -> None:
        """Report held-out values to the study, and ask the cell to end if they are hopeless."""
        known = running.study.get_trials(deepcopy=False)[running.trial.number].intermediate_values
        for line in read_metrics(running.folder):
            value, epoch = _measured(line), line["epoch"]
            if value is None or epoch == 0 or epoch in known:
                continue
            running.trial.report(value, epoch)
            if not running.hopeless and running.job and running.trial.should_prune():
                running.hopeless = f"hopeless: {value:.4g} at epoch {epoch}, below the median of the trials before"
                running.job.cancel()

    def _close(self, running: _Running, record: Record) -> bool:
        """Close the trial of a cell that has ended; False where the cell is tried again."""
        study, trial, claim = running.study, running.trial, running.claim
        if running.hopeless and not record.status.final:
            stop(running.folder, running.hopeless, discard=True)
            record = read_record(running.folder) or record
        spent, value = _hours(record), _measured(record.metrics)
        if record.status is Status.DONE and value is not None:
            self._tell(study, trial, claim, "COMPLETE", value, spent)
        elif record.status.final:
            self._tell(study, trial, claim, "PRUNED", why=f"{record.status}: {record.message}", device_hours=spent)
        else:
            return self._failed(running, record)
        return True

    def _failed(self, running: _Running, record: Record) -> bool:
        """Try a cell that failed again, or leave it to the next start; after too many failures its trial has failed."""
        study, trial, claim = running.study, running.trial, running.claim
        why, failures = f"{record.status}: {record.message}", trial.user_attrs.get("failures", 0) + 1
        trial.set_user_attr("failures", failures)
        if failures >= ATTEMPTS:
            self._tell(study, trial, claim, "FAIL", why=f"failed {failures} times: {why}", device_hours=_hours(record))
            return True
        again = answer(record, failures, ATTEMPTS)
        after = f"; again in {again[0]:g} s, {again[1]}" if again else "; left to the next `ablate tune`"
        self.console.print(f"{running.folder}: {why}{after}", style="red", markup=False)
        if again:
            running.due = time.monotonic() + again[0]
            return False
        self.left.add((running.family.study, trial.number))
        claim.close()
        return True

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

    def _stop(self, requests: Sequence[float]) -> None:
        """Stop all cells; their trials go on with the next start."""
        at_work = [(running, running.job) for running in self.running if running.job]
        ends = stop_jobs([job for _, job in at_work], requests)
        for (running, _), ended in zip(at_work, ends, strict=True):
            close(running.folder, running.cell, ended, running.before, stopped=True)
        for running in self.running:
            running.claim.close()


def _hours(record: Record) -> float:
    """Device-hours of a cell, with what was lost."""
    return record.cost.device_hours + record.cost.lost / 3600


def _measured(metrics: Any) -> float | None:
    """The held-out value that trials are judged by."""
    value: float | None = next((metrics[name] for name in MEASURES if name in metrics), None)
    return value
