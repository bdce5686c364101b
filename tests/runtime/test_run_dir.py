"""The lock on a run directory, and when a run counts as finished."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.checkpoint.final import final_step
from launcher.checkpoint.manifest import checkpoints_in
from launcher.runtime import hold
from launcher.runtime.hold import HOLDER, held
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
    with held(tmp_path) as notes:
        assert notes == []
        assert f'"process": {os.getpid()}' in (tmp_path / HOLDER).read_text()
    process.communicate()


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
    with held(tmp_path) as notes:
        assert notes == []
    process.communicate()
    assert capsys.readouterr().err.count("(job 42, since ") == 1


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(hold.fcntl, "flock", no_locks)
    with held(tmp_path) as [note]:
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


def test_a_run_killed_before_its_final_weights_resumes_and_writes_them(tmp_path: Path) -> None:
    """Final weights of an earlier end do not count, whatever layout wrote them."""
    trained(*RUN, "training.steps=6", "training.stop_at=3", cwd=tmp_path)
    assert final_step(tmp_path / "r") == 3
    weights = tmp_path / "r" / "weights"
    earlier = {path.name: path.read_bytes() for path in weights.iterdir()}
    trained(*SMALL, "run.dir=r", "parallelism=pp2", "training.steps=6", cwd=tmp_path)
    assert sorted(path.name for path in weights.iterdir()) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
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
    done = launcher(*SMALL, "run.dir=r", "parallelism=pp2", "training.steps=6", cwd=tmp_path)
    assert done.returncode == 2
    assert "no step is left to train" in done.stderr


@pytest.mark.slow
def test_a_run_with_incomplete_final_weights_is_not_finished(tmp_path: Path) -> None:
    run = [*RUN, "training.steps=3", "checkpoint.enabled=false"]
    trained(*run, cwd=tmp_path)
    [file] = (tmp_path / "r" / "weights").iterdir()
    file.rename(file.with_suffix(".partial"))
    assert final_step(tmp_path / "r") is None
    assert checkpoints_in(tmp_path / "r") == []
    trained(*run, cwd=tmp_path)
    assert [path.name for path in (tmp_path / "r" / "weights").iterdir()] == [file.name]
    assert "already holds a run" in launcher(*run, cwd=tmp_path).stderr


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    trained(*RUN, "training.steps=2", cwd=folder)
    return folder


def test_another_model_is_refused_first(finished: Path) -> None:
    """Otherwise the refusal would be that no step is left, and its remedy would be refused next."""
    done = launcher(*RUN, "training.steps=2", "model.num_layers=3", cwd=finished)
    assert "model.num_layers=3: " in done.stderr


def test_a_finished_run_is_not_submitted(finished: Path) -> None:
    on_nodes = ["hardware.accelerators_per_node=2", "training.steps=2", "submit.dry_run=true"]
    done = launcher("submit", *RUN, *on_nodes, cwd=finished)
    assert done.returncode == 2
    assert "no step is left to train" in done.stderr
