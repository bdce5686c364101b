"""W&B: one run for all starts, with the composed config; offline files; a server that does not answer."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import WandbMode
from launcher.launch.scratch import remove_abandoned
from launcher.runtime.metrics import upload, wandb_files
from launcher.runtime.metrics.upload import complete, is_complete
from launcher.runtime.metrics.wandb_files import (
    drop_steps_from,
    fragments,
    is_sent,
    mark_as_sent,
    records,
    steps_in,
)
from launcher.runtime.metrics.wandb_run import resolved_mode
from launcher.runtime.run_dir import RunDir
from tests.config.composing import run_of
from tests.forked_commands import LAUNCHER, ROOT, environment, heavy
from tests.runtime.command import SMALL, launcher, metrics, started, trained
from tests.runtime.wandb_server import refuse, wandb_server

# What happens once W&B has step 3.
AFTER_STEP_3 = """
import os, signal, time
import launcher.runtime.training as train
from launcher.runtime.metrics.wandb_files import steps_in
from pathlib import Path
step = train.optimizer_step
def faulty(run, engine, loader, progress):
    if progress.step == 3:
        while steps_in(next(Path("r").glob("wandb/*run-2*/*.wandb"))) != [1, 2, 3]:
            time.sleep(0.05)
        {fault}
    return step(run, engine, loader, progress)
train.optimizer_step = faulty
from launcher.__main__ import main
main()
"""
KILLED = AFTER_STEP_3.format(fault="os.killpg(0, signal.SIGKILL)")
WITHOUT_SERVICE = AFTER_STEP_3.format(fault="os.system('pkill -TERM -P %d' % os.getpid()); time.sleep(1)")


def wandb_rows(run_dir: Path) -> list[dict[str, Any]]:
    """Return the history of all starts that is in W&B's files."""
    rows = []
    for fragment in fragments(run_dir, identity_of(run_dir)):
        for record in records(fragment):
            if record.HasField("history"):
                items = {
                    i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item
                }
                rows.append({k: v for k, v in items.items() if not k.startswith("_")})
    return rows


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    out = trained(
        "logging=wandb", "run.dir=r", "parallelism.data=2", "training.steps=3", "logging.wandb.project=tests",
        cwd=folder,
    )  # fmt: skip
    assert "W&B      " in out
    assert "offline" in out
    return folder / "r"


def test_the_history_equals_metrics_jsonl(logged: Path) -> None:
    assert wandb_rows(logged) == metrics(logged)


def test_the_run_has_the_composed_config_and_the_id_of_the_directory(logged: Path) -> None:
    [fragment] = fragments(logged, identity_of(logged))
    assert fragments(logged) == [fragment]
    run = next(record.run for record in records(fragment) if record.HasField("run"))
    assert run.run_id == json.loads((logged / "run.json").read_text())["id"]
    assert run.project == "tests"
    config = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert config["model"]["norm"] == "layer_norm"
    assert config["training"]["global_batch_size"] == 8
    assert config["layout"]["data"] == 2


@pytest.mark.slow
def test_logging_continues_offline_if_the_server_does_not_answer(tmp_path: Path) -> None:
    out = trained(
        "logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=1", cwd=tmp_path,
        WANDB_API_KEY="0" * 40, WANDB_BASE_URL="http://127.0.0.1:9",
    )  # fmt: skip
    assert "W&B is not reachable, logging offline" in out
    assert len(metrics(tmp_path / "r")) == 1


