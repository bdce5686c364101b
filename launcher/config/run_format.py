"""The format of run directories and checkpoints. Another format is refused, never translated."""

import json
from pathlib import Path

from launcher.config.errors import ConfigError

FORMAT = 2  # 2: the model's config names its parts
IDENTITY = "run.json"


def wrong_format(number: object) -> str:
    """Return why a run or checkpoint of another format is refused."""
    return f"has format {number}; this launcher reads format {FORMAT}"


def check_format(run_dir: Path) -> None:
    """Check the format of a run directory that holds a run. Raises ConfigError."""
    try:
        identity = json.loads((run_dir / IDENTITY).read_text())
    except (OSError, ValueError):
        return  # no run, or not one that the launcher wrote, which its readers report
    number = identity.get("format", 1) if isinstance(identity, dict) else FORMAT
    if number != FORMAT:
        remedy = "a fresh run.dir, or the launcher version that wrote this one"
        raise ConfigError("run.dir", run_dir, wrong_format(number), remedy)
