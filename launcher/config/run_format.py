"""The format and identity of run directories and checkpoints. Another format is refused, never translated."""

import json
import re
from pathlib import Path
from typing import Any

from launcher.config.errors import ConfigError, typed_text
from launcher.files import read_regular, what_is_wrong, write_text

FORMAT = 2  # 2: the model's config names its parts
IDENTITY = "run.json"
SAVED_STEP = "saved_step"  # key in run.json: the step of the checkpoint that was written last
BEGUN_FROM = "begun_from"  # key in run.json: the resolved path in checkpoint.resume at the run's first start
BEGUN_BY_JOB = "begun_by_job"  # key in run.json: the id of the Slurm job of the run's first start
COMPARISON = "comparison"  # key in run.json: true if `launcher compare` wrote the directory
END_OF_DOCUMENT = "end_of_document"  # key in run.json: the token that ends each document of the run's data
_MOST_BYTES = 2**20  # of run.json


def wrong_format(number: object) -> str:
    """Return why a run or checkpoint of another format is refused."""
    return f"has format {number}; this launcher reads format {FORMAT}"


def check_format(run_dir: Path) -> None:
    """Check the format of a run directory that holds a run. Raises ConfigError."""
    read_identity(run_dir)


def read_identity(run_dir: Path) -> dict[str, Any] | None:
    """Return the content of run.json, which makes a directory a run's directory; None without the file.

    Raises ConfigError if no run wrote the file, or a run of another format.
    """
    try:
        content = json.loads(read_regular(run_dir / IDENTITY, _MOST_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _not_ours(run_dir, what_is_wrong(error)) from None
    except (ValueError, RecursionError):
        raise _not_ours(run_dir, "is not JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("id"), str):
        raise _not_ours(run_dir, "was not written by a run")
    number = content.get("format", 1)
    if number != FORMAT:
        remedy = "a fresh run.dir, or the launcher version that wrote this one"
        raise ConfigError("run.dir", run_dir, wrong_format(number), remedy)
    step, layout = content.get(SAVED_STEP), content.get("layout")
    is_step = step is None or (type(step) is int and step >= 0)
    # Optional: runs of earlier versions have neither.
    are_texts = all(isinstance(content.get(key), str | None) for key in (BEGUN_FROM, BEGUN_BY_JOB))
    is_valid = is_step and are_texts and isinstance(layout, dict)
    if not (re.fullmatch(r"[\w-]{1,64}", content["id"]) and is_valid):
        raise _not_ours(run_dir, "was altered")
    return content


def begun_from(run_dir: Path) -> str | None:
    """Return the resolved path in checkpoint.resume at the first start of a run; None if it named no path.

    Raises ConfigError.
    """
    source = (read_identity(run_dir) or {}).get(BEGUN_FROM)
    return None if source is None else str(source)


def write_identity(run_dir: Path, identity: dict[str, Any]) -> None:
    write_text(run_dir / IDENTITY, json.dumps(identity, indent=2) + "\n")


def record_saved_step(run_dir: Path, step: int) -> None:
    """Record in run.json that the checkpoint of `step` is written; do nothing without run.json.

    If checkpoints/ is removed later, the next start knows from this record that they are missing.
    """
    if identity := read_identity(run_dir):
        write_identity(run_dir, identity | {SAVED_STEP: step})


def _not_ours(run_dir: Path, why: str) -> ConfigError:
    resume = typed_text("checkpoint.resume", str(run_dir))
    remedy = f"another run.dir (with {resume} it resumes from the checkpoints there)"
    return ConfigError("run.dir", run_dir, f"{IDENTITY} {why}", remedy)
