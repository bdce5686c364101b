"""A job ends promptly after a failed rank, a signal or torchrun's stop: one message, no processes left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest

from launcher.checkpoint.manifest import checkpoints_in, read_manifest
from launcher.launch.environment import RankEnvironment
from launcher.launch.local import AGAIN, SAVING, RankFailure
from launcher.runtime.start import joined_rank_error
from tests.forked_commands import Command
from tests.runtime.command import AS_USUAL, SMALL, environment, metrics, started, trained

STOPPING = f"launcher: {SAVING}\n"
FAULTY = """
import os, sys
import launcher.runtime.training as train
step = train.optimizer_step
def faulty(run, engine, loader, progress):
    if progress.step == 2 and engine.mesh.rank == 1:
        {fault}
    return step(run, engine, loader, progress)
train.optimizer_step = faulty
from launcher.__main__ import main
main()
"""


def wait_for_rows(run_dir: Path, count: int, process: Command | subprocess.Popen[str]) -> None:
    """Wait until the run has logged `count` steps. The file exists before the run handles signals."""
    file = run_dir / "metrics.jsonl"

    def has_rows() -> bool:
        assert process.poll() is None, process.communicate()
        return file.exists() and len(file.read_text().splitlines()) >= count

    wait_until(has_rows)


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def survivors(folder: Path) -> list[str]:
    """Return the processes whose working directory is `folder`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").resolve(strict=True) == folder:
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ('raise RuntimeError("disk on fire")', "RuntimeError: disk on fire"),
        ("os.kill(os.getpid(), 9)", "rank 1 of 2 was killed by SIGKILL"),
    ],
)
def test_a_failed_rank_ends_the_job_and_is_reported_once(fault: str, said: str, tmp_path: Path) -> None:
    program = FAULTY.format(fault=fault)
    process = started(*SMALL, "run.dir=r", "parallelism.data=2", cwd=tmp_path, program=program)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("launcher: rank 1 of 2")
    assert error.count("Traceback") <= 1
    assert said in error
    assert "Connection closed" not in error
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]
    assert survivors(tmp_path) == []


ENDS = {
    signal.SIGINT: (130, "launcher: interrupted; all ranks have ended\n"),
    signal.SIGTERM: (143, "launcher: stopped by SIGTERM; all ranks have ended\n"),
    signal.SIGHUP: (129, "launcher: stopped by SIGHUP; all ranks have ended\n"),
    signal.SIGUSR1: (138, "launcher: stopped by SIGUSR1; all ranks have ended\n"),
}
QUICK = {(signal.SIGINT, True), (signal.SIGUSR1, True), (signal.SIGTERM, False)}


@pytest.mark.parametrize(
    ("number", "saving"),
    [
        case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow)
        for case in product(ENDS, (True, False))
    ],
)
def test_a_signal_ends_the_run_without_leftovers(
    number: signal.Signals, saving: bool, tmp_path: Path
) -> None:
    code, said = ENDS[number]
    long_run = [*SMALL, "run.dir=r", "parallelism.data=2", "training.steps=100000"]
    grace = [] if saving else ["checkpoint.stop_grace_seconds=null"]
    process = started(*long_run, *grace, "logging=wandb", cwd=tmp_path)
    wait_for_rows(tmp_path / "r", 4, process)
    os.killpg(process.pid, number)
    os.killpg(process.pid, number)  # a wrapper forwards what the terminal has sent to it too
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (code, STOPPING + said if saving else said)
    assert survivors(tmp_path) == []
    saved = checkpoints_in(tmp_path / "r")
    last = metrics(tmp_path / "r")[-1]["step"]
    assert [read_manifest(path).step for path in saved] == ([last] if saving else [])


