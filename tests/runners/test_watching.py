"""Looking at a grid and taking part in it: status, logs, stop, retry, clean; what they show is what the folders say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import Command, wait_until
from rich.console import Console

from ablate.attempts import Attempt, begin, complete_last, read_attempts
from ablate.grid import load_grid
from ablate.lock import lock, owner
from ablate.plan import Cell, make_plan
from ablate.record import Failure, Ledger, Record, Status, read_metrics, read_record, read_spent
from ablate.source import InputError
from runners import live
from runners.anew import start_anew
from runners.cell_state import CellState, state_of
from runners.chosen import choose, find_cell, find_results
from runners.identity import identify
from runners.live import clock, live_table, watch
from runners.logs import read_log
from runners.stop_files import ask_cell, ask_launchers, cell_is_asked, launcher_requests
from runners.sweep import freeze

GRID = Path(__file__).parents[2] / "grids" / "quickstart.yaml"
SETTINGS = {
    "budget.epochs": 8,
    "budget.device_hours": None,
    "rollout.num_groups": 3,
    "rollout.group_size": 2,
    "rollout.num_steps": 3,
    "update.updates_per_epoch": 3,
    "evaluation.num_prompts": 6,
    "evaluation.num_steps": 2,
}
PLAN = make_plan(load_grid(GRID, SETTINGS), identify)
FIRST, SECOND = PLAN.cells[0], PLAN.cells[1]
OPTIONS = [str(GRID), *(w for key, v in SETTINGS.items() for w in ("--set", f"{key}={'null' if v is None else v}"))]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    results = tmp_path / "quickstart"
    freeze(results, PLAN, GRID.read_text())
    return results


def end(
    folder: Path, cell: Cell, status: Status, message: str = "", failure: Failure | None = None, hours: float = 0.0
) -> Path:
    """A cell that was started once and has ended."""
    own = folder / cell.id
    begin(own, Attempt(started=1.0, host="node"))
    complete_last(own, ended=2.0, status=status, failure=failure)
    record = Record(
        id=cell.id, status=status, failure=failure, message=message, seed=cell.seed, attempts=len(read_attempts(own)),
        cost=Ledger(rollout=3600 * hours),
    )  # fmt: skip
    (own / "record.json").write_text(record.model_dump_json())
    return own


def log_epochs(folder: Path, cell: Cell, epochs: int, seconds: float = 10.0) -> None:
    lines = [
        {"epoch": n, "device_hours": n * seconds / 3600, **Ledger(rollout=n * seconds, lost=360.0).flat()}
        for n in range(epochs + 1)
    ]
    (folder / cell.id / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def shown(states: list[CellState], width: int = 160, **options: int | None) -> str:
    screen = Console(width=width)
    with screen.capture() as captured:
        screen.print(live_table(screen, states, **options))
    return captured.get()


# states


def test_what_is_left_is_what_the_budget_has_cost_so_far(folder: Path) -> None:
    own = folder / FIRST.id
    begin(own, Attempt(started=1.0, host="node", devices=("0", "1")))
    log_epochs(folder, FIRST, epochs=2, seconds=10.0)
    assert state_of(folder, FIRST).left is None  # nobody runs it
    with lock(own):
        state = state_of(folder, FIRST)
    assert (state.status, state.attempts, state.fraction) == ("running", 1, 0.25)
    assert state.left == pytest.approx(6 * 10.0 / 2)  # six epochs of ten seconds x devices, on two devices
    assert state.lost_device_hours == pytest.approx(0.1)


def test_a_cell_that_starts_again_shows_its_last_error_until_it_ends(folder: Path) -> None:
    own = end(folder, FIRST, Status.FAILED, "OutOfMemoryError: 2 GiB", Failure.OUT_OF_MEMORY)
    state = state_of(folder, FIRST)
    assert (state.status, state.failure, state.attempts, state.failed) == ("failed", "out_of_memory", 1, True)
    with lock(own):
        begin(own, Attempt(started=3.0, host="node"))
        state = state_of(folder, FIRST)
    assert (state.status, state.attempts, state.failed) == ("running", 2, False)
    text = shown([state])
    assert f"{FIRST.id} earlier, out_of_memory: OutOfMemoryError: 2 GiB" in text
    (own / "record.json").unlink()
    end(folder, FIRST, Status.DONE)
    assert "out_of_memory" not in shown([state_of(folder, FIRST)])


def test_a_cell_whose_reward_was_away_shows_that_as_its_last_failure(folder: Path) -> None:
    own = end(folder, FIRST, Status.REWARD_UNAVAILABLE, "https://judge: no answer")
    assert f"{FIRST.id} reward_unavailable: https://judge: no answer" in shown([state_of(folder, FIRST)])
    with lock(own):
        begin(own, Attempt(started=3.0, host="node"))
        text = shown([state_of(folder, FIRST)])
    assert f"{FIRST.id} earlier, reward_unavailable: https://judge: no answer" in text


def test_a_stopped_cell_says_why_and_a_paused_one_is_no_error(folder: Path) -> None:
    end(folder, FIRST, Status.STOPPED, "successive halving: place 3 of 4; 2 went on")
    own = end(folder, SECOND, Status.PAUSED, "paused after 0.25 of its budget")
    text = shown([state_of(folder, cell) for cell in (FIRST, SECOND)])
    assert f"{FIRST.id} stopped: successive halving: place 3 of 4; 2 went on" in text
    assert "earlier" not in text
    assert text.count(SECOND.id) == 1  # its row
    assert text.splitlines()[-1].startswith("2 cells: 1 paused, 1 stopped;")
    with lock(own):  # it goes on
        begin(own, Attempt(started=3.0, host="node"))
        assert state_of(folder, SECOND).message == ""


def test_cells_that_halving_has_stopped_come_after_those_that_failed(folder: Path) -> None:
    rows = [line.split()[0] for line in shown(many(stopped=1, paused=1, running=1, failed=1)).splitlines()]
    assert rows[1:5] == ["failed-0", "running-0", "paused-0", "stopped-0"]


def test_a_changed_file_is_read_again(folder: Path) -> None:
    for epochs in (1, 2, 5):
        log_epochs(folder, FIRST, epochs)
        assert state_of(folder, FIRST).epoch == epochs


# the table


def many(**ends: int) -> list[CellState]:
    """So many cells in these states, in the order in which a plan could have them: the worst last."""
    cells = [FIRST.model_copy(update={"id": f"{status}-{n}"}) for status, number in ends.items() for n in range(number)]
    return [
        CellState(cell=cell, status=(status := cell.id.rsplit("-")[0]), message="no luck" if status == "failed" else "")
        for cell in cells
    ]


@pytest.mark.parametrize("rows", [None, 30, 3])
def test_a_table_with_too_few_rows_omits_no_failed_cell(rows: int | None) -> None:
    text = shown(many(done=40, waiting=40, failed=35), rows=rows)
    for n in range(35):
        assert f"failed-{n} failed: no luck\n" in text
        assert sum(line.startswith(f"failed-{n} ") for line in text.splitlines()) == 2  # its row, and its error
    last = text.splitlines()[-1]
    hidden = 0 if rows is None else 80
    assert last.startswith("115 cells: 35 failed, 40 done, 40 waiting" + (f" ({hidden} more" if hidden else ";"))


@pytest.mark.parametrize("height", [10, 24, 60])
def test_a_terminal_shows_as_many_lines_as_it_has_and_the_summary_of_all(height: int) -> None:
    text = shown(many(done=40, running=20, failed=35), width=80, height=height)
    assert len(text.splitlines()) <= height
    assert "95 cells: 35 failed, 20 running, 40 done" in text.splitlines()[-1]
    assert "failed-0 failed: no luck" in text


def test_durations_are_written_as_clocks_are() -> None:
    assert [clock(seconds) for seconds in (0, 59.9, 125, 3725)] == ["0:00", "0:59", "2:05", "1:02:05"]


# status


def test_the_exit_code_says_whether_all_cells_are_done(folder: Path, ablate: Command) -> None:
    for cell in PLAN.cells[:-1]:
        end(folder, cell, Status.DONE)
    code, out, _ = ablate("status", folder)
    assert (code, f"{len(PLAN.cells)} cells: {len(PLAN.cells) - 1} done, 1 waiting" in out) == (1, True)
    last = end(folder, PLAN.cells[-1], Status.FAILED, "RuntimeError: gone", Failure.ERROR)
    code, out, _ = ablate("status", *OPTIONS, "--results", folder.parent)
    assert (code, f"{last.name} error: RuntimeError: gone" in out) == (1, True)
    (last / "record.json").unlink()
    end(folder, PLAN.cells[-1], Status.DIVERGED)  # a result
    assert ablate("status", folder)[0] == 0
    assert ablate("status", *OPTIONS, "--results", folder.parent)[0] == 0


def test_status_for_scripts(folder: Path, ablate: Command) -> None:
    end(folder, FIRST, Status.FAILED, "RuntimeError: gone", Failure.ERROR)
    code, out, _ = ablate("status", folder, "--json")
    found = json.loads(out)
    assert (code, found["done"], found["folder"]) == (1, False, str(folder))
    assert [cell["id"] for cell in found["cells"]] == [cell.id for cell in PLAN.cells]
    (cell,) = [cell for cell in found["cells"] if cell["id"] == FIRST.id]
    assert (cell["status"], cell["failure"], cell["message"]) == ("failed", "error", "RuntimeError: gone")
    assert (cell["attempts"], cell["accuracy"], cell["left"]) == (1, None, None)


def test_options_of_status_that_do_not_go_together(folder: Path, ablate: Command) -> None:
    assert "expected one of them" in ablate("status", folder, "--watch", "--json")[2]
    assert "and this is none" in ablate("status", folder, "--seeds", "0")[2]
    code, _, err = ablate("status", folder / FIRST.id)
    assert (code, "it has no plan.json" in err) == (2, True)


def test_watching_ends_when_the_last_cell_does(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end(folder, FIRST, Status.DONE)
    looks: list[float] = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        assert len(looks) < 5
        if len(looks) == 3:
            end(folder, SECOND, Status.DONE)

    monkeypatch.setattr(live.time, "sleep", pause)
    screen = Console(width=120, force_terminal=False)
    with screen.capture() as captured:
        states = watch(screen, folder, [FIRST, SECOND])
    assert [state.status for state in states] == ["done", "done"]
    assert len(looks) == 3
    before, after = captured.get().count("1 done, 1 waiting"), captured.get().count("2 cells: 2 done")
    assert (before, after) == (1, 1)


def test_watching_is_left_with_ctrl_c(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live.time, "sleep", interrupt)
    assert [state.status for state in watch(Console(file=open(os.devnull, "w")), folder, [FIRST])] == ["waiting"]  # noqa: SIM115


# cells by name


def test_a_cell_is_meant_by_its_id_its_start_or_its_folder(folder: Path) -> None:
    own = folder / FIRST.id
    assert find_cell(FIRST.id, folder.parent) == own
    assert find_cell(str(own), Path("elsewhere")) == own
    unique = next(FIRST.id[:n] for n in range(1, 99) if sum(c.id.startswith(FIRST.id[:n]) for c in PLAN.cells) == 1)
    assert find_cell(unique, folder.parent) == own
    with pytest.raises(InputError, match="cells are meant") as several:
        find_cell(unique[:1], folder.parent)
    assert str(own) in str(several.value)
    with pytest.raises(InputError, match="no cell of") as none:
        find_cell(FIRST.id[:-1] + "~", folder.parent)
    assert FIRST.id in str(none.value)


def test_an_id_that_another_one_starts_with_is_meant_itself(folder: Path) -> None:
    longer = folder / f"{FIRST.id}0"
    longer.mkdir()
    (longer / "cell.json").write_text("{}")
    assert find_cell(FIRST.id, folder.parent) == folder / FIRST.id


def test_a_grid_is_meant_by_its_file_its_name_or_its_results(folder: Path) -> None:
    for what in (str(GRID), "quickstart", str(folder)):
        chosen = choose(what, folder.parent)
        assert (chosen.results, chosen.whole, len(chosen.cells)) == (folder, True, len(PLAN.cells))
    one = choose(FIRST.id, folder.parent)
    assert (one.results, one.whole, one.cells) == (folder, False, (folder / FIRST.id,))
    with pytest.raises(InputError, match="has no results"):
        choose(str(GRID), folder.parent / "elsewhere")
    with pytest.raises(InputError, match=r"quikstart: no grid of .* has this name, .*did you mean 'quickstart'\?"):
        choose("quikstart", folder.parent)
    with pytest.raises(InputError, match=r"qquickstart.yaml: no such file"):
        choose(str(GRID.with_name("qquickstart.yaml")), folder.parent)


@pytest.mark.parametrize("command", ["report", "eval", "sync", "status"])
def test_results_are_named_as_everywhere(folder: Path, ablate: Command, command: str) -> None:
    code, _, error = ablate(command, "quikstart", "--results", folder.parent)
    assert (code, "did you mean 'quickstart'?" in error) == (2, True)
    assert find_results("quickstart", folder.parent) == folder == find_results(str(folder), Path("elsewhere"))


# logs


def test_a_log_is_printed_whole_or_from_its_last_lines(folder: Path, ablate: Command) -> None:
    own = end(folder, FIRST, Status.FAILED)
    (own / "log.txt").write_bytes(b"one\ntwo \xe2\x86\x92\nthree\nfour")
    (own / "traceback.txt").write_text("Traceback: five\n")
    words = ["logs", FIRST.id, "--results", folder.parent]
    assert ablate(*words) == (0, "one\ntwo →\nthree\nfourTraceback: five\n", "")
    assert ablate(*words, "--lines", 2)[1] == "three\nfourTraceback: five\n"
    assert ablate(*words, "--lines", 99)[1].startswith("one\n")


def test_of_a_cell_without_a_log_it_is_said_why(folder: Path, ablate: Command) -> None:
    own = folder / FIRST.id
    assert ablate("logs", own) == (0, "", f"{FIRST.id}: has not been started\n")
    end(folder, FIRST, Status.DONE)  # in the process of whoever started it
    assert ablate("logs", own) == (0, "", f"{FIRST.id}: has no log: it printed where it was started\n")
    (own / "log.txt").touch()
    assert ablate("logs", own) == (0, "", f"{FIRST.id}: has printed nothing\n")


def test_a_log_is_followed_until_its_cell_has_ended(folder: Path) -> None:
    own, log = folder / FIRST.id, folder / FIRST.id / "log.txt"
    texts: list[str] = []
    reader = threading.Thread(target=lambda: texts.extend(read_log(own, follow=True)))
    reader.start()  # before the cell does
    with lock(own):
        log.write_bytes(b"first \xe2")
        time.sleep(0.5)
        with log.open("ab") as file:
            file.write(b"\x86\x92 last\n")
        assert reader.is_alive()
        end(folder, FIRST, Status.DONE)
    reader.join(timeout=20)
    assert not reader.is_alive()
    assert "".join(texts) == "first → last\n"
    assert len(texts) > 1


# stop


def test_a_request_reaches_the_owner_of_the_lock_and_nobody_after_it(folder: Path) -> None:
    own = folder / FIRST.id
    assert ask_cell(own) is None  # nobody runs it
    with lock(own):
        assert not cell_is_asked(own)
        asked = ask_cell(own)
        assert asked is not None
        assert asked["pid"] == os.getpid()
        assert cell_is_asked(own)
    assert not cell_is_asked(own)
    with lock(own):
        assert "token" in owner(own)
        assert not cell_is_asked(own)  # the request was another's


def test_launchers_hear_of_requests_that_come_after_their_start(folder: Path) -> None:
    ask_launchers(folder)
    first = launcher_requests(folder)
    assert not first()
    ask_launchers(folder)
    assert first()
    assert not launcher_requests(folder)()


def test_a_stopped_grid_saves_its_cells_and_goes_on_where_it_was(folder: Path, ablate: Command) -> None:
    """`ablate stop CELL` ends one cell and the run goes on; `ablate stop GRID` ends the run; the next one finishes."""
    long = make_plan(load_grid(GRID, {**SETTINGS, "budget.epochs": 200}), identify)
    order = sorted(long.cells[:2], key=lambda cell: cell.seed)
    only = [word for cell in order for word in ("--only", f"id={cell.id}")]
    words = ["run", *OPTIONS, "--set", "budget.epochs=200", *only, "--results", folder.parent, "--no-tracking"]
    run = subprocess.Popen(
        [sys.executable, "-m", "ablate.cli", *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        for cell, what in zip(order, (order[0].id, "quickstart"), strict=True):
            assert wait_until(lambda: len(read_metrics(folder / cell.id)) > 1)  # noqa: B023
            code, out, _ = ablate("stop", what, "--results", folder.parent)
            assert (code, "1 cell asked to stop" in out) == (0, True)
            assert wait_until(lambda: read_record(folder / cell.id) is not None)  # noqa: B023
        out, _ = run.communicate(timeout=120)
    finally:
        run.kill()
    assert (run.returncode, "Nothing is lost" in out) == (130, True)
    for cell in order:
        record = read_record(folder / cell.id)
        assert record is not None
        assert (record.status, record.cost.lost) == (Status.INTERRUPTED, 0.0)
        assert 0 < record.epochs < 200
        assert record.epochs == read_metrics(folder / cell.id)[-1]["epoch"]


def test_nothing_that_runs_is_no_mistake(folder: Path, ablate: Command) -> None:
    code, out, _ = ablate("stop", folder)
    assert (code, out.splitlines()[0]) == (0, f"{folder}: no cell is running")


def test_status_takes_a_name_as_the_other_commands_do(folder: Path, ablate: Command) -> None:
    by_folder, by_name = ablate("status", folder), ablate("status", folder.name, "--results", folder.parent)
    assert by_name == by_folder


# retry


def test_a_failed_cell_starts_anew_and_what_it_spent_is_lost(folder: Path, ablate: Command) -> None:
    own = end(folder, FIRST, Status.FAILED, "gone", hours=0.02)
    log_epochs(folder, FIRST, epochs=2, seconds=36.0)
    end(folder, SECOND, Status.DONE)
    code, out, _ = ablate("retry", folder)
    assert (code, out.count("starts anew")) == (0, 1)
    assert state_of(folder, FIRST).status == "waiting"
    assert state_of(folder, FIRST).attempts == 1
    assert state_of(folder, SECOND).status == "done"
    kept = own / "earlier-1"
    (attempt,) = read_attempts(own)
    assert (attempt.status, 3600 * attempt.lost_device_hours) == (Status.FAILED, pytest.approx(2 * 36.0 + 360.0))
    assert read_metrics(kept)[-1]["epoch"] == 2
    spent = read_spent(own)
    assert (spent.work, spent.lost) == (0.0, pytest.approx(2 * 36.0 + 360.0))
    assert ablate("retry", folder) == (0, f"{folder}: no cell has failed\n", "")
    end(folder, FIRST, Status.FAILED)
    assert start_anew(own) == own / "earlier-2"
    assert read_spent(own).lost == pytest.approx(2 * 36.0 + 360.0)  # the second time it had spent nothing


def test_a_diverged_cell_starts_anew_only_by_name(folder: Path, ablate: Command) -> None:
    own = end(folder, FIRST, Status.DIVERGED)
    assert "no cell has failed" in ablate("retry", folder)[1]
    assert "starts anew" in ablate("retry", own)[1]
    assert read_record(own) is None


def test_a_running_cell_is_left_alone(folder: Path, ablate: Command) -> None:
    own = end(folder, FIRST, Status.FAILED)
    with lock(own):
        code, out, _ = ablate("retry", folder)
        assert (code, "another process is running this cell" in out) == (0, True)
        (own / "damaged-record.json").write_text("{")
        assert "nothing is left over" in ablate("clean", folder, "--yes")[1]
    assert (own / "record.json").exists()


# clean


def test_what_is_left_over_is_shown_and_only_then_deleted(folder: Path, ablate: Command) -> None:
    done, failed = end(folder, FIRST, Status.DONE), end(folder, SECOND, Status.FAILED)
    for own in (done, failed):
        (own / "checkpoint").mkdir(exist_ok=True)
        (own / "checkpoint" / "state").write_bytes(bytes(1 << 20))
    start_anew(failed)
    (failed / "checkpoint" / "state").write_bytes(b"new")
    (failed / ".record.json.123").write_text("{")
    (failed / "damaged-record.json").write_text("{")
    gone = [done / "checkpoint", *(failed / n for n in ("earlier-1", ".record.json.123", "damaged-record.json"))]
    code, out, _ = ablate("clean", folder)
    assert code == 0
    assert sorted(line.split(" (")[0].split()[-1] for line in out.splitlines()[:-1]) == sorted(map(str, gone))
    assert f"1.0 MiB  {done / 'checkpoint'} (the cell is finished)" in out
    assert "Nothing was deleted" in out.splitlines()[-1]
    assert all(path.exists() for path in gone)
    code, out, _ = ablate("clean", folder, "--yes")
    assert code == 0
    assert all(line.startswith("deleted ") for line in out.splitlines())
    assert sorted(line.split(" (")[0].split()[-1] for line in out.splitlines()) == sorted(map(str, gone))
    assert f"1.0 MiB  {done / 'checkpoint'} (the cell is finished)" in out
    assert not any(path.exists() for path in gone)
    assert (failed / "checkpoint" / "state").exists()  # it goes on from there
    assert read_record(done) is not None
    assert ablate("clean", folder)[1] == f"{folder}: nothing is left over\n"


def test_what_stays_as_its_cell_has_started_meanwhile_is_said(
    folder: Path, ablate: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = folder / FIRST.id / "damaged-record.json"
    damaged.write_text("{")
    monkeypatch.setattr("runners.cleaning.is_locked", lambda _: False)  # when it was looked for
    with lock(folder / FIRST.id):
        code, out, _ = ablate("clean", folder, "--yes")
    assert (code, out.startswith("stays, as its cell runs now:"), damaged.exists()) == (0, True, True)


def test_cells_of_other_settings_go_only_when_asked_for(folder: Path, ablate: Command) -> None:
    other = folder / "another-cell"
    other.mkdir()
    (other / "cell.json").write_text((folder / FIRST.id / "cell.json").read_text())
    assert "nothing is left over" in ablate("clean", folder)[1]
    assert "another-cell (not in the plan)" in ablate("clean", folder, "--strays")[1]
    assert other.exists()
    ablate("clean", folder, "--strays", "--yes")
    assert not other.exists()
    assert (folder / FIRST.id / "cell.json").exists()
