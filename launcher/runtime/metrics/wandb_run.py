"""The W&B run of a run directory: the same run through any number of starts, with every step once.

When a run is killed, W&B may lose steps that metrics.jsonl has; when it resumes, it repeats steps that W&B
has. So each start asks which steps W&B has, logs missing steps again, and does not log known steps.
"""

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import wandb

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig, WandbMode
from launcher.runtime.metrics.rows import Row
from launcher.runtime.metrics.wandb_files import fragments, steps_in
from launcher.runtime.run_dir import RunDir, config_as_dict

INIT_TIMEOUT = 20.0  # seconds to wait for a W&B server that does not answer


class WandbRun:
    """The W&B run of this start. Rows are logged in the order of their steps.

    W&B's process may end before the run: Slurm sends SIGTERM to all processes of a job. Training then
    continues without W&B, and the next start logs the missing steps.
    """

    def __init__(self, started: Any, known: Container[int]) -> None:
        """`started` is the object that wandb.init returned, `known` the steps that W&B has."""
        self._run, self._known = started, known
        self._lost = False

    def log(self, row: Row) -> None:
        """Log a row, unless W&B has its step already."""
        step = int(row["step"])
        if step not in self._known:
            self._unless_lost(lambda: self._run.log(row, step=step, commit=True))

    def finish(self, *, failed: bool) -> None:
        self._unless_lost(lambda: self._run.finish(exit_code=1 if failed else 0))

    def _unless_lost(self, call: Callable[[], object]) -> None:
        if self._lost:
            return
        try:
            call()
        except Exception as error:  # wandb's, the socket's or the queue's
            self._lost = True
            print(f"note     W&B has ended; metrics.jsonl is still written: {error!r}", flush=True)

    def where(self) -> str:
        if self._run.offline:
            files = Path(self._run.dir).parent
            return f"{files} (offline: `wandb leet PATH` shows it here, `launcher sync RUN.DIR` uploads it)"
        return str(self._run.url)


def log_missing(rows: list[Row], run: RunConfig, layout: Layout, directory: RunDir) -> None:
    """Log the rows that no earlier W&B session has, in a new offline session."""
    known = {step for fragment in fragments(directory.path) for step in steps_in(fragment)}
    missing = [row for row in rows if int(row["step"]) not in known]
    if missing:
        started = WandbRun(_init("offline", run, layout, directory), known)
        for row in missing:
            started.log(row)
        started.finish(failed=False)


def start_wandb(run: RunConfig, layout: Layout, directory: RunDir) -> tuple[WandbRun | None, list[str]]:
    """Return the W&B run, or None if it is disabled, and notes to the user."""
    mode = resolved_mode(run.logging.wandb.mode)
    if mode == "disabled":
        return None, []
    # Read before this start adds a file.
    known = {step for fragment in fragments(directory.path) for step in steps_in(fragment)}
    try:
        started = _init(mode, run, layout, directory)
    except wandb.errors.Error as error:
        if mode == "offline":
            raise
        reason = str(error).splitlines()[0]
        wandb.teardown()  # the W&B service still holds the run's id
        note = f"W&B is not reachable, logging offline: {reason}"
        return WandbRun(_init("offline", run, layout, directory), known), [note]
    # A server knows which steps have reached it.
    return WandbRun(started, known if started.offline else range(started.starting_step)), []


def _init(mode: str, run: RunConfig, layout: Layout, directory: RunDir) -> Any:
    w = run.logging.wandb
    composed = config_as_dict(run)
    resolved = {"world_size": layout.world_size, "data": layout.data, "accumulation": layout.accumulation}
    return wandb.init(
        dir=str(directory.path),
        id=directory.run_id,
        resume="allow",
        mode=mode,  # type: ignore[arg-type]
        project=w.project,
        entity=w.entity,
        name=w.name or directory.path.name,
        group=w.group,
        tags=w.tags,
        config={**composed, "layout": {**resolved, "zero_stage": layout.zero_stage}},
        settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT),
    )


def resolved_mode(mode: WandbMode) -> str:
    """Resolve `auto`: to WANDB_MODE if set, else to online if there is an API key, else to offline."""
    if mode is not WandbMode.auto:
        return mode.name
    return os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")


def has_api_key() -> bool:
    """Return whether there is a key in WANDB_API_KEY or from `wandb login`. Does not ask the server."""
    if os.environ.get("WANDB_API_KEY"):
        return True  # without asking W&B, which takes seconds if it cannot reach its server
    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.errors.Error:
        return True  # a malformed key, which W&B reports when it is used


def server_url() -> str:
    """Return WANDB_BASE_URL, or the server of `wandb login --host`, or W&B's default."""
    return os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)


def why_unreachable(url: str) -> str | None:
    """Return why this machine cannot reach the server; None if it answers, even with an error."""
    try:
        urllib.request.urlopen(url, timeout=INIT_TIMEOUT).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return str(getattr(error, "reason", error))
    return None
