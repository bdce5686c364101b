"""The failed starts of a run, and whether another one makes sense."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

ATTEMPTS = "attempts.jsonl"
MOST_ALIKE = 3


@dataclass(frozen=True)
class Attempt:
    """A start that failed: the last step that it logged, and how it ended."""

    step: int
    error: str


def note_attempt(run_dir: Path, attempt: Attempt) -> int:
    """Write it down; how many in a row, this one included, failed alike."""
    path = run_dir / ATTEMPTS
    run_dir.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")
    return alike(_attempts(path))


def alike(attempts: list[Attempt]) -> int:
    """How many at the end of the list are equal."""
    different = (n for n, one in enumerate(reversed(attempts)) if one != attempts[-1])
    return next(different, len(attempts))


def _attempts(path: Path) -> list[Attempt]:
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(Attempt(**json.loads(line)))
        except (ValueError, TypeError):
            continue  # cut short when its node died
    return found
