"""`ablate tune`: trials of all families side by side, each an ordinary cell, hopeless ones ended early.

Optuna's storage knows the trials, their folders what became of them. A trial that a kill left behind is continued by
the next `ablate tune`, from its cell's checkpoint, so that nothing is done twice.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.text import Text

from ablate.halving import MEASURES
from ablate.lock import Taken, is_locked, lock
from ablate.plan import Cell
from ablate.record import Record, Status, read_cell, read_metrics, read_record
from ablate.source import FieldError
from runners.cell import finished
from runners.cell_state import state_of
from runners.halving import stop
from runners.handed import Handed, hand_over, stop_all
from runners.launchers.protocol import Launcher
from runners.live import live, live_table
from runners.retries import answer
from runners.stop_files import launcher_requests
from runners.stopping import ONE_REQUEST, stop_requests
from runners.studies import Studies, claims
from runners.trials import IMPOSSIBLE, Family, write_cell, write_plan, writing

if TYPE_CHECKING:
    from optuna import Trial

ATTEMPTS = 3  # failures of a trial's cell until the trial has failed
NEXT = "left to the next `ablate tune`"


@dataclass(kw_only=True)
class _Running:
    family: Family
    trial: Trial
    cell: Cell
    folder: Path
    claim: contextlib.ExitStack  # held as long as this process is at work on the trial
    handed: Handed | None = None  # not while it waits, or a process that a killed tuner has left trains the cell
    due: float = 0.0  # time.monotonic() before which it is not handed over again
    hopeless: str = ""


@dataclass(kw_only=True)
class Tuning:
    """Trials of studies, in the results folder of the tuning."""

    studies: Studies
    grid_text: str  # of the file that is tuned
    trials: int  # of each family
    launcher: Launcher
    console: Console
    workers: int = 1  # trials at a time
    pause: float = 0.5  # seconds between looks at the cells
    cells: dict[str, Cell] = field(default_factory=dict)  # of all trials that were looked up
    running: list[_Running] = field(default_factory=list)
    left: set[tuple[str, int]] = field(default_factory=set)  # trials that this start goes on with no more

    @property
    def results(self) -> Path:
        """The folder of the tuning."""
        return self.studies.results

    def run(self) -> bool:
        """Run what is missing of `trials` in each family; whether all have them.

        Raises KeyboardInterrupt when asked to stop, by one of SIGNALS or `ablate stop`, once every running cell has
        saved itself; InputError for a full disk or a damaged file.
        """
        asked = launcher_requests(self.results)
        with writing(self.results), live(self.console, self._table) as refresh, stop_requests() as requests:
            try:
                while True:
                    if requests or asked():
                        self.console.print(
                            "Stopping: each running trial finishes its epoch and saves. "
                            f"Ctrl-C, {ONE_REQUEST} seconds from now or later: at once."
                        )
                        raise KeyboardInterrupt
                    while len(self.running) < self.workers and self._next():
                        pass
                    if not self.running:
                        break
                    self.running = [running for running in self.running if not self._ended(running)]
                    refresh()
                    time.sleep(self.pause)
            finally:
                try:
                    self._stop(requests)
                finally:
                    self.launcher.close()
        return self.studies.complete(self.trials)

    def _table(self, height: int | None = None) -> Group:
        """The trials at work, and how many have ended."""
        states = [state_of(self.results, running.cell) for running in self.running]
        ended = sum(len(self.studies.ended(family)) for family in self.studies.families)
        said = Text(f"{ended} of {self.trials * len(self.studies.families)} trials have ended", style="bold")
        return Group(live_table(self.console, states, height=height), said) if states else Group(said)

    def _next(self) -> bool:
        """Begin a trial that a kill left behind, or a new one of the family with the fewest; False if there is none."""
        with self.studies.alone():
            begun = self._left_behind() or self._new()
            if begun:
                self.running.append(begun)
                self._write_plan()
            return begun is not None

    def _left_behind(self) -> _Running | None:
        begun = [(family, old) for family in self.studies.families for old in self.studies.begun(family)]
        for family, old in begun:
            claim = None if old.state.is_finished() else self._claim(family, old.number)
            if claim and (running := self._begin(family, self.studies.adopt(family, old), claim)):
                return running
        return None

    def _new(self) -> _Running | None:
        for family in sorted(self.studies.families, key=lambda family: len(self.studies.begun(family))):
            while len(self.studies.begun(family)) < self.trials:
                trial = self.studies.ask(family)
                claim = self._claim(family, trial.number)
                if claim and (running := self._begin(family, trial, claim)):
                    return running
        return None

    def _begin(self, family: Family, trial: Trial, claim: contextlib.ExitStack) -> _Running | None:
        """A trial with its cell; None, and a failed trial, where its values together are not possible."""
        try:
            cell = family.cell({dimension.field: dimension.suggest(trial) for dimension in family.space})
            folder = write_cell(self.results, cell)
            trial.set_user_attr("cell", cell.id)
        except FieldError as error:
            self._tell(trial, claim, "FAIL", why=f"{IMPOSSIBLE}: {error}")
            return None
        except BaseException:
            claim.close()
            raise
        return _Running(family=family, trial=trial, cell=cell, folder=folder, claim=claim)

    def _write_plan(self) -> None:
        """Let other commands see the trials so far."""
        begun = [trial for family in self.studies.families for trial in self.studies.begun(family)]
        names = dict.fromkeys(trial.user_attrs["cell"] for trial in begun if "cell" in trial.user_attrs)
        self.cells = {name: self.cells.get(name) or read_cell(self.results / name) for name in names}
        write_plan(self.results, list(self.cells.values()), self.grid_text)

    def _claim(self, family: Family, number: int) -> contextlib.ExitStack | None:
        """Hold a trial; None if another process does, or if this one has it or had it."""
        key = (family.study, number)
        if key in self.left or any((r.family.study, r.trial.number) == key for r in self.running):
            return None
        folder, stack = claims(self.results) / f"{family.study[-9:-1]}-{number}", contextlib.ExitStack()
        folder.mkdir(exist_ok=True)
        try:
            stack.enter_context(lock(folder))
        except Taken:
            return None
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        return stack

    def _ended(self, running: _Running) -> bool:
        """Look at a cell: report what it has evaluated, end it if hopeless, and close its trial when it has ended."""
        if running.handed is None:
            return self._hand_over(running)
        ended = running.handed.job.poll()
        self._report(running)
        if ended is None:
            return False
        record = running.handed.close(ended)
        running.handed = None
        return record is not None and self._close(running, record)  # without one, another process has the cell

    def _hand_over(self, running: _Running) -> bool:
        """Hand a cell over, unless another process has it, or had it and has finished it: then close its trial."""
        self._report(running)
        if is_locked(running.folder) or time.monotonic() < running.due:
            return False
        if record := finished(running.folder):
            return self._close(running, record)
        (running.handed,) = hand_over(self.launcher, self.results, [running.cell])
        return False

    def _report(self, running: _Running) -> None:
        """Report held-out values to the study, and ask the cell to end if they are hopeless."""
        known = running.trial.study.get_trials(deepcopy=False)[running.trial.number].intermediate_values
        for line in read_metrics(running.folder):
            value, epoch = _measured(line), line["epoch"]
            if value is None or epoch == 0 or epoch in known:
                continue
            running.trial.report(value, epoch)
            if not running.hopeless and running.handed and running.trial.should_prune():
                running.hopeless = f"hopeless: {value:.4g} at epoch {epoch}, below the median of the trials before"
                running.handed.job.cancel()

    def _close(self, running: _Running, record: Record) -> bool:
        """Close the trial of a cell that has ended; False where the cell is tried again."""
        trial, claim = running.trial, running.claim
        if running.hopeless and not record.status.final:
            stop(running.folder, running.hopeless, discard=True)
            record = read_record(running.folder) or record
        spent, value = record.cost.all_hours, _measured(record.metrics)
        if record.status is Status.DONE and value is not None:
            self._tell(trial, claim, "COMPLETE", value, spent)
        elif record.status.final:
            self._tell(trial, claim, "PRUNED", why=f"{record.status}: {record.message}", device_hours=spent)
        elif record.status is Status.INTERRUPTED:  # by `ablate stop CELL`, which is no failure
            self._leave(running, str(record.status))
        else:
            return self._failed(running, record)
        return True

    def _failed(self, running: _Running, record: Record) -> bool:
        """Try a cell that failed again, or leave it to the next start; after too many failures its trial has failed."""
        trial = running.trial
        why, failures = f"{record.status}: {record.message}", trial.user_attrs.get("failures", 0) + 1
        trial.set_user_attr("failures", failures)
        if failures >= ATTEMPTS:
            why = f"failed {failures} times: {why}"
            self._tell(trial, running.claim, "FAIL", why=why, device_hours=record.cost.all_hours)
        elif again := answer(record, failures, ATTEMPTS):
            self._say(running.folder, f"{why}; again in {again[0]:g} s, {again[1]}")
            running.due = time.monotonic() + again[0]
            return False
        else:
            self._leave(running, why)
        return True

    def _leave(self, running: _Running, why: str) -> None:
        self._say(running.folder, f"{why}; {NEXT}")
        self.left.add((running.family.study, running.trial.number))
        running.claim.close()

    def _say(self, folder: Path, what: str) -> None:
        self.console.print(f"{folder}: {what}", style="red", markup=False)

    def _tell(
        self,
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
        trial.study.tell(trial.number, value, TrialState[state])
        claim.close()
        ending = f"{value:.4g}" if value is not None else why
        self.console.print(f"{trial.study.study_name} trial {trial.number}: {ending}", markup=False, highlight=False)

    def _stop(self, requests: Sequence[float]) -> None:
        """Stop all cells; their trials go on with the next start."""
        for handed, error in stop_all([running.handed for running in self.running if running.handed], requests):
            self._say(handed.folder, f"cannot be closed: {error}")
        for running in self.running:
            running.claim.close()


def _measured(metrics: Any) -> float | None:
    """The held-out value that trials are judged by."""
    value: float | None = next((metrics[name] for name in MEASURES if name in metrics), None)
    return value
