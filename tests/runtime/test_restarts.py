"""A run starts again after a failed rank, from its last checkpoint, unless it fails alike three times."""

from pathlib import Path

import pytest

from launcher.config.validate import validate
from launcher.config.world import World
from launcher.launch.local import RankFailure
from launcher.runtime.restarts import Restarts, memory_advice
from launcher.runtime.run_dir import RunDir
from tests.config.composing import run_of
from tests.runtime.command import SMALL, launcher, metrics, started, trained
from tests.runtime.test_life_cycle import FAULTY, survivors

RUN = [
    "parallelism.data=2",
    "training.steps=6",
    "training.validation_interval=0",
    "checkpoint.interval_steps=2",
    "checkpoint.asynchronous=false",  # the checkpoint of step 2 is there when step 4 kills a rank
]
COMPARED = ("step", "train/samples", "train/loss", "train/grad_norm", "val/loss")


def rows_of(folder: Path) -> list[list[float | None]]:
    return [[row.get(name) for name in COMPARED] for row in metrics(folder)]


def test_a_killed_rank_starts_the_run_again_from_the_checkpoint(tmp_path: Path) -> None:
    trained(*RUN, "run.dir=whole", cwd=tmp_path)
    fault = "os.path.exists('killed') or (open('killed', 'w').close(), os.kill(os.getpid(), 9))"
    program = FAULTY.replace("progress.step == 2", "progress.step == 3").format(fault=fault)
    process = started(*SMALL, *RUN, "run.dir=r", "launch.max_restarts=2", cwd=tmp_path, program=program)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    reason = "rank 1 of 2 was killed by SIGKILL (perhaps out of memory; see dmesg)"
    assert error == f"launcher: restart 1 of 2 at step 3, from its last checkpoint: {reason}\n"
    assert rows_of(tmp_path / "r") == rows_of(tmp_path / "whole")
    assert out.count("run      ") == 1
    assert survivors(tmp_path) == []


def test_a_run_begun_from_another_starts_again_there_if_it_has_saved_nothing(tmp_path: Path) -> None:
    trained(*RUN, "run.dir=a", "training.stop_at=2", cwd=tmp_path)
    fault = "os.path.exists('killed') or (open('killed', 'w').close(), os.kill(os.getpid(), 9))"
    program = FAULTY.replace("progress.step == 2", "progress.step == 3").format(fault=fault)
    begins = ["run.dir=b", "checkpoint.resume=a", "checkpoint.interval_steps=null", "launch.max_restarts=1"]
    process = started(*SMALL, *RUN, *begins, cwd=tmp_path, program=program)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    source = f"from {tmp_path}/a/checkpoints/step-00000002"
    assert error.startswith(f"launcher: restart 1 of 1 at step 3, {source}: rank 1 of 2 was killed")
    assert [row["step"] for row in metrics(tmp_path / "b")] == [3, 4, 5, 6]


@pytest.mark.slow
def test_three_identical_failures_end_the_run(tmp_path: Path) -> None:
    program = FAULTY.format(fault='raise RuntimeError("disk on fire")')
    options = ["run.dir=r", "parallelism.data=2", "launch.max_restarts=9"]
    process = started(*SMALL, *options, cwd=tmp_path, program=program)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    reason = "rank 1 of 2 failed: RuntimeError: disk on fire"
    for attempt in (1, 2):
        assert (
            f"launcher: restart {attempt} of 9 at step 1, because it has no checkpoint: {reason}\n" in error
        )
    assert "restart 3" not in error
    assert "launcher: giving up after 3 identical failures after step 2\n" in error
    assert error.count("Traceback") == 3
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]
    assert survivors(tmp_path) == []


def failure_after(restarts: Restarts, directory: RunDir, failure: RankFailure) -> bool:
    """Return whether the failure ends the run."""
    try:
        restarts.directory_after(failure, directory)
    except RankFailure:
        return True
    return False


def test_different_failures_are_counted_and_a_stop_is_not_restarted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = RunDir(tmp_path, "id")
    allowed = run_of("hardware=cpu", "parallelism=single", "launch.max_restarts=2")
    restarts = Restarts(allowed)
    failures = [RankFailure(0, 2, f"exited with code {code}") for code in (3, 4, 5)]
    assert [failure_after(restarts, directory, failure) for failure in failures] == [False, False, True]
    assert "giving up after launch.max_restarts=2 restarts" in capsys.readouterr().err
    assert failure_after(Restarts(allowed), directory, RankFailure(0, 2, "failed:\nx", stopping=True))
    assert failure_after(Restarts(allowed), directory, RankFailure(0, 2, "stopped the run: x", halted=True))
    never = run_of("hardware=cpu", "parallelism=single")
    assert failure_after(Restarts(never), directory, failures[0])
    assert capsys.readouterr().err == ""


def test_a_run_that_a_guard_ends_is_not_restarted(tmp_path: Path) -> None:
    program = FAULTY.format(fault="next(iter(engine.module.parameters())).data.fill_(float('inf'))")
    options = ["run.dir=r", "parallelism.data=2", "launch.max_restarts=2", "guard.nonfinite=stop"]
    process = started(*SMALL, *options, cwd=tmp_path, program=program)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.startswith("launcher: rank 0 of 2 stopped the run: "), error
    assert "restart" not in error


def test_ranks_of_torchrun_do_not_restart_the_run(tmp_path: Path) -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    done = launcher(*SMALL, "launch.max_restarts=1", cwd=tmp_path, **environ, **address)
    assert done.returncode == 2
    assert "launch.max_restarts=1: one rank or node cannot start the others again" in done.stderr


def test_the_plan_says_what_needs_less_memory() -> None:
    run = run_of(
        "hardware=cpu", "parallelism.data=2", "training.micro_batch_size=8", "training.global_batch_size=16"
    )
    layout = validate(run, World("cpu", 2, 2))
    first, *_ = memory_advice(run, layout).split(" or ")
    assert first.startswith("training.micro_batch_size=4 (planned: ")
    assert " per rank instead of " in first
