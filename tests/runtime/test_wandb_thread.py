"""W&B that does not start, hangs, dies or refuses never blocks or ends a run."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.config.layout import Layout
from launcher.config.schema import RunConfig
from launcher.runtime.metrics import wandb_thread
from launcher.runtime.metrics.log import MetricsLog
from launcher.runtime.metrics.rows import rows_in
from launcher.runtime.metrics.wandb_run import Unsent
from launcher.runtime.run_dir import RunDir
from tests.config.composing import composed


class FakeSession:
    """W&B as the thread sees it. `faults` are calls that happen in place of the method of their name."""

    last_known, is_online = -1, True

    def __init__(self, **faults: Callable[[], Any]) -> None:
        self.steps: list[int] = []
        self.faults = faults

    def log(self, row: dict[str, float]) -> None:
        self.faults.get("log", lambda: None)()
        self.steps.append(int(row["step"]))

    def finish(self, *, failed: bool) -> None:
        self.faults.get("finish", lambda: None)()

    def say_kept(self, first_step: int) -> None:
        self.faults.get("say_kept", lambda: None)()

    def where(self) -> str:
        return "there"


def hang() -> None:
    threading.Event().wait(60)


def exit_as_wandb_does() -> None:
    raise SystemExit(1)


def refuse() -> None:
    raise Unsent("its server refused rows")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("START_TIMEOUT", "FINISH_TIMEOUT", "_ANSWER_TIMEOUT"):
        monkeypatch.setattr(wandb_thread, name, 0.2)
    monkeypatch.setattr(wandb_thread, "_WAITING_ROWS", 5)
    for name in ("end_service", "leave_service"):
        monkeypatch.setattr(wandb_thread, name, lambda: None)


def log_of(
    open_session: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch, mode: str = "online"
) -> MetricsLog:
    monkeypatch.setattr(wandb_thread, "open_session", open_session)
    run: RunConfig = composed(f"logging.wandb.mode={mode}")
    layout = Layout(pipeline=1, data=1, tensor=1, device="cpu", accumulation=1, zero_stage=0)
    return MetricsLog(run, layout, RunDir(folder, "abc123"), 1)


@pytest.mark.parametrize(
    ("faults", "reason"),
    [
        ({"log": hang}, "does not answer"),
        ({"finish": hang}, "does not answer"),
        ({"finish": exit_as_wandb_does}, "has ended (1)"),
        ({"log": exit_as_wandb_does}, "has ended (1)"),
        ({"finish": refuse}, "has ended (its server refused rows)"),
    ],
)
def test_a_fault_after_the_start_is_one_note_and_no_wait(
    faults: dict[str, Callable[[], Any]], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = FakeSession(**faults)
    log = log_of(lambda *_: session, tmp_path, monkeypatch)
    begun = time.monotonic()
    for step in range(1, 4):
        log.write({"step": step})
    assert time.monotonic() - begun < 0.2
    log.close(failed=False)
    assert time.monotonic() - begun < 2.0
    [note] = log.new_notes()
    assert note.startswith(f"W&B {reason}")
    assert note.endswith(f"to upload the rest: launcher sync {tmp_path}")
    assert len(list(rows_in(tmp_path / "metrics.jsonl"))) == 3


def test_rows_are_not_kept_for_a_service_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession(log=hang)
    log = log_of(lambda *_: session, tmp_path, monkeypatch)
    begun = time.monotonic()
    for step in range(1, 101):
        log.write({"step": step})
    log.close(failed=False)
    assert time.monotonic() - begun < 1.0
    [note] = log.new_notes()
    assert note.startswith("W&B is 5 rows behind")
    assert len(list(rows_in(tmp_path / "metrics.jsonl"))) == 100


def test_a_start_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = log_of(lambda *_: hang(), tmp_path, monkeypatch)
    log.write({"step": 1})
    log.close(failed=False)
    [note] = log.new_notes()
    assert note.startswith("W&B did not start within 0 s")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_any_error_at_the_start_is_a_note(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("no user")

    log = log_of(fail, tmp_path, monkeypatch, mode)
    log.write({"step": 1})
    log.close(failed=False)
    [note] = log.new_notes()
    assert note.startswith("W&B cannot start ('no user')")
    assert log.where() is None


def test_a_server_that_does_not_answer_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = FakeSession()

    def opened(mode: str, *_: Any) -> FakeSession:
        if mode == "online":
            raise OSError("refused")
        return session

    log = log_of(opened, tmp_path, monkeypatch)
    log.write({"step": 1})
    log.close(failed=False)
    assert log.new_notes() == ["W&B is not reachable, logging offline: refused"]
    assert session.steps == [1]


def test_steps_that_are_repeated_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession()
    session.last_known = 6
    log = log_of(lambda *_: session, tmp_path, monkeypatch)
    log.close(failed=False)
    assert log.new_notes() == ["W&B keeps the earlier values of steps 1 to 6, which this start repeats"]
