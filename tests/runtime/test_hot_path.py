"""Between logged steps a run neither reads from the device nor communicates; a stop is still noticed."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import checkpoints_in, read_manifest
from launcher.runtime.saving import longest_wait, steps_within
from tests.config.composing import run_of
from tests.runtime.command import SMALL, started
from tests.runtime.test_life_cycle import survivors, wait_for_rows

# Counts the all-reduces and host reads of each step by the innermost frame of launcher or DeepSpeed.
COUNTED = """
import json, os, sys
import torch
from torch.utils._python_dispatch import TorchDispatchMode
import launcher.runtime.training as train

OPERATIONS = {
    "c10d.allreduce_.default": "all_reduce",
    "c10d.alltoall_base_.default": "all_reduce",  # of two ranks on a CPU
    "aten._local_scalar_dense.default": "read",
}
events, steps = [], [0]

def belongs(path):
    # allocations.py calls every operation of the measured step, the others each collective.
    passing = ("allocations.py", "stopwatch.py", "all_reduce.py")
    return {"launcher", "deepspeed"} & set(path) and path[-1] not in passing

def note(operation):
    frame = sys._getframe(2)
    while frame and not belongs(frame.f_code.co_filename.split(os.sep)):
        frame = frame.f_back
    events.append((steps[0], operation, frame.f_code.co_filename if frame else ""))

class Counting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if str(function) in OPERATIONS:
            note(OPERATIONS[str(function)])
        return function(*args, **(kwargs or {}))

right_list, right_step, right_loop = torch.Tensor.tolist, train.optimizer_step, train.training_loop

def tolist(self):
    note("read")
    return right_list(self)

def optimizer_step(run, engine, loader, progress):
    steps[0] = progress.step + 1
    return right_step(run, engine, loader, progress)

def counted(session, progress):
    with Counting():
        step = right_loop(session, progress)
    with open(f"rank-{session.engine.mesh.rank}.json", "w") as file:
        json.dump(events, file)
    return step

torch.Tensor.tolist, train.optimizer_step, train.training_loop = tolist, optimizer_step, counted
from launcher.__main__ import main
main()
"""
ENGINES_OWN = ("update_guard.py", "gradient_passes.py", "overlapped_reduction.py")
FAST = ["training.steps=20", "training.validation_interval=0", "checkpoint.stop_grace_seconds=600"]


def counts_by_step(folder: Path, *arguments: str) -> list[dict[int, Counter[str]]]:
    """Per rank: the all-reduces and reads of the launcher's code in each of 20 steps."""
    run = started(*SMALL, *FAST, "run.dir=r", *arguments, cwd=folder, program=COUNTED)
    assert run.wait() == 0, run.communicate()
    ranks = []
    for rank in range(2):
        counts: dict[int, Counter[str]] = {step: Counter() for step in range(1, 21)}
        for step, operation, file in json.loads((folder / f"rank-{rank}.json").read_text()):
            # The engine's own: it reduces gradients, and under ZeRO reads the norm of every step to decide.
            if "deepspeed" not in file.split(os.sep) and not file.endswith(ENGINES_OWN):
                counts[step][operation] += 1
        ranks.append(counts)
    return ranks


CHAT = [
    "parallelism=dp", "data=chat", "data.train=pkg://launcher/data/conversations.jsonl",
    "model.max_sequence_length=256",
]  # fmt: skip


@pytest.mark.parametrize(
    "settings", [["parallelism=dp"], CHAT, pytest.param(["parallelism=pp2"], marks=pytest.mark.slow)]
)
def test_nothing_synchronises_between_logged_steps(settings: list[str], tmp_path: Path) -> None:
    """Also with masked labels, whose number the host knows."""
    for counts in counts_by_step(tmp_path, *settings, "logging.interval=10"):
        # The first step is agreed upon too: nothing is known of the time of a step before.
        assert [step for step in counts if counts[step]] == [1, 10, 20]
        assert counts[1] == {"all_reduce": 1, "read": 1}
        assert counts[10] == {"all_reduce": 1, "read": 2}


def test_a_logged_step_has_one_all_reduce_and_two_reads(tmp_path: Path) -> None:
    for counts in counts_by_step(tmp_path, "parallelism=dp", "logging.interval=1"):
        # The last step validates as well.
        assert all(counts[step] == {"all_reduce": 1, "read": 2} for step in range(1, 20))


def test_a_stop_is_noticed_between_logged_steps(tmp_path: Path) -> None:
    run = [*SMALL, "run.dir=r", "parallelism.data=2", "checkpoint.stop_grace_seconds=20"]
    rare = ["logging.interval=1000000", "training.validation_interval=1000000", "training.steps=10000000"]
    process = started(*run, *rare, cwd=tmp_path)
    wait_for_rows(tmp_path / "r", 1, process)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    [saved] = checkpoints_in(tmp_path / "r")
    assert 1 < read_manifest(saved).step < 1000000
    assert survivors(tmp_path) == []


def test_ranks_agree_often_enough_for_a_stop() -> None:
    base = ["hardware=cpu", "parallelism=single", "checkpoint.interval_minutes=null"]
    assert longest_wait(run_of(*base, "checkpoint.stop_grace_seconds=60")) == 15
    assert longest_wait(run_of(*base, "checkpoint.stop_grace_seconds=null")) == float("inf")
    assert longest_wait(run_of(*base[:2], "checkpoint.interval_minutes=0.2")) == 3
    assert steps_within(15, 4.0) == 3
    assert steps_within(15, 100.0) == 1
    assert steps_within(15, 0.0) > 1e9
    assert steps_within(float("inf"), 1.0) == float("inf")
