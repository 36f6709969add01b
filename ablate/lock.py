"""The lock of a cell's folder, which says whether a process is at work there, on this machine or another.

On a disk of this machine the kernel's lock (flock) says it all; it ends with its process. On a disk that machines
share, flock may not reach the others: there the file also names its owner, who touches it every BEAT seconds. The times
compared are the file server's own, that of the last beat and that of a file just touched beside it, so that no
machine's clock matters. Before a lock is taken over it is watched for a beat, so that a jump of the server's clock does
not matter either.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ablate.source import InputError

BEAT = 10.0  # seconds between signs of life
STALE = 60.0  # seconds without one, by the file server's clock, after which an owner is suspected to be dead
WATCH = 15.0  # seconds for which such an owner is watched before its lock is taken over, by our monotonic clock
SETTLE = 1.0  # seconds after which, on a shared disk, of several that claim a free lock only the last goes on
LENGTH = 512  # bytes of the file: one write, so that nobody reads half of it
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
LOCAL = {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}


class Taken(InputError):
    """Another process holds the folder."""


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a cell's folder until the block, or the process, ends. Raises Taken, an InputError, if another does."""
    try:
        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise InputError(f"{folder}: cannot be locked: {error.strerror}") from None
    try:
        token = _taken_by_us(file, folder)
        ended = threading.Event()
        threading.Thread(target=_beat, args=(file, folder, token, ended), daemon=True).start()
        try:
            yield
        finally:
            ended.set()
            if _owner(file).get("token") == token:
                _write(file, {})
    finally:
        os.close(file)


def is_locked(folder: Path) -> bool:
    """Whether a process is running this cell."""
    try:
        file = os.open(folder / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        flock = _flock(file, fcntl.LOCK_SH)
        if flock:
            fcntl.flock(file, fcntl.LOCK_UN)  # at once, as who wants to start does not wait for long
        return flock is False or _alive_elsewhere(file, folder, flock=flock is True)
    finally:
        os.close(file)


def _taken_by_us(file: int, folder: Path) -> str:
    """The token that we have written as the owner."""
    for delay in (0, 0.01, 0.1, 0.2):  # outlasts a look by is_locked
        time.sleep(delay)
        flock = _flock(file, fcntl.LOCK_EX)
        if flock is not False:
            break
    if flock is False or _alive_elsewhere(file, folder, flock=flock is True, watch=True):
        raise _taken(file, folder)
    token = uuid.uuid4().hex
    who = {"host": platform.node(), "pid": os.getpid(), "parent": os.getppid(), "machine": _machine()}
    mine = {**who, "started": time.time(), "token": token}
    try:
        _write(file, mine)
    except OSError as error:
        raise InputError(f"{folder}: cannot be locked: {error.strerror}") from None
    if not _on_this_machine(folder):
        time.sleep(SETTLE)
        if owner(folder).get("token") != token:
            raise _taken(file, folder)
    return token


def _taken(file: int, folder: Path) -> Taken:
    return Taken(f"{folder}: another process is running this cell{_by(_owner(file))}")


def held_by(folder: Path) -> str:
    """Who holds a folder, in brackets; empty where that is not known."""
    return _by(owner(folder))


def owner(folder: Path) -> dict[str, Any]:
    """Who holds a folder, or has held it and died: host, pid, started (seconds since 1970); empty if nobody."""
    try:
        file = os.open(folder / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return {}
    try:
        return _owner(file)
    finally:
        os.close(file)


def is_orphan(folder: Path) -> bool:
    """Whether the process that holds a folder runs on this machine and has lost the one that has started it."""
    found = owner(folder)
    if found.get("machine") != _machine() or not is_locked(folder):
        return False
    try:
        status = Path("/proc", str(found["pid"]), "stat").read_text(encoding="utf-8")
    except (OSError, KeyError):  # it has ended meanwhile
        return False
    parent = int(status.rpartition(")")[2].split()[1])
    return parent != found.get("parent")


def _flock(file: int, kind: int) -> bool | None:
    """Whether no process that flock reaches holds the file; None where there is no flock."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        return None
    return True


def _machine() -> str:
    """This machine since it was started: flock between its processes is to be trusted on any disk that has it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _on_this_machine(folder: Path) -> bool:
    """Whether a folder lies on a disk that no other machine writes to."""
    mounts: dict[str, str] = {}
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        before, _, after = line.partition(" - ")
        mounts[before.split()[4].replace("\\040", " ")] = after.split()[0]  # what is mounted last hides what was there
    path = folder.resolve()
    return next((mounts[str(p)] for p in (path, *path.parents) if str(p) in mounts), "") in LOCAL


def _alive_elsewhere(file: int, folder: Path, *, flock: bool, watch: bool = False) -> bool:
    """Whether the owner is at work where flock does not reach.

    `watch`: until it gives a sign of life, or has not for long enough; else its last one decides.
    """
    found = _owner(file)
    if not found or (flock and (_on_this_machine(folder) or found.get("machine") == _machine())):
        return False
    last = os.fstat(file).st_mtime_ns
    suspected = abs(_server_time(folder) - last / 1e9) > STALE
    if not watch:
        return not suspected
    end = time.monotonic() + (WATCH if suspected else STALE)
    while time.monotonic() < end:
        time.sleep(BEAT / 10)
        with (folder / ".lock").open("rb") as again:  # opening asks the server; what a client has seen may be old
            if os.fstat(again.fileno()).st_mtime_ns != last:
                return True
    return False


def _server_time(folder: Path) -> float:
    """Seconds since 1970 by the clock of whoever keeps the folder; by ours where nothing can be written."""
    path = folder / f".clock.{uuid.uuid4().hex}"
    try:
        path.touch()
        seconds = path.stat().st_mtime
        path.unlink()
    except OSError:
        return time.time()
    return seconds


def _write(file: int, content: dict[str, Any]) -> None:
    os.pwrite(file, json.dumps(content).encode().ljust(LENGTH - 1) + b"\n", 0)
    os.fsync(file)


def _owner(file: int) -> dict[str, Any]:
    """What the file says; one that says nothing sensible has no owner."""
    try:
        found = json.loads(os.pread(file, LENGTH, 0) or b"{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _by(found: dict[str, Any]) -> str:
    return f" (process {found['pid']} on {found['host']})" if {"pid", "host"} <= found.keys() else ""


def _beat(file: int, folder: Path, token: str, ended: threading.Event) -> None:
    """Give signs of life. A process that slept so long that another has taken over must not write any more."""
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):  # a server that is away for a while
            os.utime(file)  # to the server's time
            found = owner(folder)
            if found.get("token") not in (token, None) and not ended.is_set():
                print(f"{folder}: the lock was lost{_by(found)}; ended", file=sys.stderr, flush=True)
                os._exit(1)
