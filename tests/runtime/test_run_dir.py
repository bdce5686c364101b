"""The lock on a run directory, and when a run counts as finished."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.checkpoint.final import final_step
from launcher.checkpoint.manifest import checkpoints_in
from launcher.config.compose import load_typed
from launcher.config.errors import ConfigError
from launcher.config.layout import resolve_layout
from launcher.config.run_format import read_identity, write_identity
from launcher.config.schema import RunConfig
from launcher.config.world import World
from launcher.runtime import hold
from launcher.runtime.hold import HOLDER, held, is_held
from launcher.runtime.run_dir import claimed_run_dir, start_of
from launcher.runtime.training import to_resume
from tests.config.composing import composed_compare, run_of
from tests.runtime.command import SMALL, environment, launcher, metrics, started, trained
from tests.runtime.test_life_cycle import survivors, wait_for_rows

RUN = [*SMALL, "run.dir=r", "parallelism.data=2"]


def test_only_one_process_trains_a_run_at_a_time(tmp_path: Path) -> None:
    first = started(*RUN, "training.steps=100000", cwd=tmp_path)
    wait_for_rows(tmp_path / "r", 2, first)
    second = launcher(*RUN, "training.steps=100000", cwd=tmp_path)
    assert second.returncode == 2
    assert f"run.dir=r: process {first.pid} on " in second.stderr
    assert "Ctrl-C (it saves a checkpoint)" in second.stderr
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    done = launcher(*RUN, "training.stop_at=3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert survivors(tmp_path) == []


HOLD = "import sys, time; from launcher.runtime.hold import held; from pathlib import Path\n" \
    "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(float(sys.argv[2]))"  # fmt: skip


def holding(folder: Path, seconds: float, **extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HOLD, str(folder), str(seconds)]
    process = subprocess.Popen(command, env=environment(**extra), text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_start_waits_for_a_holder_that_is_about_to_end(tmp_path: Path) -> None:
    process = holding(tmp_path, 1.0)
    with held(tmp_path) as (_, notes):
        assert notes == []
        assert f'"process": {os.getpid()}' in (tmp_path / HOLDER).read_text()
    process.communicate()


def test_a_directory_is_held_as_long_as_its_holder_lives(tmp_path: Path) -> None:
    assert is_held(tmp_path) is False
    process = holding(tmp_path, 60.0)
    assert is_held(tmp_path) is True
    (tmp_path / HOLDER).unlink()
    assert is_held(tmp_path) is True
    process.kill()
    process.wait()
    assert is_held(tmp_path) is False


@pytest.mark.parametrize(("nothing_locks", "answer"), [(True, None), (False, True)])
def test_where_directories_have_no_locks_the_file_decides(
    nothing_locks: bool, answer: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, _: int) -> None:
        if nothing_locks or stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "no locks")
        raise BlockingIOError

    (tmp_path / HOLDER).touch()
    monkeypatch.setattr("fcntl.flock", flock)
    assert is_held(tmp_path) is answer


def test_the_refusal_names_the_slurm_job_that_holds_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "_PATIENCE", 0.1)
    process = holding(tmp_path, 60.0, SLURM_JOB_ID="42")
    with (
        pytest.raises(
            Exception, match=r"process \d+ on .* \(job 42, since .*\) is training this run\n.*scancel 42"
        ),
        held(tmp_path),
    ):
        pass
    process.kill()
    process.communicate()


def test_a_start_waits_longer_for_its_own_job_on_a_lost_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hold, "_PATIENCE", 0.0)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    process = holding(tmp_path, 1.0, SLURM_JOB_ID="42")
    with held(tmp_path) as (_, notes):
        assert notes == []
    process.communicate()
    assert capsys.readouterr().err.count("(job 42, since ") == 1


def test_a_deleted_lock_file_frees_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused start makes no holder.json either, which the holder would take for a takeover."""
    monkeypatch.setattr(hold, "_PATIENCE", 0.1)
    process = holding(tmp_path, 60.0)
    (tmp_path / HOLDER).unlink()
    with pytest.raises(ConfigError, match="another process is training this run"), held(tmp_path):
        pass
    assert not (tmp_path / HOLDER).exists()
    process.kill()
    process.communicate()


