"""Render the text of a Slurm batch script. Pure.

Text that a user typed is always quoted: by Slurm's rules in `#SBATCH` lines, by the shell's rules below them.
"""

import re
import shlex
from dataclasses import dataclass

from launcher.config.errors import ConfigError
from launcher.config.schema import OnStop, RunConfig, SlurmConfig, Tasks
from launcher.config.slurm_rules import READ_WHILE_RUNNING, gpus_of_a_node, nodes_of


@dataclass(frozen=True)
class BatchScript:
    """Contents of one batch script, which runs one job or a job array."""

    run: RunConfig  # of the first job; all jobs of an array request the same resources
    typed: list[str]  # arguments of `launcher submit`
    jobs: list[list[str]]  # overrides of each job
    ranks_per_node: int
    python: str


def render(batch: BatchScript) -> str:
    """Return the text of the script. The arguments of the script are further overrides."""
    on_stop = batch.run.slurm.on_stop
    lines = [
        "#!/usr/bin/env bash",
        f"# launcher submit {shlex.join(batch.typed)}",
        *(f"#SBATCH {option}" for option in sbatch_options(batch)),
        "# Options of sbatch go before the name of this script, overrides of the run after it.",
        "# Before the time limit and on preemption the run saves a checkpoint; "
        f"then {_ACTION_ON_STOP[on_stop]} (slurm.on_stop={on_stop.name}).",
        "set -euo pipefail",
        "# Ignore SIGUSR1 until the launcher handles it. At the time limit Slurm signals again.",
        "trap '' USR1",
        *_environment_lines(batch.run.slurm),
        *_interpreter_check(batch.python),
        *_start_lines(batch),
    ]
    return "\n".join(lines) + "\n"


_ACTION_ON_STOP = {
    OnStop.requeue: "the job is requeued",
    OnStop.chain: "a follow-up job is submitted",
    OnStop.end: "the job ends",
}


def sbatch_options(batch: BatchScript) -> list[str]:
    s = batch.run.slurm
    min_nodes, max_nodes = nodes_of(batch.run)
    is_array, limit = len(batch.jobs) > 1, f"%{s.max_parallel}" if s.max_parallel else ""
    options: dict[str, str | int | None] = {
        "job-name": s.job_name,
        "partition": s.partition,
        "account": s.account,
        "qos": s.qos,
        "time": s.time,
        "nodes": s.nodes if min_nodes < max_nodes else max_nodes,
        **_task_options(batch, is_node_range=min_nodes < max_nodes),
        "gpus-per-node": gpus_of_a_node(batch.run),
        "mem": s.mem,
        "constraint": s.constraint,
        "exclude": s.exclude,
        "reservation": s.reservation,
        "array": f"0-{len(batch.jobs) - 1}{limit}" if is_array else None,
        # In an array, %j differs between the tasks but does not say which task it is.
        "output": s.output.replace("%j", "%A_%a") if is_array else s.output,
        "signal": f"B:USR1@{s.signal_seconds}",
    }
    given = {name: str(value) for name, value in options.items() if value is not None}
    set_options = [f"--{name}={slurm_word(value)}" for name, value in given.items()]
    # With --requeue Slurm requeues a job only after a node failure, a preemption or `scontrol requeue`.
    requeue = "--no-requeue" if s.on_stop is OnStop.end else "--requeue"
    return [*set_options, requeue, "--open-mode=append", *map(_quote_option, s.sbatch)]


def tasks_per_node(run: RunConfig, ranks_per_node: int) -> int:
    """Return the number of Slurm tasks per node: one per rank, or one that starts all ranks of its node."""
    return ranks_per_node if run.slurm.tasks is Tasks.per_rank else 1


def cpus_per_task(run: RunConfig, ranks_per_node: int) -> int | None:
    """Return slurm.cpus_per_task, or one CPU per rank of a node's task; None: the cluster decides."""
    default = ranks_per_node if run.slurm.tasks is Tasks.per_node else None
    return run.slurm.cpus_per_task or default


def _task_options(batch: BatchScript, *, is_node_range: bool) -> dict[str, int | None]:
    tasks, cpus = (count(batch.run, batch.ranks_per_node) for count in (tasks_per_node, cpus_per_task))
    if is_node_range:
        # With --ntasks-per-node=1 and a range of nodes, Slurm never gives more than the minimum of the range.
        return {"mincpus": (tasks or 1) * (cpus or 1)}
    return {"ntasks-per-node": tasks, "cpus-per-task": cpus}


def slurm_word(text: str) -> str:
    """Return `text` quoted for a `#SBATCH` line, where a backslash escapes and nothing expands."""
    if re.fullmatch(r"[\w.,:/@%+=-]+", text, re.ASCII):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _quote_option(option: str) -> str:
    name, equals, value = option.partition("=")
    return f"{name}={slurm_word(value)}" if equals else name


def _environment_lines(slurm: SlurmConfig) -> list[str]:
    # Module files may fail under `set -eu`.
    modules = [f"set +eu; module load {shlex.join(slurm.modules)}; set -eu"] if slurm.modules else []
    return modules + [f"export {name}={shlex.quote(value)}" for name, value in slurm.environment.items()]


def _interpreter_check(python: str) -> list[str]:
    if "/" not in python or python.startswith("/"):
        return []
    word = shlex.quote(python)
    return [
        f'[ -x {word} ] || {{ echo "launcher:" {word} "is not an executable file in $PWD: '
        'submit from the directory that contains it" >&2; exit 2; }'
    ]


def _start_lines(batch: BatchScript) -> list[str]:
    command = f"{shlex.quote(batch.python)} -P -m launcher job"
    if len(batch.jobs) == 1:
        return [f'exec {" ".join([command, *map(shlex.quote, batch.jobs[0])])} -- "$@"']
    cases = [f"    {number}) job=({shlex.join(overrides)}) ;;" for number, overrides in enumerate(batch.jobs)]
    return ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac", f'exec {command} "${{job[@]}}" -- "$@"']


# The sbatch option that replaces a field, before the script's name. Other fields are fixed in the script.
_SBATCH_OPTIONS = {
    "job_name": "--job-name={}",
    "partition": "--partition={}",
    "account": "--account={}",
    "qos": "--qos={}",
    "time": "--time={}",
    "nodes": "--nodes={}",
    "mem": "--mem={}",
    "gpus_per_node": "--gpus-per-node={}",
    "constraint": "--constraint={}",
    "exclude": "--exclude={}",
    "reservation": "--reservation={}",
    "output": "--output={}",
    "signal_seconds": "--signal=B:USR1@{}",
}


def check_script_arguments(overrides: list[str]) -> None:
    """Raise ConfigError if an override after a batch script's name would have no effect there."""
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        field = name.removeprefix("slurm.").partition(".")[0]
        if name == "hardware.nodes":
            field = "nodes"
        elif name.startswith("submit."):
            field = "submit"
        elif name.partition("@")[0] != "slurm" and not name.startswith("slurm."):
            continue
        if field in READ_WHILE_RUNNING:
            continue
        remedy = "`launcher submit` with this setting (the script's second line holds the full command)"
        if field in _SBATCH_OPTIONS:
            remedy = f"sbatch {_SBATCH_OPTIONS[field].format(value)} SCRIPT"
        why = "has no effect after the script's name: sbatch has already run"
        raise ConfigError(name, value, why, remedy)
