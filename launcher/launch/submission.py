"""`launcher submit`: render one batch script for a run or a sweep, print it, and submit it with sbatch."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launcher.config.compose import Job
from launcher.config.errors import ConfigError, as_typed
from launcher.config.layout import Layout
from launcher.config.paths import check_path
from launcher.config.schema import RunConfig, SlurmConfig
from launcher.config.secrets import Referenced, has_token
from launcher.config.slurm_rules import READ_WHILE_RUNNING, check_submission, texts_in
from launcher.launch.sbatch import BatchScript, render
from launcher.launch.slurm import (
    SlurmError,
    SlurmUnreachable,
    sbatch,
    sbatch_variable,
    submission_environment,
)


def batch_script_of(jobs: Sequence[Job[RunConfig]], typed: list[str]) -> BatchScript:
    """Return the contents of the script for `jobs`. Raises ConfigError, also if their resources differ."""
    first = jobs[0].config
    for argument in typed:
        # The script repeats the arguments in a comment, which a line break would end.
        if not argument.isprintable():
            why = "contains a control character"
            raise ConfigError("submit", repr(argument), why, "the argument without line breaks and tabs")
        if has_token(argument):
            name = argument.partition("=")[0]
            why = "the value looks like a secret, and would be written into the script"
            raise ConfigError(name, None, why, shlex.quote(f"{name}=${{oc.env:VARIABLE}}"))
    if first.slurm.max_parallel is not None and len(jobs) == 1:
        why = "max_parallel needs --multirun"
        raise ConfigError("slurm.max_parallel", first.slurm.max_parallel, why, "slurm.max_parallel=null")
    for job in jobs:
        check_submission(job.config)
        _check_references(job.config.slurm)
        if (job.config.slurm, job.config.hardware) != (first.slurm, first.hardware):
            why = "the jobs of a --multirun are one Slurm array: slurm.* and hardware.* must be equal"
            raise ConfigError("--multirun", " ".join(job.overrides), why, "one `launcher submit` per job")
    overrides = [_without_submit_fields(job.overrides) for job in jobs]
    python = first.slurm.python or sys.executable
    check_path("slurm.python", python, "null")
    python = os.path.expanduser(python)  # the script quotes it, so that no shell of the job replaces ~
    return BatchScript(first, typed, overrides, check_submission(first), python)


def _check_references(slurm: SlurmConfig) -> None:
    for field, text in texts_in(slurm):
        section = field.split(".")[1]
        if isinstance(text, Referenced) and section not in READ_WHILE_RUNNING:
            why = "values of the environment are not written into the script"
            exported = f"`export {field.rpartition('.')[2]}`, which sbatch passes on"
            raise ConfigError(field, text, why, exported if section == "environment" else f"{field}=TEXT")


def _without_submit_fields(overrides: list[str]) -> list[str]:
    return [override for override in overrides if not override.startswith("submit.")]


def submit(
    jobs: Sequence[Job[RunConfig]],
    typed: list[str],
    layouts: Sequence[Layout],
    last_check: Callable[[], None],
) -> None:
    """Print the script and submit it, unless submit.dry_run; `layouts` are those on the most nodes.

    `last_check` takes long: it is called once the job could be submitted, and raises ConfigError.
    """
    run = jobs[0].config
    script = render(batch_script_of(jobs, _without_submit_fields(typed)))
    if run.submit.dry_run:
        print(script, end="")
        print(*resource_origins(jobs[0], os.environ, script), sep="\n", file=sys.stderr)
        return
    if shutil.which("sbatch") is None:
        why = "sbatch is not installed on this machine"
        remedy = "submit.dry_run=true > job.sbatch, then `sbatch job.sbatch` on the cluster's login node"
        raise ConfigError("submit", None, why, remedy)
    _make_log_directory(run.slurm.output)
    last_check()
    print(script)
    try:
        job_id = sbatch(script)
    except SlurmUnreachable as error:
        remedy = "run the same command again when `scontrol ping` reports that the controller is UP"
        raise ConfigError("submit", None, f"Slurm does not answer: {error}", remedy) from None
    except SlurmError as error:
        remedy = "change the setting that Slurm names, and run the same command again"
        raise ConfigError("submit", None, f"Slurm rejected the job: {error}", remedy) from None
    print(*submission_summary(run, job_id, layouts), sep="\n")
    print(*resource_origins(jobs[0], os.environ, script), sep="\n")


def resource_origins(job: Job[RunConfig], environ: Mapping[str, str], script: str) -> list[str]:
    """Return a line for each of time limit, partition and account: its value and where it is set. Pure."""
    passed = submission_environment(environ, script)
    lines = []
    for name in ("time", "partition", "account"):
        value, variable = getattr(job.config.slurm, name), sbatch_variable(name)
        typed = environ.get(variable)
        if value is not None:
            text = f"{value} (from {job.origins.get(f'slurm.{name}', 'the command line')})"
        elif variable in passed:
            text = f"{typed} (from the variable {variable})"
        else:
            text = "the default of the cluster"
        if typed is not None and variable not in passed and typed != value:
            why = "of the job that this shell runs in" if value is None else "which has less precedence"
            text += f"; not {variable}={typed}, {why}"
        lines.append(f"{name:<9}{text}" if len(name) < 9 else f"{name} {text}")
    return lines


def _make_log_directory(output: str) -> None:
    """Create the directory of the log, without which a job ends silently. Raises ConfigError."""
    folder = Path(output).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = None if os.access(folder, os.W_OK | os.X_OK) else "you may not write to this directory"
    except OSError as error:
        why = error.strerror
    if why:
        remedy = "slurm.output=DIR/slurm-%j.out, in a shared directory that you may write to"
        raise ConfigError("slurm.output", output, f"{folder.absolute()}: {why}", remedy)


def submission_summary(run: RunConfig, job_id: str, layouts: Sequence[Layout]) -> list[str]:
    """Return the lines printed after a submission: job, layouts, run directory, log and commands. Pure."""
    jobs = len(layouts)
    is_array = jobs > 1
    task = "/0" if is_array else ""
    log = run.slurm.output.replace("%j", f"{job_id}_0" if is_array else job_id)
    directory = f"{as_typed(run.run.dir or f'runs/slurm-{job_id}')}{task}"
    return [
        f"job      {job_id}{f', an array of {jobs} tasks' if is_array else ''}",
        *[f"layout   {layout.describe()}" for layout in dict.fromkeys(layouts)],
        f"run      {directory}{f' to /{jobs - 1}' if is_array else ''}",
        f"log      {log}{' (one per task)' if is_array else ''}: tail -F {shlex.quote(log)}",
        f"state    squeue -j {job_id}",
        f"cancel   scancel {job_id} (saves a checkpoint first)",
    ]
