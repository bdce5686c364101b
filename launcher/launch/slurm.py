"""Slurm's commands, as this project uses them. A controller that is away for a while is waited for."""

import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.config.errors import ConfigError

_CLIENT_TIMEOUT = 60.0  # seconds: clients hang where the controller is gone
_PATIENCE, _PAUSE = 600.0, 5.0
_AWAY = re.compile(
    r"unable to contact|connection refused|socket timed out|communication|configuration (source|file)",
    re.IGNORECASE,
)


class SlurmError(Exception):
    """A command of Slurm's failed; says what it said."""


class SlurmAway(SlurmError):
    """No controller answers."""


@dataclass(frozen=True)
class Allocation:
    """The job that a batch script runs in."""

    job: str
    nodes: int
    array_job: str | None = None
    array_task: str | None = None
    restarts: int = 0

    @property
    def id(self) -> str:
        """What Slurm's commands take for this job alone: the last of an array has the number of them all."""
        return self.job if self.array_task is None else f"{self.array_job}_{self.array_task}"

    @property
    def name(self) -> str:
        """What its runs are called: an array's tasks under one name."""
        return f"slurm-{self.array_job or self.job}"


def allocation_of(environ: Mapping[str, str]) -> Allocation:
    """Raises ConfigError outside a job."""
    try:
        job, nodes = environ["SLURM_JOB_ID"], int(environ["SLURM_JOB_NUM_NODES"])
    except (KeyError, ValueError):
        why = "is what a Slurm batch script runs, and this is none"
        raise ConfigError("job", None, why, "launcher submit, or sbatch and a recipe") from None
    return Allocation(
        job,
        nodes,
        environ.get("SLURM_ARRAY_JOB_ID"),
        environ.get("SLURM_ARRAY_TASK_ID"),
        int(environ.get("SLURM_RESTART_COUNT", "0")),
    )


def sbatch(script: str, arguments: Sequence[str] = (), *, options: Sequence[str] = ()) -> str:
    """Submit a script with arguments of its own; the job's id. Raises SlurmError."""
    # As /dev/stdin it takes arguments, which it does not from standard input without a name.
    said = _run(["sbatch", "--parsable", *options, "/dev/stdin", *arguments], script, patience=0.0)
    return said.strip().partition(";")[0]


def job_state(job: str) -> str:
    """Such as RUNNING or COMPLETING. Raises SlurmError."""
    found = re.search(r"\bJobState=(\w+)", _run(["scontrol", "show", "job", "-o", job]))
    if found is None:
        raise SlurmError(f"scontrol does not know job {job}")
    return found[1]


def requeue(job: str) -> None:
    """Put a job back into the queue; Slurm then ends what it runs. Raises SlurmError."""
    _run(["scontrol", "requeue", job])


def batch_script(job: str) -> str:
    """The text that a job runs, whatever became of its file. Raises SlurmError."""
    return _run(["scontrol", "write", "batch_script", job, "-"])


def _run(command: list[str], text: str | None = None, *, patience: float = _PATIENCE) -> str:
    deadline = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(
                command, input=text, text=True, capture_output=True, timeout=_CLIENT_TIMEOUT, check=False
            )
        except FileNotFoundError:
            raise SlurmError(f"there is no {command[0]} here") from None
        except subprocess.TimeoutExpired:
            error, is_away = f"{command[0]} did not answer for {_CLIENT_TIMEOUT:.0f} s", True
        else:
            if done.returncode == 0:
                return done.stdout
            error = re.sub(rf"^{command[0]}: (error: )?", "", done.stderr.strip(), flags=re.MULTILINE)
            is_away = _AWAY.search(error) is not None
        if not is_away or time.monotonic() >= deadline:
            kind = SlurmAway if is_away else SlurmError
            raise kind(error.replace("\n", "; ") or f"{command[0]} failed")
        print(f"launcher: waiting for Slurm's controller: {error}", file=sys.stderr, flush=True)
        time.sleep(_PAUSE)
