"""Samples that a run leaves out after a rollback (guard.spike=rollback), kept in the run's directory."""

import json
from collections.abc import Sequence
from pathlib import Path

from launcher.config.errors import ConfigError
from launcher.files import read_regular, write_text

EXCLUDED = "excluded.json"
_MOST_BYTES = 2**20

SampleRange = tuple[int, int]  # the samples from the first number up to the second, which is not included


def past_excluded(samples: int, ranges: Sequence[SampleRange]) -> int:
    """Return `samples` plus the excluded samples that follow directly, which count as consumed. Pure."""
    for start, end in sorted(ranges):
        if start <= samples < end:
            samples = end
    return samples


def read_excluded(run_dir: Path) -> tuple[SampleRange, ...]:
    """Return the excluded ranges; none if there is no file. Raises ConfigError for a damaged file."""
    try:
        ranges = json.loads(read_regular(run_dir / EXCLUDED, _MOST_BYTES))
        if not isinstance(ranges, list):
            raise ValueError
        if not all(type(start) is type(end) is int and 0 <= start < end for start, end in ranges):
            raise ValueError
        return tuple((start, end) for start, end in ranges)
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, RecursionError):
        why = f"{EXCLUDED} is damaged: it lists the samples that the run left out after a rollback"
        raise ConfigError(
            "run.dir", run_dir, why, "a copy of the file, or none (no sample is left out)"
        ) from None


def exclude(run_dir: Path, added: SampleRange) -> tuple[SampleRange, ...]:
    """Add a range to the file and return all excluded ranges."""
    ranges = (*read_excluded(run_dir), added)
    write_text(run_dir / EXCLUDED, json.dumps(ranges) + "\n")
    return ranges
