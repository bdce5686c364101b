"""The state of a run, read from its directory: how far it is, and whether it trains. Imports no torch."""

import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path

from launcher.checkpoint.final import final_step
from launcher.config.errors import ConfigError
from launcher.config.run_format import IDENTITY, read_identity
from launcher.files import read_regular
from launcher.launch.attempts import ATTEMPTS_FILE
from launcher.runtime.hold import HOLDER, STOPPED, Holder, holder_of
from launcher.runtime.metrics.rows import rows_backwards
from launcher.runtime.run_dir import CONFIG, METRICS
from launcher.text import duration

HANG_REPORT = "hang.txt"
_DEPTH = 3  # of directories in which runs are looked for: a sweep has a directory per job
_TAIL, _ROWS = 1 << 20, 300  # bytes and rows at the end of metrics.jsonl in which the last losses are
_MOST_BYTES = 1 << 20  # of a config or of a report
# A run whose directory cannot be locked counts as running for this time after its last row, or for so many
# logged steps if that is longer.
_QUIET_SECONDS, _QUIET_ROWS = 120.0, 20.0


class State(Enum):
    """States of a run."""

    running = "running"
    stopped = "stopped"
    finished = "finished"
    failed = "failed"
    hung = "hung"
    unreadable = "unreadable"


@dataclass(frozen=True)
class RunState:
    """A run: its state with one line about it, steps, last values, and the time of its last change."""

    path: Path
    state: State
    detail: str = ""
    step: int = 0
    steps: int | None = None  # None: not known
    loss: float | None = None
    validation_loss: float | None = None
    tokens_per_s: float | None = None
    changed: float = 0.0  # seconds since 1970


def runs_in(path: Path, depth: int = _DEPTH) -> list[Path]:
    """Return the run directories at and below `path`. Unreadable directories below it have none."""
    if (path / IDENTITY).is_file():
        return [path]
    runs = []
    with suppress(OSError):
        for entry in sorted(path.iterdir()) if depth else []:
            if entry.is_dir():
                runs += runs_in(entry, depth - 1)
    return runs


def read_run_state(path: Path, now: float) -> RunState:
    """Return the state of the run in `path`, whatever the directory holds."""
    try:
        return _read_run_state(path, now)
    except (OSError, ConfigError, ValueError, RecursionError) as error:
        words = f"{error.field}={error.value}: {error.why}" if isinstance(error, ConfigError) else str(error)
        return RunState(path, State.unreadable, words, changed=_modified(path))


def _read_run_state(path: Path, now: float) -> RunState:
    read_identity(path)
    stop_at, steps = _planned_steps(path / CONFIG)
    values: dict[str, float] = {}
    for row in islice(rows_backwards(path / METRICS, _TAIL), _ROWS):
        values = {name: value for name, value in row.items() if isinstance(value, int | float)} | values
        if "train/loss" in values and "val/loss" in values:
            break
    changed = max(_modified(path / name) for name in (METRICS, HOLDER, IDENTITY))
    state, detail = _state(path, steps if stop_at is None else stop_at, now, values)
    return RunState(
        path, state, detail, int(values.get("step", 0)), steps, values.get("train/loss"),
        values.get("val/loss"), values.get("perf/tokens_per_s"), changed,
    )  # fmt: skip


def _state(path: Path, last_step: int | None, now: float, values: dict[str, float]) -> tuple[State, str]:
    """Return the state and a line about it."""
    holder, is_held = holder_of(path)
    quiet = now - max(_modified(path / METRICS), _modified(path / HOLDER))
    if is_held is None:
        has_ended = holder is None or holder.end is not None
        row_seconds = values.get("perf/step_time_s", 0.0)
        is_held = not has_ended and quiet < max(_QUIET_SECONDS, _QUIET_ROWS * row_seconds)
    if is_held:
        where = _place_of(holder) if holder else ""
        silence = f"; no row for {duration(quiet)}" if quiet > _QUIET_SECONDS else ""
        return State.running, f"{where}{silence}"
    # The final weights of an earlier end stay while a run with more training.steps continues.
    final = final_step(path)
    if final is not None and last_step in (None, final):
        return State.finished, ""
    report = path / HANG_REPORT
    if _modified(report) > max(_modified(path / METRICS), _since(holder)):
        return State.hung, _first_line(report)
    # The holder may have been killed, or stopped because another rank failed: the job recorded the failure.
    if holder and (error := _slurm_error(path, holder)):
        return State.failed, error
    if holder is None or holder.end is None:
        return State.stopped, "its end was not recorded: it was killed, or its machine went down"
    if holder.end and holder.end != STOPPED:
        return State.failed, holder.end
    is_comparison = any(name.startswith("loss/") for name in values)  # `launcher compare` keeps no weights
    is_over = holder.end == "" and (last_step == 0 or is_comparison)
    return (State.finished if is_over else State.stopped), ""


def _place_of(holder: Holder) -> str:
    return f"on {holder.host}, " + (f"job {holder.job}" if holder.job else f"process {holder.process}")


def _since(holder: Holder | None) -> float:
    with suppress(ValueError, OverflowError):
        return time.mktime(time.strptime(holder.since, "%Y-%m-%d %H:%M:%S")) if holder else 0.0
    return 0.0


def _slurm_error(path: Path, holder: Holder) -> str:
    """Return the error of the last failed start of a Slurm job, which names the rank that failed first."""
    if holder.job is None or _modified(path / ATTEMPTS_FILE) < _modified(path / HOLDER):
        return ""
    lines = read_regular(path / ATTEMPTS_FILE, _MOST_BYTES).splitlines()
    failed = json.loads(lines[-1]) if lines else {}
    return str(failed.get("error", "")) if isinstance(failed, dict) else ""


def _planned_steps(config: Path) -> tuple[int | None, int | None]:
    """Return training.stop_at and training.steps of a config.yaml, without parsing all of it."""
    text = read_regular(config, _MOST_BYTES).decode(errors="replace") if config.is_file() else ""
    section = re.search(r"^training:\n((?:  .*\n)*)", text, re.MULTILINE)
    fields = dict(re.findall(r"^  (\w+): (\d{1,18})$", section[1] if section else "", re.MULTILINE))
    stop_at, steps = fields.get("stop_at"), fields.get("steps")
    return (int(stop_at) if stop_at else None), (int(steps) if steps else None)


def _first_line(report: Path) -> str:
    with suppress(OSError):
        return next(iter(read_regular(report, _MOST_BYTES).decode(errors="replace").splitlines()), "")
    return ""


def _modified(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0