def test_a_held_directory_that_was_taken_away_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "r"
    with held(path) as (place, _):
        assert place.loss() is None
        (path / HOLDER).rename(path / "aside")
        assert place.loss() is None, "nobody has taken over"
        (path / HOLDER).touch()
        assert "was taken over by another process" in str(place.loss())
        (path / "aside").replace(path / HOLDER)
        assert place.loss() is None
        path.rename(tmp_path / "elsewhere")
        assert place.loss() == "was moved or deleted while the run trained"
        path.mkdir()
        assert place.loss() == "was replaced by another directory while the run trained"
    with held(tmp_path / "elsewhere"), held(path):
        pass


@pytest.mark.parametrize("saves", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_whose_directory_was_taken_away_stops_and_writes_nothing_there(
    saves: bool, tmp_path: Path
) -> None:
    run_dir, elsewhere = tmp_path / "r", tmp_path / "elsewhere"
    saving = ["checkpoint.interval_steps=20"] if saves else ["checkpoint.enabled=false"]
    process = started(*RUN, "training.steps=200", *saving, cwd=tmp_path)
    wait_for_rows(run_dir, 2, process)
    run_dir.rename(elsewhere)
    run_dir.mkdir()
    assert process.wait() == 2
    assert "run.dir=" in process.error()
    assert "was replaced by another directory while the run trained" in process.error()
    assert "Traceback" not in process.error()
    assert [path for path in run_dir.rglob("*") if path.is_file()] == []
    assert not (elsewhere / "weights").exists()


def test_a_stop_that_cannot_save_says_why(tmp_path: Path) -> None:
    process = started(*RUN, "training.steps=100000", cwd=tmp_path)
    wait_for_rows(tmp_path / "r", 2, process)
    (tmp_path / "r").rename(tmp_path / "elsewhere")
    process.send_signal(signal.SIGUSR1)
    assert process.wait() == 128 + signal.SIGUSR1
    assert "was moved or deleted while the run trained" in process.error()


FOREIGN = {
    "config.yaml": ("a: 1", "holds config.yaml"),
    "metrics.jsonl": ("{}", "holds metrics.jsonl"),
    "run.json": ('{"name": "mine"}', "run.json was not written by a run"),
    "holder.json": ("mine", "holds a holder.json that no run wrote"),
    "logs/mine.log": ("", "holds logs/ with files that no run wrote"),
    "weights/mine.bin": ("", "holds weights"),
    "checkpoints/mine": ("", "holds checkpoints"),
    "wandb/settings": ("", "holds wandb"),
    "profile/mine.json": ("", "holds profile"),
    "hang.txt": ("", "holds hang.txt"),
    "huggingface/config.json": ("{}", "holds huggingface"),
    "logs": ("", "logs is not a directory"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_directory_with_files_of_the_user_is_refused_and_not_changed(
    name: str, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    text, why = FOREIGN[name]
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    before = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "mine").rglob("*")}
    for run_dir, cwd in (("mine", tmp_path), (".", tmp_path / "mine")):
        with subtests.test(run_dir):
            run = run_of(f"run.dir={run_dir}")
            with pytest.MonkeyPatch.context() as here:
                here.chdir(cwd)
                with (
                    pytest.raises(ConfigError, match=why) as refused,
                    claimed_run_dir(run, resolve_layout(run, World("cpu", 1, 1))),
                ):
                    pass
            is_identity = name == "run.json"
            assert ("another run.dir" if is_identity else "mine-2, or leave") in refused.value.remedy
            assert {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "mine").rglob("*")} == before


@pytest.mark.parametrize(
    ("made", "other", "why"),
    [(run_of, composed_compare, "holds a training run"), (composed_compare, run_of, "holds a comparison")],
)
def test_training_and_comparisons_do_not_replace_each_other(
    made: Callable[[str], RunConfig], other: Callable[[str], RunConfig], why: str, tmp_path: Path
) -> None:
    directory, layout = f"run.dir={tmp_path}/r", resolve_layout(run_of(), World("cpu", 1, 1))
    with claimed_run_dir(made(directory), layout):
        pass
    before = {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "r").rglob("*")}
    with pytest.raises(ConfigError, match=why) as refused, claimed_run_dir(other(directory), layout):
        pass
    assert refused.value.remedy == f"{directory}-2, or leave run.dir out for a fresh one"
    assert {entry: entry.stat().st_mtime_ns for entry in (tmp_path / "r").rglob("*")} == before
    with claimed_run_dir(made(directory), layout) as (again, _):
        assert load_typed(again.path / "config.yaml", RunConfig).run.dir == f"{tmp_path}/r"


