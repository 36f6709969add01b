"""A campaign of faults: whatever happens to cells, launchers, files, disk and clock, `ablate run` brings the grid to
its end, and to the same one; nothing is lost, nothing done twice, and what was done in vain is in the ledger.

Launchers are forked from a server that has imported everything once, and cells from them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from cells import BRIEF
from commands import wait_until

from ablate import cli
from ablate.attempts import read_attempts
from ablate.grid import load_grid
from ablate.lock import is_locked, owner
from ablate.plan import make_plan
from ablate.record import Ledger, Status, read_metrics, read_record, read_spent
from runners import launchers, retries, stopping
from runners.identity import identify
from runners.launchers.protocol import Ended, Job

GRID = Path(__file__).parents[2] / "grids" / "quickstart.yaml"
NUM_EPOCHS = 4
SETTINGS = {
    **BRIEF,
    "budget.epochs": NUM_EPOCHS,
    "evaluation.num_prompts": 4,
    "evaluation.every": 2,
}
CELLS = [cell.id for cell in make_plan(load_grid(GRID, SETTINGS), identify).cells][:2]
WORDS = [str(GRID), *(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}"))]
WORDS += [word for cell in CELLS for word in ("--only", f"id={cell}")]
PLACES = 2
PATIENCE = 120  # seconds after which a grid is stuck
DAY = 86400.0
FORK, SERVER = multiprocessing.get_context("fork"), multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["runners.train", "runners.sweep", "runners.preflight", "runners.tracking", "ablate.cli"])


class ForkJob:
    def __init__(self, process: BaseProcess) -> None:
        self.process = process

    def poll(self) -> Ended | None:
        return None if self.process.exitcode is None else Ended(code=self.process.exitcode)

    def cancel(self, *, force: bool = False) -> None:
        if force:
            self.process.kill()
        else:
            self.process.terminate()


class ForkLauncher:
    places = PLACES

    def __init__(self, clock: float) -> None:
        self.clock = clock

    def submit(self, folders: Sequence[Path]) -> list[Job]:
        return [ForkJob(start(FORK, run_cell, folder, self.clock)) for folder in folders]

    def taken_by(self, orphans: Sequence[Path]) -> int:
        return len(orphans)

    def close(self) -> None:
        pass


def start(context: Any, target: Callable[..., None], *given: object) -> BaseProcess:
    process: BaseProcess = context.Process(target=target, args=given)
    process.start()
    return process


def run_cell(folder: Path, clock: float) -> None:
    for number in stopping.SIGNALS:
        signal.signal(number, signal.SIG_DFL)  # and not the launcher's handlers
    command(folder / "log.txt", clock, "cell", str(folder))


def run_grid(folder: Path, clock: float) -> None:
    launchers.make_launcher = lambda *given, **named: ForkLauncher(clock)
    retries.ANSWERS = {failure: (0.05, words) for failure, (_, words) in retries.ANSWERS.items()}
    command(folder.parent / "log.txt", clock, "run", *WORDS, "--results", str(folder.parent), "--no-tracking")


def command(log: Path, clock: float, *words: str) -> None:
    """Be `ablate WORDS`, by a clock that is wrong by so many seconds."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    right = time.time
    time.time = lambda: right() + clock
    sys.argv = ["ablate", *words]
    cli.main()


@dataclass(kw_only=True)
class Campaign:
    """One grid and what has been done to it."""

    folder: Path
    random: random.Random
    injected: Counter[str] = field(default_factory=Counter)
    again: Counter[str] = field(default_factory=Counter)  # cells whose end was taken away from them
    losses: dict[str, float] = field(default_factory=dict)  # seconds x devices that are lost for sure, by cell
    launchers: list[BaseProcess] = field(default_factory=list)
    jumped: bool = False

    def start(self, clock: float = 0.0) -> BaseProcess:
        self.folder.parent.mkdir(exist_ok=True)
        self.launchers.append(start(SERVER, run_grid, self.folder, clock))
        return self.launchers[-1]

    def cells(self) -> list[Path]:
        return [self.folder / name for name in CELLS]

    def working(self) -> list[int]:
        """The processes of cells that run."""
        return [owner(folder)["pid"] for folder in self.cells() if is_locked(folder) and "pid" in owner(folder)]

    def reach(self, launcher: BaseProcess) -> bool:
        """Whether cells are at work, at a moment that nobody has chosen."""
        lines = self.lines() + self.random.randrange(NUM_EPOCHS)
        wait_until(lambda: (self.working() and self.lines() >= lines) or launcher.exitcode is not None)
        time.sleep(self.random.uniform(0, 0.2))
        return launcher.exitcode is None and bool(self.working())

    def lines(self) -> int:
        return sum((folder / "metrics.jsonl").read_bytes().count(b"\n") for folder in self.started())

    def started(self) -> list[Path]:
        return [folder for folder in self.cells() if (folder / "metrics.jsonl").exists()]

    def finish(self) -> None:
        """The same command once more, as a user would: it must do all that is left."""
        code = self.ended(self.start())
        assert code == 0, f"exit code {code}: {(self.folder.parent / 'log.txt').read_text()[-3000:]}"

    @staticmethod
    def ended(launcher: BaseProcess) -> int | None:
        launcher.join(PATIENCE)
        return launcher.exitcode

    def kill_all(self) -> int:
        """SIGKILL to launchers and cells; how many there were."""
        running = [launcher for launcher in self.launchers if launcher.exitcode is None]
        for launcher in running:
            launcher.kill()
            launcher.join()
        killed = len(running)
        end = time.monotonic() + 10
        while (pids := self.working()) and time.monotonic() < end:  # one may have been about to start
            killed += sum(map(kill, pids))
            time.sleep(0.05)
        return killed

    def note_losses(self) -> None:
        """What of the work of cells, none of which runs, no checkpoint holds: it has to be booked as lost."""
        for folder in self.cells():
            if not (folder / "checkpoint").exists() or ((record := read_record(folder)) and record.status.final):
                continue
            newest, spent = folder / "checkpoint" / "state.pt", read_spent(folder)
            saved = Ledger(**torch.load(newest, weights_only=True)["cost"]) if newest.exists() else Ledger()
            self.losses[folder.name] = spent.lost + max(0.0, spent.work - saved.work)

    def spent(self) -> dict[str, float]:
        """Seconds x devices of each cell, with what was lost."""
        spent = {folder.name: read_spent(folder) for folder in self.cells()}
        return {name: ledger.work + ledger.lost for name, ledger in spent.items()}


