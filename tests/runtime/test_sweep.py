"""A sweep ends with a table of its jobs and their last losses."""

from pathlib import Path

import pytest

from launcher.commands.sweep import differing, lowest
from launcher.runtime.run_state import RunState, State
from tests.runtime.command import SMALL, started, trained

SWEEP = ["--multirun", "parallelism.data=1", "training.steps=2", "scheduler.warmup_steps=0"]


@pytest.mark.slow
def test_a_sweep_ends_with_its_jobs(tmp_path: Path) -> None:
    for directory in (["run.dir=sweep"], []):
        out = trained(*SWEEP, "optimizer.lr=1e-3,1e-9", *directory, cwd=tmp_path)
        table = out.partition("sweep    the last losses of its jobs\n")[2].splitlines()
        assert table[0].split() == ["job", "overrides", "step", "loss", "validation", "state", "run"]
        assert [line.split()[:3] for line in table[1:3]] == [
            ["0", "optimizer.lr=0.001", "2/2"], ["1", "optimizer.lr=1e-09", "2/2"],
        ]  # fmt: skip
        assert all("finished" in line for line in table[1:3])
        assert table[3] == "lowest   validation loss: job 0"
        for line in table[1:3]:
            assert (tmp_path / line.split()[-1] / "metrics.jsonl").is_file()
    again = trained(*SWEEP, "optimizer.lr=1e-3,1e-9", "run.dir=sweep", cwd=tmp_path)
    assert again.count("nothing is left to train") == 2
    assert "lowest   validation loss: job 0" in again, "finished jobs are in the table, too"


def test_a_sweep_that_fails_shows_the_jobs_so_far(tmp_path: Path) -> None:
    program = """
import launcher.runtime.training as train
from launcher.__main__ import main
step = train.optimizer_step
def faulty(run, engine, loader, progress):
    if run.optimizer.lr == 0.5:
        raise ValueError("broken")
    return step(run, engine, loader, progress)
train.optimizer_step = faulty
main()
"""
    command = started(
        *SMALL, *SWEEP, "optimizer.lr=0.1,0.5,0.2", "run.dir=sweep", cwd=tmp_path, program=program
    )
    out, _ = command.communicate()
    assert command.returncode == 1
    table = out.partition("sweep    the last losses of its jobs\n")[2].splitlines()
    assert [line.split()[-2] for line in table[1:3]] == ["finished", "failed"]
    assert len(table) == 4


def test_overrides_that_differ_and_the_lowest_loss() -> None:
    assert differing([["a=1", "b=1"], ["a=1", "b=2"]]) == [["b=1"], ["b=2"]]
    runs = [
        RunState(Path("a"), State.finished, loss=1.0, validation_loss=3.0),
        RunState(Path("b"), State.finished, loss=2.0, validation_loss=2.0),
        RunState(Path("c"), State.failed, loss=float("nan"), validation_loss=float("nan")),
    ]
    assert lowest(runs) == ("validation loss", 1)
    assert lowest([*runs, RunState(Path("d"), State.failed)]) == ("loss", 0)
    assert lowest([RunState(Path("d"), State.failed)]) is None
