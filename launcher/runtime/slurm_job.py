"""The life of a Slurm job: start the ranks with srun, and answer for how they end.

Told to stop (SIGUSR1 ahead of the time limit, or a preemption), the ranks save, and the job is requeued or a
next one submitted. Where a rank fails, the run starts again in the same allocation from its last checkpoint,
unless it failed alike three times in a row. What Slurm itself ends or requeues is left to Slurm.
"""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from launcher.checkpoint.final import final_step
from launcher.checkpoint.manifest import checkpoints_in
from launcher.config.layout import Layout
from launcher.config.schema import OnStop, RunConfig
from launcher.config.slurm_rules import nodes_of
from launcher.launch.attempts import MAX_IDENTICAL_FAILURES, FailedStart, record_failed_start
from launcher.launch.exit_codes import FAILED, REFUSED
from launcher.launch.rank import STOPPED_EXIT_CODE
from launcher.launch.records import ENDS_VARIABLE, RankEnd, RankEndKind, read_rank_ends
from launcher.launch.sbatch import cpus_per_task, tasks_per_node
from launcher.launch.slurm import Allocation, SlurmError, job_state, read_batch_script, requeue, sbatch
from launcher.launch.stopping import stop_grace
from launcher.runtime.metrics.rows import rows_in
from launcher.runtime.run_dir import LOGS, METRICS

_POLL = 0.2
_REQUEUE_TAKES = 60.0  # until Slurm ends a job that is requeued


class End(Enum):
    finished = "finished"
    refused = "refused"
    stopped = "stopped"
    failed = "failed"


@dataclass(frozen=True)
class Outcome:
    """How one start of the ranks ended; `error` in one line, where they failed."""

    end: End
    error: str = ""


@dataclass(frozen=True)
class SlurmJob:
    """A run in the allocation of this job: `typed` are its overrides, of which the script was given some."""

    run: RunConfig
    layout: Layout
    nodes: int  # of the allocation, that the run uses
    allocation: Allocation
    typed: list[str]
    script_arguments: list[str]

    @property
    def run_dir(self) -> Path:
        return run_dir_of(self.run, self.allocation)


def listen_for_stops() -> list[int]:
    """Return a list to which every signal that asks the job to stop is added from now on."""
    stops: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stops.append(received))
    return stops


def run_to_the_end(job: SlurmJob, stops: list[int]) -> int:
    """Start the ranks, and again where they fail; let a stopped run go on later. Return the exit code."""
    run, allocation, run_dir = job.run, job.allocation, job.run_dir
    if allocation.restarts and is_finished(run, run_dir):
        _print(f"requeued, and {run_dir} has all its steps: nothing is left to do")
        return 0
    _say(job)
    command = step_command(run, job.typed, job.nodes, job.layout, run_dir)
    ends = run_dir / LOGS / "ends" / allocation.job
    while True:
        code = _run_step(command, stops, _emptied(ends), saves=stop_grace(run) > 0)
        found = outcome(code, bool(stops), read_rank_ends(ends), job.layout.world_size)
        if found.end is End.finished:
            return 0
        if found.end is End.refused:
            return REFUSED
        if found.end is End.failed and _is_hopeless(run_dir, found):
            return FAILED
        if found.end is End.stopped or stops or not _is_running(allocation):
            return _go_on(job, stops)
        where = "its last checkpoint" if checkpoints_in(run_dir) else "the first step: it has no checkpoint"
        _print(f"the run failed ({found.error}) and starts again, from {where}")


def run_dir_of(run: RunConfig, allocation: Allocation) -> Path:
    """The same through requeues; each task of an array in a directory of its own."""
    path = base_dir(run, allocation)
    return path if allocation.array_task is None else path / allocation.array_task


def base_dir(run: RunConfig, allocation: Allocation) -> Path:
    return Path(run.run.dir or f"runs/{allocation.name}").expanduser()


def step_command(
    run: RunConfig, overrides: list[str], nodes: int, layout: Layout, run_dir: Path
) -> list[str]:
    """The srun that starts the ranks, or a launcher on each node. Pure but for the interpreter's path."""
    ranks = layout.world_size // nodes
    per_node, cpus = tasks_per_node(run, ranks), cpus_per_task(run, ranks)
    launcher = ["launcher"] if run.slurm.container else [sys.executable, "-m", "launcher"]
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes * per_node}",
        f"--ntasks-per-node={per_node}",
        # Not inherited from the job (Slurm 22.05 and later).
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        # A rank that fails ends the others: without it they wait for their timeout.
        "--kill-on-bad-exit=1",
        "--export=ALL",
        *(["--label"] if nodes * per_node > 1 else []),
        *run.slurm.srun,
        *run.slurm.container,
        *launcher,
        "train",
        *overrides,
        f"hardware.nodes={nodes}",
        f"run.dir={hydra_text(str(run_dir))}",
    ]


