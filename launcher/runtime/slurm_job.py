"""Runs a Slurm job: starts the ranks with srun, and decides what follows when they end.

After a stop request (SIGUSR1 before the time limit, or a preemption) the ranks save, and the job is requeued
or a follow-up job is submitted. After a failure the run restarts in the same allocation from its last
checkpoint, but not after three identical failures in a row, nor if a guard of the run ended it. Slurm
restarts the jobs that Slurm ends.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from launcher.checkpoint.final import final_step
from launcher.checkpoint.manifest import checkpoints_in
from launcher.config.errors import ConfigError, hydra_text, typed_text
from launcher.config.layout import Layout
from launcher.config.run_format import BEGUN_BY_JOB, begun_from, read_identity
from launcher.config.schema import OnStop, RunConfig
from launcher.config.slurm_rules import nodes_of
from launcher.launch.attempts import (
    ATTEMPTS_FILE,
    MAX_IDENTICAL_FAILURES,
    FailedStart,
    count_identical_at_end,
    record_failed_start,
)
from launcher.launch.exit_codes import FAILED, REFUSED
from launcher.launch.rank import STOPPED_EXIT_CODE
from launcher.launch.records import ENDS_VARIABLE, RankEnd, RankEndKind, read_rank_ends
from launcher.launch.sbatch import cpus_per_task, tasks_per_node
from launcher.launch.slurm import (
    Allocation,
    SlurmError,
    job_state,
    read_batch_script,
    requeue,
    sbatch,
    settings_of_job,
)
from launcher.launch.stopping import stop_grace
from launcher.runtime.restarts import last_logged_step
from launcher.runtime.run_dir import LOGS

_POLL = 0.2
_REQUEUE_TAKES = 60.0  # seconds until Slurm ends a requeued job
_RESUME = "checkpoint.resume=auto"


class End(Enum):
    finished = "finished"
    refused = "refused"
    halted = "halted"  # by a guard of the run
    stopped = "stopped"
    failed = "failed"


@dataclass(frozen=True)
class Outcome:
    """The end of a start of the ranks; `error` is the line to report if a rank failed."""

    end: End
    error: str = ""


@dataclass(frozen=True)
class SlurmJob:
    """A run in the allocation of this job. `typed` has all overrides, also those given to the script."""

    run: RunConfig
    layout: Layout
    nodes: int  # that the run uses, of those allocated
    allocation: Allocation
    typed: list[str]
    script_arguments: list[str]

    @property
    def run_dir(self) -> Path:
        return run_dir_of(self.run, self.allocation)


def listen_for_stops() -> list[int]:
    """Return a list that collects, from now on, every signal that asks the job to stop."""
    stops: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: stops.append(received))
    return stops


def run_to_the_end(job: SlurmJob, stops: list[int]) -> int:
    """Start the ranks, restart them after a failure, requeue after a stop; return the exit code."""
    run, allocation, run_dir = job.run, job.allocation, job.run_dir
    if allocation.restarts and _is_finished(job):
        _print(f"{run_dir} is finished already: nothing is left to do")
        return 0
    used = f"{job.nodes} of {allocation.nodes}" if job.nodes < allocation.nodes else job.nodes
    _print(f"job {allocation.id} on {used} nodes: {job.layout.describe()}; run {run_dir}")
    typed = [*job.typed, *(_continuing(job) if allocation.restarts else [])]
    ends = run_dir / LOGS / "ends" / allocation.job
    failures: list[FailedStart] = []
    while True:
        command = step_command(run, typed, job.nodes, job.layout, run_dir)
        _make_empty(ends, run_dir)
        code = _run_step(command, stops, ends, saves=stop_grace(run) > 0)
        ended = outcome(code, bool(stops), read_rank_ends(ends), job.layout.world_size)
        if ended.end is End.finished:
            return 0
        if ended.end is End.refused:
            return REFUSED
        if ended.end is End.halted:
            _print(f"the run does not start again, because a guard ended it: {ended.error}")
            return FAILED
        if _is_finished(job):
            # A launcher that starts the ranks of its node exits with the code of a stop signal, even if its
            # ranks had finished by then.
            _print(f"{run_dir} is finished: its final weights are written")
            return 0
        if ended.end is End.failed and _is_hopeless(job, failures, ended.error):
            return FAILED
        if ended.end is End.stopped or stops or not _is_running(allocation):
            return _requeue_or_chain(job, stops)
        _print(f"the run failed ({ended.error}) and starts again, from {_restart_point(run_dir)}")
        typed = [*job.typed, *_continuing(job)]


def _is_finished(job: SlurmJob) -> bool:
    """Return whether the final weights of the run's last step are written."""
    return final_step(job.run_dir) == (job.run.training.stop_at or job.run.training.steps)


