"""The text of a Slurm batch script. Pure.

What a user typed stands in it as a quoted word: in `#SBATCH` lines by Slurm's rules, below by the shell's.
"""

import re
import shlex
from dataclasses import dataclass

from launcher.config.errors import ConfigError
from launcher.config.schema import OnStop, RunConfig, SlurmConfig, Tasks
from launcher.config.slurm_rules import gpus_of_a_node, nodes_of


@dataclass(frozen=True)
class Batch:
    """What one script runs: a job, or several as an array."""

    run: RunConfig  # of the first: all ask Slurm for the same
    typed: list[str]  # on the command line
    jobs: list[list[str]]  # overrides of each
    ranks_per_node: int
    python: str


def render(batch: Batch) -> str:
    """The script. Its own arguments are further overrides."""
    on_stop = batch.run.slurm.on_stop
    lines = [
        "#!/usr/bin/env bash",
        f"# launcher submit {shlex.join(batch.typed)}",
        *(f"#SBATCH {option}" for option in options(batch)),
        "# sbatch's own options come before this script's name, overrides of a run's settings after it.",
        f"# Told to stop, before its time is up or by a preemption, the run is saved and {_THEN[on_stop]}"
        f" (slurm.on_stop={on_stop.name}).",
        "set -euo pipefail",
        "# Told to stop before the launcher listens: go on, it is told again when time is up.",
        "trap '' USR1",
        *_surroundings(batch.run.slurm),
        *_check_of(batch.python),
        *_start(batch),
    ]
    return "\n".join(lines) + "\n"


_THEN = {
    OnStop.requeue: "the job requeued",
    OnStop.chain: "a next job submitted",
    OnStop.end: "the job ends",
}


def options(batch: Batch) -> list[str]:
    """What stands behind each #SBATCH."""
    s = batch.run.slurm
    least, most = nodes_of(batch.run)
    named: dict[str, str | int | None] = {
        "job-name": s.job_name,
        "partition": s.partition,
        "account": s.account,
        "qos": s.qos,
        "time": s.time,
        "nodes": f"{least}-{most}" if least < most else most,
        **_tasks(batch, a_range=least < most),
        "gpus-per-node": gpus_of_a_node(batch.run),
        "mem": s.mem,
        "constraint": s.constraint,
        "exclude": s.exclude,
        "reservation": s.reservation,
        "array": _array(batch),
        "output": _output(batch),
        "signal": f"B:USR1@{s.signal_seconds}",
    }
    given = [f"--{name}={slurm_word(str(value))}" for name, value in named.items() if value is not None]
    # Slurm itself requeues only what a node's failure or a preemption ended, and what asks to be.
    requeue = "--no-requeue" if s.on_stop is OnStop.end else "--requeue"
    return [*given, requeue, "--open-mode=append", *map(_extra, s.sbatch)]


def tasks_per_node(run: RunConfig, ranks_per_node: int) -> int:
    return ranks_per_node if run.slurm.tasks is Tasks.per_rank else 1


def cpus_per_task(run: RunConfig, ranks_per_node: int) -> int | None:
    """As configured; else, for a task that stands for all ranks of its node, one for each of them."""
    alone = ranks_per_node if run.slurm.tasks is Tasks.per_node else None
    return run.slurm.cpus_per_task or alone


def _tasks(batch: Batch, *, a_range: bool) -> dict[str, int | None]:
    tasks, cpus = (count(batch.run, batch.ranks_per_node) for count in (tasks_per_node, cpus_per_task))
    if a_range:
        # Told of one task per node, Slurm gives no more than the least of the nodes.
        return {"mincpus": (tasks or 1) * (cpus or 1)}
    return {"ntasks-per-node": tasks, "cpus-per-task": cpus}


def slurm_word(text: str) -> str:
    """One word as sbatch reads it: a backslash escapes inside double quotes, and nothing is expanded."""
    if re.fullmatch(r"[\w.,:/@%+=-]+", text, re.ASCII):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _extra(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}={slurm_word(value)}" if equals else name


def _array(batch: Batch) -> str | None:
    if len(batch.jobs) == 1:
        return None
    limit = batch.run.slurm.max_parallel
    return f"0-{len(batch.jobs) - 1}" + (f"%{limit}" if limit else "")


def _output(batch: Batch) -> str:
    # %j differs between the tasks of an array, but says nothing of which is which.
    output = batch.run.slurm.output
    return output.replace("%j", "%A_%a") if len(batch.jobs) > 1 else output


def _surroundings(slurm: SlurmConfig) -> list[str]:
    # Module files are not written for `set -eu`.
    modules = [f"set +eu; module load {shlex.join(slurm.modules)}; set -eu"] if slurm.modules else []
    return modules + [f"export {name}={shlex.quote(value)}" for name, value in slurm.environment.items()]


def _check_of(python: str) -> list[str]:
    """Of an interpreter that is looked for from the directory of the submission."""
    if "/" not in python or python.startswith("/"):
        return []
    word = shlex.quote(python)
    return [
        f'[ -x {word} ] || {{ echo "launcher: no" {word} "in $PWD: submit from where it is" >&2; exit 2; }}'
    ]


def _start(batch: Batch) -> list[str]:
    command = f"{shlex.quote(batch.python)} -m launcher job"
    if len(batch.jobs) == 1:
        return [f'exec {" ".join([command, *map(shlex.quote, batch.jobs[0])])} -- "$@"']
    cases = [f"    {number}) job=({shlex.join(overrides)}) ;;" for number, overrides in enumerate(batch.jobs)]
    return [
        'case "$SLURM_ARRAY_TASK_ID" in',
        *cases,
        "esac",
        f'exec {command} "${{job[@]}}" -- "$@"',
    ]


# What comes before a script's name in place of a field; the others are in the script, for good.
_BEFORE_A_SCRIPT = {
    "job_name": "--job-name={}", "partition": "--partition={}", "account": "--account={}",
    "qos": "--qos={}", "time": "--time={}", "nodes": "--nodes={}", "mem": "--mem={}",
    "gpus_per_node": "--gpus-per-node={}", "constraint": "--constraint={}", "exclude": "--exclude={}",
    "reservation": "--reservation={}", "output": "--output={}", "signal_seconds": "--signal=B:USR1@{}",
}  # fmt: skip
_READ_WHEN_IT_RUNS = {"on_stop", "srun", "container"}


def check_after_a_script(overrides: list[str]) -> None:
    """Raise ConfigError for what comes after a batch script's name and would change nothing there."""
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        field = name.removeprefix("slurm.").partition(".")[0]
        if name == "hardware.nodes":
            field = "nodes"
        elif name.startswith("submit."):
            field = "submit"
        elif name.partition("@")[0] != "slurm" and not name.startswith("slurm."):
            continue
        if field in _READ_WHEN_IT_RUNS:
            continue
        remedy = "`launcher submit`, with the command in the script's second line"
        if field in _BEFORE_A_SCRIPT:
            remedy = f"before the script's name: sbatch {_BEFORE_A_SCRIPT[field].format(value)} SCRIPT"
        raise ConfigError(name, value, "comes after the script's name, where sbatch does not read it", remedy)
