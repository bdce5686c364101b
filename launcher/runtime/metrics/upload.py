"""Uploads what the W&B server lacks of a run, each step once and in order (`launcher sync`)."""

import os
import subprocess
import sys
import time
from pathlib import Path

from launcher.config.compose import load_typed
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout, recorded_layout
from launcher.config.run_format import IDENTITY, read_identity
from launcher.config.schema import RunConfig, WandbMode
from launcher.launch.exit_codes import FAILED
from launcher.runtime.hold import is_held
from launcher.runtime.metrics.rows import rows_in
from launcher.runtime.metrics.wandb_files import (
    fragments,
    has_ended,
    is_online,
    is_sent,
    known_steps,
    mark_as_sent,
    records,
    remove_sent_marks,
)
from launcher.runtime.metrics.wandb_run import (
    History,
    check_uploaded,
    end_service,
    has_api_key,
    leave_service,
    log_missing,
    open_session,
    resolved_mode,
    server_url,
    uploaded_history,
    why_unreachable,
)
from launcher.runtime.run_dir import CONFIG, METRICS, RunDir

_QUIET = 120.0  # seconds without a write after which a start counts as killed, where there are no locks
_FINISH_TIMEOUT = 600.0  # seconds for the server to take the rows of a run


def upload(run_dir: Path, temporary: Path) -> int:
    """Upload the steps that the server lacks; return the exit code. Raises ConfigError."""
    try:
        return _upload(run_dir, temporary)
    except ConfigError:
        raise
    except Exception as error:  # W&B raises any
        kept = f"all rows stay in {run_dir / METRICS}"
        print(f"launcher: W&B has not taken all rows of {run_dir}: {error}; {kept}", file=sys.stderr)
        return FAILED
    finally:
        end_service()


def _upload(run_dir: Path, temporary: Path) -> int:
    run, layout, directory = _identified(run_dir)
    held, files = is_held(run_dir), fragments(directory.path, directory.run_id)
    # A start that was online may have sent a part of its file: `wandb sync` would send that part again.
    in_part = any(is_online(path) and not is_sent(path) for path in files)
    are_complete = all(is_complete(path, time.time(), held=held) for path in files if not is_online(path))
    if not held and not in_part and are_complete:
        complete(run_dir, temporary)
        files = fragments(directory.path, directory.run_id)
    new = [path for path in files if not is_sent(path)]
    waiting = [path for path in new if not is_complete(path, time.time(), held=held)]
    for path in waiting:
        print(f"later    {path.parent}: the run is still writing it")
    # A file after an unfinished file must wait too, or its steps would arrive first.
    ready = new[: new.index(waiting[0])] if waiting else new
    if not ready or (in_part and waiting):
        if not waiting:
            print(f"{run_dir}: {'all W&B files are uploaded' if files else 'no W&B files'}")
        return 0
    _check_server(run_dir)
    if in_part or _has_arrived_in_part(ready, run, directory):
        return 0 if waiting else _upload_rows(run, layout, directory, temporary)
    return _upload_files(ready, files[: files.index(ready[-1]) + 1], run, directory)


def complete(run_dir: Path, temporary: Path) -> None:
    """Add the steps that W&B lost, or never had, to an offline run that is not training."""
    run, layout, directory = _identified(run_dir)
    if run.logging.wandb.mode is not WandbMode.disabled or fragments(directory.path, directory.run_id):
        log_missing(rows_in(directory.metrics), run, layout, directory, temporary)


def is_complete(fragment: Path, now: float, *, held: bool | None) -> bool:
    """Return whether no process writes the file any longer; `held` is the answer of is_held for its run."""
    if has_ended(fragment) or held is False:
        return True
    return held is None and now - fragment.stat().st_mtime > _QUIET


def _has_arrived_in_part(new: list[Path], run: RunConfig, directory: RunDir) -> bool:
    """Ask the server whether it has steps of these files, so that `wandb sync` would repeat them."""
    steps, w = known_steps(new), run.logging.wandb
    return bool(steps) and uploaded_history(w.project, w.entity, directory.run_id).last >= min(steps)


def _upload_files(new: list[Path], all_files: list[Path], run: RunConfig, directory: RunDir) -> int:
    """Let W&B send the new files, and ask the server for the steps of all files; return the exit code."""
    remove_sent_marks(new)  # or W&B passes over the files
    # `wandb sync` gives up, with exit code 0, at a file that a killed W&B left without a record.
    folders = [str(path.parent) for path in new if next(records(path), None)]
    # -P: the working directory may hold W&B's own folder `wandb`, or a module of the user with this name.
    command = [sys.executable, "-P", "-m", "wandb", "sync", "--yes", *folders]
    # W&B writes a log into WANDB_DIR/wandb, or into TMPDIR if that is missing.
    surroundings = {**os.environ, "WANDB_DIR": str(directory.path)}
    surroundings.pop("WANDB_SERVICE", None)  # the process of this one, whose settings are others
    if folders and subprocess.run(command, check=False, env=surroundings).returncode:
        return FAILED  # not the code itself, which is negative if a signal ended the process
    steps, w = known_steps(all_files), run.logging.wandb
    check_uploaded(History(len(steps), max(steps, default=0)), w.project, w.entity, directory.run_id)
    mark_as_sent(new)
    return 0


def _upload_rows(run: RunConfig, layout: Layout, directory: RunDir, temporary: Path) -> int:
    """Resume the W&B run and log the rows of metrics.jsonl that the server lacks; return the exit code."""
    session = open_session("online", run, layout, directory, temporary, _FINISH_TIMEOUT)
    for row in rows_in(directory.metrics):
        session.log(row)
    session.finish(failed=False)
    mark_as_sent(fragments(directory.path, directory.run_id))
    print(f"uploaded {session.where()}")
    return 0


def summarise(run_dir: Path, values: dict[str, float], temporary: Path, finish_timeout: float) -> str:
    """Add `values` to the summary of the W&B run; return where it is. Raises any exception of W&B."""
    run, layout, directory = _identified(run_dir)
    try:
        mode = resolved_mode(run.logging.wandb.mode)
        session = open_session(mode, run, layout, directory, temporary, finish_timeout)
        session.summarise(values)
        session.finish(failed=False)
    except BaseException:
        end_service()
        raise
    leave_service()  # it may still be writing the file
    return session.where()


def _identified(run_dir: Path) -> tuple[RunConfig, Layout, RunDir]:
    """Return the run of a directory. Raises ConfigError."""
    try:
        identity = read_identity(run_dir) or {}
        layout, directory = recorded_layout(identity), RunDir(run_dir.resolve(), str(identity["id"]))
    except (KeyError, TypeError):
        why = f"its {IDENTITY} is damaged, so that the id of the W&B run is unknown"
        raise ConfigError("sync", run_dir, why, f"a copy of {IDENTITY} from a backup") from None
    return load_typed(run_dir / CONFIG, RunConfig), layout, directory


def _check_server(run_dir: Path) -> None:
    if not has_api_key():
        remedy = "`wandb login`, or WANDB_API_KEY in the environment"
        raise ConfigError("sync", run_dir, "there is no W&B API key on this machine", remedy)
    server = server_url()
    if why := why_unreachable(server):
        remedy = "a node that can reach it, WANDB_BASE_URL=URL for another server, or HTTPS_PROXY"
        raise ConfigError("sync", run_dir, f"the W&B server {server} does not answer: {why}", remedy)
