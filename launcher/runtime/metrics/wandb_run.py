"""The W&B run of a run directory: the same run through any number of starts, with every step once.

When a run is killed, W&B may lose steps that metrics.jsonl has; when it resumes, it repeats steps that W&B
has. So each start asks which steps W&B has, logs missing steps again, and does not log known steps.

Calls of W&B can raise any exception and can wait for any time. A run makes them in wandb_thread.py.
"""

import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import wandb
from wandb.proto.wandb_api_pb2 import ApiRequest, GraphQLRequest  # type: ignore[attr-defined]

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig, WandbMode
from launcher.launch.scratch import temporary_files_in
from launcher.runtime.metrics.rows import Row, count_and_last_step
from launcher.runtime.metrics.wandb_files import fragments, known_steps
from launcher.runtime.run_dir import RunDir, config_as_dict

INIT_TIMEOUT = 20.0  # seconds to wait for a W&B server that does not answer
_END_TIMEOUT = 5.0  # seconds for W&B's own clean-up after its process was killed
_CONFIRM_TIMEOUT = 3.0  # seconds in which the server must count the rows that it has accepted
_CONFIRM_POLL = 0.5
_HISTORY = """
query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    bucket(name: $name, missingOk: true) { historyLineCount historyTail }
  }
}
"""


class Unsent(Exception):
    """Raised if the W&B server has not received all records of a session."""


class History(NamedTuple):
    """The number of steps of a W&B run, and the last step; 0 without steps."""

    steps: int
    last: int

    def includes(self, other: "History") -> bool:
        return self.steps >= other.steps and self.last >= other.last


class Messages:
    """Collects the messages that W&B would print: a silent W&B says only here that an upload has failed."""

    def __init__(self) -> None:
        self.has_fatal = False  # W&B has stopped to upload

    def warning(self, message: str) -> None:
        self.has_fatal = self.has_fatal or "Fatal error" in message

    info = error = warning


class WandbSession:
    """One start of the W&B run. Rows are logged in the order of their steps."""

    def __init__(self, started: Any, known: set[int] | range, messages: Messages, metrics: Path) -> None:
        """`started` is the object that wandb.init returned, `known` the steps that W&B has."""
        self._run, self._known, self._messages, self._metrics = started, known, messages, metrics
        self.last_known = (known.stop if isinstance(known, range) else max(known, default=-1) + 1) - 1
        self.is_online = not started.offline

    def log(self, row: Row) -> None:
        """Log a row, unless W&B has its step already."""
        step = int(row["step"])
        if step not in self._known:
            self._run.log(row, step=step, commit=True)

    def summarise(self, values: dict[str, float]) -> None:
        """Add values to the summary of the W&B run, beside its rows."""
        self._run.summary.update(values)

    def say_kept(self, first_step: int) -> None:
        """Say in the config of the W&B run which steps keep the values of an earlier start."""
        key = f"values of an earlier start/steps {first_step} to {self.last_known}"
        self._run.config.update({key: True}, allow_val_change=True)

    def finish(self, *, failed: bool) -> None:
        """Send the rest, and ask the server if it has all rows. Raises Unsent, or any exception of W&B."""
        try:
            self._run.finish(exit_code=1 if failed else 0)
        except TimeoutError:
            raise Unsent("its server did not take all rows in time") from None
        if self._messages.has_fatal:
            raise Unsent("its server refused rows")
        if self.is_online:
            expected = History(*count_and_last_step(self._metrics))
            check_uploaded(expected, self._run.project, self._run.entity, self._run.id)

    def where(self) -> str:
        if self._run.offline:
            files = Path(self._run.dir).parent
            return f"{files} (offline: `wandb leet PATH` shows it here, `launcher sync RUN.DIR` uploads it)"
        return str(self._run.url)


