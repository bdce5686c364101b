"""Where a run's numbers go: metrics.jsonl always, W&B as configured. Used by one rank."""

import json
import netrc
import os
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import wandb

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig, WandbMode
from launcher.runtime.run_dir import RunDir, config_as_dict

INIT_TIMEOUT = 20.0  # seconds until a W&B server that does not answer is given up


class MetricsLog:
    """Appends rows to metrics.jsonl, each flushed, and to the W&B run."""

    def __init__(self, run: RunConfig, layout: Layout, directory: RunDir, first_step: int) -> None:
        """Rows from `first_step` on, of an earlier start, are dropped: those steps are run again."""
        _keep_rows_before(first_step, directory.metrics)
        self._file = directory.metrics.open("a")
        self._wandb, self.notes = _start_wandb(run, layout, directory)

    def write(self, row: dict[str, float | int]) -> None:
        """One row; `step` is the optimizer step it belongs to."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(row, step=int(row["step"]))

    def close(self, *, failed: bool) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=1 if failed else 0)

    def where(self) -> str | None:
        """How to see the W&B run, in one line; None without one."""
        if self._wandb is None:
            return None
        if self._wandb.offline:
            files = Path(self._wandb.dir).parent
            return f"{files} (offline: `wandb leet PATH` shows it here, `wandb sync PATH` uploads it)"
        return str(self._wandb.url)


def _keep_rows_before(step: int, path: Path) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short in the middle of a line
        if row["step"] < step:
            kept.append(line + "\n")
    aside = path.with_suffix(".tmp")
    aside.write_text("".join(kept))
    aside.replace(path)


def _start_wandb(run: RunConfig, layout: Layout, directory: RunDir) -> tuple[Any | None, list[str]]:
    """The W&B run, or None where it is disabled, and what to tell the user."""
    mode = resolved_mode(run.logging.wandb.mode)
    if mode == "disabled":
        return None, []
    try:
        return _init(mode, run, layout, directory), []
    except wandb.errors.Error as error:
        if mode == "offline":
            raise
        reason = str(error).splitlines()[0]
        wandb.teardown()  # its service still holds the run's id
        return _init("offline", run, layout, directory), [f"W&B is not reachable, logging offline: {reason}"]


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
    return os.environ.get("WANDB_MODE") or ("online" if _has_api_key() else "offline")


def _has_api_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
