"""Run the commands of Slurm. While the Slurm controller is unreachable, repeat a command for ten minutes."""

import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.config.errors import ConfigError

_CLIENT_TIMEOUT = 60.0  # seconds; a command can hang while the controller is unreachable
_PATIENCE, _PAUSE = 600.0, 5.0  # seconds
_UNREACHABLE = re.compile(
    r"unable to contact|connection refused|socket timed out|communication|configuration (source|file)",
    re.IGNORECASE,
)


class SlurmError(Exception):
    """Raised if a Slurm command fails, with the text that the command printed."""


class SlurmUnreachable(SlurmError):
    """Raised if the Slurm controller does not answer."""


@dataclass(frozen=True)
class Allocation:
    """The Slurm job that runs this batch script."""

    job: str
    nodes: int
    array_job: str | None = None
    array_task: str | None = None
    restarts: int = 0

    @property
    def id(self) -> str:
        """Return the id that Slurm commands take for this job alone. In an array `job` is ambiguous."""
        return self.job if self.array_task is None else f"{self.array_job}_{self.array_task}"

    @property
    def name(self) -> str:
        return f"slurm-{self.array_job or self.job}"


def read_allocation(environ: Mapping[str, str]) -> Allocation:
    """Return the job of this process from its environment. Raises ConfigError outside a Slurm job."""
    try:
        job, nodes = environ["SLURM_JOB_ID"], int(environ["SLURM_JOB_NUM_NODES"])
    except (KeyError, ValueError):
        why = "must run inside a Slurm job"
        raise ConfigError("job", None, why, "`launcher submit`, or sbatch with a recipe") from None
    array_job, array_task = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return Allocation(job, nodes, array_job, array_task, int(environ.get("SLURM_RESTART_COUNT", "0")))


def sbatch(script: str, arguments: Sequence[str] = (), *, options: Sequence[str] = ()) -> str:
    """Submit a script with arguments; return the id of the job. Raises SlurmError."""
    # sbatch passes arguments to a script named /dev/stdin, but not to a script on standard input.
    output = _run(["sbatch", "--parsable", *options, "/dev/stdin", *arguments], script, patience=0.0)
    return output.strip().partition(";")[0]


def job_state(job: str) -> str:
    """Return the state of a job, such as RUNNING or COMPLETING. Raises SlurmError."""
    state = re.search(r"\bJobState=(\w+)", _run(["scontrol", "show", "job", "-o", job]))
    if state is None:
        raise SlurmError(f"scontrol does not know job {job}")
    return state[1]


def requeue(job: str) -> None:
    """Put a job back into the queue; Slurm then ends its processes. Raises SlurmError."""
    _run(["scontrol", "requeue", job])


def read_batch_script(job: str) -> str:
    """Return the text of a job's script as submitted, even if the file has changed. Raises SlurmError."""
    return _run(["scontrol", "write", "batch_script", job, "-"])


def _run(command: list[str], text: str | None = None, *, patience: float = _PATIENCE) -> str:
    deadline = time.monotonic() + patience
    while True:
        try:
            process = subprocess.run(
                command, input=text, text=True, capture_output=True, timeout=_CLIENT_TIMEOUT, check=False
            )
        except FileNotFoundError:
            raise SlurmError(f"the command {command[0]} is not installed on this machine") from None
        except subprocess.TimeoutExpired:
            error, is_unreachable = f"{command[0]} did not answer within {_CLIENT_TIMEOUT:.0f} s", True
        else:
            if process.returncode == 0:
                return process.stdout
            error = re.sub(rf"^{command[0]}: (error: )?", "", process.stderr.strip(), flags=re.MULTILINE)
            is_unreachable = _UNREACHABLE.search(error) is not None
        if not is_unreachable or time.monotonic() >= deadline:
            error_class = SlurmUnreachable if is_unreachable else SlurmError
            raise error_class(error.replace("\n", "; ") or f"{command[0]} failed")
        print(f"launcher: waiting for the Slurm controller: {error}", file=sys.stderr, flush=True)
        time.sleep(_PAUSE)
