"""Many cells through the front door: run, interrupt, kill, run again, report; no work lost and none done twice."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commands import Command, wait_until
from rich.console import Console

from ablate import cli
from ablate.grid import load_grid
from ablate.limits import read_limits
from ablate.lock import is_locked, lock
from ablate.plan import Cell, make_plan
from ablate.record import Ledger, Record, Status, read_metrics, read_record, write_atomic, write_ledger
from ablate.source import InputError
from ablate.stop_rule import StopRule
from runners import handed, preflight, stopping, sweep
from runners.cell_state import state_of
from runners.identity import identify
from runners.launchers import local
from runners.launchers import processes as cell_processes
from runners.launchers.local import LocalLauncher, check_gpus
from runners.live import live_table
from runners.preflight import with_fields
from runners.stop_files import ask_launchers
from runners.sweep import freeze, in_order, run_cells

GRID = Path(__file__).parents[2] / "grids" / "quickstart.yaml"
NUM_EPOCHS = 8
SETTINGS = {
    "budget.epochs": NUM_EPOCHS,
    "rollout.num_groups": 3,
    "rollout.group_size": 2,
    "rollout.num_steps": 3,
    "update.updates_per_epoch": 3,
    "evaluation.num_prompts": 6,
    "evaluation.num_steps": 2,
}
PLAN = make_plan(load_grid(GRID, SETTINGS), identify)
FIRST, SECOND = PLAN.cells[0], PLAN.cells[-1]
OPTIONS = [str(GRID), *(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}"))]
OPTIONS += ["--only", f"id={FIRST.id}", "--only", f"id={SECOND.id}"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def processes(folder: Path) -> list[int]:
    """Processes that run a cell of these results."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # ended meanwhile
            continue
        if "cell" in words and any(word.startswith(str(folder)) for word in words):
            found.append(int(path.parent.name))
    return found


def epochs(cell: Path) -> list[int]:
    return [line["epoch"] for line in read_metrics(cell)]


def attempts(cell: Path) -> int:
    path = cell / "attempts.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@dataclass(kw_only=True)
class Stage:
    """One `ablate run` and what it left behind."""

    code: int
    out: str
    err: str
    records: dict[str, Record | None]
    epochs: dict[str, list[int]]
    attempts: dict[str, int]
    alive: list[int]


