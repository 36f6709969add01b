"""A PostgreSQL server of Debian's packages for as long as a test needs it, on a Unix socket and a loopback port."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAMS = max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)


def can_serve() -> bool:
    """Whether PostgreSQL is here; it refuses to be run by root, who then needs its user."""
    return PROGRAMS is not None and (os.geteuid() != 0 or "postgres" in {user.pw_name for user in pwd.getpwall()})


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of a server without databases of its own."""
    folder = Path(tempfile.mkdtemp(prefix="ablate-pg-"))  # the path of a socket has to be short
    if os.geteuid() == 0:
        shutil.chown(folder, "postgres")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    data, options = folder / "data", f"-c listen_addresses=127.0.0.1 -p {port} -k {folder} -c fsync=off"
    try:
        _run("initdb", "--auth=trust", "--username=ablate", "--pgdata", str(data))
        _run("pg_ctl", "-D", str(data), "-o", options, "-l", str(folder / "log"), "--wait", "start")
        yield f"postgresql://ablate@127.0.0.1:{port}"
    finally:
        _run("pg_ctl", "-D", str(data), "--mode=immediate", "stop", check=False)
        shutil.rmtree(folder)


def database(url: str, name: str) -> str:
    """The URL of a new database."""
    _run("createdb", f"--maintenance-db={url}/postgres", name)
    return f"{url}/{name}"


def _run(name: str, *words: str, check: bool = True) -> None:
    assert PROGRAMS is not None
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}
    subprocess.run([str(PROGRAMS / name), *words], check=check, capture_output=True, cwd="/", **user)
