"""Samples that a run leaves out after a rollback (guard.spike=rollback), kept in the run's directory."""

import json
from collections.abc import Sequence
from pathlib import Path

from launcher.config.errors import ConfigError
from launcher.files import write_text

EXCLUDED = "excluded.json"

Stretch = tuple[int, int]  # the samples from the first number up to the second, which is not included


def past_excluded(samples: int, stretches: Sequence[Stretch]) -> int:
    """Return how many samples count as consumed, with the stretches that begin here left out. Pure."""
    for start, end in sorted(stretches):
        if start <= samples < end:
            samples = end
    return samples


def read_excluded(run_dir: Path) -> tuple[Stretch, ...]:
    """Return the stretches; nothing if there is no file. Raises ConfigError for a damaged file."""
    path = run_dir / EXCLUDED
    if not path.exists():
        return ()
    try:
        stretches = json.loads(path.read_text())
        assert all(0 <= start < end for start, end in stretches)
        return tuple((int(start), int(end)) for start, end in stretches)
    except (OSError, ValueError, TypeError, AssertionError):
        why = f"{EXCLUDED} is damaged: it lists the samples that the run left out after a rollback"
        raise ConfigError(
            "run.dir", run_dir, why, "a copy of the file, or none (no sample is left out)"
        ) from None


def exclude(run_dir: Path, stretch: Stretch) -> tuple[Stretch, ...]:
    """Add a stretch to the file and return all."""
    stretches = (*read_excluded(run_dir), stretch)
    write_text(run_dir / EXCLUDED, json.dumps(stretches) + "\n")
    return stretches
