"""`launcher status` lists runs by their state, quickly, and whatever a directory holds."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from launcher.config.run_format import FORMAT
from launcher.launch.local import RankFailure
from launcher.runtime.hold import Holder, held, is_held
from launcher.runtime.run_state import RunState, State, read_run_state, runs_in
from tests.config.test_cli import launcher as light_launcher
from tests.runtime.command import SMALL, launcher, started, trained
from tests.runtime.test_life_cycle import FAULTY, wait_for_rows, wait_until
from tests.runtime.test_run_dir import holding


def a_run(path: Path, *, steps: int = 100, rows: int = 3) -> Path:
    """Write the files that a run has after some steps."""
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"id": "abc", "format": FORMAT, "layout": {}}))
    (path / "config.yaml").write_text(
        f"model:\n  steps: 7\ntraining:\n  steps: {steps}\n  stop_at: null\n  seed: 1\n"
    )
    lines = [
        {"step": step, "train/loss": 5 - step / 100, "perf/tokens_per_s": 1e4} for step in range(1, rows + 1)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def state_of(path: Path) -> RunState:
    return read_run_state(path, time.time())


def test_real_runs_that_finished_stopped_and_failed(tmp_path: Path) -> None:
    trained("training.steps=4", "training.validation_interval=2", "run.dir=runs/done", cwd=tmp_path)
    trained("training.steps=9", "training.stop_at=2", "checkpoint.enabled=false", "run.dir=runs/part",
            cwd=tmp_path)  # fmt: skip
    program = FAULTY.format(fault="raise ValueError('rank 1 is broken')")
    failed = started(*SMALL, "training.steps=5", "parallelism.data=2", "run.dir=runs/bad", cwd=tmp_path,
                     program=program)  # fmt: skip
    assert failed.wait() == 1
    [ended] = light_launcher(tmp_path, ["status"])
    assert (ended.code, ended.err, ended.heavy) == (0, "", [])
    assert ended.out.splitlines()[0] == "3 runs: 2 finished, 1 failed"
    lines = {line.split()[0]: line for line in ended.out.splitlines() if line.startswith("runs/")}
    assert list(lines) == ["runs/bad", "runs/part", "runs/done"], "the last changed run is the first"
    assert " 4/4 " in lines["runs/done"]
    assert " 2/9 " in lines["runs/part"]
    assert "rank 1 is broken" in lines["runs/bad"]
    state = state_of(tmp_path / "runs" / "done")
    assert state.loss is not None
    assert state.validation_loss is not None
    assert state.tokens_per_s is not None


def test_a_run_that_trains_and_one_that_was_killed(tmp_path: Path) -> None:
    first = started(*SMALL, "training.steps=100000", "run.dir=r", cwd=tmp_path)
    wait_for_rows(tmp_path / "r", 2, first)
    state = state_of(tmp_path / "r")
    assert (state.state, f"process {first.pid}" in state.detail) == (State.running, True)
    os.killpg(first.pid, signal.SIGTERM)
    first.wait()
    assert state_of(tmp_path / "r").state is State.stopped
    assert state_of(tmp_path / "r").detail == ""


def test_a_continued_run_that_was_killed_is_not_finished(tmp_path: Path) -> None:
    """Although the final weights of its earlier end are there."""
    trained("training.steps=2", "run.dir=r", cwd=tmp_path)
    assert state_of(tmp_path / "r").state is State.finished
    process = started(*SMALL, "training.steps=100000", "run.dir=r", cwd=tmp_path)
    wait_for_rows(tmp_path / "r", 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: is_held(tmp_path / "r") is False)  # the ranks hold the directory until they have ended
    state = state_of(tmp_path / "r")
    assert (state.state, "its end was not recorded" in state.detail) == (State.stopped, True)
    (tmp_path / "r" / "config.yaml").unlink()
    assert state_of(tmp_path / "r").state is State.finished, "the last step is not known"


def test_the_end_of_a_holder_is_its_state(tmp_path: Path, subtests: pytest.Subtests) -> None:
    ends: list[tuple[BaseException, State, str]] = [
        (KeyboardInterrupt(), State.stopped, ""),
        (SystemExit(143), State.stopped, ""),
        (RankFailure(3, 4, "was killed by SIGKILL\nmore"), State.failed, "rank 3 of 4 was killed by SIGKILL"),
        (ValueError("no\nsecond line"), State.failed, "ValueError: no"),
    ]
    for number, (error, state, detail) in enumerate(ends):
        with subtests.test(repr(error)):
            path = a_run(tmp_path / str(number))
            with pytest.raises(type(error)), held(path):
                raise error
            assert (state_of(path).state, state_of(path).detail) == (state, detail)
    process = holding(a_run(tmp_path / "killed"), 60.0, SLURM_JOB_ID="42")
    assert "job 42" in state_of(tmp_path / "killed").detail
    process.kill()
    process.communicate()
    assert "its end was not recorded" in state_of(tmp_path / "killed").detail


def test_a_failure_that_the_slurm_job_recorded_is_the_state(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    """The holder was killed too, or stopped by srun, before it could record the failure."""
    for end in (None, "stopped", "RankFailure: lost a rank"):
        with subtests.test(str(end)):
            path = a_run(tmp_path / str(end))
            holder = Holder("node1", 7, "42", "2026-01-01 00:00:00", end)
            (path / "holder.json").write_text(json.dumps(asdict(holder)))
            attempt = {"step": 3, "error": "rank 3 of 4 was killed by SIGKILL"}
            (path / "attempts.jsonl").write_text(json.dumps(attempt) + "\n")
            os.utime(path / "holder.json", (1e9, 1e9))
            assert (state_of(path).state, state_of(path).detail) == (State.failed, attempt["error"])
            os.utime(path / "attempts.jsonl", (9e8, 9e8))  # of a start before the last
            assert state_of(path).detail != attempt["error"]


def test_a_comparison_that_ended_is_finished(tmp_path: Path) -> None:
    path = a_run(tmp_path / "r")
    with held(path):
        pass
    assert state_of(path).state is State.stopped
    with (path / "metrics.jsonl").open("a") as rows:
        rows.write('{"step": 9, "loss/single": 1.5, "loss/tp2": 1.5}\n')
    assert state_of(path).state is State.finished


def test_a_hang_report_after_the_last_row(tmp_path: Path) -> None:
    path = a_run(tmp_path / "r")
    (path / "hang.txt").write_text("the run hangs: rank 1 did not arrive\nmore\n")
    os.utime(path / "metrics.jsonl", (1e9, 1e9))
    assert (state_of(path).state, state_of(path).detail) == (
        State.hung,
        "the run hangs: rank 1 did not arrive",
    )
    os.utime(path / "hang.txt", (9e8, 9e8))
    assert state_of(path).state is State.stopped, "the report is of an earlier start"


def spoiled_metrics(path: Path, content: bytes | None) -> None:
    (path / "metrics.jsonl").unlink()
    if content is None:
        (path / "metrics.jsonl").mkdir()
    else:
        (path / "metrics.jsonl").write_bytes(content)


def spoiled_config(path: Path) -> None:
    (path / "config.yaml").unlink()
    os.mkfifo(path / "config.yaml")


ODD: dict[str, Callable[[Path], object]] = {
    "run.json is damaged": lambda path: (path / "run.json").write_bytes(b"\xff\0{"),
    "run.json is of another format": lambda path: (path / "run.json").write_text('{"id": "a", "format": 9}'),
    "metrics.jsonl is a directory": lambda path: spoiled_metrics(path, None),
    "metrics.jsonl is binary": lambda path: spoiled_metrics(path, bytes(200_000)),
    "metrics.jsonl has words": lambda path: spoiled_metrics(path, b'{"step": 1, "train/loss": "x"}'),
    "metrics.jsonl has no loss": lambda path: spoiled_metrics(path, b'{"step": 1, "train/loss": null}'),
    "holder.json is a pipe": lambda path: os.mkfifo(path / "holder.json"),
    "config.yaml is a pipe": spoiled_config,
    "config.yaml is gone": lambda path: (path / "config.yaml").unlink(),
    "weights are a file": lambda path: (path / "weights").write_text("x"),
    "the name has a line break": lambda path: path.rename(path.with_name("a\n[red]b\x1b[1m")),
    "the name is no text": lambda path: path.rename(os.fsdecode(os.fsencode(path) + b"\xff")),
    "a loop of links": lambda path: (path.parent / "loop").symlink_to(path.parent),
}


def test_odd_directories_are_listed(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for number, (name, spoil) in enumerate(ODD.items()):
        with subtests.test(name):
            folder = tmp_path / str(number)
            spoil(a_run(folder / "r"))
            [ended] = light_launcher(tmp_path, ["status", str(folder)])
            assert (ended.code, ended.err) == (0, ""), ended.err
            assert ended.out.startswith("1 run: "), ended.out
            assert len(ended.out.splitlines()) == 3


def test_no_directory_is_refused_and_an_empty_one_is_said(tmp_path: Path) -> None:
    missing, empty = light_launcher(tmp_path, ["status"], ["status", "."])
    assert missing.code == 2
    assert missing.err.startswith("launcher: status=runs: there is no such directory\n  try: launcher status")
    assert (empty.code, empty.out) == (0, "no runs in .\n")


def test_hundreds_of_long_runs_take_seconds(tmp_path: Path) -> None:
    for number in range(5):
        a_run(tmp_path / f"sweep-{number}" / "0", rows=20_000)
        for copy in range(1, 60):
            run = a_run(tmp_path / f"sweep-{number}" / str(copy), rows=0)
            (run / "metrics.jsonl").unlink()
            (run / "metrics.jsonl").hardlink_to(tmp_path / f"sweep-{number}" / "0" / "metrics.jsonl")
    begin = time.process_time()
    states = [state_of(run) for run in runs_in(tmp_path)]
    assert time.process_time() - begin < 6
    assert [state.step for state in states] == 300 * [20_000]


def test_status_during_a_run_takes_no_lock_that_a_start_needs(tmp_path: Path) -> None:
    path = a_run(tmp_path / "r")
    state_of(path)
    with held(path) as (_, notes):
        assert notes == []
        assert state_of(path).state is State.running


def test_the_help_names_the_states(tmp_path: Path) -> None:
    done: subprocess.CompletedProcess[str] = launcher("status", "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "hung" in done.stdout