@pytest.mark.parametrize(
    ("mode", "environment", "expected"),
    [
        (WandbMode.auto, {}, "offline"),
        (WandbMode.auto, {"WANDB_API_KEY": "k"}, "online"),
        (WandbMode.auto, {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "disabled"),
        (WandbMode.offline, {"WANDB_API_KEY": "k"}, "offline"),
        (WandbMode.disabled, {"WANDB_MODE": "online"}, "disabled"),
    ],
)
def test_wandb_mode_is_resolved(
    mode: WandbMode,
    environment: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolved_mode(mode) == expected


def test_a_netrc_entry_counts_as_an_api_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine api.wandb.ai login user password key\n")
    netrc.chmod(0o600)
    assert resolved_mode(WandbMode.auto) == "online"


@pytest.mark.slow
def test_a_resumed_run_does_not_log_a_step_twice(tmp_path: Path) -> None:
    """The killed start trained beyond its last checkpoint, so the next start repeats those steps."""
    run = ["logging=wandb", "run.dir=r", "parallelism.data=1", "checkpoint.interval_steps=2"]
    run.append("checkpoint.asynchronous=false")
    started(*SMALL, *run, "training.steps=6", cwd=tmp_path, program=KILLED).wait()
    before = [row["step"] for row in wandb_rows(tmp_path / "r")]
    assert before == [1, 2, 3]
    trained(*run, "training.steps=6", cwd=tmp_path)
    assert [row["step"] for row in wandb_rows(tmp_path / "r")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_steps_that_are_taken_back_have_their_new_values_in_wandb(tmp_path: Path) -> None:
    """The user goes back to an older checkpoint with another learning rate; nothing was uploaded before."""
    run = ["logging=wandb", "run.dir=r", "parallelism.data=1", "checkpoint.keep_last=9"]
    run += ["checkpoint.interval_steps=3", "training.steps=8"]
    trained(*run, "training.stop_at=6", cwd=tmp_path)
    shutil.rmtree(tmp_path / "r" / "checkpoints" / "step-00000006")
    # This start takes the steps back and does not log to W&B; the next one logs them.
    trained(*run, "optimizer.lr=1e-5", "training.stop_at=5", "logging.wandb.mode=disabled", cwd=tmp_path)
    out = trained(*run, "optimizer.lr=1e-5", cwd=tmp_path)
    assert "W&B keeps" not in out
    assert wandb_rows(tmp_path / "r") == metrics(tmp_path / "r")
    with wandb_server() as server:
        done = launcher("sync", "r", cwd=tmp_path, **server.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.steps(identity_of(tmp_path / "r")) == list(range(1, 9))


def test_steps_are_dropped_from_files_with_records_of_any_length(logged: Path, tmp_path: Path) -> None:
    """Records that fill a block of the file to its last bytes, and records of several blocks."""
    copy = shutil.copytree(logged, tmp_path / "r")
    [fragment] = fragments(copy)
    [run] = [record for record in records(fragment) if record.HasField("run")]
    kept = [record.SerializeToString() for record in records(fragment)]
    for length in (*range(32_700, 32_780), 100_000):
        run.run.notes = "x" * length
        kept.insert(1, run.SerializeToString())
    wandb_files.write_records(fragment, kept)
    assert [record.SerializeToString() for record in records(fragment)] == kept
    drop_steps_from(2, [fragment])
    assert steps_in(fragment) == [1]
    assert len(list(records(fragment))) == len(kept) - 2
    mark = fragment.with_name(f"{fragment.name}.synced")
    mark.touch()  # by `wandb sync`: it may have sent a part
    drop_steps_from(1, [fragment])
    assert steps_in(fragment) == [1]


def cut_after_step_3(fragment: Path) -> None:
    whole = fragment.read_bytes()
    for cut in range(len(whole), 0, -7):
        fragment.write_bytes(whole[:cut])
        if len(steps_in(fragment)) == 3:
            break
    assert steps_in(fragment) == [1, 2, 3]


@pytest.mark.slow
def test_the_next_start_logs_the_steps_that_a_killed_start_lost(tmp_path: Path) -> None:
    """A node died before the end of W&B's file reached the disk. `launcher sync` logs the steps too."""
    run = ["logging=wandb", "run.dir=r", "parallelism.data=1"]
    trained(*run, "training.steps=9", "training.stop_at=6", cwd=tmp_path)
    [fragment] = fragments(tmp_path / "r", identity_of(tmp_path / "r"))
    cut_after_step_3(fragment)
    shutil.copytree(tmp_path / "r", tmp_path / "ended")
    trained(*run, "training.steps=9", cwd=tmp_path)
    assert wandb_rows(tmp_path / "r") == metrics(tmp_path / "r")
    assert [row["step"] for row in metrics(tmp_path / "r")] == list(range(1, 10))

    for _ in range(2):
        complete(tmp_path / "ended", tmp_path)
    assert wandb_rows(tmp_path / "ended") == metrics(tmp_path / "ended")
    assert len(metrics(tmp_path / "ended")) == 6


def test_a_file_that_is_still_written_is_not_uploaded(tmp_path: Path) -> None:
    fragment = tmp_path / "run-x.wandb"
    fragment.write_bytes(b":W&B\xe1\xbe\x00")
    now = fragment.stat().st_mtime
    assert not is_complete(fragment, now + 60, held=None)
    assert is_complete(fragment, now + 600, held=None)
    assert not is_complete(fragment, now + 600, held=True)
    assert is_complete(fragment, now, held=False)


def test_only_a_mark_of_ours_says_that_the_server_has_a_file(tmp_path: Path) -> None:
    fragment, mark = tmp_path / "run-x.wandb", tmp_path / "run-x.wandb.synced"
    assert not is_sent(fragment)
    mark.touch()  # as `wandb sync` does, whatever its server answered
    assert not is_sent(fragment)
    mark_as_sent([fragment])
    assert is_sent(fragment)


@pytest.mark.slow
def test_training_continues_if_the_process_of_wandb_is_killed(tmp_path: Path) -> None:
    """Slurm sends SIGTERM to all processes of a job. The next start logs the missing steps."""
    run = ["logging=wandb", "run.dir=r", "parallelism.data=1"]
    steps = ["training.steps=8", "training.stop_at=5"]
    process = started(*SMALL, *run, *steps, cwd=tmp_path, program=WITHOUT_SERVICE)
    out, error = process.communicate()
    assert process.returncode == 0, out + error
    assert out.count("note     W&B has ended (") == 1
    assert error == ""
    assert len(metrics(tmp_path / "r")) == 5
    assert [row["step"] for row in wandb_rows(tmp_path / "r")] == [1, 2, 3]
    trained(*run, "training.steps=8", cwd=tmp_path)
    assert wandb_rows(tmp_path / "r") == metrics(tmp_path / "r")


def test_a_wandb_sync_that_a_signal_ended_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "records", lambda path: iter("x"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -9))
    assert upload._upload_files([tmp_path / "x"], [tmp_path / "x"], run_of(), RunDir(tmp_path, "abc")) == 1


def identity_of(run_dir: Path) -> str:
    return str(json.loads((run_dir / "run.json").read_text())["id"])


def test_sync_names_a_server_that_does_not_answer(tmp_path: Path) -> None:
    trained("logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=1", cwd=tmp_path)
    nowhere = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    done = launcher("sync", "r", cwd=tmp_path, **nowhere)
    assert done.returncode == 2
    assert "the W&B server http://127.0.0.1:9 does not answer: " in done.stderr
    assert "refused" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_offline_and_online_starts_are_one_run_on_the_server(tmp_path: Path) -> None:
    """Two offline starts are uploaded together; then an online start repeats two of their steps."""
    run = ["logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=9"]
    trained(*run, "training.stop_at=3", cwd=tmp_path)
    trained(*run, "training.stop_at=6", "checkpoint.keep_last=9", cwd=tmp_path)
    with wandb_server() as server:
        done = launcher("sync", "r", cwd=tmp_path, **server.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        name = identity_of(tmp_path / "r")
        assert server.steps(name) == [1, 2, 3, 4, 5, 6]
        again = launcher("sync", "r", cwd=tmp_path, **server.environment)
        assert again.stdout == "r: all W&B files are uploaded\n"

        shutil.rmtree(tmp_path / "r" / "checkpoints" / "step-00000006")
        done = launcher(*SMALL, *run, cwd=tmp_path, **server.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"W&B      {server.url}/me/launcher/runs/{name}" in done.stdout
        assert "WARNING" not in done.stderr
        assert [row["step"] for row in metrics(tmp_path / "r")] == list(range(1, 10))
        assert server.steps(name) == list(range(1, 10))


@pytest.mark.slow
def test_an_evaluation_is_in_the_summary_of_the_run(tmp_path: Path) -> None:
    """It adds no step, and `launcher sync` sends it with the steps."""
    trained("logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=3", cwd=tmp_path)
    done = launcher("evaluate", "run.dir=r", "limit=2", "report=e.json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(offline: " in done.stdout
    name = identity_of(tmp_path / "r")
    summaries = {
        update.key or "/".join(update.nested_key): json.loads(update.value_json)
        for fragment in fragments(tmp_path / "r", name)
        for record in records(fragment)
        if record.HasField("summary")
        for update in record.summary.update
    }
    values = json.loads((tmp_path / "e.json").read_text())["data"]["validation"]
    assert {key: summaries[f"evaluate/validation/{key}"] for key in values} == values
    assert [row["step"] for row in wandb_rows(tmp_path / "r")] == [1, 2, 3]
    with wandb_server() as server:
        done = launcher("sync", "r", cwd=tmp_path, **server.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.steps(name) == [1, 2, 3]


@pytest.mark.slow
def test_sync_says_all_is_uploaded_only_if_the_server_confirms_it(tmp_path: Path) -> None:
    """The server accepts what `wandb sync` sends, and keeps nothing of it."""
    trained("logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=3", cwd=tmp_path)
    with wandb_server() as server:
        server.forgetful = True
        done = launcher("sync", "r", cwd=tmp_path, **server.environment)
        assert done.returncode == 1
        assert "its server has 0 steps up to step 0, not 3 up to step 3; all rows stay in r" in done.stderr
        server.forgetful = False
        done = launcher("sync", "r", cwd=tmp_path, **server.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.steps(identity_of(tmp_path / "r")) == [1, 2, 3]
        server.fault = refuse(500)  # the mark makes a question needless
        again = launcher("sync", "r", cwd=tmp_path, **server.environment)
        assert again.stdout == "r: all W&B files are uploaded\n"


@pytest.mark.slow
def test_steps_that_the_server_has_already_are_not_sent_again(tmp_path: Path) -> None:
    """The user, or a `launcher sync` that was killed, has sent an offline file."""
    trained("logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=3", cwd=tmp_path)
    with wandb_server() as server:
        name = identity_of(tmp_path / "r")
        for _ in range(2):
            done = launcher("sync", "r", cwd=tmp_path, **server.environment)
            assert done.returncode == 0, done.stdout + done.stderr
            assert server.steps(name) == [1, 2, 3]
            for fragment in fragments(tmp_path / "r", name):
                fragment.with_name(f"{fragment.name}.synced").write_text("")


@pytest.mark.slow
def test_a_run_whose_server_lost_rows_says_so_and_sync_sends_them(tmp_path: Path) -> None:
    with wandb_server() as server:
        server.forgetful = True
        run = ["logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=3"]
        out = trained(*run, cwd=tmp_path, **server.environment)
        assert "note     W&B has ended (its server has 0 steps up to step 0, not 3 up to step 3)" in out
        assert "launcher sync" in out
        server.forgetful = False
        done = launcher("sync", "r", cwd=tmp_path, **server.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.steps(identity_of(tmp_path / "r")) == [1, 2, 3]


# W&B's process is killed after step 3, or all processes of the run but its launcher's.
SERVICE_KILLED = AFTER_STEP_3.format(
    fault="import wandb; wandb.sdk.wandb_setup._singleton._connection._proc._process.kill()"
)
RANK_KILLED = AFTER_STEP_3.format(fault="os.kill(os.getpid(), signal.SIGKILL)")


@pytest.mark.parametrize(
    ("program", "code"),
    [
        pytest.param(SERVICE_KILLED, 0, marks=pytest.mark.slow),
        pytest.param(RANK_KILLED, 1, marks=pytest.mark.slow),
        ("", 0),
    ],
)
def test_no_temporary_file_of_wandb_stays_behind(program: str, code: int, tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    process = heavy().start(
        [*SMALL, "logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=5"],
        cwd=tmp_path,
        environment=environment(TMPDIR=str(temporary)),
        program=f"import tempfile\ntempfile.tempdir = None\n{program or LAUNCHER}",
    )
    out, error = process.communicate()
    assert process.returncode == code, out + error
    assert [path for path in temporary.iterdir() if not path.name.startswith("torchinductor_")] == []


LOG_KILLED = """
import os, signal, sys
from pathlib import Path
from launcher.config.layout import Layout
from launcher.runtime.metrics.log import MetricsLog
from launcher.runtime.run_dir import RunDir
from tests.config.composing import composed
layout = Layout(pipeline=1, data=1, tensor=1, device="cpu", accumulation=1, zero_stage=0)
log = MetricsLog(composed("logging=wandb"), layout, RunDir(Path(sys.argv[1]), "abc123"), 1)
print(*os.listdir(os.environ["TMPDIR"]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_the_next_start_removes_what_the_import_of_wandb_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B makes directories when it is imported: here in a process that has not imported it yet."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    command = [sys.executable, "-c", LOG_KILLED, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(TMPDIR=str(temporary)), capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout.startswith("launcher-")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    remove_abandoned()
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_sync_uploads_a_killed_run_at_once(tmp_path: Path) -> None:
    """And nothing of it while it trains."""
    run = [*SMALL, "logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=6"]
    waiting = AFTER_STEP_3.format(fault="Path('reached').touch(); time.sleep(600)")
    process = started(*run, cwd=tmp_path, program=waiting)
    while not (tmp_path / "reached").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    with wandb_server() as server:
        early = launcher("sync", "r", cwd=tmp_path, **server.environment)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert (early.returncode, early.stdout.count("the run is still writing it")) == (0, 1)
        assert server.history == {}
        done = launcher("sync", "r", cwd=tmp_path, **server.environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert server.steps(identity_of(tmp_path / "r")) == [1, 2, 3]


@pytest.mark.slow
def test_an_online_start_uploads_the_steps_of_offline_starts(tmp_path: Path) -> None:
    """The run began offline, and its files were not uploaded."""
    run = ["logging=wandb", "run.dir=r", "parallelism.data=1", "training.steps=6"]
    trained(*run, "training.stop_at=3", cwd=tmp_path)
    with wandb_server() as server:
        trained(*run, cwd=tmp_path, **server.environment)
        assert server.steps(identity_of(tmp_path / "r")) == [1, 2, 3, 4, 5, 6]
