"""A real Slurm of several nodes on this machine: munged, slurmctld, and a slurmd for each node.

Each node has a UTS and a PID namespace of its own: its jobs see the node's host name, and killing the
namespace's first process ends all that runs there, as a power failure does. Needs root, and Debian's packages
(installed where apt can); without accounting, so there is no sacct.
"""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from launcher.launch.orphans import die_with

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge"]
PROGRAMS = ["slurmctld", "slurmd", "sbatch", "srun", "munged", "unshare"]
MARK = "# launcher-tests"
KILL_WAIT = 20  # seconds from SIGTERM to SIGKILL; 30 is usual
_HOSTS = Path("/etc/hosts")


class NoSlurm(Exception):
    """Raised if Slurm cannot run on this machine; the message says why."""


def install() -> None:
    """Put Slurm's programs on the PATH. Raises NoSlurm."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if os.geteuid() != 0:
        raise NoSlurm("starting Slurm's daemons needs root")
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        if shutil.which("apt-get") is None:
            raise NoSlurm(f"{', '.join(missing)} not found, and no apt-get to install them")
        quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "capture_output": True}
        command = ["apt-get", "install", "-y", "-q", "--no-install-recommends", *PACKAGES]
        if subprocess.run(command, check=False, **quiet).returncode != 0:  # type: ignore[call-overload]
            subprocess.run(["apt-get", "update", "-q"], check=False, **quiet)  # type: ignore[call-overload]
            done = subprocess.run(command, check=False, **quiet)  # type: ignore[call-overload]
            if done.returncode != 0:
                raise NoSlurm(f"apt-get cannot install them: {done.stderr.decode()[-500:]}")
    trial = ["unshare", "--uts", "--pid", "--mount-proc", "--fork", "true"]
    if subprocess.run(trial, check=False, capture_output=True).returncode != 0:
        raise NoSlurm("namespaces cannot be made here")


class Cluster:
    """A Slurm cluster of `nodes` with `cpus` each, and with `gpus` that are configured but do not exist."""

    def __init__(self, nodes: int, *, cpus: int = 4, gpus: int = 0, memory_mb: int = 16000) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self._cpus, self._gpus, self._memory = cpus, gpus, memory_mb
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._controller: subprocess.Popen[bytes] | None = None
        self.environment = {"SLURM_CONF": str(self.base / "slurm.conf")}

    def up(self) -> None:
        """Start the cluster and wait until all nodes are idle. Raises RuntimeError."""
        for name in ("munge", "state", "log", *(f"spool/{node}" for node in self.names)):
            (self.base / name).mkdir(parents=True)
        self.base.chmod(0o755)
        self._write_configuration()
        self._resolve(on=True)
        munge = self.base / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        files = [f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")]
        self._daemons.append(self._start("munged", "--foreground", f"--socket={munge / 'socket'}", *files))
        wait_for((munge / "socket").exists, "munged", 10)
        self._start_controller()
        for node in self.names:
            self._start_node(node)
        wait_for(lambda: self.states().count("idle") == len(self.names), "the nodes are idle", 120)

    def down(self) -> None:
        self.run("scancel", "--full", "--signal=KILL", "--user=root", check=False)
        for node in [*self._nodes]:
            self._nodes.pop(node).kill()
        for daemon in [*self._daemons, *([self._controller] if self._controller else [])]:
            daemon.terminate()
            daemon.wait(timeout=20)
        self._resolve(on=False)
        shutil.rmtree(self.base, ignore_errors=True)

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Return the output of a Slurm client. Clients hang without a controller, hence the timeout."""
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, **self.environment}, text=True, capture_output=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def states(self) -> list[str]:
        return self.run("sinfo", "-h", "-N", "-o", "%T", check=False).split()

    def alive(self) -> list[str]:
        return list(self._nodes)

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "show", "job", "-o", job)
        return shown.partition("JobState=")[2].partition(" ")[0]

    def fail(self, node: str) -> None:
        """Simulate a power loss: kill all processes of a node at once, and mark the node as down in Slurm."""
        self._nodes.pop(node).kill()
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=failed")

    def restore(self, node: str) -> None:
        self._start_node(node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)
        wait_for(lambda: "down" not in "".join(self.states()), f"{node} is back", 30)

    def restore_all(self) -> None:
        for node in self.names:
            if node not in self._nodes:
                self.restore(node)

    def restart_controller(self) -> None:
        """Kill and restart the controller; running jobs continue."""
        assert self._controller is not None
        self._controller.kill()
        self._controller.wait()
        self._start_controller()

    def start_now(self, job: str) -> None:
        """Release a requeued job, which waits two minutes by default."""
        wait_for(lambda: self.state(job) != "COMPLETING", f"job {job} is in the queue", 60)
        if self.state(job) == "PENDING":
            # A job started within the second of its requeue is mistaken by slurmd for the revoked job.
            time.sleep(1.5)
            self.run("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)

    def _start_controller(self) -> None:
        self._controller = self._start("slurmctld", "-D")
        wait_for(lambda: "UP" in self.run("scontrol", "ping", check=False), "slurmctld", 30)

    def _start_node(self, node: str) -> None:
        inside = f"hostname {node} && exec slurmd -D -N {node}"
        namespaces = ["unshare", "--uts", "--pid", "--mount-proc", "--fork", "--kill-child"]
        # A shell remains the namespace's first process: slurmd as such would reap no orphan.
        self._nodes[node] = self._start(*namespaces, "bash", "-c", f"({inside}) & wait")

    def _start(self, *command: str) -> subprocess.Popen[bytes]:
        log = (self.base / "log" / f"{Path(command[0]).name}.err").open("ab")
        return subprocess.Popen(
            command, env={**os.environ, **self.environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, preexec_fn=partial(die_with, os.getpid()),
        )  # fmt: skip

    def _resolve(self, *, on: bool) -> None:
        """Resolve the names of all nodes and of this machine to 127.0.0.1; otherwise srun hangs."""
        lines = [line for line in _HOSTS.read_text().splitlines() if not line.endswith(MARK)]
        names = " ".join([*self.names, socket.gethostname()])
        # In place: it may be a mount of its own.
        _HOSTS.write_text("\n".join([*([f"127.0.0.1 {names} {MARK}"] if on else []), *lines]) + "\n")

    def _write_configuration(self) -> None:
        base, ports = self.base, free_ports(1 + len(self.names))
        gres = f" Gres=gpu:{self._gpus}" if self._gpus else ""
        size = f"CPUs={self._cpus} RealMemory={self._memory}{gres}"
        nodes = [
            f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} {size}"
            for node, port in zip(self.names, ports[1:], strict=True)
        ]
        settings = f"""
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket
StateSaveLocation={base}/state
SlurmctldPidFile={base}/slurmctld.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdSpoolDir={base}/spool/%n
SlurmdPidFile={base}/spool/%n/slurmd.pid
SlurmdLogFile={base}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait={KILL_WAIT}
MinJobAge=86400
GresTypes=gpu
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
        (base / "slurm.conf").write_text("\n".join([settings, *nodes]) + "\n")
        for number in range(self._gpus):
            (base / f"gpu{number}").symlink_to("/dev/null")
        files = f"File={base}/gpu[0-{self._gpus - 1}]"
        (base / "gres.conf").write_text(f"Name=gpu {files}\n" if self._gpus else "")


def free_ports(count: int) -> list[int]:
    """Return ports that are free now, below those that the kernel hands out to connections: tests beside
    these open many, and a node whose port was taken in between never comes up."""
    ports: list[int] = []
    for port in random.sample(range(10_000, 32_000), 2_000):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise RuntimeError(f"not {count} free ports")


def wait_for(happened: Callable[[], object], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"still waiting: {what}")
        time.sleep(0.05)
