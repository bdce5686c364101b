"""`launcher status [PATH ...]`: list runs with their steps, losses, speeds and states. Imports no torch."""

import time
from pathlib import Path

from launcher.config.errors import ConfigError
from launcher.config.paths import path_argument
from launcher.runtime.run_state import RunState, State, read_run_state, runs_in
from launcher.text import aligned, duration, plural, printable

USAGE = """\
launcher status [PATH ...]   list the runs in each PATH (default: runs/), the last changed run first

PATH is the directory of a run, or a directory of runs or sweeps. A run is running, stopped (the same command
resumes it), finished, failed, hung or unreadable; the last column says why, or where it runs."""
_HEADINGS = ["run", "step", "loss", "validation", "tokens/s", "changed", "state", ""]
_RIGHT = {1, 2, 3, 4, 5}  # columns of numbers
_LONGEST_DETAIL = 200  # characters


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    paths = [path_argument("status", text.removeprefix("run.dir=")) for text in arguments] or [Path("runs")]
    for path in paths:
        if not path.is_dir():
            why = "there is no such directory"
            raise ConfigError("status", printable(path), why, "launcher status DIRECTORY of your runs")
    now = time.time()
    every_run = [run for path in paths for run in runs_in(path)]
    # A run that links lead to is listed once, under its shortest path.
    runs = {run.resolve(): run for run in sorted(every_run, key=lambda run: len(run.parts), reverse=True)}
    states = [read_run_state(run, now) for run in runs.values()]
    if states:
        print_states(sorted(states, key=lambda state: state.changed, reverse=True), now)
    else:
        print(f"no runs in {', '.join(map(printable, paths))}")
    return 0


def print_states(states: list[RunState], now: float) -> None:
    print(summary(states))
    for line in aligned([_HEADINGS, *(cells(state, now) for state in states)], right=_RIGHT):
        print(line)


def summary(states: list[RunState]) -> str:
    """Return the number of runs, and how many are in each state."""
    counts = {kind: sum(state.state is kind for state in states) for kind in State}
    by_state = ", ".join(f"{count} {kind.name}" for kind, count in counts.items() if count)
    return f"{plural(len(states), 'run')}: {by_state}"


def cells(state: RunState, now: float) -> list[str]:
    steps = "?" if state.steps is None else state.steps
    ago = f"{duration(round(max(0.0, now - state.changed)))} ago" if state.changed else ""
    return [
        _one_line(state.path),
        f"{state.step}/{steps}",
        *(
            "" if value is None else form.format(value)
            for value, form in (
                (state.loss, "{:.4f}"),
                (state.validation_loss, "{:.4f}"),
                (state.tokens_per_s, "{:,.0f}"),
            )
        ),
        ago,
        state.state.name,
        _one_line(state.detail)[:_LONGEST_DETAIL],
    ]


def _one_line(value: object) -> str:
    """Return text of a directory that a terminal shows as it is."""
    return "".join(letter if letter.isprintable() else "?" for letter in printable(value))
