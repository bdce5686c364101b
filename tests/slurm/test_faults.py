"""Under faults at random moments and a time limit, a run finishes, or stops with the reason."""

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoint.manifest import checkpoints_in
from launcher.runtime.metrics.upload import complete
from tests.runtime.command import metrics, trained
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import Job, before_each_step, logged_steps, processes_of, rows, submit

RUN = [
    "training.steps=400", "training.validation_interval=0", "training.micro_batch_size=1",
    "checkpoint.interval_steps=5",
]  # fmt: skip
LAST = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Return the metrics of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    trained(*RUN, f"training.stop_at={LAST}", "run.dir=r", "parallelism.data=4", cwd=folder)
    return rows(folder / "r")


def kill_a_rank(job: Job, chance: random.Random) -> None:
    os.kill(chance.choice(processes_of(job)), signal.SIGKILL)


def fail_a_node(job: Job, chance: random.Random) -> None:
    shown = job.cluster.run("squeue", "-h", "-j", job.number, "-o", "%N")
    job.cluster.fail(chance.choice(job.cluster.run("scontrol", "show", "hostnames", shown).split()))


def restart_the_controller(job: Job, chance: random.Random) -> None:
    job.cluster.restart_controller()


def stop_the_batch_script(job: Job, chance: random.Random) -> None:
    job.tell(f"--signal={chance.choice(['USR1', 'TERM'])}", "--batch")


def stop_the_ranks(job: Job, chance: random.Random) -> None:
    """Signal the job as a preemption does, without asking the batch script."""
    job.tell(f"--signal={chance.choice(['USR1', 'TERM'])}")


def cancel(job: Job, chance: random.Random) -> None:
    job.tell()


FAULTS = [
    kill_a_rank, fail_a_node, restart_the_controller, stop_the_batch_script, stop_the_ranks, cancel,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))  # each fault with both ways of starting ranks
def test_a_run_survives_random_faults(
    seed: int, whole: list[list[Any]], cluster: Cluster, tmp_path: Path
) -> None:
    chance = random.Random(seed)
    fault, tasks = FAULTS[seed % len(FAULTS)], ["per_node", "per_rank"][seed // len(FAULTS)]
    elastic = ["hardware.nodes=2", "slurm.nodes=1-2", f"slurm.tasks={tasks}", "logging=wandb"]
    job = submit(cluster, tmp_path, *RUN, f"training.stop_at={LAST}", *elastic)
    try:
        job.wait_for_step(chance.randint(1, LAST - 20))
        fault(job, chance)
        log = job.end("CANCELLED" if fault is cancel else "COMPLETED")
    finally:
        cluster.restore_all()
    wait_for(lambda: not processes_of(job), "no process is left", 30)
    found = rows(job.run_dir)
    if fault is cancel:
        assert "decides whether it starts again" in log
        [saved, *_] = checkpoints_in(job.run_dir)
        assert int(saved.name.removeprefix("step-")) == len(found) < LAST
    else:
        assert len(found) == LAST
    for one, other in zip(found, whole, strict=False):
        assert one[:2] == other[:2]
        assert one[2:4] == pytest.approx(other[2:4], rel=1e-4)
    complete(job.run_dir, tmp_path)  # as `launcher sync` does
    # W&B's process may still be writing when it has answered.
    wait_for(
        lambda: logged_steps(job.run_dir) == list(range(1, len(found) + 1)), "every step in W&B's files", 30
    )


@pytest.mark.slow
def test_a_run_finishes_under_a_time_limit_of_minutes(cluster: Cluster, tmp_path: Path) -> None:
    """Training takes longer than the limit of two minutes: Slurm signals the job, and it is requeued."""
    steps = 100
    run = [f"training.steps={steps}", "training.validation_interval=0", "logging=wandb"]
    trained(*run, "logging=local", "run.dir=whole", "parallelism.data=4", cwd=tmp_path)
    (tmp_path / "sitecustomize.py").write_text(before_each_step("import time; time.sleep(2)"))
    job = submit(
        cluster, tmp_path, *run, "slurm.time=2", "slurm.signal_seconds=20", "slurm.tasks=per_node",
        f"slurm.environment.PYTHONPATH={tmp_path}",
    )  # fmt: skip
    log = job.end("COMPLETED", seconds=1800)
    assert job.starts() >= 3
    assert log.count("stopped and requeued") == job.starts() - 1
    assert rows(job.run_dir) == rows(tmp_path / "whole")
    assert logged_steps(job.run_dir) == list(range(1, steps + 1))
    assert [row["train/samples"] for row in metrics(job.run_dir)] == [8 * n for n in range(1, steps + 1)]
