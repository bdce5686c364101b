"""Starts the ranks of a run again after a failure, in the same launcher process (`launch.max_restarts`)."""

import sys
from dataclasses import replace
from pathlib import Path

from launcher.checkpoint.manifest import checkpoints_in, read_manifest
from launcher.checkpoint.resume_choice import checkpoint_to_resume
from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.launch.attempts import MAX_IDENTICAL_FAILURES, FailedStart, count_identical_at_end
from launcher.launch.local import RankFailure
from launcher.launch.records import error_summary
from launcher.planning.choose.changes import smaller
from launcher.planning.cost.run_plan import make_plan
from launcher.runtime.metrics.rows import last_step
from launcher.runtime.run_dir import METRICS, RunDir
from launcher.text import size


class Restarts:
    """Decides whether a run starts again, and from which checkpoint."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._failures: list[FailedStart] = []

    def directory_after(self, failure: RankFailure, directory: RunDir) -> RunDir:
        """Return the directory to start again with, and print why. Raise `failure` to end the run."""
        most = self._run.launch.max_restarts
        if failure.stopping or failure.halted or not most:
            raise failure
        step = last_logged_step(directory.path)
        self._failures.append(FailedStart(step, error_summary(failure.reason)))
        if count_identical_at_end(self._failures) == MAX_IDENTICAL_FAILURES:
            _print(f"giving up after {MAX_IDENTICAL_FAILURES} identical failures after step {step}")
            raise failure
        if len(self._failures) > most:
            _print(f"giving up after launch.max_restarts={most} restarts")
            raise failure
        directory = resumed(self._run, directory)
        start = read_manifest(directory.checkpoint).step + 1 if directory.checkpoint else 1
        if "\n" in str(failure):
            _print(str(failure))
        where = f"at step {start}, {_reason_for_step(directory)}"
        _print(f"restart {len(self._failures)} of {most} {where}: {failure.reason}")
        return directory


def resumed(run: RunConfig, directory: RunDir) -> RunDir:
    """Return the directory with its newest checkpoint, or else with the one that the run was begun from.

    The directory of a run with neither is unchanged. Raises ConfigError.
    """
    newest = checkpoint_to_resume(
        replace(run, checkpoint=replace(run.checkpoint, resume="auto")), directory.path
    )
    return replace(directory, checkpoint=newest, initial=None) if newest else directory


def _reason_for_step(directory: RunDir) -> str:
    """Return why the run starts again at its step: the checkpoint it resumes from, or that it has none."""
    if directory.checkpoint is None:
        return "because it has no checkpoint"
    is_own = directory.checkpoint in checkpoints_in(directory.path)
    return "from its last checkpoint" if is_own else f"from {directory.checkpoint}"


def last_logged_step(run_dir: Path) -> int:
    """Return the step of the last row in metrics.jsonl; 0 without rows."""
    return last_step(run_dir / METRICS)


def memory_advice(run: RunConfig, layout: Layout) -> str:
    """Return the settings that would reduce the memory of this machine that a rank needs, after `try:`."""
    if layout.device == "cuda":
        settings = ["checkpoint.asynchronous=false"] if run.checkpoint.asynchronous else []
        settings += ["parallelism.offload_optimizer=false"] if run.parallelism.offload_optimizer else []
        return " or ".join([*settings, "fewer ranks per machine"])
    plan = make_plan(run, layout)
    changes = [
        f"{change.settings} (planned: {size(change.plan.peak)} per rank instead of {size(plan.peak)})"
        for change in smaller(plan)
    ]
    return " or ".join(changes or ["a smaller model, or a machine with more memory"])


def _print(text: str) -> None:
    print(f"launcher: {text}", file=sys.stderr, flush=True)
