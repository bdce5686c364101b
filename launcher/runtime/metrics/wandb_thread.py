"""Logs to W&B from a thread, so that nothing W&B does, or fails to do, ends a run or keeps it waiting.

Rows wait in a queue that never blocks. Start and finish are bounded; when a bound is exceeded, W&B's process
is killed. Whatever the server lacks then is in metrics.jsonl: `launcher sync` or the next start sends it.
"""

import threading
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.runtime.metrics.rows import Row, rows_in
from launcher.runtime.metrics.wandb_files import drop_steps_from, fragments, mark_as_sent
from launcher.runtime.metrics.wandb_run import (
    WandbSession,
    end_service,
    leave_service,
    open_session,
    resolved_mode,
)
from launcher.runtime.run_dir import RunDir

START_TIMEOUT = 60.0  # seconds in which W&B must have started, online or else offline
FINISH_TIMEOUT = 30.0  # seconds in which W&B may send the rest at the end of a run
_ANSWER_TIMEOUT = 10.0  # seconds more for W&B to say that FINISH_TIMEOUT is over, or that the rows arrived
_LONGEST_REASON = 160  # characters
_WAITING_ROWS = 10_000  # W&B is given up when it is this far behind


class WandbThread:
    """The W&B run of this start, or nothing if W&B cannot be used. `notes` are for the user."""

    def __init__(
        self, run: RunConfig, layout: Layout, directory: RunDir, first_step: int, temporary: Path
    ) -> None:
        """Start W&B, and let it log the rows of metrics.jsonl that it lacks."""
        self.notes: list[str] = []
        self.where: str | None = None
        self._run, self._layout, self._directory, self._first_step = run, layout, directory, first_step
        self._temporary = temporary
        # The watchdog would call a longer wait a hang.
        patience = 60 * run.launch.timeout_minutes / 4
        start_timeout, self._finish_timeout = min(START_TIMEOUT, patience), min(FINISH_TIMEOUT, patience)
        self._earlier_bytes = directory.metrics.stat().st_size if directory.metrics.is_file() else 0
        self._rows: Queue[Row | None] = Queue(_WAITING_ROWS)
        self._failed = self._is_lost = False
        self._started, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._work, name="W&B", daemon=True).start()
        if not self._started.wait(start_timeout):
            self._give_up(f"did not start within {start_timeout:.0f} s")

    def log(self, row: Row | None) -> None:
        """Hand a row to the thread, None after the last; never blocks."""
        try:
            if not self._is_lost:
                self._rows.put_nowait(row)
        except Full:
            self._give_up(f"is {_WAITING_ROWS} rows behind")

    def close(self, *, failed: bool) -> None:
        """Let W&B send the rest, for a bounded time."""
        self._failed = failed
        self.log(None)
        if not self._is_lost and not self._ended.wait(self._finish_timeout + _ANSWER_TIMEOUT):
            self._give_up("does not answer")

    def _give_up(self, why: str) -> None:
        self._is_lost = True
        remedy = f"to upload the rest: launcher sync {self._directory.path}"
        self.notes.append(f"W&B {why}; metrics.jsonl is still written; {remedy}")
        end_service()

    def _work(self) -> None:
        try:
            if session := self._session():
                self._started.set()
                self._log_rows(session)
        except BaseException as error:  # W&B raises SystemExit too
            if not self._is_lost:
                verb = "has ended" if self._started.is_set() else "cannot start"
                self._give_up(f"{verb} ({_reason(error)})")
        finally:
            self._started.set()
            self._ended.set()

    def _session(self) -> WandbSession | None:
        """Start W&B online or offline as configured, or offline if its server does not answer."""
        with suppress(OSError):  # then W&B keeps the earlier values, which a note says
            drop_steps_from(self._first_step, fragments(self._directory.path, self._directory.run_id))
        mode = resolved_mode(self._run.logging.wandb.mode)
        if mode == "disabled":
            return None
        common = (self._run, self._layout, self._directory, self._temporary, self._finish_timeout)
        try:
            session = open_session(mode, *common)
        except Exception as error:
            if mode == "offline" or self._is_lost:
                raise
            end_service()  # it still holds the run's id
            session = open_session("offline", *common)
            self.notes.append(f"W&B is not reachable, logging offline: {_reason(error)}")
        self.where = session.where()
        return session

    def _log_rows(self, session: WandbSession) -> None:
        """Log the earlier rows, then those of this start; finish."""
        if session.last_known >= self._first_step:
            session.say_kept(self._first_step)
            steps = f"steps {self._first_step} to {session.last_known}"
            self.notes.append(f"W&B keeps the earlier values of {steps}, which this start repeats")
        for row in rows_in(self._directory.metrics, self._earlier_bytes):
            session.log(row)
        while (waiting := self._rows.get()) is not None:
            session.log(waiting)
        session.finish(failed=self._failed)
        leave_service()
        if session.is_online:
            mark_as_sent(fragments(self._directory.path, self._directory.run_id))


def _reason(error: BaseException) -> str:
    """Return the message of an error of W&B, which may have many lines."""
    return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
