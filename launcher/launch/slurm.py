"""Run the commands of Slurm. While the Slurm controller is unreachable, repeat a command for ten minutes."""

import os
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


# Variables that Slurm's commands need to reach the cluster.
_CLUSTER_VARIABLES = {"SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT"}
# The variable that sbatch reads for an option. It has precedence over `#SBATCH` lines.
_SBATCH_VARIABLES = {
    "time": "SBATCH_TIMELIMIT", "gpus-per-node": "SBATCH_GPUS_PER_NODE", "mem": "SBATCH_MEM_PER_NODE",
    "cpus-per-task": "SBATCH_CPUS_PER_TASK", "job-name": "SBATCH_JOB_NAME",
}  # fmt: skip


def sbatch_variable(option: str) -> str:
    """Return the variable that sbatch reads for an option, such as SBATCH_PARTITION for `partition`."""
    return _SBATCH_VARIABLES.get(option, f"SBATCH_{option.upper().replace('-', '_')}")


def submission_environment(environ: Mapping[str, str], script: str) -> dict[str, str]:
    """Return the environment to submit a script in. Pure.

    The variables of the job that this process runs in describe that job, not the new job. A variable of
    sbatch does not replace an option that the script sets. Outside of jobs, the others stay, such as
    SBATCH_ACCOUNT from the start-up file of a shell.
    """
    set_here = {sbatch_variable(name) for name in re.findall(r"^#SBATCH --([\w-]+)", script, re.MULTILINE)}
    inside_a_job = "SLURM_JOB_ID" in environ

    def is_passed(name: str) -> bool:
        if name.startswith("SBATCH_"):
            return not inside_a_job and name not in set_here
        return name in _CLUSTER_VARIABLES or not name.startswith("SLURM_")

    return {name: value for name, value in environ.items() if is_passed(name)}


def sbatch(script: str, arguments: Sequence[str] = (), *, options: Sequence[str] = ()) -> str:
    """Submit a script with arguments; return the id of the job. Raises SlurmError."""
    # sbatch passes arguments to a script named /dev/stdin, but not to a script on standard input.
    command = ["sbatch", "--parsable", *options, "/dev/stdin", *arguments]
    output = _run(command, script, patience=0.0, environment=submission_environment(os.environ, script))
    return submitted_job(output)


def submitted_job(output: str) -> str:
    """Return the job id in sbatch's output, also among lines of a site's wrapper. Raises SlurmError."""
    ids = re.findall(r"^\s*(\d+)(?:;[^\s;]+)?\s*$|Submitted batch job (\d+)", output, re.MULTILINE)
    if not ids:
        shown = "; ".join(output.split("\n")).strip("; ") or "nothing"
        raise SlurmError(f"sbatch printed no job id, so that the job may or may not run; it printed {shown}")
    return str(ids[-1][0] or ids[-1][1])


def job_state(job: str) -> str:
    """Return the state of a job, such as RUNNING or COMPLETING. Raises SlurmError."""
    state = re.search(r"\bJobState=(\w+)", _run(["scontrol", "show", "job", "-o", job]))
    if state is None:
        raise SlurmError(f"scontrol does not know job {job}")
    return state[1]


def settings_of_job(job: str) -> list[str]:
    """Return the options of sbatch for the time limit, partition ... that a job has. Raises SlurmError.

    They may come from sbatch's command line or from variables, and not from the job's script.
    """
    shown = _run(["scontrol", "show", "job", "-o", job])
    # The name may hold spaces, and text that looks like another value.
    name = re.search(r"\bJobName=(.*?) UserId=", shown)
    shown = shown[name.end() :] if name else shown
    names = {
        "time": "TimeLimit", "partition": "Partition", "account": "Account", "qos": "QOS",
        "reservation": "Reservation", "constraint": "Features", "exclude": "ExcNodeList",
        "mem": "MinMemoryNode",
    }  # fmt: skip
    values = {option: re.search(rf"\b{value}=(\S+)", shown) for option, value in names.items()}
    given = {option: match[1] for option, match in values.items() if match}
    if not re.fullmatch(r"[1-9]\d*[KMGT]", given.get("mem", "")):
        given.pop("mem", None)  # it is not set, or a fraction, which sbatch does not take
    given |= {"job-name": name[1]} if name else {}
    return [f"--{option}={value}" for option, value in given.items() if value not in ("(null)", "N/A")]


def requeue(job: str) -> None:
    """Put a job back into the queue; Slurm then ends its processes. Raises SlurmError."""
    _run(["scontrol", "requeue", job])


def read_batch_script(job: str) -> str:
    """Return the text of a job's script as submitted, even if the file has changed. Raises SlurmError."""
    output = _run(["scontrol", "write", "batch_script", job, "-"])
    return output[max(0, output.find("#!")) :]  # without lines of a site's wrapper


def _run(
    command: list[str],
    text: str | None = None,
    *,
    patience: float = _PATIENCE,
    environment: Mapping[str, str] | None = None,
) -> str:
    deadline = time.monotonic() + patience
    while True:
        try:
            process = subprocess.run(
                command, input=text, text=True, capture_output=True, timeout=_CLIENT_TIMEOUT, check=False,
                env=environment,
            )  # fmt: skip
        except FileNotFoundError:
            raise SlurmError(f"the command {command[0]} is not installed on this machine") from None
        except subprocess.TimeoutExpired:
            error, is_unreachable = f"{command[0]} did not answer within {_CLIENT_TIMEOUT:.0f} s", True
        else:
            if process.returncode == 0:
                print(process.stderr, end="", file=sys.stderr, flush=True)  # warnings, and a site's notes
                return process.stdout
            error = re.sub(rf"^{command[0]}: (error: )?", "", process.stderr.strip(), flags=re.MULTILINE)
            is_unreachable = _UNREACHABLE.search(error) is not None
        if not is_unreachable or time.monotonic() >= deadline:
            error_class = SlurmUnreachable if is_unreachable else SlurmError
            raise error_class(error.replace("\n", "; ") or f"{command[0]} failed")
        print(f"launcher: waiting for the Slurm controller: {error}", file=sys.stderr, flush=True)
        time.sleep(_PAUSE)
