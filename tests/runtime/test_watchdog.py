"""A run that hangs is ended, with the ranks named for which the others waited."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from launcher.engine.distributed import collectives_in_words
from launcher.engine.watchdog import RankPosition, report
from tests.runtime.command import SMALL, metrics, started
from tests.runtime.test_life_cycle import FAULTY, survivors, wait_for_rows

HOSTS = ["node1", "node1", "node2", "node2"]
HANGS = "import time; time.sleep(1000) if engine.mesh.rank == 1 else os.kill(os.getpid(), 19)"


LIMIT = "launch.timeout_minutes=30"
REDUCING = "all_reduce, called by global_norm (launcher/engine/flat.py:88)"


def waiting(rank: int, at: str = "step 7", collective: str = REDUCING) -> RankPosition:
    return RankPosition(rank, at, True, f"stack of {rank}\n", collective)


def test_ranks_in_another_call_are_reported_as_missing() -> None:
    standing = [waiting(0), waiting(1), waiting(3), RankPosition(2, "step 7", False, "  File sampler.py\n")]
    assert report(standing, HOSTS, LIMIT).splitlines() == [
        "the run hangs: rank 2 on node2 did not arrive (nothing has ended for launch.timeout_minutes=30)",
        f"at step 7, waiting for others in {REDUCING}: ranks 0 on node1, 1 on node1, 3 on node2",
        "at step 7: rank 2 on node2, in",
        "  File sampler.py",
    ]


def test_ranks_that_do_not_answer_are_reported_as_missing() -> None:
    told = report([waiting(0), waiting(1, "step 8", "")], HOSTS, "5 minutes").splitlines()
    assert told == [
        "the run hangs: ranks 2 on node2, 3 on node2 did not arrive (nothing has ended for 5 minutes)",
        f"at step 7, waiting for others in {REDUCING}: rank 0 on node1",
        "at step 8, waiting for others: rank 1 on node1",
        "no answer from ranks 2 on node2, 3 on node2: "
        "stopped, stuck in the kernel, or on a node that is gone",
    ]


def test_if_all_ranks_wait_their_stacks_are_shown() -> None:
    told = report([waiting(rank) for rank in range(4)], HOSTS, LIMIT)
    assert "the run hangs: all ranks wait" in told
    assert "ranks 2:\nstack of 2" in told


def test_a_long_list_of_ranks_is_shortened() -> None:
    hosts = [f"node{rank}" for rank in range(100)]
    assert "and 91 more did not arrive" in report([waiting(0)], hosts, LIMIT)


def test_a_hung_run_ends_and_names_the_ranks(tmp_path: Path) -> None:
    """One of four ranks sleeps, and a signal stops another, so that it cannot answer."""
    program = FAULTY.replace("rank == 1", "rank in (1, 2)").format(fault=HANGS)
    options = ["run.dir=r", "parallelism.data=4", "launch.timeout_minutes=0.2"]
    process = started(*SMALL, *options, cwd=tmp_path, program=program)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1, out + error
    host = socket.gethostname()
    assert f"launcher: the run hangs: ranks 1 on {host}, 2 on {host} did not arrive" in error
    assert re.search(
        r"at step 3, waiting for others in gloo:all_reduce of sizes \[\[26368\]\] in group \d+ "
        r"\(number \d+ of the group\): "
        rf"ranks 0 on {host}, 3 on {host}\n",
        error,
    ), error
    assert f"at step 3: rank 1 on {host}, in\n" in error
    assert "in faulty\n" in error
    assert f"no answer from rank 2 on {host}" in error
    assert "launcher: rank 0 of 4 exited with code 124" in error
    assert (tmp_path / "r" / "hang.txt").read_text() in error.replace("launcher: ", "", 1)
    assert survivors(tmp_path) == []


@pytest.mark.slow
def test_a_slow_step_is_not_a_hang(tmp_path: Path) -> None:
    """Each call ends within the limit, but their total exceeds it."""
    program = FAULTY.replace("progress.step == 2 and ", "").format(fault="import time; time.sleep(2)")
    options = ["run.dir=r", "parallelism.data=2", "launch.timeout_minutes=0.2", "training.steps=8"]
    process = started(*SMALL, *options, cwd=tmp_path, program=program)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    assert len(metrics(tmp_path / "r")) == 8


@pytest.mark.slow
def test_suspended_time_is_not_counted(tmp_path: Path) -> None:
    """Suspending a whole run, as with Ctrl-Z, is not a hang."""
    options = ["run.dir=r", "parallelism.data=2", "launch.timeout_minutes=0.2", "training.steps=100000"]
    process = started(*SMALL, *options, cwd=tmp_path)
    wait_for_rows(tmp_path / "r", 3, process)
    os.killpg(process.pid, signal.SIGSTOP)
    time.sleep(14)
    os.killpg(process.pid, signal.SIGCONT)
    reached = len(metrics(tmp_path / "r"))
    wait_for_rows(tmp_path / "r", reached + 5, process)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error


# Rank 1 sleeps for ever in a function of the ranks that a command starts.
STUCK = """
import sys, time
import torch.distributed as dist
import {module} as module
right = module.{function}
def stuck(*arguments, **options):
    if dist.get_rank() == 1:
        time.sleep(1000)
    return right(*arguments, **options)
