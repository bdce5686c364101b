"""Run the command line in a process of its own, on runs small enough for a test."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tests.forked_commands import LAUNCHER, Command, environment, heavy

SMALL = [
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2", "model.max_sequence_length=32",
    "training.global_batch_size=8", "training.micro_batch_size=2", "training.validation_batches=2",
    "hardware=cpu", "logging=local",
]  # fmt: skip

AS_USUAL = ["env", "--default-signal=HUP,INT"]  # which nohup and background jobs of a script ignore


def launcher(
    *arguments: str, cwd: Path, timeout: float = 120, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run `launcher ARGUMENTS` to its end."""
    return heavy().run(list(arguments), cwd=cwd, environment=environment(**extra), timeout=timeout)


def started(*arguments: str, cwd: Path, program: str = LAUNCHER) -> Command:
    """Start `launcher ARGUMENTS`, or another program with these arguments."""
    return heavy().start(list(arguments), cwd=cwd, environment=environment(), program=program)


def trained(*arguments: str, cwd: Path, **extra: str) -> str:
    """A run that must succeed; its standard output."""
    done = launcher(*SMALL, *arguments, cwd=cwd, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
