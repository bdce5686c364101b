"""Submit small runs as Slurm jobs with the real command line."""

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runtime.command import SMALL, environment, metrics
from tests.slurm.cluster import Cluster, wait_for

ON_TWO_NODES = ["hardware.nodes=2", "hardware.accelerators_per_node=2"]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Job:
    cluster: Cluster
    number: str
    folder: Path  # that it was submitted from
    directory: Path | None = None  # of its run, where it is another than usual

    @property
    def run_dir(self) -> Path:
        return self.directory or self.folder / "runs" / f"slurm-{self.number}"

    @property
    def log(self) -> str:
        path = self.folder / f"slurm-{self.number}.out"
        return path.read_text() if path.exists() else ""

    @property
    def state(self) -> str:
        return self.cluster.state(self.number)

    def has_ended(self) -> bool:
        """Return whether the job has ended for good: during a requeue it looks cancelled for some seconds."""
        deadline = time.monotonic() + 15
        while (state := self.state) in ENDED:
            if state in ("COMPLETED", "FAILED") or time.monotonic() > deadline:
                return True
            time.sleep(0.5)
        return False

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert not self.has_ended(), self.log
            return (self.run_dir / "metrics.jsonl").exists() and last_step(self.run_dir) >= step

        wait_for(reached, f"step {step} of job {self.number}\n{self.log}")

    def end(self, state: str, seconds: float = 900) -> str:
        """Wait until the job ends in `state`, releasing it if it was requeued; return its log."""

        def ended() -> bool:
            if self.state == "PENDING":
                self.cluster.start_now(self.number)
            return self.has_ended()

        wait_for(ended, f"the end of job {self.number}", seconds)
        assert self.state == state, self.log
        return self.log

    def tell(self, *options: str) -> None:
        self.cluster.run("scancel", *options, self.number)

    def starts(self) -> int:
        return (
            int(
                re.search(r"Restarts=(\d+)", self.cluster.run("scontrol", "show", "job", "-o", self.number))[
                    1
                ]
            )
            + 1
        )  # type: ignore[index]


def last_step(run_dir: Path) -> int:
    text = (run_dir / "metrics.jsonl").read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0


def command(cluster: Cluster, *arguments: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run the launcher on the login node."""
    surroundings = {**environment(**extra), **cluster.environment, "PATH": os.environ["PATH"]}
    if arguments[0] == "submit":
        arguments += ("submit.preflight=false",)  # tests/parity/test_preflight.py
    python = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(python, cwd=cwd, env=surroundings, text=True, capture_output=True, timeout=120)


def submit(cluster: Cluster, cwd: Path, *overrides: str, **extra: str) -> Job:
    done = command(cluster, "submit", *SMALL, *ON_TWO_NODES, *overrides, cwd=cwd, **extra)
    assert done.returncode == 0, done.stderr
    found = re.search(r"^job +(\d+)", done.stdout, re.MULTILINE)
    assert found is not None
    return Job(cluster, found[1], cwd)


def processes_of(job: Job) -> list[int]:
    """Return the training processes of a job, its ranks and their launchers, in order of their start."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            surroundings = (process / "environ").read_bytes()
        except OSError:
            continue
        if b"train" in words and f"SLURM_JOB_ID={job.number}".encode() in surroundings:
            found.append(int(process.name))
    return sorted(found)


COMPARED = ("step", "train/samples", "train/loss", "train/grad_norm", "val/loss")


def rows(run_dir: Path) -> list[list[Any]]:
    """Return the logged values that must not depend on how often a run was started."""
    return [[row.get(name) for name in COMPARED] for row in metrics(run_dir)]


def logged_steps(run_dir: Path) -> list[int]:
    """Return the steps in all offline W&B files of a run, in order."""
    from launcher.runtime.metrics.wandb_files import fragments, steps_in

    return [step for fragment in fragments(run_dir, identity_of(run_dir)) for step in steps_in(fragment)]


def identity_of(run_dir: Path) -> str:
    """Return the run id, which W&B has too."""
    return str(json.loads((run_dir / "run.json").read_text())["id"])


def before_each_step(statement: str) -> str:
    """Write a sitecustomize.py that makes every rank execute `statement` before each step."""
    return f"""
import importlib.util, sys

class Patch:
    def find_spec(self, name, path, target=None):
        if name != "launcher.runtime.training":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            step = module.optimizer_step

            def patched(run, engine, loader, progress):
                {statement}
                return step(run, engine, loader, progress)

            module.optimizer_step = patched

        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Patch())
"""
