"""The table at the end of a sweep: its jobs and their last losses. Used by `launcher train`."""

import time
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

from launcher.config.compose import Job
from launcher.config.schema import RunConfig
from launcher.config.secrets import masked
from launcher.runtime.run_state import RunState, read_run_state
from launcher.text import aligned, printable

_HEADINGS = ["job", "overrides", "step", "loss", "validation", "state", "run"]
_RIGHT = {0, 2, 3, 4}  # columns of numbers


def print_sweep(jobs: Sequence[Job[RunConfig]], paths: Sequence[Path]) -> None:
    """Print a line per job that was started, in `paths`, and the job with the lowest loss."""
    states = [read_run_state(path, time.time()) for path in paths]
    overrides = differing([job.overrides for job in jobs])
    rows = [
        [
            str(job.index), masked(" ".join(varying)), f"{state.step}/{job.config.training.steps}",
            _loss(state.loss), _loss(state.validation_loss), state.state.name, printable(state.path),
        ]
        for job, varying, state in zip(jobs, overrides, states, strict=False)
    ]  # fmt: skip
    print("\nsweep    the last losses of its jobs")
    for line in aligned([_HEADINGS, *rows], right=_RIGHT):
        print(line)
    if best := lowest(states):
        name, index = best
        print(f"lowest   {name}: job {jobs[index].index}", flush=True)


def differing(overrides: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the overrides of each job that not all jobs have."""
    common = set(overrides[0]).intersection(*overrides)
    return [[override for override in job if override not in common] for job in overrides]


def lowest(states: Sequence[RunState]) -> tuple[str, int] | None:
    """Return the name of the loss and the position of the run with the lowest; None if it has none.

    It is the validation loss if all runs have one.
    """
    is_validated = all(state.validation_loss is not None for state in states)
    losses = [state.validation_loss if is_validated else state.loss for state in states]
    finite = [(loss, index) for index, loss in enumerate(losses) if loss is not None and isfinite(loss)]
    name = "validation loss" if is_validated else "loss"
    return (name, min(finite)[1]) if finite else None


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
