"""Preflight finds faults in DeepSpeed: each is planted into a copy of the installed package.

They are of the kinds that DeepSpeed 0.17.6 to 0.19.3 had: gradients that lack a part (issues 7718 and 8224),
and clipping by the mean of the ranks' norms (issue 8475; the launcher computes the norm itself, so that the
fault must be where DeepSpeed clips). None of them raises an error or a warning.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STAGE_1_AND_2 = Path("runtime/zero/stage_1_and_2.py")
RUN = ("model=llama_tiny", "parallelism.data=2", "hardware=cpu", "training.global_batch_size=32")
# Text of DeepSpeed, the text that replaces it, a run that it breaks, and words of the failure.
FAULTS = {
    "7718: with accumulation only the last micro-batch counts": (
        "accumulated_grad.add_(new_avg_grad)",
        "accumulated_grad.copy_(new_avg_grad)",
        ("parallelism=zero2",),
        "gradient",
    ),
    "8224: in bf16 a gradient lacks what was added to it before": (
        "output.add_(source.to(output.dtype))",
        "output.copy_(source.to(output.dtype))",
        ("parallelism=zero2", "precision=bf16"),
        "gradient",
    ),
    "8475: gradients are clipped by the mean of the ranks' norms": (
        "            clip_norm = total_norm\n",
        "            clip_norm = total_norm / dist.get_world_size(group=self.dp_process_group)\n",
        ("parallelism=zero1",),
        "clipping",
    ),
}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH with a copy of the installed DeepSpeed."""
    origin = importlib.util.find_spec("deepspeed").origin  # type: ignore[union-attr]
    folder = tmp_path_factory.mktemp("copied")
    shutil.copytree(
        Path(origin or "").parent, folder / "deepspeed", ignore=shutil.ignore_patterns("__pycache__")
    )
    return folder


def preflight(copied: Path, cache: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    surroundings = {**os.environ, "PYTHONPATH": str(copied), "XDG_CACHE_HOME": str(cache)}
    words = [sys.executable, "-P", "-m", "launcher", "preflight", *RUN, *overrides]
    return subprocess.run(words, env=surroundings, cwd=cache, capture_output=True, text=True, timeout=400)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_detected(name: str, copied: Path, tmp_path: Path) -> None:
    right, wrong, overrides, words = FAULTS[name]
    path = copied / "deepspeed" / STAGE_1_AND_2
    text = path.read_text()
    assert text.count(right) == 1, "DeepSpeed has changed: find the place again"
    path.write_text(text.replace(right, wrong))
    try:
        done = preflight(copied, tmp_path, *overrides)
    finally:
        path.write_text(text)
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stdout.splitlines()[0]
    assert list(tmp_path.rglob("*.json")) == []


@pytest.mark.slow
def test_the_unchanged_copy_passes_and_a_changed_copy_is_another_version(
    copied: Path, tmp_path: Path
) -> None:
    for entries in (1, 1, 2):
        if entries == 2:
            path = copied / "deepspeed" / STAGE_1_AND_2
            path.write_text(path.read_text() + "\n# changed\n")
        done = preflight(copied, tmp_path, "parallelism=zero2", "precision=bf16")
        assert done.returncode == 0, done.stdout + done.stderr
        assert len(list(tmp_path.rglob("*.json"))) == entries
