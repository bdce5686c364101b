"""metrics.jsonl: a line of JSON for each logged step. Does not import wandb."""

import json
from pathlib import Path

from launcher.files import json_lines, write_text

Row = dict[str, float | int]


def keep_rows_before(step: int, path: Path) -> list[Row]:
    """Drop the rows from `step` on; return the rows that are kept."""
    kept = [row for row in json_lines(path) if row["step"] < step]
    if path.exists():
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept
