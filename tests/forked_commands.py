"""Run Python programs, `launcher ...` above all, in processes forked from a server with the imports done.

A forked process starts in milliseconds instead of two to five seconds. It has its own arguments, directory,
environment, output and process group. The server `light()` has imported the command line only, the server
`heavy()` all that trains.
"""

import atexit
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parents[1]
LAUNCHER = "from launcher.__main__ import main\nmain()\n"
HEAVY_MODULES = {"torch", "deepspeed", "wandb", "transformers"}
COMMAND_LINE = tuple(
    f"launcher.commands.{path.stem}" for path in (ROOT / "launcher" / "commands").glob("[a-z]*.py")
)
TRAINING = (
    *COMMAND_LINE, "launcher.engine.build", "launcher.runtime.training", "launcher.runtime.sampling",
    "launcher.runtime.metrics.wandb_thread",
    "launcher.parity.verification", "launcher.compare.measured_layout", "launcher.calibrate.rounds",
    "launcher.evaluation.ranks",
)  # fmt: skip

_RANK_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment without variables that change where W&B or the ranks look."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB_", "SLURM_")) and name not in _RANK_VARIABLES
    }
    kept.pop("HYDRA_FULL_ERROR", None)
    return {**kept, "OMP_NUM_THREADS": "1", "HOME": "/nonexistent", **extra}


@cache
def light() -> "CommandServer":
    return CommandServer(COMMAND_LINE)


@cache
def heavy() -> "CommandServer":
    return CommandServer(TRAINING)


@dataclass
class Command:
    """A forked process that leads a process group of its own. The interface is that of subprocess.Popen."""

    pid: int
    _reports: IO[bytes]
    _out: IO[str]
    _error: IO[str]
    returncode: int | None = None
    heavy: list[str] = field(default_factory=list)  # HEAVY_MODULES that it had imported at its exit

    def poll(self) -> int | None:
        while self.returncode is None and select.select([self._reports], [], [], 0)[0]:
            vars(self).update(json.loads(self._reports.readline()))
        return self.returncode

    def wait(self, timeout: float = 120) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if not select.select([self._reports], [], [], max(0.0, deadline - time.monotonic()))[0]:
                os.killpg(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(str(self.pid), timeout, self.out(), self.error())
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end; standard output and standard error."""
        self.wait(timeout)
        return self.out(), self.error()

    def out(self) -> str:
        """Return the standard output so far."""
        return _read(self._out)

    def error(self) -> str:
        """Return the standard error so far."""
        return _read(self._error)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


class CommandServer:
    """A process that forks a process per program. It ends with this process."""

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_commands", str(theirs.fileno()), *modules],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def start(
        self,
        arguments: list[str],
        *,
        cwd: Path,
        environment: dict[str, str],
        program: str = LAUNCHER,
        largest_file: int | None = None,
    ) -> Command:
        """Start `program` with these arguments. No file that it writes may exceed `largest_file` bytes."""
        request, out, error = (tempfile.TemporaryFile("w+") for _ in range(3))  # noqa: SIM115
        json.dump([arguments, str(cwd), environment, program, largest_file], request)
        request.flush()
        ours, theirs = socket.socketpair()
        with ours, theirs, request:
            socket.send_fds(self._socket, [b"x"], [f.fileno() for f in (request, out, error, theirs)])
            # Unbuffered, or select would not see a report that was read with the one before it.
            reports = ours.makefile("rb", buffering=0)
            theirs.close()
            pid = json.loads(reports.readline())["pid"]
        return Command(pid, reports, out, error)

    def run(
        self, arguments: list[str], *, timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; the options are those of start."""
        command = self.start(arguments, **options)
        out, error = command.communicate(timeout)
        return subprocess.CompletedProcess(arguments, command.wait(), out, error)


def _read(file: IO[str]) -> str:
    size = os.fstat(file.fileno()).st_size
    return os.pread(file.fileno(), size, 0).decode()


def _serve(requests: socket.socket) -> None:
    """Fork for each request, until this end of the requests is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the process that waits for a program
    gc.collect()
    gc.freeze()
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 1, 4)
        if not message:
            return
        if not os.fork():
            requests.close()
            _fork_program(*fds)
        for fd in fds:
            os.close(fd)


def _fork_program(request: int, out: int, error: int, reports: int) -> NoReturn:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with os.fdopen(request) as file:
        file.seek(0)
        arguments, cwd, environment, program, largest_file = json.load(file)
    for fd in (out, error, reports):
        os.set_inheritable(fd, False)
    started, start = os.pipe()
    if pid := os.fork():
        os.setpgid(pid, pid)
        _report(reports, pid=pid)
        os.close(start)  # the program may begin
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with suppress(BrokenPipeError):  # nobody waits any longer for a program that exceeded its time
            _report(reports, returncode=code)
        os._exit(0)
    os.close(start)
    os.read(started, 1)
    os.close(started)
    os.dup2(out, 1)
    os.dup2(error, 2)
    os.close(out)
    os.close(error)
    # As a shell leaves them; nohup and background jobs of a script ignore both.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    # The first to be registered runs last.
    atexit.register(lambda: _report(reports, heavy=sorted(HEAVY_MODULES & set(sys.modules))))
    sys.argv = ["launcher", *arguments]
    _run_to_its_end(program)


def _run_to_its_end(program: str) -> NoReturn:
    """Run and exit as an interpreter does, without unloading its modules: torch's take 0.4 s."""
    code: object = 0
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    if not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _report(reports: int, **values: Any) -> None:
    os.write(reports, f"{json.dumps(values)}\n".encode())


def _preload(modules: list[str]) -> None:
    if "launcher.engine.build" in modules:
        from launcher.engine.distributed import prepare_deepspeed

        prepare_deepspeed("cpu")
    for module in modules:
        importlib.import_module(module)
    if modules:
        from launcher.config.compose import compose_jobs
        from launcher.config.schema import RunConfig

        compose_jobs("config", RunConfig, [])  # the first of a process takes twice as long as the next


if __name__ == "__main__":
    descriptor, *preloaded = sys.argv[1:]
    _preload(preloaded)
    _serve(socket.socket(fileno=int(descriptor)))