def test_a_file_for_a_directory_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(ConfigError, match=r"is a file, not a directory\n  try: run.dir=\S+file-2$"),
        claimed_run_dir(run_of(f"run.dir={tmp_path}/file"), resolve_layout(run_of(), World("cpu", 1, 1))),
    ):
        pass


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "run.json", "holder.json", "weights"])
def test_a_fifo_where_a_run_writes_is_refused(name: str, tmp_path: Path) -> None:
    run = run_of(f"run.dir={tmp_path}")
    layout = resolve_layout(run, World("cpu", 1, 1))
    with claimed_run_dir(run, layout):
        pass
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=f"{name} is "), claimed_run_dir(run, layout):
        pass


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(hold.fcntl, "flock", no_locks)
    with held(tmp_path) as (_, [note]):
        assert "does not support locks" in note


def test_a_run_of_another_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.json").write_text('{"id": "a1b2c3d4"}')
    (tmp_path / "r" / "config.yaml").write_text("model: {family: gpt}")
    for command in (["training.steps=1"], ["generate", 'prompt="a"']):
        done = launcher(*command, "run.dir=r", cwd=tmp_path)
        assert done.returncode == 2
        assert "run.dir=r: has format 1; this launcher reads format 2\n  try: a fresh run.dir" in done.stderr


