"""Failed starts of a run, and the limit on identical failures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.files import json_lines

ATTEMPTS_FILE = "attempts.jsonl"
MAX_IDENTICAL_FAILURES = 3


@dataclass(frozen=True)
class FailedStart:
    """Last step that a failed start logged, and the error that ended the start."""

    step: int
    error: str


def record_failed_start(run_dir: Path, failed: FailedStart) -> int:
    """Append `failed` to the run's file; return how many identical failures in a row now end that file.

    Raises OSError.
    """
    path = run_dir / ATTEMPTS_FILE
    run_dir.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(failed)) + "\n")
    return count_identical_at_end(json_lines(path))


def count_identical_at_end(failures: Sequence[object]) -> int:
    """Return how many equal failures in a row end the list."""
    different = (count for count, failed in enumerate(reversed(failures)) if failed != failures[-1])
    return next(different, len(failures))
