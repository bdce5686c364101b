"""The rank that the other ranks wait for is named in every logged row, and once in a warning if it lasts."""

import socket
from pathlib import Path
from statistics import median, mode

import pytest

from launcher.runtime.slow_rank import SlowRankWatch, slowest
from tests.runtime.command import SMALL, metrics, started

HOSTS = ["node1", "node1", "node2", "node2"]
FAST, SLOW = [0.10, 0.11, 0.10, 0.10], [0.10, 0.11, 0.30, 0.10]

# Rank 1 sleeps in its data or in its forward pass, from step 3 on.
DELAYED = """
import time
import launcher.runtime.training as train
step, delayed = train.optimizer_step, set()
def optimizer_step(run, engine, loader, progress):
    if progress.step == 2 and engine.mesh.rank == 1:
        {delay}
    return step(run, engine, loader, progress)
train.optimizer_step = optimizer_step
from launcher.__main__ import main
main()
"""
FORWARD = (
    "next(engine.module.parameters()); engine.module.register_forward_pre_hook(lambda *_: time.sleep(0.3))"
)
DATA = "read = loader.step; loader.step = lambda samples: (time.sleep(0.3), read(samples))[1]"


def warnings_of(watch: SlowRankWatch, rows: list[list[float]], seconds: float = 1.0) -> list[str]:
    return [line for row in rows for line in watch.after(row, seconds, 10)[1]]


def test_the_slowest_rank_is_compared_with_the_others() -> None:
    worst = slowest(SLOW)
    assert (worst.rank, worst.seconds, worst.others, round(worst.ratio, 9)) == (2, 0.30, 0.10, 3.0)
    row, _ = SlowRankWatch(HOSTS, [1] * 4, 60).after(SLOW, 0.31, 1)
    assert row == {"perf/slowest_rank": 2, "perf/slowest_over_median": pytest.approx(3.0)}
    assert SlowRankWatch(["node1"], [1], 60).after([0.1], 0.1, 1) == ({}, [])


def test_one_warning_while_it_lasts_and_another_after_a_recovery() -> None:
    watch = SlowRankWatch(HOSTS, [1] * 4, 60)
    said = warnings_of(watch, [FAST] * 5 + [SLOW] * 50)
    assert said == [
        "warning  the other ranks wait for rank 2 on node2: 0.3 s of work per step, 3.0 times the median of "
        "the other ranks (0.1 s), for 60 s now"
    ]
    assert warnings_of(watch, [FAST] * 2 + [SLOW] * 50) == []
    assert warnings_of(watch, [FAST] * 9) == ["note     rank 2 on node2 is no longer slow"]
    assert len(warnings_of(watch, [SLOW] * 50)) == 1


def test_no_warning_of_short_cheap_or_planned_differences() -> None:
    assert warnings_of(SlowRankWatch(HOSTS, [1] * 4, 60), [SLOW, SLOW], seconds=100) == []
    assert warnings_of(SlowRankWatch(HOSTS, [1] * 4, 60), [SLOW] * 50, seconds=4) == []
    tiny = [value / 100 for value in SLOW]
    assert warnings_of(SlowRankWatch(HOSTS, [1] * 4, 60), [tiny] * 100) == []
    assert warnings_of(SlowRankWatch(HOSTS, [1, 1, 3, 1], 60), [SLOW] * 100) == []


@pytest.mark.parametrize(
    ("layout", "delay"),
    [
        pytest.param("parallelism.data=2", FORWARD, marks=pytest.mark.slow),
        pytest.param("parallelism.data=2", DATA, marks=pytest.mark.slow),
        pytest.param("parallelism=tp2", FORWARD, marks=pytest.mark.slow),
        pytest.param("parallelism=pp2", FORWARD, marks=pytest.mark.slow),
        pytest.param("parallelism=pp2", DATA, marks=pytest.mark.slow),
        pytest.param("parallelism=zero3", FORWARD, marks=pytest.mark.slow),
    ],
)
def test_a_slow_rank_is_named(layout: str, delay: str, tmp_path: Path) -> None:
    options = ["run.dir=r", layout, "launch.slow_rank_seconds=2", "training.steps=16"]
    process = started(*SMALL, *options, cwd=tmp_path, program=DELAYED.format(delay=delay))
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    rows = metrics(tmp_path / "r")[3:-1]  # the last row validates
    # Most rows, not all: another program may take the cores in one step.
    assert mode(row["perf/slowest_rank"] for row in rows) == 1
    assert median(row["perf/slowest_over_median"] for row in rows) > 2
    said = [line for line in out.splitlines() if line.startswith("warning  the other ranks")]
    assert len(said) == 1
    assert said[0].startswith(f"warning  the other ranks wait for rank 1 on {socket.gethostname()}: ")