def _continuing(job: SlurmJob) -> list[str]:
    """Return the overrides with which a later start continues the run that this job began.

    With checkpoint.resume=none, the ranks refuse to begin a run in a directory that holds a run. They still
    refuse if another job or a shell began the run there.
    """
    begun_by = (read_identity(job.run_dir) or {}).get(BEGUN_BY_JOB)
    is_own = job.run.checkpoint.resume == "none" and begun_by == job.allocation.job
    return [_RESUME] if is_own else []


def _restart_point(run_dir: Path) -> str:
    """Return in words the place where the next start of a run begins."""
    if checkpoints_in(run_dir):
        return "its last checkpoint"
    return begun_from(run_dir) or "step 1, because it has no checkpoint"


def run_dir_of(run: RunConfig, allocation: Allocation) -> Path:
    """Return the run directory, equal after a requeue; each task of an array has its own."""
    path = base_dir(run, allocation)
    return path if allocation.array_task is None else path / allocation.array_task


def base_dir(run: RunConfig, allocation: Allocation) -> Path:
    return Path(run.run.dir or f"runs/{allocation.name}").expanduser()


def step_command(
    run: RunConfig, overrides: list[str], nodes: int, layout: Layout, run_dir: Path
) -> list[str]:
    """Return the srun command that starts the ranks, or a launcher on each node."""
    ranks = layout.world_size // nodes
    per_node, cpus = tasks_per_node(run, ranks), cpus_per_task(run, ranks)
    launcher = ["launcher"] if run.slurm.container else [sys.executable, "-P", "-m", "launcher"]
    return [
        "srun",
        f"--nodes={nodes}",
        f"--ntasks={nodes * per_node}",
        f"--ntasks-per-node={per_node}",
        # srun does not inherit it from the job (Slurm 22.05 and later).
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        # Without this option the other ranks wait for a failed rank until their timeout.
        "--kill-on-bad-exit=1",
        "--export=ALL",
        *(["--label"] if nodes * per_node > 1 else []),
        *run.slurm.srun,
        *map(os.path.expanduser, run.slurm.container),
        *launcher,
        "train",
        *overrides,
        f"hardware.nodes={nodes}",
        f"run.dir={hydra_text(str(run_dir))}",
    ]


def outcome(code: int, stop_requested: bool, ends: list[RankEnd], ranks: int) -> Outcome:
    """Return how the ranks ended. Their records count more than srun's exit code. Pure."""
    if ends and ends[0].kind is RankEndKind.refused:
        return Outcome(End.refused, ends[0].error)
    if ends and ends[0].kind is RankEndKind.halted:
        return Outcome(End.halted, ends[0].error)
    if ends and ends[0].kind is RankEndKind.lost and len(ends) < ranks:
        # The errors of the other ranks differ from start to start, so they would never count as identical.
        return Outcome(End.failed, "a rank ended without a message: see the output of srun above")
    if ends and ends[0].kind is not RankEndKind.stopped:
        return Outcome(End.failed, ends[0].error)
    if ends or (code and stop_requested):
        return Outcome(End.stopped)
    if code == 0:
        return Outcome(End.finished)
    name = next((f", {candidate.name}" for candidate in signal.Signals if candidate == code - 128), "")
    return Outcome(End.failed, f"srun ended with code {code}{name}: see its output above")


def _make_empty(ends: Path, run_dir: Path) -> None:
    """Make the directory for the ends of ranks, without the files of an earlier start. Raises ConfigError."""
    try:
        ends.mkdir(parents=True, exist_ok=True)
        for path in ends.iterdir():
            path.unlink()
    except OSError as error:
        why = f"cannot be written: {error.strerror}"
        raise ConfigError("run.dir", run_dir, why, "a directory you may write to") from None