def hydra_text(text: str) -> str:
    """As Hydra's grammar reads it back: backslashes escape only where a quote follows. Not for `${`."""
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', text)
    return '"' + re.sub(r"(\\+)$", r"\1\1", escaped) + '"'


def outcome(code: int, told_to_stop: bool, ends: list[RankEnd], ranks: int) -> Outcome:
    """How it ended, from srun's exit code and, which count more, the words that ranks left. Pure."""
    if ends and ends[0].kind is RankEndKind.refused:
        return Outcome(End.refused, ends[0].error)
    if ends and ends[0].kind is RankEndKind.lost and len(ends) < ranks:
        # What the others then say, and which of them does, is another each time.
        return Outcome(End.failed, "a rank ended without a word; srun says above which, and how")
    if ends and ends[0].kind is not RankEndKind.stopped:
        return Outcome(End.failed, ends[0].error)
    if ends or (code and told_to_stop):
        return Outcome(End.stopped)
    if code == 0:
        return Outcome(End.finished)
    name = next((one.name for one in signal.Signals if one == code - 128), "")
    with_name = f"srun ended with code {code}" + (f", {name}" if name else "")
    return Outcome(End.failed, f"{with_name}; what it says stands above")


def is_finished(run: RunConfig, run_dir: Path) -> bool:
    """Whether the run has trained to its last step, and left its final weights."""
    return final_step(run_dir) == (run.training.stop_at or run.training.steps)


def _emptied(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    return folder


def _run_step(command: list[str], stops: list[int], ends: Path, *, saves: bool) -> int:
    environment = {**os.environ, ENDS_VARIABLE: str(ends.absolute())}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
    told = False
    while (code := process.poll()) is None:
        if stops and not told:
            what = "the step in hand is saved" if saves else "at once, as checkpoint.stop_grace_seconds says"
            _print(f"told to stop: {what}")
            process.send_signal(signal.SIGUSR1)  # which srun passes on to every rank
            told = True
        time.sleep(_POLL)
    return code if code >= 0 else 128 - code


def _is_hopeless(run_dir: Path, found: Outcome) -> bool:
    """Note a failure; whether it was the last of three alike."""
    rows = rows_in(run_dir / METRICS)
    step = int(rows[-1]["step"]) if rows else 0
    if record_failed_start(run_dir, FailedStart(step, found.error)) < MAX_IDENTICAL_FAILURES:
        return False
    times = MAX_IDENTICAL_FAILURES
    _print(f"the run failed {times} times alike after step {step} and is given up: {found.error}")
    _print(f"once it is mended, the same command with run.dir={run_dir} goes on from its last checkpoint")
    return True


def _is_running(allocation: Allocation) -> bool:
    try:
        return job_state(allocation.id) == "RUNNING"
    except SlurmError as error:
        _print(f"{error}: taken for running")
        return True


def _go_on(job: SlurmJob, stops: list[int]) -> int:
    """See to it that the run goes on later; the exit code."""
    job_id, run_dir = job.allocation.id, job.run_dir
    if not _is_running(job.allocation):
        _print("stopped, and this job is ended by Slurm, which also decides whether it starts again")
        return STOPPED_EXIT_CODE
    try:
        if job.run.slurm.on_stop is OnStop.requeue:
            requeue(job_id)
            _print(f"stopped and requeued: job {job_id} goes on in {run_dir}")
            _wait_for_the_end(stops)
            return STOPPED_EXIT_CODE
        if job.run.slurm.on_stop is OnStop.chain:
            _print(f"stopped: job {_next_link(job)} goes on in {run_dir}")
            return 0
    except SlurmError as error:
        _print(f"stopped, and cannot be started again by itself: {error}")
    _print(f"stopped: the same command with run.dir={run_dir} goes on")
    return STOPPED_EXIT_CODE


def _wait_for_the_end(stops: list[int]) -> None:
    """Of this job, whom Slurm ends once it is requeued: an end of its own would complete it."""
    before, deadline = len(stops), time.monotonic() + _REQUEUE_TAKES
    while len(stops) == before and time.monotonic() < deadline:
        time.sleep(_POLL)


def _next_link(job: SlurmJob) -> str:
    """Submit the same script once more, to begin when this job has ended."""
    allocation = job.allocation
    options = [f"--dependency=afterany:{allocation.id}"]
    if allocation.array_task is not None:
        options.append(f"--array={allocation.array_task}")
    least, most = nodes_of(job.run)
    if not least <= allocation.nodes <= most:
        options.append(f"--nodes={allocation.nodes}")  # asked for on sbatch's command line
    own = f"run.dir={hydra_text(str(base_dir(job.run, allocation)))}"
    return sbatch(read_batch_script(allocation.id), [*job.script_arguments, own], options=options)


def _say(job: SlurmJob) -> None:
    nodes, allocated = job.nodes, job.allocation.nodes
    used = f"{nodes} of {allocated} nodes" if nodes < allocated else f"{nodes} nodes"
    _print(f"job {job.allocation.id} on {used}: {job.layout.describe()}; run {job.run_dir}")


def _print(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)
