"""metrics.jsonl: a row per step, each a line of JSON. Imports no wandb."""

import json
from pathlib import Path

from launcher.files import write_text

Row = dict[str, float | int]


def rows_in(path: Path) -> list[Row]:
    """Every whole row; none where there is no such file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # cut short in the middle of a line
    return rows


def keep_rows_before(step: int, path: Path) -> list[Row]:
    """Drop the rows from `step` on; those that are left."""
    kept = [row for row in rows_in(path) if row["step"] < step]
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
