"""A run whose replicas differ stops, names ranks and tensors, and saves nothing; equal replicas do not."""

import socket
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import checkpoints_in
from launcher.engine.replicas import Disagreement
from launcher.runtime.replica_check import report
from tests.runtime.command import SMALL, launcher, metrics, started, trained

# After step 3, on rank 1, `{flip}` runs with `parameters`, by logical name, and `states`, the optimizer's.
FLIPPING = """
import torch
import launcher.runtime.training as train
from launcher.parallel.sharding import logical_of
step = train.optimizer_step
def lowest_bit(tensor):
    tensor.detach().view(-1).view(torch.int32)[5] ^= 1
def flipping(run, engine, loader, progress):
    result = step(run, engine, loader, progress)
    if progress.step == 2 and engine.mesh.rank == 1:
        parameters = {{logical_of(p).name: p for p in engine.module.parameters()}}
        states = engine.optimizer.state
        {flip}
    return result
train.optimizer_step = flipping
from launcher.__main__ import main
main()
"""
WEIGHT = 'lowest_bit(parameters["blocks.0.mlp.up.weight"])'
STATE = 'lowest_bit(states[parameters["blocks.1.attention.qkv.bias"]]["exp_avg_sq"])'
TIED = 'lowest_bit(parameters["embedding.weight"])'
RUN = ["run.dir=r", "training.steps=5", "checkpoint.interval_steps=1", "checkpoint.keep_last=9"]
HOST = socket.gethostname()


def stopped_run(folder: Path, flip: str, *arguments: str) -> str:
    """Return the standard error of a run that must stop."""
    process = started(*SMALL, *arguments, cwd=folder, program=FLIPPING.format(flip=flip))
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1, out + error
    assert "Traceback" not in error
    return error


def saved_steps(folder: Path) -> list[str]:
    return sorted(path.name for path in checkpoints_in(folder / "r"))


@pytest.mark.parametrize(
    ("layout", "flip", "name"),
    [
        ("dp parallelism.data=2", WEIGHT, "blocks.0.mlp.up.weight"),
        pytest.param(
            "dp parallelism.data=2", STATE, "blocks.1.attention.qkv.bias (exp_avg_sq)", marks=pytest.mark.slow
        ),
        pytest.param("pp2 parallelism.data=1", TIED, "embedding.weight", marks=pytest.mark.slow),
        pytest.param("zero2 parallelism.data=2", WEIGHT, "blocks.0.mlp.up.weight", marks=pytest.mark.slow),
    ],
)
def test_a_flipped_bit_is_not_saved_and_the_run_resumes(
    layout: str, flip: str, name: str, tmp_path: Path
) -> None:
    """The message and the checkpoint that it names; resuming gives the rows of a run without the fault."""
    arguments = [*RUN, *f"parallelism={layout}".split()]
    error = stopped_run(tmp_path, flip, *arguments)
    assert error == (
        f"launcher: rank 0 of 2 stopped the run: the replicas of {name} differ after step 3:\n"
        f"  {name}: ranks 0 on {HOST}, 1 on {HOST} differ\n"
        "  Replicas must be equal bit for bit. The usual cause is a bit flipped in memory or in transit.\n"
        f"  try: the same command with run.dir={tmp_path}/r checkpoint.resume=auto (it resumes from "
        "step-00000002, whose replicas were equal)\n"
    )
    assert saved_steps(tmp_path) == ["step-00000001", "step-00000002"]
    assert not (tmp_path / "r" / "weights").exists()
    out = trained(*arguments, "checkpoint.resume=auto", cwd=tmp_path)
    assert "step-00000002, at step 2" in out
    trained(*arguments, "run.dir=unharmed", cwd=tmp_path)
    rows, unharmed = metrics(tmp_path / "r"), metrics(tmp_path / "unharmed")
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in unharmed]


def test_replicas_are_compared_between_logged_steps_and_without_checkpoints(tmp_path: Path) -> None:
    """The message names the one rank of four whose copy differs."""
    rare = ["guard.replica_interval=4", "logging.interval=1000", "training.validation_interval=0"]
    unsaved = ["run.dir=r", "parallelism.data=4", "checkpoint.enabled=false"]
    error = stopped_run(tmp_path, WEIGHT, *unsaved, *rare)
    name = "blocks.0.mlp.up.weight"
    assert f"the replicas of {name} differ after step 4" in error
    assert f"{name}: rank 1 on {HOST} differs from ranks 0 on {HOST}, 2 on {HOST}, 3 on {HOST}" in error
    assert "try: the same command with another run.dir (this run has no checkpoint)" in error


def test_the_last_step_is_compared_before_the_final_weights(tmp_path: Path) -> None:
    end = ["run.dir=r", "parallelism.data=2", "training.steps=3", "checkpoint.enabled=false"]
    assert "differ after step 3" in stopped_run(tmp_path, WEIGHT, *end)
    assert not (tmp_path / "r" / "weights").exists()


@pytest.mark.slow
def test_the_check_can_be_switched_off(tmp_path: Path) -> None:
    off = ["parallelism.data=2", "guard.replica_interval=0"]
    process = started(*SMALL, *RUN, *off, cwd=tmp_path, program=FLIPPING.format(flip=WEIGHT))
    assert process.wait() == 0, process.communicate()


CHAIN = [
    "dp parallelism.data=2",
    "tp2_pp2 parallelism.data=1",
    "zero3 parallelism.data=2 parallelism.tensor=2",
    "single",
    "tp2 parallelism.data=2 parallelism.sequence_parallel=true",
    "pp2 parallelism.data=2",
    "zero1 parallelism.data=2 precision=bf16",
    "zero2 parallelism.data=2 parallelism.tensor=2",
    "pp2 parallelism.data=1 parallelism.pipeline_schedule=dualpipev",
    "zero3_offload parallelism.data=2",
]


@pytest.mark.slow
def test_no_false_alarm_after_resuming_in_another_layout(tmp_path: Path) -> None:
    for number, layout in enumerate(CHAIN, 1):
        model = ["model.num_layers=4", "model.dropout=0.1"]
        steps = ["guard.replica_interval=1", "training.steps=100", f"training.stop_at={3 * number}"]
        in_layout = f"parallelism={layout}".split()
        done = launcher(*SMALL, "run.dir=r", *model, *steps, *in_layout, cwd=tmp_path)
        assert done.returncode == 0, (layout, done.stderr)


def test_a_long_list_is_shortened(tmp_path: Path) -> None:
    differing = [Disagreement(f"w{index}", {0: 1, 1: 2, 2: 1}) for index in range(30)]
    lines = report(7, differing, ["a", "b", "a"], None).splitlines()
    assert lines[0] == "the replicas of w0 and 29 more differ after step 7:"
    assert lines[1] == "  w0: rank 1 on b differs from ranks 0 on a, 2 on a"
    assert lines[9] == "  and 22 more"