module.{function} = stuck
{setting}
from launcher.__main__ import main
main()
"""
SHORT = """
import launcher.calibrate.rounds as rounds
rounds.MEASURING_MINUTES = 0.2
module.products = lambda dtype, device: []
module.elementwise = lambda device: []
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "module", "function", "setting", "said"),
    [
        (
            ["verify", *SMALL, "parallelism=tp2", "launch.timeout_minutes=0.1"],
            *("launcher.parity.recording", "recorded_step", ""),
            ["nothing has ended for 0.1 minutes", "at step 1, waiting for others in all_reduce, called by "],
        ),
        pytest.param(
            ["compare", *SMALL, "compare.layouts=[dp]", "compare.ranks=2", "launch.timeout_minutes=0.1"],
            *("launcher.compare.rank_record", "optimizer_step", ""),
            [
                "nothing has ended for launch.timeout_minutes=0.1",
                "at step 1, waiting for others in gloo:all_reduce of ",
            ],
        ),
        pytest.param(
            ["calibrate", "rounds=1", "most_ranks=2", "dir=mine"],
            *("launcher.calibrate.probes", "stream", SHORT),
            [
                "nothing has ended for 0.2 minutes",
                "at the probe of memory bandwidth: rank 1 on ",
                "at the probe of single operations, waiting for others in barrier, called by begin (",
            ],
        ),
    ],
    ids=["verify", "compare", "calibrate"],
)
def test_commands_that_start_ranks_end_hung_ranks_too(
    command: list[str], module: str, function: str, setting: str, said: list[str], tmp_path: Path
) -> None:
    program = STUCK.format(module=module, function=function, setting=setting)
    process = started(*command, cwd=tmp_path, program=program)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1, out + error
    assert f"the run hangs: rank 1 on {socket.gethostname()} did not arrive" in error
    for text in said:
        assert text in error
    # To verify a hang is a verdict; the other commands fail.
    assert ("FAILED: " if command[0] == "verify" else "exited with code 124") in out + error
    assert survivors(tmp_path) == []


def test_unfinished_collectives_are_read_from_the_flight_recorder() -> None:
    entry = {
        **{"profiling_name": "nccl:all_reduce", "input_sizes": [[4096]], "process_group": ["3", "undefined"]},
        **{"state": "started", "collective_seq_id": 57, "retired": False},
    }
    assert (
        collectives_in_words([{**entry, "retired": True}, *[entry] * 9])
        == ["nccl:all_reduce of sizes [[4096]] in group 3 (number 57 of the group)"] * 3
    )
