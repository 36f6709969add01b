"""A SLURM cluster of two nodes on this machine, with a munge of its own, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={controller}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=2
SlurmdTimeout=10
ReturnToService=2
MpiDefault=none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=1 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=1 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
CGROUP = "CgroupPlugin=cgroup/v1\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n"


@dataclass
class SlurmCluster:
    folder: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    nodes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *words: str) -> str:
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, check=True).stdout.strip()

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / "daemons.log").open("ab") as log:
            self.processes.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))
        return self.processes[-1]

    def lose(self, node: str) -> None:
        """What a node's sudden death leaves: no daemon, and no process of a job."""
        stepped = [*_descendants(self.nodes[node].pid), *_steps_of(self.folder, node)]
        for pid in (self.nodes[node].pid, *stepped):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _steps_of(folder: Path, node: str) -> list[int]:
    """Daemons of job steps, which leave their parent, and whatever they have started."""
    steps = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/environ")
        if f"SLURMD_NODENAME={node}".encode() in (environ := _read(path)).split(b"\0")
        and str(folder).encode() in environ
    ]
    parents = [int(_read(Path("/proc", str(pid), "stat")).rpartition(b")")[2].split()[1] or 0) for pid in steps]
    daemons = [pid for pid in parents if b"slurmstepd" in _read(Path("/proc", str(pid), "cmdline"))]
    return [*daemons, *steps]


def _descendants(pid: int) -> list[int]:
    children = _read(Path("/proc", str(pid), "task", str(pid), "children")).split()
    return [found for child in map(int, children) for found in (child, *_descendants(child))]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@contextlib.contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Two nodes with one core each. A job that was requeued waits `cred_expire` seconds, else two minutes."""
    for name in ("state", "spool-n0", "spool-n1"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    ports = dict(zip(("controller", "first", "second"), _free_ports(3), strict=True))
    host = platform.node().split(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, user=getpass.getuser(), host=host, **ports))
    (folder / "cgroup.conf").write_text(CGROUP)
    cluster = SlurmCluster(folder)
    try:
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        names["seed-file"] = "munge.seed"
        options = [f"--{option}={folder / name}" for option, name in names.items()]
        cluster.start("munged", "--foreground", "--force", *options)
        _wait_for(folder / "munge.socket")
        cluster.start("slurmctld", "-D", "-c")
        for node in ("n0", "n1"):
            cluster.nodes[node] = cluster.start("slurmd", "-D", "-c", "-N", node)
        end = time.monotonic() + 60
        while _idle(cluster) < 2 and time.monotonic() < end:
            time.sleep(0.2)
        yield cluster
    finally:
        for process in reversed(cluster.processes):
            process.kill()
            process.wait()


def _idle(cluster: SlurmCluster) -> int:
    try:
        return cluster.ask("sinfo", "--noheader", "--Node", "--format=%t").split().count("idle")
    except subprocess.CalledProcessError:
        return 0


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 10
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
