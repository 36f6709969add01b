"""The one writer of a grid's results into MLflow.

Two tags say how far a run is: `ablate.claimed` (count and hash of lines of metrics.jsonl) is written before the points
of these lines, `ablate.synced_lines` after them. Whoever continues sends what lies between once more, and MLflow keeps
one of equal (name, step, timestamp, value). A resumed cell continues its run. One that was killed does its epochs since
the checkpoint again; a run that has points of these is deleted and built again, with the tags that people gave it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ablate.attempts import read_attempts
from ablate.plan import Cell
from ablate.probe_rows import FOLDER as PROBE
from ablate.record import Record, Status, parse_metrics, read_cell, read_plan, read_record
from ablate.secrets import without_secrets
from ablate.source import InputError, text_of
from runners.databases import with_driver

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

METRICS_PER_BATCH, PARAMS_PER_BATCH, VALUE_LENGTH = 1000, 100, 500  # what every MLflow server accepts
_KILLED = dict.fromkeys((Status.INTERRUPTED, Status.PAUSED, Status.STOPPED), "KILLED")
RUN_STATUS = {Status.DONE: "FINISHED", Status.DIVERGED: "FINISHED", **_KILLED}  # others: FAILED
FILES = ("cell.json", "metrics.jsonl", "attempts.jsonl", "record.json")
LATEST = 2**40  # seconds since 1970 that MLflow's columns can hold
NOTE = "mlflow.note.content"  # the description that people write on a run's page
REPORT = "report"  # folder of figures, and the name of their run
PROBED = ("snr", "total_snr", "cosine", "effective_points", "largest_share", "calls", "seconds")  # by points

T = TypeVar("T")


@dataclass(frozen=True)
class SyncSummary:
    experiment_id: str
    experiment: str
    runs: dict[str, str]  # MLflow's run ids by cell id, in the order of the plan
    num_points: int  # sent this time


@dataclass
class _Run:
    """What MLflow holds of a cell."""

    id: str
    start: int  # milliseconds since 1970
    status: str = "RUNNING"
    end: int | None = None  # likewise; None while it runs
    tags: dict[str, str] = field(default_factory=dict)
    params: set[str] = field(default_factory=set)
    stamps: list[tuple[Path, int, int]] = field(default_factory=list)  # of the files it was last written from

    def changed(self, files: Iterable[Path]) -> bool:
        """Whether the files are others than at the last call."""
        before = self.stamps
        self.stamps = [(p, p.stat().st_mtime_ns, p.stat().st_size) for p in files if p.exists()]
        return self.stamps != before

    @property
    def last_change(self) -> int:
        return max(mtime for _, mtime, _ in self.stamps) // 1_000_000

    def comes_from(self, lines: list[bytes]) -> bool:
        """Whether all points that may be in the run are of these lines."""
        claimed = self.tags.get("ablate.claimed", _claim([]))
        return claimed == _claim(lines[: int(claimed.split()[0])])


def _has_begun(folder: Path) -> bool:
    """Whether a cell has ever been started; a waiting one has its folder, and no run."""
    return (folder / "cell.json").exists() and any((folder / name).exists() for name in FILES[1:])


class Writer:
    """The one writer. It remembers what MLflow holds, so that no news cost nothing; not to be used after an error."""

    def __init__(self, results: Path, uri: str) -> None:
        for name in ("plan.json", "grid.yaml"):
            if not (results / name).is_file():
                raise InputError(f"{results}: not a results folder, it has no {name}")
        plan = read_plan(results)
        self.results, self.grid = results, plan.grid
        self.cells = [cell.id for cell in plan.cells]
        self.grid_sha = hashlib.sha256((results / "grid.yaml").read_bytes()).hexdigest()[:12]
        self.client = _client(uri)
        # two results folders of one grid can share a server under two names; a server has its own place for artifacts
        self.experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", self.grid)
        artifacts = None if is_server(uri) else str(results.resolve().parent / "mlartifacts" / self.grid)
        known = self.client.get_experiment_by_name(self.experiment)
        if known and known.lifecycle_stage == "deleted":
            self.client.restore_experiment(known.experiment_id)
        self.experiment_id = known.experiment_id if known else self.client.create_experiment(self.experiment, artifacts)
        self.runs = self._find()

    def write(self) -> SyncSummary:
        """Send what is new. Raises InputError for damaged files, one line each, once all others are sent."""
        num_points, damaged = 0, []
        for id in self.cells:
            if _has_begun(self.results / id):
                try:
                    num_points += self._write_cell(id)
                except InputError as error:
                    damaged.append(str(error))
        self._write_folder(REPORT)
        self._write_probe()
        if damaged:
            raise InputError("\n".join(damaged))
        runs = {id: self.runs[id].id for id in self.cells if id in self.runs}
        return SyncSummary(self.experiment_id, self.experiment, runs, num_points)

    def _find(self) -> dict[str, _Run]:
        """This grid's runs by cell. If two writers at once have made two for a cell, one is deleted."""
        runs: dict[str, _Run] = {}
        token: str | None = None
        while token != "":
            page = self.client.search_runs([self.experiment_id], page_token=token)
            for info, data in ((run.info, run.data) for run in page if run.data.tags.get("ablate.grid") == self.grid):
                name = data.tags.get("ablate.cell", data.tags.get("ablate.kind", REPORT))
                if name in runs:
                    self.client.delete_run(info.run_id)
                else:
                    end = None if info.status == "RUNNING" else info.end_time
                    runs[name] = _Run(info.run_id, info.start_time, info.status, end, dict(data.tags), set(data.params))
            token = page.token or ""
        return runs

    def _create(self, name: str, start: float, **tags: str) -> _Run:
        tags = {f"ablate.{key}": value for key, value in {"grid": self.grid, **tags}.items()}
        info = self.client.create_run(self.experiment_id, round(start * 1000), tags, name).info
        self.runs[name] = _Run(info.run_id, info.start_time, tags=tags)
        return self.runs[name]

    def _write_cell(self, id: str) -> int:
        folder = self.results / id
        cell, metrics, attempts, record = (folder / name for name in FILES)
        files = [cell, metrics, attempts, record, *_files(folder / "samples")]
        starts = [a.started for a in read_attempts(folder) if 0 < a.started < LATEST] or [cell.stat().st_mtime]
        run = self.runs.get(id) or self._create(id, starts[0], kind="cell", cell=id)
        if not run.changed(files):
            return 0
        lines = _lines(metrics)
        if not run.comes_from(lines):
            self.client.delete_run(run.id)
            given = {key: value for key, value in run.tags.items() if not key.startswith("ablate.")}
            run = self._create(id, starts[0], kind="cell", cell=id)
            self._tag(run, {key: value for key, value in given.items() if key == NOTE or not key.startswith("mlflow.")})
            run.changed(files)
        self._write_params(run, read_cell(folder))
        num_points = self._write_lines(run, lines, metrics)
        self._write_artifacts(run, folder / "samples")
        ended = read_record(folder)
        self._write_status(run, ended if ended and ended.attempts >= len(starts) else None)  # else it is running again
        return num_points

    def _write_params(self, run: _Run, cell: Cell) -> None:
        from mlflow.entities import Param

        params = [Param(k, v[:VALUE_LENGTH]) for k, v in cell_params(cell).items() if k not in run.params]
        for batch in _batches(params, PARAMS_PER_BATCH):
            self.client.log_batch(run.id, params=batch)
        run.params.update(param.key for param in params)

    def _write_lines(self, run: _Run, lines: list[bytes], path: Path) -> int:
        synced = int(run.tags.get("ablate.synced_lines", 0))
        new = [
            parse_metrics(text_of(line, path, number), path, number)
            for number, line in enumerate(lines[synced:], start=synced + 1)
        ]
        points = [point for line in new for point in _points(line, run.start)]
        self._tag(run, {"ablate.claimed": _claim(lines)})
        for batch in _batches(points, METRICS_PER_BATCH):
            self.client.log_batch(run.id, metrics=batch)
        self._tag(run, {"ablate.synced_lines": str(len(lines))})
        return len(points)

    def _write_status(self, run: _Run, record: Record | None) -> None:
        """The state of a cell, which has no record while it runs."""
        tags, status, end = {"ablate.status": "running"}, "RUNNING", None
        if record:
            commit = record.provenance.commit if record.provenance else None
            tags = {"ablate.status": record.status.value, "ablate.commit": commit or "unknown"}
            tags |= {"ablate.message": record.message[:VALUE_LENGTH]}
            status, end = RUN_STATUS.get(record.status, "FAILED"), run.last_change
        self._tag(run, {"ablate.grid_sha": self.grid_sha, "ablate.commit": "", "ablate.message": "", **tags})
        if end is not None and (status, end) != (run.status, run.end):
            self.client.set_terminated(run.id, status, end)
        elif status != run.status:
            self.client.update_run(run.id, status)
        run.status, run.end = status, end

    def _write_folder(self, name: str) -> _Run | None:
        """A folder of tables and figures as a run of its own; None if there is nothing new in it."""
        files = _files(self.results / name)
        if not files:
            return None
        start = (self.results / "grid.yaml").stat().st_mtime  # lists it below the cells, which have charts
        run = self.runs.get(name) or self._create(name, start, kind=name)
        if not run.changed(files):
            return None
        self._write_artifacts(run, self.results / name)
        self.client.set_terminated(run.id, end_time=run.last_change)
        return run

    def _write_probe(self) -> None:
        """The probe's folder, and its table of gradients as metrics whose step is the number of points."""
        from mlflow.entities import Metric

        run, table = self._write_folder(PROBE), self.results / PROBE / "gradients.csv"
        if run is None or not table.exists():
            return
        with table.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        points = []
        for row in rows:
            setting = "/".join(filter(None, (row["weights"], row["estimator"], row["sampler"], row["axes"])))
            setting = re.sub(r"[^\w/. :-]", "_", setting)
            found = {name: float(row[name]) for name in PROBED if row[name]}
            points += [
                Metric(f"{name}/{setting}", value, run.last_change, int(row["points"]))
                for name, value in found.items()
                if math.isfinite(value)
            ]
        for batch in _batches(points, METRICS_PER_BATCH):
            self.client.log_batch(run.id, metrics=batch)

    def _write_artifacts(self, run: _Run, folder: Path) -> None:
        """A folder, if the run does not hold it as it is."""
        contents = hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in _files(folder)))
        if _files(folder) and run.tags.get(f"ablate.{folder.name}") != contents.hexdigest():
            for file in _files(folder):  # and not the folder, which may hold links to files elsewhere
                self.client.log_artifact(run.id, str(file), str(file.parent.relative_to(folder.parent)))
            self._tag(run, {f"ablate.{folder.name}": contents.hexdigest()})

    def _tag(self, run: _Run, tags: dict[str, str]) -> None:
        """Give a run these tags; one with an empty value is taken away."""
        from mlflow.entities import RunTag

        changed = {key: value for key, value in tags.items() if run.tags.get(key, "") != value}
        if news := {key: value for key, value in changed.items() if value}:
            self.client.log_batch(run.id, tags=[RunTag(key, value) for key, value in news.items()])
        for key in changed.keys() - news.keys():
            self.client.delete_tag(run.id, key)
            del run.tags[key]
        run.tags.update(news)