@pytest.mark.parametrize("field", ["checkpoint.resume", "checkpoint.init_from"])
def test_a_refusal_makes_no_directory(field: str, tmp_path: Path) -> None:
    done = launcher(*RUN, f"{field}=nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert f"{field}=nowhere: " in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_a_run_killed_before_its_final_weights_resumes_and_writes_them(tmp_path: Path) -> None:
    """Final weights of an earlier end do not count, whatever layout wrote them."""
    trained(*RUN, "training.steps=6", "training.stop_at=3", cwd=tmp_path)
    assert final_step(tmp_path / "r") == 3
    weights = tmp_path / "r" / "weights"
    earlier = {path.name: path.read_bytes() for path in weights.iterdir()}
    trained(*SMALL, "run.dir=r", "parallelism=pp2", "training.steps=6", cwd=tmp_path)
    assert sorted(path.name for path in weights.iterdir()) == [
        "manifest.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    ]  # fmt: skip
    written = {path.name: path.read_bytes() for path in weights.iterdir()}
    # As it was left by a kill after the checkpoint of the last step: the earlier end's weights are whole.
    for name in written:
        (weights / name).unlink()
    for name, content in earlier.items():
        (weights / name).write_bytes(content)
    out = trained(*SMALL, "run.dir=r", "parallelism=pp2", "training.steps=6", cwd=tmp_path)
    assert "at step 6" in out
    assert {path.name: path.read_bytes() for path in weights.iterdir()} == written
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2, 3, 4, 5, 6]
    again = trained(*SMALL, "run.dir=r", "parallelism=pp2", "training.steps=6", cwd=tmp_path)
    assert again.splitlines()[-1] == "finished r is at step 6 of 6: nothing is left to train"


@pytest.mark.slow
def test_a_run_with_incomplete_final_weights_is_not_finished(tmp_path: Path) -> None:
    run = [*RUN, "training.steps=3", "checkpoint.enabled=false"]
    trained(*run, cwd=tmp_path)
    [file] = (tmp_path / "r" / "weights").glob("*.safetensors")
    file.rename(file.with_suffix(".partial"))
    assert final_step(tmp_path / "r") is None
    assert checkpoints_in(tmp_path / "r") == []
    trained(*run, cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "r" / "weights").iterdir()) == [
        "manifest.json",
        file.name,
    ]
    assert "nothing is left to train" in trained(*run, cwd=tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    trained(*RUN, "training.steps=2", cwd=folder)
    return folder


def test_another_model_is_refused_first(finished: Path) -> None:
    """Otherwise the refusal would be that no step is left, and its remedy would be refused next."""
    done = launcher(*RUN, "training.steps=2", "model.num_layers=3", cwd=finished)
    assert "model.num_layers=3: " in done.stderr


def refusal_to_start(run_dir: Path, *overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as refused:
        start_of(run_of(*RUN, "training.steps=4", *overrides), run_dir)
    return refused.value


def test_only_the_path_that_a_run_was_begun_from_continues_it(
    finished: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    for name in ("a", "other", "b"):
        shutil.copytree(finished / "r", tmp_path / name)
    from_a, from_other = (f"checkpoint.resume={tmp_path}/{name}" for name in ("a", "other"))
    identity = read_identity(tmp_path / "b")
    assert identity is not None
    write_identity(tmp_path / "b", identity | {"begun_from": str(tmp_path / "a")})
    own = tmp_path / "b" / "checkpoints" / "step-00000002"
    assert start_of(run_of(*RUN, "training.steps=4", from_a), tmp_path / "b") == own
    auto, new = "checkpoint.resume=auto (continues the run there) or ", f"run.dir={tmp_path}/b-2, or leave"
    for resume in (from_other, "checkpoint.resume=none"):
        with subtests.test(resume):
            error = refusal_to_start(tmp_path / "b", resume)
            assert error.why == f"already holds a run, which was begun from {tmp_path}/a"
            assert error.remedy.startswith(auto + new)
    with subtests.test("a run of an earlier version"):
        write_identity(tmp_path / "b", identity)
        error = refusal_to_start(tmp_path / "b", from_a)
        assert error.why == "already holds a run"
        assert error.remedy.startswith(auto + new)
    with subtests.test("the record was altered"):
        write_identity(tmp_path / "b", identity | {"begun_from": 3})
        assert refusal_to_start(tmp_path / "b", from_a).why == "run.json was altered"


def test_a_run_that_cannot_begin_again_is_refused(
    finished: Path, tmp_path: Path, subtests: pytest.Subtests
) -> None:
    shutil.copytree(finished / "r", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    shutil.rmtree(tmp_path / "b" / "weights")
    identity = read_identity(tmp_path / "b")
    assert identity is not None
    identity |= {"begun_from": str(finished / "r")}
    write_identity(tmp_path / "b", identity)
    with subtests.test("its own checkpoints were lost"):
        error = refusal_to_start(tmp_path / "b", f"checkpoint.resume={finished}/r")
        assert error.why.startswith("this run saved a checkpoint at step 2, and ")
    write_identity(tmp_path / "b", identity | {"saved_step": None, "begun_from": str(tmp_path / "gone")})
    for resume in ("checkpoint.resume=auto", f"checkpoint.resume={tmp_path}/gone"):
        with subtests.test(resume):
            error = refusal_to_start(tmp_path / "b", resume)
            source = f"{tmp_path}/gone"
            why = f"was begun from {source}, which holds no checkpoint now, and has saved none itself"
            assert error.why == f"{tmp_path}/b {why}"
            anew = f"checkpoint.resume=none run.dir={tmp_path}/b-2"
            assert error.remedy.startswith(f"restore {source} or {anew}")


def test_a_finished_run_is_not_submitted(finished: Path) -> None:
    on_nodes = ["hardware.accelerators_per_node=2", "training.steps=2", "submit.dry_run=true"]
    done = launcher("submit", *RUN, *on_nodes, cwd=finished)
    assert done.returncode == 2
    assert "no step is left to train" in done.stderr


@pytest.mark.parametrize(("resume", "added"), [("auto", ""), ("none", " checkpoint.resume=auto"), ("a", "")])
def test_a_stopped_run_names_the_settings_that_resume_it(resume: str, added: str) -> None:
    """The same command with checkpoint.resume=none would be refused: its directory holds a run."""
    assert to_resume(run_of(f"checkpoint.resume={resume}"), Path("runs/r")) == f"run.dir=runs/r{added}"
