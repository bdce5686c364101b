"""metrics.jsonl: a line of JSON for each logged step. Does not import wandb."""

import json
from pathlib import Path

from launcher.files import write_text

Row = dict[str, float | int]


def rows_in(path: Path) -> list[Row]:
    """Return every whole row of a file; no rows if the file does not exist."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the run was killed in the middle of this line
    return rows


def keep_rows_before(step: int, path: Path) -> list[Row]:
    """Drop the rows from `step` on; return the rows that are kept."""
    kept = [row for row in rows_in(path) if row["step"] < step]
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
