"""Running the same command again resumes the run."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.integrity import read_intact_manifest
from launcher.checkpoint.manifest import checkpoints_in
from launcher.checkpoint.sources import WeightsKind, weights_at
from tests.forked_commands import LAUNCHER, Command, heavy
from tests.runtime.command import SMALL, environment, launcher, metrics, started, trained
from tests.runtime.test_life_cycle import FAULTY

RUN = ["run.dir=r", "training.steps=6"]
COMPARED = ("train/loss", "train/grad_norm", "val/loss", "train/samples", "train/lr")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return the metrics of six uninterrupted steps on two ranks."""
    folder = tmp_path_factory.mktemp("whole")
    trained(*RUN, "parallelism.data=2", cwd=folder)
    return metrics(folder / "r")


def agree(rows: list[dict[str, Any]], expected: list[dict[str, Any]], relative: float) -> None:
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        # Where an earlier start ended, there is a validation more.
        for name in [name for name in COMPARED if name in other]:
            assert row[name] == pytest.approx(other[name], rel=relative, abs=0), (row["step"], name)


def test_resume_in_another_layout(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    trained(*RUN, "parallelism.data=2", "training.stop_at=2", cwd=tmp_path)
    identity = json.loads((tmp_path / "r" / "run.json").read_text())["id"]
    out = trained(*RUN, "parallelism=tp2", "parallelism.data=1", "training.stop_at=4", cwd=tmp_path)
    assert "resumed  " in out
    assert "step-00000002, at step 2" in out
    trained(*RUN, "parallelism=zero3", "parallelism.data=2", cwd=tmp_path)
    agree(metrics(tmp_path / "r"), whole, 1e-5)
    found = json.loads((tmp_path / "r" / "run.json").read_text())
    assert (found["id"], found["layout"]["zero_stage"]) == (identity, 3)
    kept = sorted(path.name for path in (tmp_path / "r" / "checkpoints").iterdir())
    assert kept == ["latest", "step-00000004", "step-00000006"]


# Draws no weight: a run that draws one ends with an exception.
WITHOUT_DRAWS = """
import launcher.parallel.initializer as initializer
initializer.draw_block = None
from launcher.__main__ import main
main()
"""


@pytest.mark.parametrize(
    "layout", [pytest.param(f"parallelism={name}", marks=pytest.mark.slow) for name in ("zero1", "zero3")]
)
def test_weights_that_are_read_from_files_are_not_drawn(layout: str, tmp_path: Path) -> None:
    """By a resumed run, by a run that begins with other weights, and by generate."""
    trained("run.dir=r", "training.steps=2", layout, "parallelism.data=2", "training.stop_at=1", cwd=tmp_path)
    for arguments in (
        [*SMALL, "run.dir=r", "training.steps=2", layout, "parallelism.data=2"],
        [*SMALL, "run.dir=s", "training.steps=1", layout, "parallelism.data=2", "checkpoint.init_from=r"],
        ["generate", "run.dir=r", "max_new_tokens=2"],
    ):
        command = started(*arguments, cwd=tmp_path, program=WITHOUT_DRAWS)
        _, error = command.communicate()
        assert command.returncode == 0, error
    new = started(*SMALL, "run.dir=t", "training.steps=1", cwd=tmp_path, program=WITHOUT_DRAWS)
    assert "NoneType" in new.communicate()[1]


def test_resume_after_a_kill_is_bitwise_equal(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    """SIGKILL every process at once, as a lost node does; resuming from the checkpoint is bitwise equal."""
    every_step = ["checkpoint.interval_steps=1"]
    process = started(*SMALL, *RUN, "parallelism.data=2", *every_step, cwd=tmp_path)
    latest = tmp_path / "r" / "checkpoints" / "latest"
    deadline = time.monotonic() + 90
    while not latest.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    trained(*RUN, "parallelism.data=2", *every_step, cwd=tmp_path)
    agree(metrics(tmp_path / "r"), whole, 0.0)
    assert not list((tmp_path / "r" / "checkpoints").glob("*.partial"))


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    trained(*RUN, "parallelism.data=2", "training.stop_at=2", "checkpoint.enabled=false", cwd=tmp_path)
    done = launcher(*SMALL, *RUN, "parallelism.data=2", cwd=tmp_path)
    assert done.returncode == 2, "it holds a run that ended as it was told to"
    shutil.rmtree(tmp_path / "r" / "weights")
    out = trained(*RUN, "parallelism.data=2", cwd=tmp_path)
    assert "note     an earlier start saved no checkpoint: the run begins again" in out
    agree(metrics(tmp_path / "r"), whole, 0.0)


def test_no_sample_is_skipped_or_repeated_with_another_batch_size(tmp_path: Path) -> None:
    trained(*RUN, "parallelism.data=1", "training.stop_at=2", cwd=tmp_path)
    trained(*RUN, "parallelism.data=1", "training.global_batch_size=12", cwd=tmp_path)
    assert [row["train/samples"] for row in metrics(tmp_path / "r")] == [8, 16, 28, 40, 52, 64]


def test_a_finished_run_has_nothing_left_and_another_config_is_refused(tmp_path: Path) -> None:
    """The layout may differ. Another learning rate would not be trained, so it is refused."""
    trained("run.dir=r", "training.steps=1", "parallelism.data=1", cwd=tmp_path)
    files = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "r").rglob("*") if path.name != "holder.json"
    }
    for layout in ("parallelism.data=1", "parallelism.data=2"):
        out = trained("run.dir=r", "training.steps=1", layout, cwd=tmp_path)
        assert out.splitlines()[-1] == "finished r is at step 1 of 1: nothing is left to train"
    assert {path: path.stat().st_mtime_ns for path in files} == files
    done = launcher(*SMALL, "run.dir=r", "training.steps=1", "optimizer.lr=0.5", cwd=tmp_path)
    assert done.returncode == 2
    assert "training.steps=1: " in done.stderr
    assert "no step is left to train" in done.stderr
    assert "training.steps=2 (or more)" in done.stderr
    # The weights say that the run is finished, even without its checkpoints; more steps need them.
    shutil.rmtree(tmp_path / "r" / "checkpoints")
    assert "nothing is left" in trained("run.dir=r", "training.steps=1", "parallelism.data=1", cwd=tmp_path)
    done = launcher(*SMALL, "run.dir=r", "training.steps=2", "parallelism.data=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "run.dir=r: this run saved a checkpoint at step 1, and r/checkpoints holds none" in done.stderr


@pytest.mark.parametrize("loss", ["deleted", "moved", "emptied", "incomplete", "a file"])
def test_missing_checkpoints_are_refused_and_the_rows_stay(loss: str, stopped: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(stopped, tmp_path / "r")
    folder = run_dir / "checkpoints"
    if loss == "emptied":
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    elif loss == "incomplete":
        (folder / "step-00000002").rename(folder / "step-00000002.partial")
    else:
        folder.rename(run_dir / "elsewhere")
    if loss == "deleted":
        shutil.rmtree(run_dir / "elsewhere")
    elif loss == "a file":
        folder.touch()
    done = launcher(*SMALL, *RUN, "parallelism.data=1", cwd=tmp_path)
    assert done.returncode == 2
    why = "checkpoints is not a directory" if loss == "a file" else "this run saved a checkpoint at step 2"
    assert f"run.dir=r: {why}" in done.stderr
    assert "run.dir=r-2" in done.stderr
    assert [row["step"] for row in metrics(run_dir)] == [1, 2]
    trained(*RUN, "parallelism.data=1", "run.dir=r-2", "checkpoint.resume=none", cwd=tmp_path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a run that was stopped after two of six steps, without its final weights."""
    folder = tmp_path_factory.mktemp("stopped")
    trained(*RUN, "parallelism.data=1", "training.stop_at=2", cwd=folder)
    shutil.rmtree(folder / "r" / "weights")
    return folder / "r"


FROM_A = ["run.dir=b", "training.steps=6", "parallelism.data=1", "checkpoint.resume=a"]


def test_the_command_that_begins_from_another_run_resumes_its_own_run(
    whole: list[dict[str, Any]], stopped: Path, tmp_path: Path
) -> None:
    """Also if the other run is gone by then."""
    shutil.copytree(stopped, tmp_path / "a")
    trained(*FROM_A, "training.stop_at=4", cwd=tmp_path)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["begun_from"] == str(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    out = trained(*FROM_A, cwd=tmp_path)
    assert "resumed  b/checkpoints/step-00000004, at step 4\n" in out
    agree(metrics(tmp_path / "b"), whole[2:], 1e-5)
    assert "nothing is left to train" in trained(*FROM_A, cwd=tmp_path)


@pytest.mark.parametrize("resume", ["checkpoint.resume=a", "checkpoint.resume=auto"])
def test_a_run_that_has_saved_nothing_begins_again_where_it_began(
    resume: str, stopped: Path, tmp_path: Path
) -> None:
    shutil.copytree(stopped, tmp_path / "a")
    trained(*FROM_A, "training.stop_at=4", "checkpoint.enabled=false", cwd=tmp_path)
    done = launcher(*SMALL, *FROM_A, resume, cwd=tmp_path)
    assert done.returncode == 2, "it has final weights, from which no run continues"
    assert "run.dir=b: already holds a run" in done.stderr
    shutil.rmtree(tmp_path / "b" / "weights")  # as after a kill
    out = trained(*FROM_A, resume, cwd=tmp_path)
    assert f"resumed  {tmp_path}/a/checkpoints/step-00000002, at step 2\n" in out
    assert "note     an earlier start saved no checkpoint: the run begins again" in out
    assert [row["step"] for row in metrics(tmp_path / "b")] == [3, 4, 5, 6]


def test_a_missing_newest_checkpoint_is_said(stopped: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(stopped, tmp_path / "r")
    trained(*RUN, "parallelism.data=1", "training.stop_at=4", cwd=tmp_path)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000004")
    out = trained(*RUN, "parallelism.data=1", cwd=tmp_path)
    assert "note     the checkpoint of step 4 is missing: the newest one is of step 2\n" in out


@pytest.mark.slow
def test_a_sweep_passes_over_finished_runs_and_resumes_an_interrupted_one(tmp_path: Path) -> None:
    sweep = ["--multirun", "optimizer.lr=0.1,0.2,0.3", "run.dir=r", "parallelism.data=1", "training.steps=2"]
    trained("optimizer.lr=0.1", "run.dir=r/0", "parallelism.data=1", "training.steps=2", cwd=tmp_path)
    one = ["optimizer.lr=0.2", "run.dir=r/1", "parallelism.data=1", "training.steps=2"]
    trained(*one, "training.stop_at=1", cwd=tmp_path)
    out = trained(*sweep, cwd=tmp_path)
    assert out.count("finished r/0 is at step 2 of 2: nothing is left to train\n") == 1
    assert out.count("step-00000001, at step 1\n") == 1
    assert [row["step"] for row in metrics(tmp_path / "r" / "2")] == [1, 2]
    again = trained(*sweep, cwd=tmp_path)
    assert again.count("nothing is left to train") == 3


def test_a_damaged_checkpoint_is_named_and_skipped_with_fallback(
    whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = [*RUN, "parallelism.data=2"]
    trained(*run, "training.stop_at=4", "checkpoint.interval_steps=2", cwd=tmp_path)
    file = tmp_path / "r" / "checkpoints" / "step-00000004" / "00001-000.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    done = launcher(*SMALL, *run, cwd=tmp_path)
    assert done.returncode == 2
    assert "step-00000004: 00001-000.safetensors is damaged" in done.stderr
    assert "checkpoint.fallback=true" in done.stderr
    assert "Traceback" not in done.stderr
    out = trained(*run, "checkpoint.fallback=true", cwd=tmp_path)
    assert "step-00000004 cannot be used: 00001-000.safetensors is damaged" in out
    assert "trying step-00000002 instead\n" in out
    assert "at step 2" in out
    agree(metrics(tmp_path / "r"), whole, 0.0)


def test_a_full_disk_ends_the_run_only_with_stop_on_error(tmp_path: Path) -> None:
    """A limit of 150 KiB per file acts like a full disk: the checkpoint files of a rank are larger."""

    def run(*more: str, kib: int = 150) -> subprocess.CompletedProcess[str]:
        arguments = [*SMALL, "training.steps=3", "parallelism.data=2", *more]
        return heavy().run(arguments, cwd=tmp_path, environment=environment(), largest_file=kib * 1024)

    goes_on = run("run.dir=on", "checkpoint.interval_steps=1")
    assert goes_on.returncode == 0, goes_on.stdout + goes_on.stderr
    assert "a checkpoint could not be written, those before it are intact" in goes_on.stdout
    assert "File too large" in goes_on.stdout
    assert len(metrics(tmp_path / "on")) == 3
    assert list((tmp_path / "on" / "checkpoints").iterdir()) == [], "it would fill the disk"
    ends = run("run.dir=off", "checkpoint.interval_steps=1", "checkpoint.stop_on_error=true")
    assert ends.returncode == 1
    assert "File too large" in ends.stderr
    no_weights = run("run.dir=last", kib=50)
    assert no_weights.returncode == 2
    assert "the final weights cannot be written: " in no_weights.stderr
    assert "Traceback" not in no_weights.stderr
    trained("training.steps=3", "parallelism.data=2", "run.dir=last", cwd=tmp_path)


def test_a_damaged_later_checkpoint_does_not_displace_the_new_ones(stopped: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(stopped, tmp_path / "r")
    run = [*RUN, "parallelism.data=2"]
    trained(*run, "training.stop_at=4", cwd=tmp_path)
    for file in (run_dir / "checkpoints" / "step-00000004").glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    program = FAULTY.replace("progress.step == 2", "progress.step == 3").format(
        fault="os.kill(os.getpid(), 9)"
    )
    one_kept = ["checkpoint.keep_last=1", "checkpoint.keep_best=false"]
    saves = ["checkpoint.fallback=true", "checkpoint.interval_steps=1", "checkpoint.asynchronous=false"]
    process = started(*SMALL, *run, *saves, *one_kept, cwd=tmp_path, program=program)
    assert process.wait() == 1, process.error()
    assert [path.name for path in checkpoints_in(run_dir)] == ["step-00000004", "step-00000003"]
    out = trained(*run, *saves, *one_kept, cwd=tmp_path)
    assert "trying step-00000003 instead\n" in out
    assert [path.name for path in checkpoints_in(run_dir)] == ["step-00000006"]


FAILING_SAVE = """
import launcher.checkpoint.save as save
write, count = save.write_pieces, 0
def failing(*arguments):
    global count
    count += 1
    if count == {failing}:
        raise RuntimeError("the disk is on fire")
    write(*arguments)
save.write_pieces = failing
"""


def test_an_exception_while_a_checkpoint_is_written_is_a_note(tmp_path: Path) -> None:
    """The run is not restarted for it, and the next checkpoint is written."""
    arguments = [
        *SMALL,
        "run.dir=r",
        "training.steps=3",
        "checkpoint.interval_steps=1",
        "launch.max_restarts=2",
    ]
    program = FAILING_SAVE.format(failing=2) + LAUNCHER
    done = heavy().run(arguments, cwd=tmp_path, environment=environment(), program=program)
    assert done.returncode == 0, done.stdout + done.stderr
    note = "a checkpoint could not be written, those before it are intact: RuntimeError: the disk is on fire"
    assert done.stdout.count(note) == 1
    assert "restart" not in done.stdout + done.stderr
    present = {path.name for path in (tmp_path / "r" / "checkpoints").iterdir()}
    assert "step-00000003" in present
    assert "step-00000002" not in present


def test_later_final_weights_count_instead_of_the_newest_checkpoint(tmp_path: Path) -> None:
    """As after a last save that failed: export, evaluate and checkpoint.init_from take the same weights."""
    arguments = [*SMALL, "run.dir=r", "training.steps=3", "checkpoint.interval_steps=1"]
    program = FAILING_SAVE.format(failing=3) + LAUNCHER
    done = heavy().run(arguments, cwd=tmp_path, environment=environment(), program=program)
    assert done.returncode == 0, done.stdout + done.stderr
    newest = checkpoints_in(tmp_path / "r")[0]
    assert newest.name == "step-00000002"
    weights = weights_at(tmp_path / "r", "x")
    assert (weights.path, weights.kind) == (tmp_path / "r", WeightsKind.run)
    assert weights_at(newest, "x").kind is WeightsKind.checkpoint, "as it was typed"
    out = trained("run.dir=b", "training.steps=1", "checkpoint.init_from=r", cwd=tmp_path)
    assert f"begun    {tmp_path}/r\n" in out


@pytest.mark.slow
def test_a_hundred_kills_lose_at_most_one_interval_each(tmp_path: Path) -> None:
    """SIGKILL all ranks or a single rank at a random moment of a run that saves after every step."""
    chance = random.Random(0)
    run = ["run.dir=r", "training.steps=100000", "parallelism.data=2", "checkpoint.interval_steps=1"]
    run.append("training.validation_interval=0")  # or the best is kept as well
    folder, kills = tmp_path / "r" / "checkpoints", {"all": 0, "one": 0}
    before = 0
    for _ in range(100):
        process = started(*SMALL, *run, cwd=tmp_path)
        wait_until_beyond(before + 1, folder, process)
        time.sleep(chance.uniform(0, 0.2))
        kind = chance.choice(list(kills))
        kills[kind] += 1
        if kind == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            os.kill(chance.choice(children_of(process.pid)), signal.SIGKILL)
        process.wait(timeout=60)
        newest = checkpoints_in(tmp_path / "r")[0]
        manifest = read_intact_manifest(newest)
        assert manifest.step > before
        # The step that was being saved, and the one behind which it was.
        assert metrics_of_a_killed_run(tmp_path / "r") - manifest.step <= 2
        before = manifest.step
    assert min(kills.values()) > 30
    trained(*run, f"training.stop_at={before + 2}", cwd=tmp_path)
    assert sorted(path.suffix for path in folder.iterdir()) == ["", "", ""]
    assert [row["step"] for row in metrics(tmp_path / "r")] == list(range(1, before + 3))


def wait_until_beyond(step: int, folder: Path, process: Command) -> None:
    deadline = time.monotonic() + 120
    while not (found := checkpoints_in(folder.parent)) or int(found[0].name.removeprefix("step-")) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children_of(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid,ppid"], text=True, capture_output=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()[1:]]
    return [pid for pid, its_parent in pairs if its_parent == parent]


def metrics_of_a_killed_run(run_dir: Path) -> int:
    """Return the last step that has a row."""
    text = (run_dir / "metrics.jsonl").read_text()
    return int(json.loads(text[: text.rindex("\n")].splitlines()[-1])["step"])
