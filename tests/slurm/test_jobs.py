"""Runs submitted to a real Slurm agree with a local run, through requeues, chains, faults and lost nodes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.checkpoint.manifest import checkpoints_in
from launcher.runtime.metrics.wandb_files import fragments
from tests.runtime.command import launcher, metrics, trained
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.jobs import (
    Job,
    before_each_step,
    command,
    identity_of,
    last_step,
    logged_steps,
    processes_of,
    rows,
    submit,
)

STEPS = ["training.steps=12", "training.validation_interval=6"]
PER_NODE = ["slurm.tasks=per_node"]
# Long enough to be stopped in, and without what takes time besides.
LONG = ["training.steps=400", "training.validation_interval=0"]


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[list[Any]]:
    """Return the metrics of the same layout without Slurm."""
    folder = tmp_path_factory.mktemp("local")
    trained(*STEPS, "run.dir=r", "parallelism.data=4", cwd=folder)
    return rows(folder / "r")


@pytest.mark.parametrize("tasks", ["per_rank", pytest.param("per_node", marks=pytest.mark.slow)])
def test_two_nodes_agree_with_the_local_run(
    tasks: str, local: list[list[Any]], cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, *STEPS, f"slurm.tasks={tasks}")
    log = job.end("COMPLETED")
    assert "4 cpu ranks = 1 pipeline x 4 data x 1 tensor" in log
    assert log.count("layout ") == 1
    assert rows(job.run_dir) == local
    assert job.starts() == 1


@pytest.mark.slow
def test_auto_chooses_a_layout_for_the_job_and_records_it(
    local: list[list[Any]], cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, *STEPS, "parallelism=auto")
    log = job.end("COMPLETED")
    recorded = yaml.safe_load((job.run_dir / "config.yaml").read_text())["parallelism"]
    assert not recorded["auto"]
    assert recorded["data"] * recorded["tensor"] * recorded["pipeline"] == 4
    assert f"{recorded['pipeline']} pipeline x {recorded['data']} data x {recorded['tensor']} tensor" in log
    assert [row[0] for row in rows(job.run_dir)] == [row[0] for row in local]
    losses = [[row[2] for row in run] for run in (rows(job.run_dir), local)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_requeued_job_continues_the_same_run(
    local: list[list[Any]], cluster: Cluster, tmp_path: Path
) -> None:
    """After two stop signals, as before a time limit, the steps equal those of an uninterrupted run."""
    trained(*LONG, "training.stop_at=90", "run.dir=whole", "parallelism.data=4", cwd=tmp_path)
    job = submit(cluster, tmp_path, *LONG, "training.stop_at=90", *PER_NODE, "logging=wandb")
    step = 0
    for _ in range(2):
        job.wait_for_step(step + 10)
        starts = job.starts()
        job.tell("--signal=USR1", "--batch")
        wait_for(lambda starts=starts: job.starts() > starts, "a requeue")  # type: ignore[misc]
        step = last_step(job.run_dir)  # of the start that was stopped: the next one is to take steps too
        cluster.start_now(job.number)
    log = job.end("COMPLETED")
    assert job.starts() == 3
    assert log.count("stopped and requeued") == 2
    assert rows(job.run_dir) == rows(tmp_path / "whole")
    assert logged_steps(job.run_dir) == list(range(1, 91))
    identity = identity_of(job.run_dir)
    folders = [path.parent.name for path in fragments(job.run_dir, identity)]
    assert 1 <= len(folders) <= 3  # on a busy machine a start may be stopped before W&B has opened its file
    assert all(name.endswith(f"-{identity}") for name in folders)


@pytest.mark.slow
def test_a_chain_continues_in_a_new_job(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, *LONG, "training.stop_at=60", *PER_NODE, "slurm.on_stop=chain")
    job.wait_for_step(5)
    job.tell("--signal=USR1", "--batch")
    log = job.end("COMPLETED")
    number = log.partition("stopped: job ")[2].partition(" ")[0]
    following = Job(cluster, number, tmp_path)
    said = following.end("COMPLETED")
    assert "resumed  " in said
    assert [row["step"] for row in metrics(job.run_dir)] == list(range(1, 61))
    assert not following.run_dir.exists()


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_requeued(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, *LONG, *PER_NODE)
    job.wait_for_step(5)
    job.tell()
    log = job.end("CANCELLED")
    assert "left to it" in log or "decides whether it starts again" in log
    [saved] = checkpoints_in(job.run_dir)
    assert int(saved.name.removeprefix("step-")) == len(metrics(job.run_dir))


@pytest.mark.slow
def test_a_run_continues_without_a_lost_node(cluster: Cluster, tmp_path: Path) -> None:
    """A run of 2 to 4 nodes loses a node for good: of the three that remain, two divide the batch."""
    run = [*LONG, "training.stop_at=80", "training.micro_batch_size=1"]
    trained(*run, "run.dir=whole", "parallelism.data=8", cwd=tmp_path)
    elastic = ["hardware.nodes=4", "slurm.nodes=2-4", "checkpoint.interval_steps=5"]
    job = submit(cluster, tmp_path, *run, *PER_NODE, *elastic, "logging=wandb")
    try:
        job.wait_for_step(12)
        node = cluster.run("squeue", "-h", "-j", job.number, "-o", "%N")
        last = cluster.run("scontrol", "show", "hostnames", node).split()[-1]
        cluster.fail(last)
        log = job.end("COMPLETED")
    finally:
        cluster.restore_all()
    assert "2 of 3 nodes: 4 cpu ranks" in log
    expected, found = rows(tmp_path / "whole"), rows(job.run_dir)
    assert len(found) == 80
    for one, other in zip(found, expected, strict=True):
        assert one[:2] == other[:2]
        assert one[2:4] == pytest.approx(other[2:4], rel=1e-4)
    assert logged_steps(job.run_dir) == list(range(1, 81))


@pytest.mark.slow
def test_a_killed_rank_is_restarted_in_the_same_allocation(cluster: Cluster, tmp_path: Path) -> None:
    trained(*LONG, "training.stop_at=60", "run.dir=whole", "parallelism.data=4", cwd=tmp_path)
    job = submit(cluster, tmp_path, *LONG, "training.stop_at=60", *PER_NODE, "checkpoint.interval_steps=5")
    job.wait_for_step(12)
    os.kill(processes_of(job)[-1], signal.SIGKILL)
    log = job.end("COMPLETED")
    assert "starts again, from its last checkpoint" in log
    assert job.starts() == 1
    assert rows(job.run_dir) == rows(tmp_path / "whole")


KILL = "if progress.step == 3 and engine.mesh.rank == 1: import os; os.kill(os.getpid(), 9)"
FAULT = "if progress.step == 3 and engine.mesh.rank == 1: raise RuntimeError('disk on fire')"


def given_up(fault: str, tasks: str, cluster: Cluster, folder: Path) -> str:
    """Return the log of a job that fails after step 3 at every start, in the same allocation."""
    (folder / "sitecustomize.py").write_text(before_each_step(fault))
    job = submit(
        cluster, folder, *LONG, f"slurm.tasks={tasks}", f"slurm.environment.PYTHONPATH={folder}",
        "checkpoint.interval_steps=2",
    )  # fmt: skip
    log = job.end("FAILED")
    assert "giving up after 3 identical failures after step 3" in log
    assert job.starts() == 1
    return log


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["per_node", "per_rank"])
def test_a_run_killed_three_times_after_the_same_step_is_stopped(
    tasks: str, cluster: Cluster, tmp_path: Path
) -> None:
    """As when memory runs out: the killed rank logs nothing; messages of other ranks differ each time."""
    log = given_up(KILL, tasks, cluster, tmp_path)
    assert ("rank 1 of 4 was killed by SIGKILL" if tasks == "per_node" else "Killed") in log


@pytest.mark.slow
@pytest.mark.parametrize("tasks", ["per_node", "per_rank"])
def test_three_identical_failures_stop_the_job(tasks: str, cluster: Cluster, tmp_path: Path) -> None:
    log = given_up(FAULT, tasks, cluster, tmp_path)
    assert log.count("RuntimeError: disk on fire) and starts again") == 2
    assert "giving up after 3 identical failures after step 3: RuntimeError: disk on fire" in log
    assert log.count("Traceback") == 3
    assert "Connection closed" not in log


@pytest.mark.slow
def test_a_refusal_ends_the_job_immediately(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, *STEPS, 'run.dir="held"', "checkpoint.resume=none")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "config.yaml").touch()
    log = job.end("FAILED")
    assert "holds config.yaml, which would be overwritten, and no run.json" in log
    assert "starts again" not in log


@pytest.mark.slow
def test_a_sweep_is_a_job_array(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, *STEPS, *PER_NODE, "--multirun", "optimizer.lr=1e-3,2e-3")
    wait_for(lambda: not cluster.run("squeue", "-h", "-j", job.number, check=False), "the array's end", 240)
    rates = [metrics(job.run_dir / task)[-1]["train/lr"] for task in ("0", "1")]
    assert rates[1] == pytest.approx(2 * rates[0])
    assert (tmp_path / f"slurm-{job.number}_1.out").exists()


@pytest.mark.slow
def test_only_the_signalled_task_of_an_array_is_requeued(cluster: Cluster, tmp_path: Path) -> None:
    """The last task has the job number of the whole array. In a chain, too, only this task continues."""
    job = submit(
        cluster, tmp_path, *LONG, "training.stop_at=120", *PER_NODE, "--multirun", "optimizer.lr=1e-3,2e-3",
        "hardware.nodes=1", "parallelism.data=2",
    )  # fmt: skip
    first, last = (Job(cluster, f"{job.number}_{task}", tmp_path, job.run_dir / str(task)) for task in (0, 1))
    last.wait_for_step(10)
    last.tell("--signal=USR1", "--batch")
    wait_for(lambda: last.starts() > 1, "a requeue")
    cluster.start_now(last.number)
    log = last.end("COMPLETED")
    first.end("COMPLETED")
    assert f"stopped and requeued: job {last.number} resumes" in log
    assert "exited with exit code" not in log.lower(), "to srun a stop is no crash"
    assert (first.starts(), last.starts()) == (1, 2)
    for one in (first, last):
        assert [row["step"] for row in metrics(one.run_dir)] == list(range(1, 121))


@pytest.mark.slow
def test_a_requeued_finished_run_ends_without_training(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, *STEPS, *PER_NODE)
    job.end("COMPLETED")
    before = rows(job.run_dir)
    cluster.run("scontrol", "requeue", job.number)
    wait_for(lambda: job.state == "PENDING", "it is in the queue")
    cluster.start_now(job.number)
    wait_for(lambda: "nothing is left to do" in job.log, "the second start")
    job.end("COMPLETED")
    assert rows(job.run_dir) == before


@pytest.mark.slow
def test_a_job_needs_no_environment_variables(cluster: Cluster, tmp_path: Path) -> None:
    script = command(
        cluster, "submit", "experiment=stdlib_gpt", "training.steps=2", "hardware.accelerators_per_node=2",
        "logging=local", "submit.dry_run=true", cwd=tmp_path,
    )  # fmt: skip
    (tmp_path / "job.sbatch").write_text(script.stdout)
    number = cluster.run("sbatch", "--parsable", "--export=NONE", "job.sbatch", cwd=tmp_path)
    job = Job(cluster, number, tmp_path)
    job.end("COMPLETED")
    assert len(metrics(job.run_dir)) == 2


KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.slow
def test_the_api_key_is_written_nowhere(cluster: Cluster, tmp_path: Path) -> None:
    """The key travels only in the environment. No server answers at this address."""
    job = submit(
        cluster, tmp_path, *STEPS, *PER_NODE, "logging=wandb", "logging.wandb.mode=offline",
        WANDB_API_KEY=KEY, WANDB_BASE_URL="http://127.0.0.1:9",
    )  # fmt: skip
    seen = set()

    def watched() -> bool:
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = process.read_bytes()
            except OSError:
                continue
            assert KEY.encode() not in line
            seen.add(b"launcher" in line)
        return job.state == "COMPLETED"

    wait_for(watched, "the job's end", 240)
    assert True in seen
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert KEY not in cluster.run("scontrol", "write", "batch_script", job.number, "-")
    done = launcher("sync", str(job.run_dir), cwd=tmp_path)
    assert done.returncode == 2
    assert "there is no W&B API key on this machine" in done.stderr
