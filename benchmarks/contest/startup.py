"""Seconds from the launcher's command to the end of its first step."""

import subprocess
import sys
import time
from pathlib import Path

from benchmarks.contest.job import ROOT
from benchmarks.contest.ranks import ContestantFailed

_STEPS = "training.steps="


def first_step_of_command(overrides: list[str], folder: Path) -> float:
    """Start the command `launcher` for two steps; return the seconds until it has logged the first."""
    directory, log = folder / "run", folder / "command.log"
    kept = [override for override in overrides if not override.startswith(_STEPS)]
    command = [sys.executable, "-m", "launcher", *kept, f"{_STEPS}2", f'run.dir="{directory}"']
    with log.open("w") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        metrics = directory / "metrics.jsonl"
        try:
            while not (metrics.is_file() and metrics.stat().st_size):
                if process.poll() is not None:
                    raise ContestantFailed(f"launcher: the command failed\n{log.read_text()[-3000:]}")
                time.sleep(0.005)
            seconds = time.monotonic() - started
            process.wait()
        finally:
            process.kill()
    return seconds