@dataclass(kw_only=True)
class Story:
    folder: Path
    stages: list[Stage] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        return ["run", *OPTIONS, "--results", str(self.folder.parent), "--no-tracking"]

    def note(self, code: int, out: str, err: str) -> None:
        cells = [self.folder / cell.id for cell in (FIRST, SECOND)]
        self.stages.append(
            Stage(
                code=code,
                out=out,
                err=err,
                records={cell.name: read_record(cell) for cell in cells},
                epochs={cell.name: epochs(cell) for cell in cells},
                attempts={cell.name: attempts(cell) for cell in cells},
                alive=processes(self.folder),
            )
        )

    def interrupted(self) -> None:
        """A run in its own process, that gets a SIGINT in the middle of the first cell."""
        process = subprocess.Popen(
            [sys.executable, "-m", "ablate.cli", *self.words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        wait_until(lambda: len(epochs(self.folder / FIRST.id)) > 1 or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        self.note(process.returncode, out, err)

    def here(self, *options: str) -> None:
        """A run from this process, which has imported torch already; cells have processes of their own as ever."""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with (
            mock.patch.dict(os.environ, ENVIRONMENT),
            mock.patch.object(sys, "argv", ["ablate", *self.words, *options]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                cli.main()
            except SystemExit as ended:
                code = int(ended.code or 0)
        self.note(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Interrupted in the first cell; then the first cell is killed as it continues; then run to the end."""
    story = Story(folder=tmp_path_factory.mktemp("results") / PLAN.grid)
    first = story.folder / FIRST.id

    def kill() -> None:
        wait_until(lambda: attempts(first) > 1)
        for pid in processes(first):
            os.kill(pid, signal.SIGKILL)

    story.interrupted()
    killer = threading.Thread(target=kill)
    killer.start()
    story.here("--attempts", "1")
    killer.join()
    story.here()
    return story


def test_ctrl_c_saves_the_running_cell_and_says_how_to_continue(story: Story) -> None:
    stage = story.stages[0]
    assert stage.code == 130
    assert f"continue with: ablate run {OPTIONS[0]} --set budget.epochs={NUM_EPOCHS} " in stage.out
    assert "Traceback" not in stage.err
    record = stage.records[FIRST.id]
    assert record is not None
    assert record.status == Status.INTERRUPTED
    assert 0 < record.epochs < NUM_EPOCHS
    assert stage.records[SECOND.id] is None
    assert stage.attempts == {FIRST.id: 1, SECOND.id: 0}
    assert stage.alive == []


def test_a_killed_cell_is_failed_and_the_others_go_on(story: Story) -> None:
    stage = story.stages[1]
    assert stage.code == 1
    failed, done = stage.records[FIRST.id], stage.records[SECOND.id]
    assert failed is not None
    assert (failed.status, failed.message, failed.attempts) == (Status.FAILED, "killed by SIGKILL", 2)
    assert f"{FIRST.id} failed: killed by SIGKILL" in stage.out.replace("\n", " ")
    assert done is not None
    assert (done.status, done.epochs) == (Status.DONE, NUM_EPOCHS)
    assert stage.epochs[SECOND.id] == list(range(NUM_EPOCHS + 1))
    assert stage.alive == []


def test_the_next_run_continues_from_the_checkpoint_and_does_nothing_twice(story: Story) -> None:
    stage = story.stages[2]
    assert (stage.code, stage.err) == (0, "")
    assert {record.status for record in stage.records.values() if record} == {Status.DONE}
    assert stage.attempts == {FIRST.id: 3, SECOND.id: 1}
    assert stage.epochs == {cell.id: list(range(NUM_EPOCHS + 1)) for cell in (FIRST, SECOND)}
    before = story.stages[0].records[FIRST.id]
    assert before is not None
    saved = [line for line in read_metrics(story.folder / FIRST.id) if line["epoch"] <= before.epochs]
    # lines of the first start, not new ones
    assert saved[-1]["device_hours"] == pytest.approx(before.cost.device_hours, abs=1e-6)
    assert stage.records[SECOND.id] == story.stages[1].records[SECOND.id]
    assert f"ablate report {story.folder}" in stage.out.replace("\n", "")


def test_a_finished_grid_starts_nothing(story: Story, ablate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalLauncher, "submit", lambda *_: pytest.fail("a process was started"))
    code, out, _ = ablate("run", *OPTIONS, "--results", story.folder.parent, "--no-tracking")
    assert code == 0
    assert "2 cells: 2 done" in out
    assert attempts(story.folder / FIRST.id) == 3


def test_a_finished_cell_is_not_trained_by_hand_either(story: Story, ablate: Command) -> None:
    code, out, _ = ablate("cell", story.folder / SECOND.id)
    assert (code, out) == (0, f"{SECOND.id} done\n")
    assert attempts(story.folder / SECOND.id) == 1


def test_status_shows_what_is_done(story: Story, ablate: Command) -> None:
    code, out, _ = ablate("status", *OPTIONS, "--results", story.folder.parent)
    assert code == 0
    assert "2 cells: 2 done" in out
    for cell in (FIRST, SECOND):
        (line,) = [line for line in out.splitlines() if line.startswith(cell.id)]
        assert line.split()[1:3] == ["done", str(NUM_EPOCHS)]


def test_the_report_needs_nothing_else(story: Story, ablate: Command, tmp_path: Path) -> None:
    code, out, _ = ablate("report", story.folder, "--out", tmp_path)
    assert code == 0
    assert out.splitlines()[0] == str(tmp_path / "index.html")
    assert FIRST.estimator in (tmp_path / "table.md").read_text()


# one folder at a time, without training


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    freeze(tmp_path / "g", PLAN.keep(lambda cell: cell in (FIRST, SECOND)), "name: quickstart\n")
    return tmp_path / "g"


def on_devices(folder: Path, *cells: Cell, devices: int = 2) -> list[Cell]:
    """The cells with so many devices, in their folders too."""
    changed = [with_fields(cell, {"devices": devices, "rollout.num_groups": 3 * devices}) for cell in cells]
    for cell in changed:
        write_atomic(folder / cell.id / "cell.json", cell.model_dump_json())
    return changed


def console() -> Console:
    return Console(width=100, quiet=True)


def script(path: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script in the place of the cell's process: $4 is the cell's folder."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def record_of(folder: Path, cell: Cell) -> Record:
    record = read_record(folder / cell.id)
    assert record is not None
    return record


def test_a_folder_holds_one_process(folder: Path, ablate: Command) -> None:
    with lock(folder / FIRST.id):
        assert is_locked(folder / FIRST.id)
        with pytest.raises(InputError, match="another process is running this cell"), lock(folder / FIRST.id):
            pass
        code, out, err = ablate("cell", folder / FIRST.id)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert f"{FIRST.id}: another process is running this cell" in err
    assert not is_locked(folder / FIRST.id)


def test_looking_at_a_folder_does_not_keep_its_process_from_starting(folder: Path) -> None:
    cell, stop = folder / FIRST.id, threading.Event()
    (cell / ".lock").touch()

    def look() -> None:
        while not stop.is_set():
            is_locked(cell)

    observer = threading.Thread(target=look)
    observer.start()
    try:
        for _ in range(50):
            with lock(cell):
                pass
    finally:
        stop.set()
        observer.join()


@pytest.mark.parametrize("ends", [True, False])
def test_a_cell_that_another_run_holds_is_left_to_it_and_taken_over_if_that_is_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    script(folder / "fake", 'touch "$4/started"; exit 3', monkeypatch)
    monkeypatch.setattr(sweep, "LOOK", 1)
    held, own = threading.Event(), folder / FIRST.id

    def run_elsewhere() -> None:
        with lock(own):
            held.set()
            assert wait_until(lambda: state_of(folder, SECOND).status == "failed")
            assert not (own / "started").exists()
            if ends:
                done = Record(id=FIRST.id, status=Status.DONE, seed=0, attempts=1)
                write_atomic(own / "record.json", done.model_dump_json())

    other = threading.Thread(target=run_elsewhere)
    other.start()
    held.wait()
    states = run_cells(folder, [FIRST, SECOND], workers=1, console=console())
    other.join()
    assert [state.status for state in states] == ["done" if ends else "failed", "failed"]
    assert (own / "started").exists() == (not ends)


ORPHAN = """\
import subprocess, sys, time
from pathlib import Path
from ablate.attempts import Attempt, begin
from ablate.lock import lock
folder = Path(sys.argv[1])
if len(sys.argv) == 2:  # starts another one, and ends
    code = Path("/proc/self/cmdline").read_text().split("\\0")[2]
    subprocess.Popen([sys.executable, "-c", code, str(folder), "hold"])
    while not (folder / "held").exists():
        time.sleep(0.01)
else:
    with lock(folder):
        begin(folder, Attempt(devices=("0",)))
        (folder / "held").touch()
        while not (folder / "end").exists():
            time.sleep(0.01)
        (folder / "record.json").write_text('{"format": 1, "id": "%s", "status": "done", "seed": 0}' % folder.name)
"""


@pytest.fixture
def orphan(folder: Path) -> Iterator[Path]:
    """A cell at work on GPU 0 whose launcher has ended: its folder."""
    own = folder / FIRST.id
    subprocess.run([sys.executable, "-c", ORPHAN, str(own)], check=True, timeout=60)
    yield own
    (own / "end").touch()
    assert wait_until(lambda: not is_locked(own))


def test_cells_of_a_killed_launcher_keep_their_places(
    folder: Path, orphan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(folder / "fake", 'if [ -e "$4/../end" ]; then touch "$4/late"; fi; exit 3', monkeypatch)
    monkeypatch.setattr(sweep, "LOOK", 1)

    def end() -> None:
        time.sleep(1.5)
        (folder / "end").touch()
        (orphan / "end").touch()

    threading.Thread(target=end).start()
    states = run_cells(folder, [SECOND, FIRST], workers=1, console=console())
    assert [state.status for state in states] == ["failed", "done"]
    assert (folder / SECOND.id / "late").exists()


def test_cells_of_a_killed_launcher_keep_their_gpus(
    folder: Path, orphan: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(folder / "fake", f'echo $CUDA_VISIBLE_DEVICES > "$4/gpu"; touch "{orphan}/end"', monkeypatch)
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0", "1"])
    monkeypatch.setattr(sweep, "LOOK", 1)
    run_cells(folder, [SECOND, FIRST], workers=2, console=console())
    assert (folder / SECOND.id / "gpu").read_text() == "1\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("kill -9 $$", "killed by SIGKILL"),  # before it could note an attempt
        ("echo one; echo last words; exit 3", "exit code 3: last words"),
        ("exit 0", "exit code 0"),  # without a record
    ],
)
def test_a_process_without_a_record_gets_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    script(folder / "fake", body, monkeypatch)
    states = run_cells(folder, [FIRST, SECOND], workers=2, console=console())
    assert [(state.status, state.message) for state in states] == [("failed", message)] * 2


def test_a_failed_cell_is_tried_again_and_a_diverged_one_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(folder / "fake", 'echo x >> "$4/tries"; exit 3', monkeypatch)
    write_atomic(
        folder / SECOND.id / "record.json", Record(id=SECOND.id, status=Status.DIVERGED, seed=0).model_dump_json()
    )
    for tries in (1, 2):
        states = run_cells(folder, [FIRST, SECOND], workers=1, console=console())
        assert [state.status for state in states] == ["failed", "diverged"]
        assert len((folder / FIRST.id / "tries").read_text().splitlines()) == tries
    assert not (folder / SECOND.id / "tries").exists()


def test_a_cell_that_takes_long_to_be_closed_holds_up_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one whose machine is gone, and whose lock is watched for a minute."""
    script(folder / "fake", 'touch "$4/started"; exit 3', monkeypatch)
    real = handed.close

    def slow(own: Path, *given: Any, **named: Any) -> Record | None:
        assert own.name == SECOND.id or wait_until((folder / SECOND.id / "started").exists, 20)
        return real(own, *given, **named)

    monkeypatch.setattr(handed, "close", slow)
    states = run_cells(folder, [FIRST, SECOND], workers=1, console=console())
    assert [state.status for state in states] == ["failed", "failed"]


def test_a_request_to_stop_counts_from_the_first_second_of_a_run(
    folder: Path, ablate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder.rename(folder.with_name(PLAN.grid))
    script(folder / "fake", 'touch "$4/started"', monkeypatch)
    monkeypatch.setattr(preflight, "preflight", lambda *_, **__: ask_launchers(folder) or [])
    code, out, _ = ablate("run", *OPTIONS, "--results", folder.parent, "--no-tracking")
    assert (code, "Stopped. Nothing is lost" in out) == (130, True)
    assert not list(folder.glob("*/started"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget-device-hours", "nan"], "--budget-device-hours nan: expected a finite number above 0"),
        (["--budget-device-hours", "0"], "--budget-device-hours 0: expected a finite number above 0"),
        (["--freeze", "--halving", "1"], "--freeze starts nothing"),
        (["--freeze", "--budget-device-hours", "3"], "--freeze starts nothing"),
    ],
)
def test_ends_that_a_run_could_not_come_to_are_refused(
    tmp_path: Path, ablate: Command, words: list[str], said: str
) -> None:
    code, _, error = ablate("run", *OPTIONS, "--results", tmp_path, *words)
    assert (code, said in error) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_frozen_cell_has_its_stop_rule(tmp_path: Path, ablate: Command) -> None:
    code, out, _ = ablate("run", *OPTIONS, "--results", tmp_path, "--freeze", "--stop-when", "reward >= 0.5")
    assert code == 0
    assert {read_limits(Path(line)).stop_when for line in out.split()} == {str(StopRule.parse("reward >= 0.5"))}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", b'{"epoch": 1}\n{"epoch": x}\n', "metrics.jsonl:2: cannot be read as JSON"),
        ("record.json", b'{"format": 1}', "record.json:1: cannot be read: id: Field required"),
        ("record.json", b'{"format": 7}', "record.json:1: results of format 7"),
    ],
)
def test_a_finished_cell_with_a_damaged_file_is_left_alone_and_keeps_no_other_from_running(
    folder: Path, ablate: Command, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, said: str
) -> None:
    folder = folder.rename(folder.with_name(PLAN.grid))
    done = Record(id=FIRST.id, status=Status.DONE, seed=0, epochs=3)
    write_atomic(folder / FIRST.id / "record.json", done.model_dump_json())
    (folder / FIRST.id / name).write_bytes(content)
    script(folder / "fake", 'touch "$4/started"; exit 3', monkeypatch)
    code, out, _ = ablate("run", *OPTIONS, "--results", folder.parent, "--no-tracking")
    out = out.replace("\n", "")
    assert code == 1
    assert [path.parent.name for path in folder.glob("*/started")] == [SECOND.id]
    assert said in out
    assert f"{FIRST.id} damaged: " in out
    assert (folder / FIRST.id / name).read_bytes() == content


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff"])
@pytest.mark.parametrize("name", ["plan.json", "cell.json"])
def test_what_the_plan_says_is_written_anew_where_it_is_damaged(folder: Path, name: str, content: bytes) -> None:
    path = folder / name if name == "plan.json" else folder / FIRST.id / name
    written = path.read_bytes()
    done = Record(id=FIRST.id, status=Status.DONE, seed=0)
    write_atomic(folder / FIRST.id / "record.json", done.model_dump_json())
    path.write_bytes(content)
    freeze(folder, PLAN.keep(lambda cell: cell in (FIRST, SECOND)), "name: quickstart\n")
    assert path.read_bytes() == written


def test_a_damaged_cell_fails_alone(folder: Path) -> None:
    (folder / FIRST.id / "cell.json").write_text("{")
    (state,) = run_cells(folder, [FIRST], workers=1, console=console())
    assert state.status == "failed"
    assert "exit code 2" in state.message
    assert "cell.json:1: cannot be read as JSON" in state.message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_start_of_a_cell_interrupts_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """As before a cell's own handlers: its process ends without a record."""
    script(folder / "fake", 'trap "exit 1" INT; touch "$4/ready"; while :; do sleep 0.05; done', monkeypatch)
    ready = [folder / cell.id / "ready" for cell in (FIRST, SECOND)]

    def stop() -> None:
        while not all(path.exists() for path in ready):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_cells(folder, [FIRST, SECOND], workers=2, console=console())
    assert [record_of(folder, cell).status for cell in (FIRST, SECOND)] == [Status.INTERRUPTED] * 2
    assert signal.getsignal(number) == before
    assert processes(folder) == []


def signals_once_ready(folder: Path, *numbers: signal.Signals, pause: float = 0) -> None:
    """Send this process the signals, once both ranks of the first cell are ready."""

    def stop() -> None:
        wait_until(lambda: all((folder / FIRST.id / f"ready-{rank}").exists() for rank in (0, 1)))
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(pause)

    threading.Thread(target=stop, daemon=True).start()


def test_a_stop_does_not_wait_for_a_process_that_waits_for_one_that_failed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = 'trap "" TERM; if [ $RANK = 1 ]; then trap "exit 3" TERM; fi; touch "$4/ready-$RANK"'
    script(folder / "fake", f"{body}; for i in $(seq 400); do sleep 0.05; done", monkeypatch)
    monkeypatch.setattr(cell_processes, "PATIENCE", 0.1)
    signals_once_ready(folder, signal.SIGTERM)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_cells(folder, on_devices(folder, FIRST), console=console())
    assert time.monotonic() - start < 10
    assert record_of(folder, FIRST).status is Status.INTERRUPTED


def test_cells_that_do_not_end_at_once_are_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = 'trap "" TERM; touch "$4/ready-$RANK"'
    script(folder / "fake", f"{body}; for i in $(seq 400); do sleep 0.05; done", monkeypatch)
    monkeypatch.setattr(stopping, "AT_ONCE", 0.2)
    monkeypatch.setattr(stopping, "ONE_REQUEST", 0.1)
    signals_once_ready(folder, signal.SIGINT, signal.SIGTERM, pause=0.5)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_cells(folder, on_devices(folder, FIRST), console=console())
    assert time.monotonic() - start < 10
    assert record_of(folder, FIRST).status is Status.INTERRUPTED
    assert processes(folder) == []


def test_two_signals_of_one_request_let_cells_save_themselves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = "echo x >> $cell/asked-$RANK; sleep 1; touch $cell/saved-$RANK; exit 0"
    body = f'cell=$4; trap "{ending}" TERM; touch "$4/ready-$RANK"'
    script(folder / "fake", f"{body}; for i in $(seq 400); do sleep 0.05; done", monkeypatch)
    signals_once_ready(folder, signal.SIGINT, signal.SIGTERM, pause=0.2)
    with pytest.raises(KeyboardInterrupt):
        run_cells(folder, on_devices(folder, FIRST), console=console())
    for rank in (0, 1):
        assert (folder / FIRST.id / f"saved-{rank}").exists()
        assert (folder / FIRST.id / f"asked-{rank}").read_text() == "x\n"


def test_threads_are_those_of_the_user_or_a_fair_share(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(folder / "fake", 'echo "$OMP_NUM_THREADS" > "$4/threads"; exit 3', monkeypatch)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))

    def threads(workers: int) -> str:
        run_cells(folder, [FIRST], workers=workers, console=console())
        return (folder / FIRST.id / "threads").read_text().strip()

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads(2) == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert (threads(1), threads(2), threads(16)) == ("8", "4", "1")


def test_seeds_take_turns() -> None:
    cells = make_plan(load_grid(GRID.with_name("tiny.yaml"))).cells
    assert [cell.seed for cell in in_order(cells)] == [0] * 44 + [1] * 44 + [2] * 44
    assert [c.objective for c in in_order(cells)[:44]] == [c.objective for c in cells if c.seed == 0]


@pytest.fixture
def half_done(folder: Path) -> Path:
    lines = [{"epoch": 0, "eval/score": 0.25, "eval/accuracy": 0.125}, {"epoch": 3, "rollout/score": 0.5}]
    lines += [
        {
            "epoch": 6,
            "rollout/score": 0.625,
            "eval/score": 0.5,
            "eval/accuracy": 0.25,
            "device_hours": 0.5,
            "cost/rollout": 1800,
        }
    ]
    (folder / FIRST.id / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_state_of_a_cell_is_read_from_its_folder(half_done: Path) -> None:
    state = state_of(half_done, FIRST)
    assert (state.status, state.epoch, state.reward) == ("interrupted", 6, 0.625)
    assert (state.base_accuracy, state.accuracy, state.fraction) == (0.125, 0.25, 1.0)  # the hours are spent
    assert state_of(half_done, SECOND).status == "waiting"
    with lock(half_done / SECOND.id):
        assert state_of(half_done, SECOND).status == "running"


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_loses_columns_before_words(half_done: Path, width: int) -> None:
    screen = Console(width=width)
    with screen.capture() as captured:
        screen.print(live_table(screen, [state_of(half_done, cell) for cell in (FIRST, SECOND)]))
    text = captured.get()
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width
    for part in (FIRST.id, SECOND.id, "interrupted", "0.125 → 0.250", "2 cells: 1 interrupted, 1 waiting"):
        assert part in text
    assert ("reward" in text) == (width >= 100)


def test_a_plan_frozen_again_leaves_cells_alone(folder: Path) -> None:
    path = folder / FIRST.id / "cell.json"
    assert Cell.model_validate_json(path.read_text()) == FIRST
    before = path.stat().st_mtime_ns
    freeze(folder, PLAN, "name: quickstart\n# edited\n")
    assert path.stat().st_mtime_ns == before
    assert (folder / "grid.yaml").read_text().endswith("# edited\n")
    assert len(list(folder.glob("*/cell.json"))) == len(PLAN.cells)


def test_the_processes_of_a_cell_know_each_other_and_their_devices(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "$RANK $LOCAL_RANK $WORLD_SIZE $OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES"
    script(
        folder / "fake",
        f'echo "{words}" > "$4/rank-$RANK"; echo $ABLATE_MEETING_POINT > "$4/meet-$RANK"; sleep 1',  # both at once
        monkeypatch,
    )
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0", "1", "2", "3"])
    run_cells(folder, on_devices(folder, FIRST, SECOND), workers=2, console=console())
    for cell, devices in ((FIRST, "0,1"), (SECOND, "2,3")):
        told = [(folder / cell.id / f"rank-{rank}").read_text().strip() for rank in (0, 1)]
        assert told == [f"0 0 2 2 {devices}", f"1 1 2 2 {devices}"]
    meeting = [[(folder / cell.id / f"meet-{rank}").read_text() for rank in (0, 1)] for cell in (FIRST, SECOND)]
    assert meeting[0][0] == meeting[0][1] != meeting[1][0] == meeting[1][1]


def test_each_cell_has_as_many_devices_as_its_recipe_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = 'echo "$CUDA_VISIBLE_DEVICES $OMP_NUM_THREADS" > "$4/rank-${RANK:-0}"; sleep 1'
    script(folder / "fake", told, monkeypatch)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(local, "visible_gpus", lambda: list("0123456"))
    cells = [*on_devices(folder, FIRST, devices=3), *on_devices(folder, SECOND, devices=1)]
    run_cells(folder, cells, workers=2, console=console())
    found = {path.parent.name: path.read_text() for path in folder.glob("*/rank-0")}
    assert found == {FIRST.id: "0,1,2 2\n", SECOND.id: "3 6\n"}
    assert len(list(folder.glob("*/rank-*"))) == 4


def test_where_one_process_fails_the_others_end_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(folder / "fake", 'if [ "$RANK" = 1 ]; then echo no luck; exit 3; fi; exec sleep 600', monkeypatch)
    monkeypatch.setattr(cell_processes, "PATIENCE", 0.1)
    (state,) = run_cells(folder, on_devices(folder, FIRST), console=console())
    assert state.status == "failed"


@pytest.mark.parametrize("killed", [0, 1])
def test_a_record_names_the_process_that_was_killed_and_not_who_missed_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    missed = Record(id=FIRST.id, status=Status.FAILED, message="RuntimeError: connection closed by peer", seed=0)
    write_atomic(folder / "missed.json", missed.model_dump_json())
    body = f'if [ $RANK = {killed} ]; then kill -9 $$; fi; cp "{folder}/missed.json" "$4/record.json"; exit 1'
    script(folder / "fake", body, monkeypatch)
    (state,) = run_cells(folder, on_devices(folder, FIRST), console=console())
    assert (state.status, state.message) == ("failed", f"process {killed} of 2: killed by SIGKILL")


def test_a_process_that_is_ended_here_is_not_the_one_at_fault(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(folder / "fake", 'if [ "$RANK" = 1 ]; then echo no luck; exit 3; fi; exec sleep 600', monkeypatch)
    monkeypatch.setattr(cell_processes, "PATIENCE", 0.1)
    (state,) = run_cells(folder, on_devices(folder, FIRST), console=console())
    assert state.message == "process 1 of 2: exit code 3: no luck"


def test_a_spent_grid_starts_nothing_more(half_done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(half_done / "fake", 'touch "$4/started"', monkeypatch)
    run_cells(half_done, [FIRST, SECOND], device_hours=0.5, console=console())
    assert not list(half_done.glob("*/started"))
    run_cells(half_done, [FIRST, SECOND], device_hours=0.6, console=console())
    assert len(list(half_done.glob("*/started"))) == 2


def test_the_budget_counts_all_cells_of_the_grid_and_what_was_lost(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(folder / "fake", 'touch "$4/started"', monkeypatch)
    done = Record(id=SECOND.id, status=Status.DONE, seed=0, cost=Ledger(update=900, eval=9e9, lost=900))
    write_atomic(folder / SECOND.id / "record.json", done.model_dump_json())
    interrupted = next(cell.id for cell in PLAN.cells if cell not in (FIRST, SECOND))
    freeze(folder, PLAN, "name: quickstart\n")
    write_ledger(folder / interrupted, Ledger(rollout=900, reward=900, lost=1800))
    run_cells(folder, [FIRST], device_hours=1.5, console=console())
    assert not list(folder.glob("*/started"))
    run_cells(folder, [FIRST], device_hours=1.6, console=console())
    assert [path.parent.name for path in folder.glob("*/started")] == [FIRST.id]


@pytest.mark.parametrize(
    ("given", "num_gpus", "allowed"), [("0,1", 9, False), (None, 2, False), (None, 3, True), (None, 0, True)]
)
def test_more_processes_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, given: str | None, num_gpus: int, allowed: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    with contextlib.nullcontext() if allowed else pytest.raises(InputError, match=r"devices = 3: .* machine has 2;"):
        check_gpus(3)
    check_gpus(1)


def test_the_command_line_refuses_more_processes_than_gpus_before_it_writes(
    tmp_path: Path, ablate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0", "1"])
    words = ["run", str(GRID), "--results", tmp_path / "r", "--no-tracking", "--set", "devices=3"]
    code, out, error = ablate(*words, "--set", "rollout.num_groups=24", "--set", "update.updates_per_epoch=2")
    assert (code, out, len(error.splitlines())) == (2, "", 1)
    assert "devices = 3" in error
    assert not (tmp_path / "r").exists()


def test_two_processes_through_the_front_door(tmp_path: Path, ablate: Command) -> None:
    words = [*OPTIONS[:-2], "--set", "rollout.num_groups=4", "--set", "update.updates_per_epoch=2"]
    words += ["--set", "budget.epochs=1", "--results", str(tmp_path), "--no-tracking"]
    words[words.index(f"id={FIRST.id}")] = "objective=epg"
    code, _, error = ablate("run", *words, "--set", "devices=3")
    assert code == 2
    assert "which 3 devices cannot share evenly: take 2 devices" in error
    code, _, error = ablate("run", *words, "--only", "estimator=trajectory", "--seeds", "0", "--set", "devices=2")
    assert code == 0, error
    (path,) = tmp_path.glob("*/*/record.json")
    assert json.loads(path.read_text())["provenance"]["num_devices"] == 2
    code, out, _ = ablate("run", *words, "--only", "estimator=trajectory", "--seeds", "0", "--dry-run")
    assert (code, out.split()) == (0, ["done", path.parent.name])  # on one device it is the same cell
