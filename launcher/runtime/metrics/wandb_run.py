"""One W&B run per run directory, through any number of starts: every step in it once.

Killed, W&B may have lost the last steps that metrics.jsonl has; resumed, a run takes steps again that W&B has
already. So what W&B has is asked for at each start, missing steps are logged again and known ones are not.
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

INIT_TIMEOUT = 20.0  # seconds until a W&B server that does not answer is given up


class WandbRun:
    """The W&B run of this start. Rows are logged in the order of their steps.

    W&B's own process may end before the run does: Slurm sends SIGTERM to all processes of a job. Training
    goes on without it then, and the next start logs what is missing.
    """

    def __init__(self, started: Any, known: Container[int]) -> None:
        self._run, self._known = started, known
        self._lost = False

    def log(self, row: Row) -> None:
        """One row, unless W&B has its step already."""
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
        except Exception as error:  # of its own, of the socket, of the queue to it
            self._lost = True
            print(f"note     W&B has ended, and metrics.jsonl goes on alone: {error!r}", flush=True)

    def where(self) -> str:
        """How to see it, in one line."""
        if self._run.offline:
            files = Path(self._run.dir).parent
            return f"{files} (offline: `wandb leet PATH` shows it here, `launcher sync RUN.DIR` uploads it)"
        return str(self._run.url)


def log_missing(rows: list[Row], run: RunConfig, layout: Layout, directory: RunDir) -> None:
    """Into an offline start of its own, what no start so far has of these rows."""
    known = {step for fragment in fragments(directory.path) for step in steps_in(fragment)}
    missing = [row for row in rows if int(row["step"]) not in known]
    if missing:
        started = WandbRun(_init("offline", run, layout, directory), known)
        for row in missing:
            started.log(row)
        started.finish(failed=False)


def start_wandb(run: RunConfig, layout: Layout, directory: RunDir) -> tuple[WandbRun | None, list[str]]:
    """The W&B run, or None where it is disabled, and what to tell the user."""
    mode = resolved_mode(run.logging.wandb.mode)
    if mode == "disabled":
        return None, []
    # Before this start's own is among them.
    known = {step for fragment in fragments(directory.path) for step in steps_in(fragment)}
    try:
        started = _init(mode, run, layout, directory)
    except wandb.errors.Error as error:
        if mode == "offline":
            raise
        reason = str(error).splitlines()[0]
        wandb.teardown()  # its service still holds the run's id
        note = f"W&B is not reachable, logging offline: {reason}"
        return WandbRun(_init("offline", run, layout, directory), known), [note]
    # A server knows best what has reached it.
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
    """`auto` becomes what WANDB_MODE says, else online where an API key is found, else offline."""
    if mode is not WandbMode.auto:
        return mode.name
    return os.environ.get("WANDB_MODE") or ("online" if has_api_key() else "offline")


def has_api_key() -> bool:
    """In WANDB_API_KEY, or where `wandb login` leaves it; the server is not asked."""
    if os.environ.get("WANDB_API_KEY"):
        return True  # at once: W&B takes seconds to say so where it has no way to its server
    try:
        return wandb.login(prompt=False, verify=False)
    except wandb.errors.Error:
        return True  # a malformed one, as W&B says again where it is used


def server_url() -> str:
    """As WANDB_BASE_URL says, or what `wandb login --host` wrote, or W&B's own."""
    return os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)


def why_unreachable(url: str) -> str | None:
    """What keeps this machine from the server; None where it answers, be it with an error."""
    try:
        urllib.request.urlopen(url, timeout=INIT_TIMEOUT).close()
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        return str(getattr(error, "reason", error))
    return None
