"""The command line: `launcher [train | plan | verify | submit | generate | ...] OVERRIDES`.

Nothing here imports torch before the config has been composed and checked.
"""

import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from launcher import __version__
from launcher.commands.calibrate import calibrate
from launcher.commands.checkpoint import inspect
from launcher.commands.compare import compare
from launcher.commands.exchange import export, import_
from launcher.commands.job import ready_on_nodes, run_job
from launcher.commands.plan import dump, plan_and_print
from launcher.commands.prepare import prepare
from launcher.config.compose import Job, compose_jobs, load_typed
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout, resolve_device
from launcher.config.schema import Device, Family, GenerateConfig, OutputFormat, PlannedRunConfig, RunConfig
from launcher.config.slurm_rules import check_submission, nodes_of
from launcher.config.validate import validate, validate_generate
from launcher.data.open import check_data
from launcher.launch.environment import Place, RankEnvironment, joined_ranks, place_of
from launcher.launch.local import RankFailure, Stopped
from launcher.launch.machine import Machine, memory_here, share_cores, this_machine
from launcher.launch.records import Kind, record_end
from launcher.launch.submit import submit as submit_jobs
from launcher.parity.shrink import MOST_RANKS
from launcher.planning.choose.enforce import chosen, refuse_too_large
from launcher.planning.choose.search import Search, Space
from launcher.planning.cost.plan import memory_budget
from launcher.planning.show.plan_figure import check_figure
from launcher.runtime.run_dir import CONFIG, IDENTITY, run_path, start_of

REFUSED, FAILED = 2, 1


def run_command(arguments: list[str]) -> int:
    """The exit code. Prints what a user can mend as one message without a traceback."""
    if arguments == ["--version"]:
        print(f"launcher {__version__}")
        return 0
    try:
        command, overrides = _command(arguments)
        return command(overrides)
    except ConfigError as error:
        record_end(int(os.environ.get("SLURM_PROCID", "0")), Kind.refused, error)
        return _report(f"launcher: {error}", REFUSED)
    except RankFailure as failure:
        return _report(f"launcher: {failure}", FAILED)
    except Stopped as stop:
        return _report(f"launcher: stopped by {stop.signal.name}; all ranks have ended", stop.exit_code)


def _command(arguments: list[str]) -> tuple[Callable[[list[str]], int], list[str]]:
    word = arguments[0] if arguments else ""
    if word in COMMANDS:
        return COMMANDS[word], arguments[1:]
    if word.isalpha() and (meant := difflib.get_close_matches(word, COMMANDS, n=1, cutoff=0.7)):
        raise ConfigError(word, None, "no such command", f"launcher {meant[0]}")
    return train, arguments


def train(arguments: list[str]) -> int:
    jobs = compose_jobs("config", RunConfig, arguments)
    if not jobs:
        return 0
    machine = this_machine()
    if joined_ranks(os.environ) and len(jobs) > 1:
        why = "ranks that torchrun or srun started train one run"
        raise ConfigError("--multirun", None, why, "one torchrun or srun per run, or a sweep without them")
    # All jobs of a sweep are checked before the first is trained.
    ready = [_ready(job.config, machine) for job in jobs]
    from launcher.runtime.start import train_as_joined_rank, train_on_this_machine, train_on_this_node

    for job, (run, layout, place) in zip(jobs, ready, strict=True):
        _say_which(job)
        if isinstance(place, RankEnvironment):
            train_as_joined_rank(run, layout, place)
        elif place:
            train_on_this_node(run, layout, place, cores=machine.cores)
        else:
            train_on_this_machine(run, layout, cores=machine.cores, multirun_index=job.index)
    return 0


def _ready(run: RunConfig, machine: Machine) -> tuple[RunConfig, Layout, Place]:
    """The run as it is to be trained, checked, in the layout that it says or that auto chooses."""
    gpus = 0 if run.hardware.device is Device.cpu else machine.gpus
    place = place_of(os.environ, configured=run.hardware.accelerators_per_node, gpus=gpus)
    if run.parallelism.auto:
        run, found = chosen(run, _space(run, machine, place))
        if _speaks_for_all():
            print(
                f"auto     the fastest of {len(found.candidates)} legal layouts; `launcher plan` shows them"
            )
    joined_world = place.world_size if place else None
    layout = validate(run, gpus=machine.gpus, cores=machine.cores, joined_world=joined_world)
    check_data(run)
    ranks_here = place.local_size if place else layout.world_size
    refuse_too_large(run, layout, memory_budget(run, ranks_here, _memory_of(layout.device)))
    return run, layout, place


def _space(run: RunConfig, machine: Machine, place: Place) -> Space:
    """The ranks that there are to lay the model out over."""
    device = resolve_device(run, gpus=machine.gpus)
    if place:
        return Space(device, place.world_size, place.local_size, exact=True)
    here = run.hardware.accelerators_per_node or (machine.gpus if device == "cuda" else machine.cores)
    return Space(device, here, here, exact=False, memory_here=_memory_of(device))


def _memory_of(device: str) -> int | None:
    """This machine's, which CPU ranks share."""
    return memory_here() if device == "cpu" else None


def _say_which(job: Job[RunConfig] | Job[PlannedRunConfig]) -> None:
    if job.index is not None:
        print(f"job      {job.index}: {' '.join(job.overrides)}", flush=True)


