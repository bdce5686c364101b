"""A rank that fails, Ctrl-C, torchrun: the job ends promptly, says why once, and leaves nothing behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.runtime.command import SMALL, environment, metrics

FAULTY = """
import os, sys
import launcher.runtime.train as train
step = train.train_step
def faulty(run, layout, engine, samples, progress, device):
    if progress.step == 2 and engine.mesh.rank == 1:
        {fault}
    return step(run, layout, engine, samples, progress, device)
train.train_step = faulty
from launcher.__main__ import main
main()
"""


def start(command: list[str], cwd: Path) -> subprocess.Popen[str]:
    """In a process group of its own, as a terminal does; under nohup, too, with SIGHUP not ignored."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    as_usual = ["env", "--default-signal=HUP,INT"]
    return subprocess.Popen(
        [*as_usual, *command], cwd=cwd, env=environment(), text=True, process_group=0, **pipes
    )


def survivors(folder: Path) -> list[str]:
    """Processes that work in `folder`."""
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
def test_a_rank_that_fails_ends_the_job_with_its_own_story(fault: str, said: str, tmp_path: Path) -> None:
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(fault=fault))
    process = start([sys.executable, str(script), *SMALL, "run.dir=r", "parallelism.data=2"], tmp_path)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1
    assert error.startswith("launcher: rank 1 of 2")
    assert error.count("Traceback") <= 1
    assert said in error
    assert "Connection closed" not in error
    assert [row["step"] for row in metrics(tmp_path / "r")] == [1, 2]
    assert survivors(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "launcher: interrupted; all ranks have ended\n"),
        (signal.SIGTERM, 143, "launcher: stopped by SIGTERM; all ranks have ended\n"),
        (signal.SIGHUP, 129, "launcher: stopped by SIGHUP; all ranks have ended\n"),
    ],
)
def test_an_interrupted_run_ends_cleanly(number: int, code: int, said: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "launcher",
        *SMALL,
        "run.dir=r",
        "parallelism.data=2",
        "training.steps=100000",
    ]
    process = start([*command, "logging=wandb"], tmp_path)
    file = tmp_path / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (file.exists() and len(file.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (code, said)
    assert survivors(tmp_path) == []


def test_ctrl_c_during_the_first_imports_ends_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    surroundings = environment()
    surroundings["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{surroundings.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "launcher", *SMALL]
    done = subprocess.run(
        command, cwd=tmp_path, env=surroundings, text=True, capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "launcher: interrupted; all ranks have ended\n")


def test_under_torchrun_it_joins_the_ranks_that_are_there(tmp_path: Path) -> None:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "launcher",
    ]
    process = start([*torchrun, *SMALL, "run.dir=r", "parallelism=tp2", "training.steps=2"], tmp_path)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, out + error
    assert out.count("layout   2 cpu ranks = 1 pipeline x 1 data x 2 tensor") == 1
    assert len(metrics(tmp_path / "r")) == 2
