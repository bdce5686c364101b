"""A run that hangs: it ends, and says which ranks the others waited for."""

import os
import signal
import socket
import time
from pathlib import Path

import pytest

from launcher.runtime.watchdog import Standing, report
from tests.runtime.command import SMALL, metrics, started
from tests.runtime.test_life_cycle import FAULTY, survivors, wait_for_rows

HOSTS = ["node1", "node1", "node2", "node2"]
HANGS = "import time; time.sleep(1000) if engine.mesh.rank == 1 else os.kill(os.getpid(), 19)"


def waiting(rank: int, at: str = "step 7") -> Standing:
    return Standing(rank, at, True, f"stack of {rank}\n")


def test_the_ranks_that_are_elsewhere_did_not_arrive() -> None:
    standing = [waiting(0), waiting(1), waiting(3), Standing(2, "step 7", False, "  File sampler.py\n")]
    assert report(standing, HOSTS, 30).splitlines() == [
        "the run hangs: rank 2 on node2 did not arrive (nothing has ended for launch.timeout_minutes=30)",
        "at step 7, waiting for others: ranks 0 on node1, 1 on node1, 3 on node2",
        "at step 7: rank 2 on node2, in",
        "  File sampler.py",
    ]


def test_the_ranks_that_do_not_answer_did_not_arrive() -> None:
    told = report([waiting(0), waiting(1, "step 8")], HOSTS, 0.5).splitlines()
    assert told == [
        "the run hangs: ranks 2 on node2, 3 on node2 did not arrive "
        "(nothing has ended for launch.timeout_minutes=0.5)",
        "at step 7, waiting for others: rank 0 on node1",
        "at step 8, waiting for others: rank 1 on node1",
        "no answer from ranks 2 on node2, 3 on node2: "
        "stopped, stuck in the kernel, or on a node that is gone",
    ]


def test_where_all_wait_their_stacks_tell() -> None:
    told = report([waiting(rank) for rank in range(4)], HOSTS, 30)
    assert "the run hangs: all ranks wait" in told
    assert "ranks 2:\nstack of 2" in told


def test_many_ranks_are_not_all_named() -> None:
    hosts = [f"node{rank}" for rank in range(100)]
    assert "and 91 more did not arrive" in report([waiting(0)], hosts, 30)


def test_a_hung_run_ends_and_names_the_ranks(tmp_path: Path) -> None:
    """Of four ranks one sleeps and one is stopped, which therefore cannot tell."""
    program = FAULTY.replace("rank == 1", "rank in (1, 2)").format(fault=HANGS)
    options = ["run.dir=r", "parallelism.data=4", "launch.timeout_minutes=0.2"]
    process = started(*SMALL, *options, cwd=tmp_path, program=program)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 1, out + error
    host = socket.gethostname()
    assert f"launcher: the run hangs: ranks 1 on {host}, 2 on {host} did not arrive" in error
    assert f"at step 3, waiting for others: ranks 0 on {host}, 3 on {host}" in error
    assert f"at step 3: rank 1 on {host}, in\n" in error
    assert "in faulty\n" in error
    assert f"no answer from rank 2 on {host}" in error
    assert "launcher: rank 0 of 4 exited with code 124" in error
    assert (tmp_path / "r" / "hang.txt").read_text() in error.replace("launcher: ", "", 1)
    assert survivors(tmp_path) == []


@pytest.mark.slow
def test_a_slow_step_is_no_hang(tmp_path: Path) -> None:
    """Each of these ends within the time, all together do not."""
    program = FAULTY.replace("progress.step == 2 and ", "").format(fault="import time; time.sleep(2)")
    options = ["run.dir=r", "parallelism.data=2", "launch.timeout_minutes=0.2", "training.steps=8"]
    process = started(*SMALL, *options, cwd=tmp_path, program=program)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    assert len(metrics(tmp_path / "r")) == 8


@pytest.mark.slow
def test_the_clock_runs_only_while_it_watches(tmp_path: Path) -> None:
    """A run that is suspended as a whole, as by Ctrl-Z, is not hung because of it."""
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
