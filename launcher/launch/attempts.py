"""Failed starts of a run, and the limit on identical failures."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ATTEMPTS_FILE = "attempts.jsonl"
MAX_IDENTICAL_FAILURES = 3


@dataclass(frozen=True)
class FailedStart:
    """Last step that a failed start logged, and the error that ended the start."""

    step: int
    error: str


def record_failed_start(run_dir: Path, failed: FailedStart) -> int:
    """Append `failed` to the run's file; return how many identical failures in a row now end that file."""
    path = run_dir / ATTEMPTS_FILE
    run_dir.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(failed)) + "\n")
    return count_identical_at_end(_read_failed_starts(path))


def count_identical_at_end(failures: list[FailedStart]) -> int:
    """Return how many equal failures in a row end the list."""
    different = (count for count, failed in enumerate(reversed(failures)) if failed != failures[-1])
    return next(different, len(failures))


def _read_failed_starts(path: Path) -> list[FailedStart]:
    failures = []
    for line in path.read_text().splitlines():
        try:
            failures.append(FailedStart(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # the node died while it wrote this line
    return failures