def kill(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return True
    return False


def fill_disk(pid: int) -> bool:
    """From now on the process cannot write another byte to any file."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return True
    return False


# faults: each is told the running launcher, and says how often it has struck


def kill_a_cell(campaign: Campaign, launcher: BaseProcess) -> int:
    return sum(map(kill, campaign.random.sample(campaign.working(), 1)))


def kill_the_launcher(campaign: Campaign, launcher: BaseProcess) -> int:
    launcher.kill()
    return 1


def kill_both(campaign: Campaign, launcher: BaseProcess) -> int:
    return campaign.kill_all()


def fill_the_disk_of_a_cell(campaign: Campaign, launcher: BaseProcess) -> int:
    return sum(map(fill_disk, campaign.random.sample(campaign.working(), 1)))


def fill_the_disk(campaign: Campaign, launcher: BaseProcess) -> int:
    return sum(map(fill_disk, [launcher.pid or 0, *campaign.working()]))


def cut_the_metrics_short(campaign: Campaign, launcher: BaseProcess) -> int:
    campaign.kill_all()
    return cut_short(campaign, campaign.random.choice(campaign.started() or campaign.cells()) / "metrics.jsonl")


def cut_the_metrics_of_a_finished_cell_short(campaign: Campaign, launcher: BaseProcess) -> int:
    campaign.finish()
    return cut_short(campaign, campaign.random.choice(campaign.cells()) / "metrics.jsonl")


def cut_a_record_short(campaign: Campaign, launcher: BaseProcess) -> int:
    campaign.finish()
    return cut_short(campaign, campaign.random.choice(campaign.cells()) / "record.json")


def cut_short(campaign: Campaign, path: Path) -> int:
    if not path.exists():
        return 0
    record = read_record(path.parent)
    campaign.again[path.parent.name] += bool(record and record.status.final)
    os.truncate(path, campaign.random.randrange(path.stat().st_size - 1))  # and not the last line break alone
    return 1


def flip_a_bit_of_the_newest_checkpoint(campaign: Campaign, launcher: BaseProcess) -> int:
    wait_until(lambda: launcher.exitcode is not None or any(campaign.folder.glob("*/checkpoint/state.pt")))
    campaign.kill_all()
    there = [path for path in campaign.folder.glob("*/checkpoint/state.pt") if not read_record(path.parent.parent)]
    for path in there[:1]:
        content = bytearray(path.read_bytes())
        content[campaign.random.randrange(len(content))] ^= 1 << campaign.random.randrange(8)
        path.write_bytes(content)
    return len(there[:1])


def let_the_clock_jump(campaign: Campaign, launcher: BaseProcess) -> int:
    """The launcher goes on by one clock, the next one and its cells by another; and files are from another day."""
    if campaign.random.random() < 0.5:
        campaign.kill_all()
    jump = campaign.random.choice((-DAY, DAY))
    for path in campaign.folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            os.utime(path, (time.time() + jump,) * 2)
    campaign.jumped = True
    campaign.ended(campaign.start(clock=jump))
    return 1


def start_a_second_launcher(campaign: Campaign, launcher: BaseProcess) -> int:
    for other in (campaign.start(), campaign.start(), launcher):
        campaign.ended(other)
    return 2


def ask_to_stop_and_kill_soon(campaign: Campaign, launcher: BaseProcess) -> int:
    launcher.terminate()
    time.sleep(campaign.random.uniform(0, 0.5))
    campaign.kill_all()
    return 1


FAULTS = (
    kill_a_cell,
    kill_the_launcher,
    kill_both,
    fill_the_disk_of_a_cell,
    fill_the_disk,
    cut_the_metrics_short,
    cut_the_metrics_of_a_finished_cell_short,
    cut_a_record_short,
    flip_a_bit_of_the_newest_checkpoint,
    let_the_clock_jump,
    start_a_second_launcher,
    ask_to_stop_and_kill_soon,
)
Fault = Callable[[Campaign, BaseProcess], int]


def timeless(folder: Path) -> list[str]:
    """The metric log of a cell, without what clocks say."""
    counted = ("cost/forwards", "cost/backwards")
    kept = [
        {key: value for key, value in line.items() if key in counted or not key.startswith(("cost/", "device_hours"))}
        for line in read_metrics(folder)
    ]
    return [json.dumps(line) for line in kept]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The metric logs of a grid to which nothing happens."""
    campaign = Campaign(folder=tmp_path_factory.mktemp("undisturbed") / "quickstart", random=random.Random(0))
    campaign.finish()
    assert all(len(read_attempts(folder)) == 1 for folder in campaign.cells())
    return {folder.name: timeless(folder) for folder in campaign.cells()}


@pytest.fixture
def campaign(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Campaign]:
    campaign = Campaign(folder=tmp_path / "r" / "quickstart", random=random.Random(request.node.name))
    yield campaign
    campaign.kill_all()


def inject(campaign: Campaign, fault: Fault) -> None:
    """Let a fault strike once; where it comes too late, the grid is done already."""
    before = campaign.spent()
    launcher = campaign.start()
    if campaign.reach(launcher):
        campaign.injected[fault.__name__] += fault(campaign, launcher)
    if fault not in (kill_a_cell, kill_the_launcher, fill_the_disk_of_a_cell):
        campaign.kill_all()
        campaign.note_losses()
    campaign.ended(launcher)
    if "metrics" not in fault.__name__ and "record" not in fault.__name__:  # which have gone with what was in them
        after = campaign.spent()
        assert all(after[name] >= before[name] - 1e-3 for name in before), "what was spent has been forgotten"


def check(campaign: Campaign, undisturbed: dict[str, list[str]]) -> None:
    """The grid has come to its end, and nothing shows but attempts and what they have lost."""
    for folder in campaign.cells():
        record, attempts = read_record(folder), read_attempts(folder)
        assert record is not None
        assert (record.status, record.epochs, record.attempts) == (Status.DONE, NUM_EPOCHS, len(attempts))
        assert timeless(folder) == undisturbed[folder.name]
        assert sum(a.status is Status.DONE for a in attempts) == 1 + campaign.again[folder.name]
        assert all(a.status is not None for a in attempts)
        assert record.cost.lost == pytest.approx(3600 * sum(a.lost_device_hours for a in attempts), abs=1e-3)
        assert record.cost.lost >= campaign.losses.get(folder.name, 0) - 1e-3
        if not campaign.jumped:
            pairs = itertools.pairwise(attempts)
            assert all(a.ended <= b.started for a, b in pairs if a.ended is not None), "two at once"
        assert not (folder / "checkpoint").exists()
        assert not is_locked(folder)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_grid_comes_to_the_same_end_whatever_happens(
    campaign: Campaign, undisturbed: dict[str, list[str]], fault: Fault, record_property: Callable[[str, object], None]
) -> None:
    inject(campaign, fault)
    campaign.finish()
    assert campaign.injected[fault.__name__], "it came too late"
    record_property("faults", sum(campaign.injected.values()))
    check(campaign, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 MiB, enough for the checkpoints of two cells, as the folder of the results."""
    disk = tmp_path / "quickstart"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here; the other full disks are limits on the size of files")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_grid_outlives_a_disk_without_a_byte_left(small_disk: Path, undisturbed: dict[str, list[str]]) -> None:
    campaign = Campaign(folder=small_disk, random=random.Random(0))
    launcher = campaign.start()
    assert campaign.reach(launcher)
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    assert campaign.ended(launcher) == 1
    said = (campaign.folder.parent / "log.txt").read_text()  # on another disk
    assert "No space left on device" in " ".join(said.split())  # lines are broken to the width of a terminal
    refused = campaign.start()
    assert campaign.ended(refused) in (1, 2)
    filler.unlink()
    campaign.finish()
    check(campaign, undisturbed)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_two_hundred_faults_at_random(
    tmp_path: Path, undisturbed: dict[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    chance, injected = random.Random(0), Counter[str]()
    for number in range(1000):
        campaign = Campaign(folder=tmp_path / str(number) / "quickstart", random=chance)
        for fault in chance.choices(FAULTS, k=chance.randint(1, 4)):
            inject(campaign, fault)
        campaign.finish()
        check(campaign, undisturbed)
        injected += campaign.injected
        if injected.total() >= 200:
            break
    with capsys.disabled():
        print(f"\n{injected.total()} faults: " + ", ".join(f"{name} {n}" for name, n in injected.most_common()))
    assert injected.total() >= 200
