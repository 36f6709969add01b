"""Cells as jobs of a SLURM array, by submitit.

Before its time limit, or where SLURM takes its place away, a cell saves itself and its job goes back into the queue.
What has become of a cell is in its folder; SLURM is asked only whether a job is still there, as its accounting may be
missing. Results must lie on a disk that all nodes share.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablate.attempts import read_attempts
from ablate.record import Status, read_record, write_atomic
from ablate.source import InputError
from runners.closing import note_lost_node
from runners.launchers.processes import CellProcesses, environments, fair_threads, processes_of, start
from runners.launchers.protocol import Ended, Job

ARRAY = 1000  # jobs of one array; SLURM's MaxArraySize is 1001 unless a site has changed it
LOOK = 5.0  # seconds between looks at the queue
GONE = 60.0  # seconds that a job is missing from the queue, with no word of its end, until it is taken for lost
DEFAULTS = {"time": 24 * 60, "signal_delay_s": 600}  # minutes; seconds before that limit


class SlurmLauncher:
    """Arrays of jobs, `workers` of them at a time, with as many GPUs as a cell asks for if the site has any.

    Cells that ask for the same number of GPUs are one array.

    `settings` are submitit's, such as partition, time in minutes, signal_delay_s, account, mem, gpus_per_node.
    """

    def __init__(self, results: Path, workers: int | None, settings: Mapping[str, Any]) -> None:
        self.places = ARRAY
        self.folder = (results / "slurm").resolve()
        at_once = {"array_parallelism": workers or ARRAY}
        self.parameters = {"job_name": "ablate", **DEFAULTS, "stderr_to_stdout": True, **at_once, **settings}
        try:
            self.has_gpus = _has_gpus(settings.get("partition"))
            self.folder.mkdir(parents=True, exist_ok=True)
            self._executor(1)
        except (OSError, RuntimeError) as error:
            raise InputError(f"--launcher slurm: {error}; is this a machine that can submit jobs?") from None
        except ValueError as error:
            raise InputError(f"--launcher-set: {str(error).replace(chr(10), ' ')}") from None
        self.queue = Queue()

    def submit(self, folders: Sequence[Path]) -> list[Job]:
        alike: dict[int, list[Path]] = {}
        for folder in folders:
            alike.setdefault(processes_of(folder), []).append(folder)
        jobs = {job.folder: job for processes, some in alike.items() for job in self._submit(processes, some)}
        return [jobs[folder] for folder in folders]

    def taken_by(self, orphans: Sequence[Path]) -> int:
        return 0

    def close(self) -> None:
        pass

    def _executor(self, processes: int) -> Any:
        """What submits cells of so many processes. Raises what submitit does."""
        executor = _submitit().SlurmExecutor(self.folder, max_num_timeout=10**6)
        cores = {"cpus_per_task": processes} if processes > 1 else {}
        gpus = {"gpus_per_node": processes} if self.has_gpus else {}
        executor.update_parameters(**cores, **gpus, **self.parameters)
        return executor

    def _submit(self, processes: int, folders: Sequence[Path]) -> list[SlurmJob]:
        """One array."""
        words = [self.folder / f"{folder.name}-{uuid.uuid4().hex[:8]}.json" for folder in folders]
        given = [(str(folder.resolve()), str(word)) for folder, word in zip(folders, words, strict=True)]
        jobs = self._executor(processes).map_array(SlurmTask(processes, os.getcwd()), *zip(*given, strict=True))
        return [
            SlurmJob(job.job_id, folder, word, self.queue)
            for job, folder, word in zip(jobs, folders, words, strict=True)
        ]


class SlurmTask:
    """What a job runs. submitit calls `checkpoint` when SLURM announces the time limit, or a preemption."""

    def __init__(self, processes: int, where: str) -> None:
        self.processes, self.where = processes, where
        self.cell: CellProcesses | None = None

    def __call__(self, folder: str, word: str) -> None:
        """The processes of a cell until they have ended; how, is written to the file `word`."""
        if Path(self.where).is_dir():
            os.chdir(self.where)  # for components of the user's own
        if os.environ.get("SLURM_RESTART_COUNT"):  # by itself: a cell that was asked to stop has closed its attempt
            note_lost_node(Path(folder))
        threads = fair_threads(self.processes)
        self.cell = start(Path(folder), environments(self.processes, threads=threads), tied=True)
        while (ended := self.cell.poll()) is None:
            time.sleep(0.2)
        job = _submitit().JobEnvironment().job_id  # with its place in the array, whose own id one of its jobs has too
        if _goes_on(job, Path(folder), Path(word)):
            _command("scontrol", "requeue", job)
            time.sleep(GONE)  # until SLURM ends this job
        write_atomic(Path(word), json.dumps({"code": ended.code, "rank": ended.rank, "size": ended.size}))

    def checkpoint(self, folder: str, word: str) -> Any:
        """Let the cell save itself; the job that goes back into the queue."""
        if self.cell:
            self.cell.cancel()
            self.cell.wait()
        return _submitit().helpers.DelayedSubmission(SlurmTask(self.processes, self.where), folder, word)


class Queue:
    """The jobs that SLURM knows of, looked up every LOOK seconds."""

    def __init__(self) -> None:
        self.jobs: set[str] = set()
        self.seen: dict[str, float] = {}  # time.monotonic() of the last look that found a job
        self.looked = float("-inf")

    def missing(self, job: str) -> float:
        """Seconds since a job was last seen; 0 while it is there, and while nobody knows."""
        now = time.monotonic()
        self.seen.setdefault(job, now)
        if now - self.looked >= LOOK:
            self._look(now)
        return 0.0 if job in self.jobs else self.looked - self.seen[job]

    def _look(self, now: float) -> None:
        try:
            listed = _command("squeue", "--me", "--noheader", "--array", "--format=%i")
        except OSError:  # the controller is away
            self.seen = dict.fromkeys(self.seen, now)
            return
        self.jobs, self.looked = set(listed.split()), now
        self.seen |= {job: now for job in self.seen if job in self.jobs}


class SlurmJob:
    """A job of the array."""

    def __init__(self, id: str, folder: Path, word: Path, queue: Queue) -> None:
        self.id, self.folder, self.word, self.queue = id, folder, word, queue
        self.starts = len(read_attempts(folder))
        self.cancelled = False

    def poll(self) -> Ended | None:
        if self.word.exists():
            return Ended(**json.loads(self.word.read_text(encoding="utf-8")))
        missing = self.queue.missing(self.id)
        if self.cancelled and missing > 0:
            return Ended(started=len(read_attempts(self.folder)) > self.starts)
        if missing >= GONE:
            return Ended(node_lost=f"job {self.id} has left the queue without a word; see {self.word.parent}/")
        return None

    def cancel(self, *, force: bool = False) -> None:
        self.cancelled = True
        _request(self.word).touch()
        for options in ([],) if force else (["--state=PENDING"], ["--signal=TERM"]):
            try:
                _command("scancel", *options, self.id)
            except OSError:  # it has ended meanwhile
                continue


def _goes_on(job: str, folder: Path, word: Path) -> bool:
    """Whether a cell has saved itself because SLURM, and not its launcher or who called scancel, has asked it to."""
    record = read_record(folder)
    if record is None or record.status is not Status.INTERRUPTED or _request(word).exists():
        return False
    try:
        state = _command("squeue", "--noheader", "--format=%T", f"--jobs={job}")
    except OSError:
        return False
    return state.strip() == "RUNNING"


def _request(word: Path) -> Path:
    """The file that says that a launcher has asked a cell to stop."""
    return word.with_suffix(".stop")


def _has_gpus(partition: str | None) -> bool:
    """Whether nodes have GPUs to ask for."""
    where = [f"--partition={partition}"] if partition else []
    return "gpu" in _command("sinfo", "--noheader", "--format=%G", *where)


def _command(*words: str) -> str:
    """What a command prints. Raises OSError where there is none, or where it fails."""
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise OSError(f"{words[0]}: {ended.stderr.strip() or ended.returncode}")
    return ended.stdout


def _submitit() -> Any:
    try:
        import submitit  # noqa: PLC0415
    except ImportError:
        raise InputError("--launcher slurm: submitit is not installed; pip install 'ablate[slurm]'") from None
    return submitit
