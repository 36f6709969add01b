"""The lock of a cell on a disk that machines share, where flock reaches nobody else."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ablate import lock as module
from ablate.lock import Taken, is_locked, lock, owner

THEIRS = {"host": "elsewhere", "pid": 7, "started": 0.0, "machine": "another", "token": "theirs"}


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on a disk without flock, where everything takes a hundredth of the time."""
    monkeypatch.setattr(module, "_flock", lambda file, kind: None)
    monkeypatch.setattr(module, "_on_this_machine", lambda folder: False)
    for name, seconds in (("BEAT", 0.1), ("STALE", 0.6), ("WATCH", 0.4), ("SETTLE", 0.2)):
        monkeypatch.setattr(module, name, seconds)
    return tmp_path


@contextmanager
def owned_elsewhere(folder: Path, moment: Callable[[], float]) -> Iterator[None]:
    """By a process on another machine, alive, whose signs of life have the times that `moment` says."""
    path, ended = folder / ".lock", threading.Event()
    path.write_text(json.dumps(THEIRS))

    def beat() -> None:
        while True:
            os.utime(path, (moment(),) * 2)
            if ended.wait(0.05):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_cell_at_work_on_another_machine_is_left_alone(shared: Path) -> None:
    with owned_elsewhere(shared, time.time):
        time.sleep(0.1)
        assert is_locked(shared)
        with (
            pytest.raises(Taken, match=r"another process is running this cell \(process 7 on elsewhere\)"),
            lock(shared),
        ):
            pass
    assert owner(shared) == THEIRS


@pytest.mark.parametrize("jump", [-86400.0, 86400.0])
def test_a_server_whose_clock_has_jumped_takes_no_lock_from_its_owner(shared: Path, jump: float) -> None:
    """Its signs of life come with times of another day, but they come."""
    with owned_elsewhere(shared, lambda: time.time() + jump), pytest.raises(Taken), lock(shared):
        pass


def test_the_lock_of_a_machine_that_is_gone_is_taken_over(shared: Path) -> None:
    (shared / ".lock").write_text(json.dumps(THEIRS))
    long_ago = time.time() - 10
    os.utime(shared / ".lock", (long_ago, long_ago))
    assert not is_locked(shared)
    with lock(shared):
        assert owner(shared)["pid"] == os.getpid()
        assert is_locked(shared)
        time.sleep(1)  # signs of life keep it ours
        assert is_locked(shared)
    assert owner(shared) == {}
    assert not is_locked(shared)


def test_of_several_that_claim_a_free_lock_one_goes_on(shared: Path) -> None:
    gone_on, ready = [], threading.Barrier(4)

    def claim(number: int) -> None:
        ready.wait()
        try:
            with lock(shared):
                gone_on.append(number)
                time.sleep(1)
        except Taken:
            pass

    claims = [threading.Thread(target=claim, args=(number,)) for number in range(4)]
    for each in claims:
        each.start()
    for each in claims:
        each.join()
    assert len(gone_on) == 1


def test_who_has_slept_until_another_has_taken_over_ends(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set())
    with lock(shared):
        (shared / ".lock").write_text(json.dumps(THEIRS))
        assert ended.wait(5)
    assert owner(shared) == THEIRS


def test_a_file_that_says_nothing_sensible_has_no_owner(shared: Path) -> None:
    (shared / ".lock").write_bytes(b"\0" * 100)
    assert owner(shared) == {}
    with lock(shared):
        assert owner(shared)["pid"] == os.getpid()