def open_session(
    mode: str, run: RunConfig, layout: Layout, directory: RunDir, temporary: Path, finish_timeout: float
) -> WandbSession:
    """Start W&B, and wait at most `finish_timeout` seconds for uploads at the end. Raises any exception.

    W&B's processes leave sockets behind when they are killed; their temporary files are in `temporary`.
    """
    folder = directory.path / "wandb"
    folder.mkdir(exist_ok=True)
    if not os.access(folder, os.W_OK):  # W&B would log to a temporary directory
        raise PermissionError(f"{folder} is not writable")
    files = fragments(directory.path, directory.run_id)  # before this start adds a file
    messages = Messages()
    with temporary_files_in(temporary):
        wandb.setup()  # starts W&B's process
    wandb.termsetup(wandb.Settings(silent=True), messages)
    started = _init(mode, run, layout, directory, finish_timeout)
    # A server knows which steps have reached it.
    known = known_steps(files) if started.offline else range(started.starting_step)
    return WandbSession(started, known, messages, directory.metrics)


def uploaded_history(project: str, entity: str | None, run_id: str) -> History:
    """Ask the server which steps of the run it has. Raises any exception of W&B."""
    setup = wandb.setup()
    # Not wandb.Api(): if W&B's process is killed, its clean-up prints a traceback from a thread.
    service = setup.ensure_service()
    api_id = service.api_init_request(setup.settings.to_proto()).api_id
    variables = {"project": project, "entity": entity or setup.settings.entity, "name": run_id}
    question = GraphQLRequest(query=_HISTORY, variables_json=json.dumps(variables))
    answer = service.api_request(ApiRequest(api_id=api_id, graphql_request=question), _CONFIRM_TIMEOUT)
    bucket = (json.loads(answer.graphql_response.data_json)["model"] or {}).get("bucket")
    if bucket is None:
        return History(0, 0)
    tail = json.loads(bucket["historyTail"] or "[]")
    return History(bucket["historyLineCount"], json.loads(tail[-1])["_step"] if tail else 0)


def check_uploaded(expected: History, project: str, entity: str | None, run_id: str) -> None:
    """Raise Unsent unless the server says, within a few seconds, that it has the expected steps."""
    deadline = time.monotonic() + _CONFIRM_TIMEOUT
    while True:
        try:
            uploaded = uploaded_history(project, entity, run_id)
        except Exception as error:
            raise Unsent(f"its server does not say which steps it has: {error}") from None
        if uploaded.includes(expected):
            return
        if time.monotonic() > deadline:
            missing = f"{uploaded.steps} steps up to step {uploaded.last}"
            raise Unsent(f"its server has {missing}, not {expected.steps} up to step {expected.last}")
        time.sleep(_CONFIRM_POLL)


def log_missing(
    rows: Iterable[Row], run: RunConfig, layout: Layout, directory: RunDir, temporary: Path
) -> None:
    """Log the rows that no earlier W&B session has, in a new offline session."""
    known = known_steps(fragments(directory.path, directory.run_id))
    missing = (row for row in rows if int(row["step"]) not in known)
    if (first := next(missing, None)) is not None:
        session = open_session("offline", run, layout, directory, temporary, finish_timeout=0)
        for row in (first, *missing):
            session.log(row)
        session.finish(failed=False)
        leave_service()  # it may still be writing the file


def end_service() -> None:
    """Kill W&B's process and forget it.

    W&B's atexit hook, which leave_service removes, would wait for as long as the server does not answer.
    """
    with suppress(AttributeError):  # the process has not been started
        # Not wandb.setup(): a thread that waits for the process may hold its lock.
        service = wandb.sdk.wandb_setup._singleton._connection._proc  # type: ignore[union-attr]
        service._process.kill()  # type: ignore[union-attr]
    cleanup = threading.Thread(target=leave_service, daemon=True)
    cleanup.start()
    cleanup.join(_END_TIMEOUT)


def leave_service() -> None:
    """Wait for the end of W&B's process, so that nothing is left to do at exit."""
    with suppress(BaseException):  # W&B calls sys.exit with the exit code of its process
        wandb.teardown()


def _init(mode: str, run: RunConfig, layout: Layout, directory: RunDir, finish_timeout: float) -> Any:
    w = run.logging.wandb
    composed = config_as_dict(run)
    resolved = {
        "world_size": layout.world_size,
        "data": layout.data,
        "context": layout.context,
        "accumulation": layout.accumulation,
    }
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
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT,
            finish_timeout=finish_timeout,
            finish_timeout_raises=True,
        ),
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
