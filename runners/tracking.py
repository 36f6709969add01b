"""Results mirrored into MLflow: one experiment per grid, one flat run per cell, from the files, by one writer.

The files are the truth, so a killed writer or a deleted database loses nothing: the next sync continues or starts over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from ablate.lock import Taken, lock
from ablate.secrets import redacted
from ablate.source import InputError
from runners.mlflow_writer import SyncSummary, Writer, is_server

logger = logging.getLogger(__name__)


def default_uri(results: Path) -> str:
    """An SQLite file in the results root, beside the folders of the grids."""
    return f"sqlite:///{results.resolve().parent / 'mlflow.db'}"


def server_command(results: Path, uri: str | None = None) -> str:
    """The command that shows a database on http://127.0.0.1:5000."""
    artifacts = results.resolve().parent / "mlartifacts"
    words = ["mlflow", "server", "--backend-store-uri", redacted(uri or default_uri(results))]
    words += ["--artifacts-destination", str(artifacts), "--host", "127.0.0.1", "--port", "5000", "--workers", "1"]
    return shlex.join(words)


def compare_link(uri_or_host: str, experiment_id: str, run_ids: list[str]) -> str:
    """The page that compares runs, on the tracking server, or for a database on the server of `server_command`."""
    host = redacted(uri_or_host).replace("***@", "").rstrip("/") if is_server(uri_or_host) else "http://127.0.0.1:5000"
    runs, experiments = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (run_ids, [experiment_id]))
    return f"{host}/#/compare-runs?runs={runs}&experiments={experiments}"


class Mirrored(InputError):
    """Another process mirrors these results, and will send what is new."""


@contextlib.contextmanager
def _only_writer(results: Path) -> Iterator[None]:
    """Hold a grid's folder against other writers, not against cells. Raises Mirrored if there is another."""
    with contextlib.ExitStack() as held:
        if (results / "plan.json").is_file():
            try:
                held.enter_context(lock(results))
            except Taken:
                raise Mirrored(
                    f"{results}: another process mirrors it to MLflow; try again once that has ended"
                ) from None
        yield


def sync(results: Path, uri: str | None = None) -> SyncSummary:
    """Bring MLflow up to date with results/<grid>.

    Raises InputError if it is no such folder, a file in it is damaged, or MLflow cannot be used; Mirrored, an
    InputError, while another process does the same.
    """
    uri = uri or default_uri(results)
    try:
        with _only_writer(results):
            return Writer(results, uri).write()
    except InputError:
        raise
    except Exception as error:  # of MLflow, its database or its server, or a damaged file
        raise InputError(f"{results}: cannot be mirrored to {redacted(uri)}: {_problem(error)}") from error


class Mirror:
    """Syncs a grid's folder every few seconds in the background. Never raises: tracking cannot stop training.

    The first failure is logged; all are tried again later. While another process mirrors the folder it waits.
    """

    def __init__(self, results: Path, uri: str | None = None, *, seconds: float = 5.0) -> None:
        self.results, self.uri, self.seconds = results, uri or default_uri(results), seconds
        self.summary: SyncSummary | None = None  # of the last success
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mlflow-mirror", daemon=True)

    def __enter__(self) -> Mirror:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout: float = 60.0) -> None:
        """A last sync, waited for at most `timeout` seconds."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        if self._thread.is_alive():
            self._warn(f"the last sync takes more than {timeout:.0f} s")

    def _loop(self) -> None:
        writer: Writer | None = None
        stopping = False
        with contextlib.ExitStack() as held:
            while not stopping:
                stopping = self._stop.wait(self.seconds)
                try:
                    if writer is None:
                        held.close()
                        held.enter_context(_only_writer(self.results))
                        writer = Writer(self.results, self.uri)
                    self.summary = writer.write()
                except Mirrored:
                    continue
                except InputError as error:  # a damaged file: all others are sent
                    self._warn(_problem(error))
                except Exception as error:
                    writer = None  # the next one looks up what MLflow really holds
                    self._warn(_problem(error))

    def _warn(self, problem: str) -> None:
        if not self._warned:
            where, again = redacted(self.uri), f"ablate sync {shlex.quote(str(self.results))}"
            logger.warning("MLflow at %s is behind: %s. Training goes on; `%s` catches up.", where, problem, again)
        self._warned = True


def _problem(error: Exception) -> str:
    return redacted((str(error).strip().splitlines() or [type(error).__name__])[0])
