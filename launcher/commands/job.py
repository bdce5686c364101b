"""`launcher job`: the command of a batch script. Starts the run's ranks on the nodes of this Slurm job."""

import os

from launcher.commands.ready import ready_on_most_nodes
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.schema import RunConfig
from launcher.launch.sbatch import check_script_arguments
from launcher.launch.slurm import read_allocation
from launcher.runtime.slurm_job import SlurmJob, listen_for_stops, run_to_the_end

HELP = """\
launcher job [OVERRIDES]: the command of a batch script that `launcher submit` writes.

Starts the ranks of the run on the nodes of this Slurm job, and restarts, requeues or continues the run.

To submit a job: launcher submit --help"""


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return 0
    stops = listen_for_stops()
    allocation = read_allocation(os.environ)
    typed, script_arguments = _split(arguments)
    check_script_arguments(script_arguments)
    jobs = compose_jobs("config", RunConfig, typed)
    if len(jobs) != 1:
        raise ConfigError("job", None, "--multirun is not supported", "launcher submit --multirun")
    ready_run, nodes = ready_on_most_nodes(jobs[0].config, allocation.nodes)
    job = SlurmJob(ready_run.run, ready_run.layout, nodes, allocation, typed, script_arguments)
    return run_to_the_end(job, stops)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return all overrides, and those after `--`, which are the script's own arguments."""
    if "--" not in arguments:
        return arguments, []
    place = arguments.index("--")
    script_arguments = arguments[place + 1 :]
    return [*arguments[:place], *script_arguments], script_arguments
