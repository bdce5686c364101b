"""`launcher train`, or `launcher` alone: train a run, or each run of a sweep."""

import os
from pathlib import Path

from launcher.commands.ready import ReadyRun, check_bytes, check_compiler, check_tensorboard, ready
from launcher.commands.sweep import print_sweep
from launcher.config.compose import COMMAND_LINE, Job, compose_jobs
from launcher.config.errors import ConfigError, refusal
from launcher.config.finetune_rules import adapter_warnings
from launcher.config.machine import Machine
from launcher.config.schedule import schedule_warnings
from launcher.config.schema import Device, RunConfig
from launcher.config.world import world_of_joined_ranks, world_of_machine
from launcher.data.input_files import listed
from launcher.launch.environment import (
    LaunchEnvironment,
    RankEnvironment,
    joined_ranks,
    launch_environment,
    speaks_for_all,
)
from launcher.launch.this_machine import this_machine
from launcher.planning.show.search_report import reasons
from launcher.streams import outlive_output


def main(arguments: list[str]) -> int:
    jobs = compose_jobs("config", RunConfig, arguments)
    if not jobs:
        return 0  # --help
    outlive_output()
    machine = this_machine()
    if joined_ranks(os.environ) and len(jobs) > 1:
        why = "ranks that torchrun or srun started train one run"
        raise ConfigError("--multirun", None, why, "one torchrun or srun per run, or a sweep without them")
    # All jobs of a sweep are checked before the first is trained.
    ready_runs = [_ready(job, machine) for job in jobs]
    paths: list[Path] = []
    try:
        for job, (ready_run, place) in zip(jobs, ready_runs, strict=True):
            job.announce()
            _train(job, ready_run, place, cores=machine.cores, paths=paths)
    finally:
        if paths and jobs[0].index is not None:
            print_sweep(jobs, paths)
    return 0


def _train(
    job: Job[RunConfig], ready_run: ReadyRun, place: LaunchEnvironment, *, cores: int, paths: list[Path]
) -> None:
    """Train a run; append its directory to `paths` if this command starts all ranks."""
    from launcher.runtime.start import join_ranks, launch_on_this_machine, launch_on_this_node

    run, layout = ready_run.run, ready_run.layout
    if isinstance(place, RankEnvironment):
        join_ranks(run, layout, place)
    elif place:
        launch_on_this_node(run, layout, place, cores=cores)
    else:
        launch_on_this_machine(run, layout, cores=cores, multirun_index=job.index, on_directory=paths.append)


def _ready(job: Job[RunConfig], machine: Machine) -> tuple[ReadyRun, LaunchEnvironment]:
    run = job.config
    gpus = 0 if run.hardware.device is Device.cpu else machine.gpus
    place = launch_environment(os.environ, configured=run.hardware.accelerators_per_node, gpus=gpus)
    world = world_of_machine(run, machine)
    if place and run.launch.max_restarts:
        why = "one rank or node cannot start the others again"
        remedy = "launch.max_restarts=0, and `torchrun --max-restarts=N` or `launcher submit`"
        raise refusal(run, "launch.max_restarts", why, remedy)
    if place:
        world = world_of_joined_ranks(run, machine, ranks=place.world_size, ranks_per_node=place.local_size)
    check_tensorboard(run)
    ready_run = ready(run, world, needs_data=True, must_fit=True)
    check_compiler(run, ready_run.layout)
    warnings = [*schedule_warnings(run, job.origins), *adapter_warnings(run), *check_bytes(run)]
    if speaks_for_all(os.environ):
        for line in (*warnings, *_unused(job)):
            print(line)
    if (files := listed(ready_run.left_out)) and speaks_for_all(os.environ):
        print(f"note     data left out: {files}")
    if ready_run.search and speaks_for_all(os.environ):
        for line in reasons(ready_run.search):
            print(line)
    return ready_run, place


def _unused(job: Job[RunConfig]) -> list[str]:
    """Return a note for each setting on the command line that another command uses and training does not."""
    if joined_ranks(os.environ):
        return []
    users = {"slurm": "submit", "submit": "submit", "verify": "verify"}
    typed = (name for name, origin in job.origins.items() if origin == COMMAND_LINE)
    return [
        f"note     {name} has no effect here: `launcher {user}` uses it"
        for name in typed
        if (user := users.get(name.partition(".")[0]))
    ]
