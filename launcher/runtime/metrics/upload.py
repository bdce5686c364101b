"""Uploads a run's offline W&B files to the server, each once and in order (`launcher sync`)."""

import json
import subprocess
import sys
import time
from pathlib import Path

from launcher.config.compose import load_typed
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.run_format import IDENTITY
from launcher.config.schema import RunConfig
from launcher.files import json_lines
from launcher.runtime.metrics.wandb_files import fragments, has_ended
from launcher.runtime.metrics.wandb_run import has_api_key, log_missing, server_url, why_unreachable
from launcher.runtime.run_dir import CONFIG, RunDir

_QUIET = 120.0  # seconds without a write after which a start counts as killed


def upload(run_dir: Path) -> int:
    """Upload new files, with steps that W&B lost; return `wandb sync`'s exit code. Raises ConfigError."""
    if all(is_complete(path, time.time()) for path in offline_fragments(run_dir)):
        complete(run_dir)
    new = [path for path in offline_fragments(run_dir) if not is_synced(path)]
    waiting = [path for path in new if not is_complete(path, time.time())]
    for path in waiting:
        print(f"later    {path.parent}: the run is still writing it")
    # A file after an unfinished file must wait too, or its steps would arrive first.
    ready = new[: new.index(waiting[0])] if waiting else new
    if not ready:
        if not waiting:
            state = "all W&B files are uploaded" if offline_fragments(run_dir) else "no offline W&B files"
            print(f"{run_dir}: {state}")
        return 0
    if not has_api_key():
        remedy = "`wandb login`, or WANDB_API_KEY in the environment"
        raise ConfigError("sync", run_dir, "there is no W&B API key on this machine", remedy)
    server = server_url()
    if why := why_unreachable(server):
        remedy = "a node that can reach it, WANDB_BASE_URL=URL for another server, or HTTPS_PROXY"
        raise ConfigError("sync", run_dir, f"the W&B server {server} does not answer: {why}", remedy)
    folders = [str(path.parent) for path in ready]
    # -P: the working directory may hold W&B's own folder `wandb`, or a module of the user with this name.
    command = [sys.executable, "-P", "-m", "wandb", "sync", "--yes", *folders]
    return subprocess.run(command, check=False).returncode


def offline_fragments(run_dir: Path) -> list[Path]:
    return [path for path in fragments(run_dir) if path.parent.name.startswith("offline-run-")]


def complete(run_dir: Path) -> None:
    """Add the steps that W&B lost to an offline run that is not training. Raises ConfigError."""
    if not offline_fragments(run_dir):
        return
    run, identity = load_typed(run_dir / CONFIG, RunConfig), json.loads((run_dir / IDENTITY).read_text())
    directory = RunDir(run_dir.resolve(), identity["id"])
    log_missing(json_lines(directory.metrics), run, Layout(**identity["layout"]), directory)


def is_synced(fragment: Path) -> bool:
    return fragment.with_name(f"{fragment.name}.synced").exists()


def is_complete(fragment: Path, now: float) -> bool:
    return has_ended(fragment) or now - fragment.stat().st_mtime > _QUIET