def submit(arguments: list[str]) -> int:
    jobs = compose_jobs("config", RunConfig, arguments)
    if not jobs:
        return 0
    layouts = []
    for one in jobs:
        check_submission(one.config)
        on_nodes = [ready_on_nodes(one.config, nodes)[1] for nodes in nodes_of(one.config)]
        layouts.append(on_nodes[-1])
        check_data(one.config)
        if one.config.run.dir is not None:
            start_of(one.config, run_path(one.config, multirun_index=one.index))
    submit_jobs(jobs, arguments, layouts)
    return 0


def generate(arguments: list[str]) -> int:
    for argument in arguments:
        if "=" not in argument and Path(argument).is_dir():
            why = "a setting needs a name, = and a value"
            raise ConfigError(argument, None, why, f"run.dir={argument}")
    for job in compose_jobs("generate", GenerateConfig, arguments):
        run_dir = Path(validate_generate(job.config)).expanduser()
        # Read here only to refuse it: what comes next imports torch.
        if load_typed(run_dir / CONFIG, RunConfig).model.family is Family.vit:
            why = "is of a classifier of images, which writes no text"
            raise ConfigError("run.dir", run_dir, why, "the directory of a language model's run")
        share_cores(1, this_machine().cores)
        from launcher.runtime.sampling import generate as sample_text

        print(sample_text(job.config, run_dir))
    return 0


def plan(arguments: list[str]) -> int:
    jobs, machine = compose_jobs("plan", PlannedRunConfig, arguments), this_machine()
    if not jobs:
        return 0
    for job in jobs:
        check_figure(job.config.plan.figure)
    ready = [_ready_elsewhere(job.config, machine) for job in jobs]
    printed, for_people = [], jobs[0].config.format is OutputFormat.table
    for job, (run, layout, found) in zip(jobs, ready, strict=True):
        if for_people:
            _say_which(job)
        assert isinstance(run, PlannedRunConfig)
        printed.append(plan_and_print(run, layout, _memory_of(layout.device), found))
    if not for_people:
        print(dump(printed, is_sweep=jobs[0].index is not None))
    return 0


VERIFY_HELP = """\
launcher verify [OVERRIDES]: prove on this machine that a run's layout computes what one process does.

Takes the overrides of the run you mean to train, makes it small, trains it here in its layout and in one
process of plain torch, and compares. Exit code 0: the same run; 1: not, with a diagnosis; 2: refused.

  verify.steps=3           optimizer steps to compare
  verify.device=cpu        or cuda: the layout's ranks on this machine's GPUs
  verify.report=PATH       everything measured, as JSON

Example: launcher verify model=llama_tiny parallelism=tp2_pp2 precision=bf16
All groups and fields of a run: launcher --help"""


def verify(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(VERIFY_HELP)
        return 0
    jobs, machine = compose_jobs("config", RunConfig, arguments), this_machine()
    ready = [_ready_elsewhere(job.config, machine) for job in jobs]
    for job, (run, layout, _) in zip(jobs, ready, strict=True):
        _say_which(job)
        share_cores(MOST_RANKS, machine.cores)
        from launcher.commands.verify import verify_and_report

        if not verify_and_report(run, layout, cores=machine.cores, gpus=machine.gpus):
            return FAILED
    return 0


def _ready_elsewhere(run: RunConfig, machine: Machine) -> tuple[RunConfig, Layout, Search | None]:
    """The run and its layout on the run's own hardware, whatever this machine has."""
    h, found, cores = run.hardware, None, max(2, machine.cores)
    is_cuda = h.device is Device.cuda or (h.device is Device.auto and machine.gpus > 0)
    gpus = (h.accelerators_per_node or machine.gpus or 1) if is_cuda else 0
    per_node = gpus or h.accelerators_per_node
    if run.parallelism.auto:
        device, here = ("cuda" if is_cuda else "cpu"), per_node or cores
        space = Space(device, h.nodes * here, here, exact=False, memory_here=_memory_of(device))
        run, found = chosen(run, space)
    nodes = run.hardware.nodes
    joined_world = nodes * per_node if nodes > 1 and per_node else None
    return run, validate(run, gpus=gpus, cores=cores, joined_world=joined_world), found


def sync(arguments: list[str]) -> int:
    if not arguments or {"-h", "--help"} & set(arguments):
        print("launcher sync RUN.DIR ...: upload what is new of a run's offline W&B files, in order")
        return 0
    runs = [Path(argument).expanduser() for argument in arguments]
    for run in runs:
        if not (run / IDENTITY).is_file():
            raise ConfigError(
                "sync", run, f"not a run's directory, it has no {IDENTITY}", "as a run printed it"
            )
    from launcher.runtime.metrics.sync import upload

    return max(upload(run) for run in runs)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "plan": plan,
    "compare": compare,
    "calibrate": calibrate,
    "verify": verify,
    "submit": submit,
    "job": run_job,
    "sync": sync,
    "generate": generate,
    "checkpoint": inspect,
    "prepare": prepare,
    "export": export,
    "import": import_,
}


def _report(message: str, code: int) -> int:
    # Under torchrun or srun every rank is refused alike: one of them says so.
    if code == FAILED or _speaks_for_all():
        print(message, file=sys.stderr)
    return code


def _speaks_for_all() -> bool:
    try:
        ranks = joined_ranks(os.environ)
    except ConfigError:
        return True  # a stray RANK or WORLD_SIZE is what is wrong, and nobody else may be there to say so
    return ranks is None or ranks.rank == 0
