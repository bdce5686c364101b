"""Runs the real command line in a process of its own, on runs small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SMALL = [
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2", "model.max_sequence_length=32",
    "training.global_batch_size=8", "training.micro_batch_size=2", "training.validation_batches=2",
    "hardware=cpu", "logging=local",
]  # fmt: skip

AS_USUAL = ["env", "--default-signal=HUP,INT"]  # which nohup and background jobs of a script ignore


def environment(**extra: str) -> dict[str, str]:
    """This process's, without what would change where W&B or the ranks look."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "SLURM_")) and k not in _RANKS}
    return {**kept, "OMP_NUM_THREADS": "1", "HOME": "/nonexistent", **extra}


_RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def launcher(
    *arguments: str, cwd: Path, timeout: float = 120, **extra: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment(**extra), text=True, capture_output=True, timeout=timeout
    )


def trained(*arguments: str, cwd: Path, **extra: str) -> str:
    """A run that must succeed; its standard output."""
    done = launcher(*SMALL, *arguments, cwd=cwd, **extra)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