def cell_params(cell: Cell) -> dict[str, str]:
    """A resolved cell as flat params: the axes under their own names, then `components.objective.clip_range`, ..."""
    axes = {"objective": cell.objective, "estimator": cell.estimator, "sampler": cell.sampler, "seed": cell.seed}
    rest = cell.model_dump(mode="json", include={"components", "recipe", "versions"})
    # a cell.json need not come from a grid, where secrets are refused
    values = {key: without_secrets(key, value) for key, value in {**axes, **cell.axes, **rest}.items()}
    return dict(pair for key, value in values.items() for pair in _flat(key, value))


def _flat(path: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{path}.{key}", inner)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value)


def _points(line: dict[str, Any], start: int) -> Iterator[Metric]:
    """A line of metrics.jsonl. Its time is the run's start plus the device time so far: the same whoever sends it.

    Accuracy goes first, as the compare page opens on the first metric a run got.
    """
    from mlflow.entities import Metric

    time = start + round(line.get("device_hours", 0.0) * 3_600_000)
    for name, value in sorted(line.items(), key=lambda item: item[0] != "eval/accuracy"):
        if name != "epoch" and isinstance(value, int | float):
            yield Metric(name, float(value), time, line["epoch"])


def _batches(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _claim(lines: list[bytes]) -> str:
    return f"{len(lines)} {hashlib.sha256(b''.join(lines)).hexdigest()}"


def _lines(path: Path) -> list[bytes]:
    """The complete lines of a file, without one that is still being written."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _client(uri: str) -> MlflowClient:
    """Imports MLflow, which takes seconds, without its telemetry, its news and minutes of retries."""
    settings = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    }
    os.environ.update({name: value for name, value in settings.items() if name not in os.environ})
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=with_driver(uri))


def _files(folder: Path) -> list[Path]:
    """The files below a folder, none of which is a link: it may lead out of the results."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return sorted(path for path in found if path.resolve() == folder.parent.resolve() / path.relative_to(folder.parent))


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))