def _run_step(command: list[str], stops: list[int], ends: Path, *, saves: bool) -> int:
    environment = {**os.environ, ENDS_VARIABLE: str(ends.absolute())}
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment)
    stopping = False
    while (code := process.poll()) is None:
        if stops and not stopping:
            how = "saving the current step" if saves else "ending without a save (see checkpoint.enabled)"
            _print(f"stop requested: {how}")
            process.send_signal(signal.SIGUSR1)  # srun sends it to every rank
            stopping = True
        time.sleep(_POLL)
    return code if code >= 0 else 128 - code


def _is_hopeless(job: SlurmJob, failures: list[FailedStart], error: str) -> bool:
    """Record a failure, also in `failures` of this job; return whether it is the third identical in a row."""
    step = last_logged_step(job.run_dir)
    failures.append(FailedStart(step, error))
    try:
        identical = record_failed_start(job.run_dir, failures[-1])
    except OSError as problem:  # a full disk: the run may still be able to resume
        _print(f"{job.run_dir / ATTEMPTS_FILE} cannot be written ({problem.strerror})")
        identical = count_identical_at_end(failures)
    if identical < MAX_IDENTICAL_FAILURES:
        return False
    _print(f"giving up after {MAX_IDENTICAL_FAILURES} identical failures after step {step}: {error}")
    typed = _settings_to_resume(job)
    _print(f"fix the cause; the same command with {typed} then resumes from the last checkpoint")
    return True


def _settings_to_resume(job: SlurmJob) -> str:
    """Return the settings with which the job's command, typed again, resumes its run."""
    run_dir = typed_text("run.dir", str(job.run_dir))
    return f"{run_dir} {_RESUME}" if job.run.checkpoint.resume == "none" else run_dir


def _is_running(allocation: Allocation) -> bool:
    try:
        return job_state(allocation.id) == "RUNNING"
    except SlurmError as error:
        _print(f"the state of this job is unknown, it is assumed to be running: {error}")
        return True


def _requeue_or_chain(job: SlurmJob, stops: list[int]) -> int:
    """Requeue the job or submit the next one, as slurm.on_stop says; return the exit code."""
    job_id, run_dir = job.allocation.id, job.run_dir
    if not _is_running(job.allocation):
        _print("stopped: Slurm ends this job, and decides whether it starts again")
        return STOPPED_EXIT_CODE
    try:
        if job.run.slurm.on_stop is OnStop.requeue:
            requeue(job_id)
            _print(f"stopped and requeued: job {job_id} resumes in {run_dir}")
            _wait_for_the_end(stops)
            return STOPPED_EXIT_CODE
        if job.run.slurm.on_stop is OnStop.chain:
            _print(f"stopped: job {_next_link(job)} resumes in {run_dir}")
            return 0
    except SlurmError as error:
        _print(f"stopped, but cannot be restarted automatically: {error}")
    _print(f"stopped: the same command with {_settings_to_resume(job)} resumes")
    return STOPPED_EXIT_CODE


def _wait_for_the_end(stops: list[int]) -> None:
    """Wait until Slurm ends this requeued job: if it exits by itself, Slurm marks it as completed."""
    before, deadline = len(stops), time.monotonic() + _REQUEUE_TAKES
    while len(stops) == before and time.monotonic() < deadline:
        time.sleep(_POLL)


def _next_link(job: SlurmJob) -> str:
    """Submit the same script again, to start after this job; return the id of the new job."""
    allocation = job.allocation
    options = [f"--dependency=afterany:{allocation.id}", *settings_of_job(allocation.id)]
    if allocation.array_task is not None:
        options.append(f"--array={allocation.array_task}")
    least, most = nodes_of(job.run)
    if not least <= allocation.nodes <= most:
        options.append(f"--nodes={allocation.nodes}")  # requested on sbatch's command line
    run_dir = f"run.dir={hydra_text(str(base_dir(job.run, allocation)))}"
    # The next job has another id, so that the run is not its own.
    arguments = [*job.script_arguments, run_dir, *_continuing(job)]
    return sbatch(read_batch_script(allocation.id), arguments, options=options)


def _print(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)
