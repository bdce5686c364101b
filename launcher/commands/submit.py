"""`launcher submit`: a run, or the runs of a sweep, as one Slurm job."""

import sys

from launcher.checkpoint.resume_choice import RunFinished
from launcher.commands.preflight import check_before_submission
from launcher.commands.ready import ReadyRun, check_tensorboard, ready
from launcher.config.compose import Job, compose_jobs
from launcher.config.finetune_rules import adapter_warnings
from launcher.config.schedule import schedule_warnings
from launcher.config.schema import RunConfig
from launcher.config.slurm_rules import check_submission, nodes_of
from launcher.config.world import world_of_nodes
from launcher.launch.submission import submit
from launcher.runtime.run_dir import run_path, start_of

HELP = """\
launcher submit [OVERRIDES]: train as a Slurm job, or a sweep (--multirun) as a job array.

Checks the run, prints a batch script, submits the script with sbatch, and prints the job's id, its run
directory and its log. The time limit, the partition and the account are printed with the file or variable
that sets them.

  submit.dry_run=true      print the script only
  submit.preflight=false   submit without running `launcher preflight`
  slurm.time=24:00:00      and other options of sbatch: see docs/slurm.md
  slurm=mycluster          the file my_conf/slurm/mycluster.yaml, with --config-dir my_conf

Example: launcher submit experiment=llama3_8b_3d slurm.partition=gpu slurm.account=lab
All groups and fields of a run: launcher --help"""


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    jobs = compose_jobs("config", RunConfig, arguments)
    if jobs:
        ready_runs = [_ready_on_most_nodes(job) for job in jobs]
        finished = [end for job in jobs if (end := _end_of(job))]
        if len(finished) == len(jobs):
            raise finished[0].refusal()
        # On standard error: with submit.dry_run the output is the script.
        warnings = [text for job in jobs for text in schedule_warnings(job.config, job.origins)]
        warnings += [text for job in jobs for text in adapter_warnings(job.config)]
        print("".join(f"{warning}\n" for warning in dict.fromkeys(warnings)), end="", file=sys.stderr)
        layouts = [ready_run.layout for ready_run in ready_runs]
        submit(jobs, arguments, layouts, last_check=lambda: check_before_submission(ready_runs))
    return 0


def _ready_on_most_nodes(job: Job[RunConfig]) -> ReadyRun:
    """Return the run on the most nodes; the run is checked on the fewest nodes too. Raises ConfigError."""
    run = job.config
    check_submission(run)
    if not run.slurm.container and run.slurm.python is None:  # else another Python runs the job
        check_tensorboard(run)
    least, most = nodes_of(run)
    ready_runs = [
        ready(run, world_of_nodes(run, nodes), needs_data=nodes == most, must_fit=True)
        for nodes in sorted({least, most})
    ]
    return ready_runs[-1]


def _end_of(job: Job[RunConfig]) -> RunFinished | None:
    """Return the end of a run that is finished; None if steps are left. Raises ConfigError."""
    if job.config.run.dir is not None:
        try:
            start_of(job.config, run_path(job.config, multirun_index=job.index))
        except RunFinished as finished:
            return finished
    return None
