"""The results of an evaluation: lines for people, JSON, and numbers by name for W&B."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.files import write_text
from launcher.text import json_text, whole

_FILE = "results.json"
REPORT_KEY = "evaluation"  # by which a report is known to be the launcher's


@dataclass(frozen=True)
class Results:
    """Results by name of the data, and lm-evaluation-harness's own results by task."""

    data: dict[str, dict[str, float | int]]
    tasks: dict[str, Any]  # "results", "configs", "versions", "n-shot" and others of lm_eval


def write_results(folder: Path, results: Results) -> None:
    write_text(folder / _FILE, json.dumps(asdict(results), default=str))


def read_results(folder: Path) -> Results:
    return Results(**json.loads((folder / _FILE).read_text()))


def lines(results: Results) -> list[str]:
    """Return the lines to print: one for each source of data, one for each metric of a task."""
    text = []
    for name, values in results.data.items():
        text.append(f"{name}: {whole(int(values['tokens']))} tokens, loss {values['loss']:.4f}")
        text.append(f"         perplexity {_number(values['perplexity'])} per token")
        if "bytes" in values:
            per_byte = (
                f"{_number(values['byte_perplexity'])} per byte, {values['bits_per_byte']:.4f} bits per byte"
            )
            text[-1] += f", {per_byte} ({whole(int(values['bytes']))} bytes)"
    for name, value in task_numbers(results).items():
        text.append(f"{name:<40} {value:.4f}")
    return text


def task_numbers(results: Results) -> dict[str, float]:
    """Return each number of lm_eval's results as TASK/METRIC, with the name of a filter behind a comma."""
    return {
        f"{task}/{metric.removesuffix(',none')}": float(value)
        for task, metrics in results.tasks.get("results", {}).items()
        for metric, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "," in metric
    }


def numbers(results: Results) -> dict[str, float]:
    """Return every finite number by the name that W&B shows."""
    data = {f"{name}/{key}": value for name, values in results.data.items() for key, value in values.items()}
    return {f"evaluate/{k}": v for k, v in (data | task_numbers(results)).items() if math.isfinite(v)}


def write_report(path: Path, about: dict[str, Any], results: Results) -> None:
    """Write all results as JSON, with `about`: the weights, the layout and the settings."""
    text = json_text({REPORT_KEY: about, **asdict(results)}) + "\n"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text)  # /dev/stdout or a pipe: no file can be renamed to it
    else:
        write_text(path, text)


def _number(value: float) -> str:
    return f"{value:.4g}" if value >= 1e4 else f"{value:.4f}"