def test_a_stopped_run_resumes_at_its_step(tmp_path: Path) -> None:
    """The losses of all steps equal those of an uninterrupted run: every sample is read once."""
    run = ["parallelism.data=2", "training.steps=40", "training.validation_interval=0"]
    trained(*run, "run.dir=whole", cwd=tmp_path)
    process = started(*SMALL, *run, "run.dir=r", cwd=tmp_path)
    wait_for_rows(tmp_path / "r", 4, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    stopped_at = len(metrics(tmp_path / "r"))
    assert 3 < stopped_at < 40
    assert f"stopped  at step {stopped_at}. To resume: the same command, run.dir={tmp_path / 'r'}\n" in out
    assert f"at step {stopped_at}\n" in trained(*run, "run.dir=r", cwd=tmp_path)
    names = ("step", "train/samples", "train/loss", "train/grad_norm", "val/loss")
    one, other = (
        [[row.get(name) for name in names] for row in metrics(tmp_path / folder)] for folder in ("r", "whole")
    )
    assert one == other


SLOW_SAVE = """
import time
import launcher.checkpoint.save as save
write = save.write_pieces
save.write_pieces = lambda *arguments: (print("saving", flush=True), time.sleep(100), write(*arguments))
from launcher.__main__ import main
main()
"""


@pytest.mark.parametrize("impatient", ["Ctrl-C", "grace"])
def test_a_save_that_exceeds_the_grace_period_is_ended(impatient: str, tmp_path: Path) -> None:
    grace = ["checkpoint.stop_grace_seconds=1"] if impatient == "grace" else []
    long_run = ["run.dir=r", "training.steps=100000", *grace]
    process = started(*SMALL, *long_run, cwd=tmp_path, program=SLOW_SAVE)
    wait_for_rows(tmp_path / "r", 1, process)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "saving\n" in process.out())
    if impatient == "Ctrl-C":
        time.sleep(AGAIN)
        process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert error == f"{STOPPING}launcher: interrupted; all ranks have ended\n"
    assert process.returncode == 130
    assert survivors(tmp_path) == []
    assert checkpoints_in(tmp_path / "r") == []


def test_ctrl_c_during_the_first_imports_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    surroundings = environment()
    surroundings["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{surroundings.get('PYTHONPATH', '')}"
    command = [*AS_USUAL, sys.executable, "-m", "launcher", *SMALL]
    done = subprocess.run(
        command, cwd=tmp_path, env=surroundings, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "launcher: interrupted; all ranks have ended\n")


TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    *("-m", "launcher"),
]


def torchrun(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the ranks with torchrun, in a new process group, as a terminal does."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [*AS_USUAL, *TORCHRUN, *SMALL, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment(), text=True, process_group=0, **pipes)


@pytest.mark.slow
def test_under_torchrun_the_launcher_joins_its_ranks(tmp_path: Path) -> None:
    process = torchrun("run.dir=r", "parallelism=tp2", "training.steps=2", cwd=tmp_path)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    assert out.count("layout   2 cpu ranks = 1 pipeline x 1 data x 2 tensor") == 1
    assert len(metrics(tmp_path / "r")) == 2


@pytest.mark.slow
def test_under_torchrun_sigterm_saves_the_run(tmp_path: Path) -> None:
    process = torchrun("run.dir=r", "parallelism=tp2", "training.steps=100000", cwd=tmp_path)
    wait_for_rows(tmp_path / "r", 1, process)
    process.terminate()
    process.communicate(timeout=60)
    [saved] = checkpoints_in(tmp_path / "r")
    assert read_manifest(saved).step == metrics(tmp_path / "r")[-1]["step"]
    assert survivors(tmp_path) == []


def test_a_rank_that_lost_its_peers_during_a_stop_is_silent() -> None:
    """srun ends all ranks after one has failed, while they wait in a collective."""
    ranks = RankEnvironment(3, 4, local_rank=1, local_size=2, master_addr="node1", master_port=1)
    lost = RuntimeError("Connection closed by peer")
    assert isinstance(joined_rank_error(ranks, lost, stop_asked=True), SystemExit)
    assert isinstance(joined_rank_error(ranks, OSError("disk on fire"), stop_asked=True), RankFailure)
