"""`launcher submit`: a run, or the runs of a sweep, as one batch script, shown and handed to sbatch."""

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.config.compose import Job
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.config.slurm_rules import check_submission
from launcher.launch.sbatch import Batch, render
from launcher.launch.slurm import SlurmAway, SlurmError, sbatch


def batch_of(jobs: Sequence[Job[RunConfig]], typed: list[str]) -> Batch:
    """What one script runs. Raises ConfigError, also where jobs of a sweep ask Slurm for different things."""
    first = jobs[0].config
    for argument in typed:
        # The script repeats them in a comment, which a line break would end.
        if not argument.isprintable():
            raise ConfigError("submit", repr(argument), "holds a control character", "text of one line")
    if first.slurm.max_parallel is not None and len(jobs) == 1:
        why = "is of a --multirun's jobs, and this is one job"
        raise ConfigError("slurm.max_parallel", first.slurm.max_parallel, why, "slurm.max_parallel=null")
    for job in jobs:
        check_submission(job.config)
        if (job.config.slurm, job.config.hardware) != (first.slurm, first.hardware):
            why = "the jobs of a --multirun are one array, and ask for the same nodes"
            raise ConfigError("--multirun", " ".join(job.overrides), why, "one `launcher submit` for each")
    return Batch(
        first,
        typed,
        [[one for one in job.overrides if not one.startswith("submit.")] for job in jobs],
        check_submission(first),
        first.slurm.python or sys.executable,
    )


def submit(jobs: Sequence[Job[RunConfig]], typed: list[str], layouts: Sequence[Layout]) -> None:
    """Show the script and submit it, or only print it; `typed` is the command line. Raises ConfigError.

    `layouts` are those of the jobs on as many nodes as they may take.
    """
    run = jobs[0].config
    script = render(batch_of(jobs, [word for word in typed if not word.startswith("submit.")]))
    if run.submit.dry_run:
        print(script, end="")
        return
    if shutil.which("sbatch") is None:
        why = "there is no sbatch here: not a node from which jobs are submitted"
        remedy = "submit.dry_run=true > job.sbatch, and there `sbatch job.sbatch`"
        raise ConfigError("submit", None, why, remedy)
    _make_room_for(run.slurm.output)
    print(script)
    try:
        number = sbatch(script)
    except SlurmAway as error:
        remedy = "submit again once `scontrol ping` says that the controller is up"
        raise ConfigError("submit", None, f"Slurm does not answer: {error}", remedy) from None
    except SlurmError as error:
        remedy = "the same with what Slurm names changed"
        raise ConfigError("submit", None, f"Slurm refuses: {error}", remedy) from None
    for line in told(run, number, layouts):
        print(line)


def _make_room_for(output: str) -> None:
    """Slurm makes no directories: a job whose log it cannot open ends without a word."""
    folder = Path(output).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        why = None if os.access(folder, os.W_OK | os.X_OK) else "not a directory that you may write to"
    except OSError as error:
        why = error.strerror
    if why:
        raise ConfigError(
            "slurm.output", output, f"{folder.absolute()}: {why}", "a shared directory of yours"
        )


def told(run: RunConfig, number: str, layouts: Sequence[Layout]) -> list[str]:
    """What job `number` is and what to do with it. Pure."""
    jobs = len(layouts)
    many = jobs > 1
    each = "/0" if many else ""
    log = run.slurm.output.replace("%j", f"{number}_0" if many else number)
    directory = f"{run.run.dir or f'runs/slurm-{number}'}{each}"
    return [
        f"job      {number}{f', an array of {jobs}' if many else ''}",
        *[f"layout   {layout.describe()}" for layout in dict.fromkeys(layouts)],
        f"run      {directory}{f' to /{jobs - 1}' if many else ''}",
        f"log      {log}{' and so on' if many else ''}: tail -F {shlex.quote(log)}",
        f"state    squeue -j {number}",
        f"cancel   scancel {number}, which saves the run first",
    ]
