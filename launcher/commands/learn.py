"""`launcher plan learn=[RUN,...]`: compare plans with finished runs, and refine the hardware config."""

from pathlib import Path
from statistics import mean, median
from typing import Any

from launcher.calibrate.hardware_file import refined_target, write_refined
from launcher.config.compose import load_typed
from launcher.config.errors import ConfigError
from launcher.config.layout import recorded_layout
from launcher.config.run_format import IDENTITY, read_identity
from launcher.config.schema import HardwareConfig, OutputFormat, PlannedRunConfig, RunConfig
from launcher.config.validate import check_values
from launcher.planning.choose.learning import FinishedRun, refined
from launcher.runtime.metrics.rows import rows_in
from launcher.runtime.run_dir import CONFIG, METRICS
from launcher.text import four_digits, plain_table, print_table

FEWEST_ROWS = 3  # of metrics, without the first


def learn(config: PlannedRunConfig) -> dict[str, Any]:
    """Print the error of each run's plan before and after, and write config.learned. Return the report."""
    check_values(config)
    path = refined_target(config.learned) if config.learned else None
    runs = [finished_run(Path(name).expanduser()) for name in config.learn]
    hardware = config.hardware
    if any(run.planned(hardware) is None for run in runs):
        why = "the hardware config states no speed to refine"
        raise ConfigError("learn", config.learn, why, "hardware=h100_80gb (or another with known speeds)")
    after = refined(hardware, runs)
    rows = [_row(run, hardware, after) for run in runs]
    errors = {name: mean(abs(row[name]) for row in rows) for name in ("error_before", "error_after")}
    setting = f"hardware.compute_scale={after.compute_scale:g}"
    if config.format is OutputFormat.table:
        _print(rows)
        print(f"error    {errors['error_before']:.1%} on average before, {errors['error_after']:.1%} after")
        print(f"setting  {setting}")
    if path is not None:
        write_refined(after, path, runs=len(runs))
        if config.format is OutputFormat.table:
            print(f"hardware {path}")
    return {"runs": rows, **errors, "compute_scale": after.compute_scale}


def finished_run(path: Path) -> FinishedRun:
    """Return a run of at least four rows of metrics. Raises ConfigError for any other directory."""
    run = load_typed(path / CONFIG, RunConfig)
    seconds = [
        float(row["perf/step_time_s"]) for row in rows_in(path / METRICS) if "perf/step_time_s" in row
    ][1:]
    if len(seconds) < FEWEST_ROWS:
        why = f"the run has {len(seconds)} measured rows after its first, and {FEWEST_ROWS} are needed"
        raise ConfigError("learn", path, why, "learn=[runs/NAME] with a run of more steps")
    try:
        layout = recorded_layout(read_identity(path) or {})
    except (KeyError, TypeError):
        why = f"its {IDENTITY} is damaged, so that its layout is unknown"
        raise ConfigError("learn", path, why, f"a copy of {IDENTITY} from a backup") from None
    return FinishedRun(path.name, run, layout, median(seconds))


def _row(run: FinishedRun, before: HardwareConfig, after: HardwareConfig) -> dict[str, Any]:
    row: dict[str, Any] = {"run": run.name, "measured_s": run.seconds}
    for name, hardware in (("before", before), ("after", after)):
        time = run.planned(hardware)
        assert time is not None
        row |= {f"planned_{name}_s": time.total, f"error_{name}": time.total / run.seconds - 1}
    return row


def _print(rows: list[dict[str, Any]]) -> None:
    table = plain_table("Plans of finished runs, seconds of a step")
    for name in ("run", "measured", "planned before", "error", "planned after", "error"):
        table.add_column(name, justify="left" if name == "run" else "right")
    for row in rows:
        seconds = [four_digits(row[name]) for name in ("measured_s", "planned_before_s", "planned_after_s")]
        errors = [f"{row[name]:+.1%}" for name in ("error_before", "error_after")]
        table.add_row(row["run"], seconds[0], seconds[1], errors[0], seconds[2], errors[1])
    print_table(table)
