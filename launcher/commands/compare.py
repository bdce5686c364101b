"""`launcher compare`: the same run in several layouts on this machine, side by side."""

from collections.abc import Sequence
from pathlib import Path

from launcher.checkpoint.resume_choice import RunFinished
from launcher.checkpoint.sources import WeightSource
from launcher.commands.ready import ready
from launcher.commands.report_files import check_figure_is_writable, writable_report
from launcher.compare.compared_layouts import (
    FIELDS_OF_LAYOUTS,
    ComparedLayout,
    chosen_layouts,
    in_layout,
)
from launcher.compare.comparison_figure import draw_comparison
from launcher.compare.comparison_report import (
    TOLERANCE,
    ComparisonRow,
    as_json,
    differing,
    metric_rows,
    print_comparison,
)
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.layout import Layout
from launcher.config.schema import ComparedRunConfig, RunConfig
from launcher.config.validate import validate_compare
from launcher.config.world import World, world_of_machine
from launcher.data.open import check_data
from launcher.launch.exit_codes import FAILED
from launcher.launch.local import RankFailure
from launcher.launch.this_machine import share_cores, this_machine
from launcher.planning.choose.enforce import refuse_too_large
from launcher.planning.show.plan_figure import check_figure
from launcher.runtime.run_dir import RunDir, claimed_run_dir
from launcher.text import json_text


def main(arguments: list[str]) -> int:
    jobs = compose_jobs("compare", ComparedRunConfig, arguments)
    if not jobs:
        return 0  # --help
    if len(jobs) > 1:
        raise ConfigError("--multirun", None, "not supported by `launcher compare`", "one command per run")
    run, machine = jobs[0].config, this_machine()
    validate_compare(run)
    check_figure(run.compare.figure, "compare.figure")
    check_figure_is_writable(run.compare.figure, "compare.figure")
    layouts = chosen_layouts(run.compare.layouts, run.compare.ranks, run.model.experts.count)
    world = world_of_machine(run, machine)
    compared = [planned(name, in_layout(run, sizes, world), world) for name, sizes in layouts.items()]
    if all(candidate.refused for candidate in compared):
        raise refusal_of_all(compared)
    check_data(run)
    report = writable_report(run.compare.report, "compare.report", key="resolved")
    layout = next(candidate.layout for candidate in compared if candidate.layout and not candidate.refused)
    try:
        with claimed_run_dir(run, layout) as (directory, _):
            share_cores(machine.cores, machine.cores)  # one core per rank
            rows = [_row(candidate, run.compare.steps, directory.initial) for candidate in compared]
            _log(run, layout, directory, rows)
    except RunFinished as finished:
        raise finished.refusal() from None
    return _report(run, rows, report)


def planned(name: str, run: RunConfig, world: World) -> ComparedLayout:
    """Return the run in one layout with its plan; a layout that is refused keeps the error."""
    try:
        ready_run = ready(run, world, needs_data=False, must_fit=False)
    except ConfigError as error:
        return ComparedLayout(name, run, None, None, error)
    try:
        refuse_too_large(ready_run.plan)
    except ConfigError as error:
        return ComparedLayout(name, run, ready_run.layout, ready_run.plan, error)
    return ComparedLayout(name, run, ready_run.layout, ready_run.plan)


def refusal_of_all(compared: Sequence[ComparedLayout]) -> ConfigError:
    """Return the error if every layout is refused: a layout's own error, unless its size is the reason."""
    errors = {candidate.name: candidate.error for candidate in compared if candidate.error}
    error = errors.get("single", compared[0].error)
    assert error is not None
    reasons = {(other.field, other.why) for other in errors.values()}
    is_of_sizes = "single" not in errors and (len(reasons) > 1 or error.field in FIELDS_OF_LAYOUTS)
    too_large = next((candidate for candidate in compared if candidate.error and candidate.plan), None)
    if too_large is None and not is_of_sizes:
        return error
    remedies = [] if "single" in errors else ["compare.layouts=[single]"]
    if too_large and too_large.run.hardware.memory_bytes:
        remedies = ["hardware.memory_bytes=null (the memory of this machine)"]
    elif too_large:
        remedies.append("a smaller model")
    return ConfigError("compare.layouts", list(errors), compared[0].refused, " or ".join(remedies))


def _row(compared: ComparedLayout, steps: int, initial: WeightSource | None) -> ComparisonRow:
    if compared.layout is None or compared.refused:
        return ComparisonRow(compared)
    print(f"train    {compared.name}: {compared.layout.describe()}", flush=True)
    from launcher.engine.distributed import prepare_deepspeed

    prepare_deepspeed(compared.layout.device)
    import launcher.compare.rank_record  # noqa: F401  # before ranks are forked
    from launcher.compare.measured_layout import measure_layout

    try:
        measured = measure_layout(compared.run, compared.layout, initial, steps=steps)
        return ComparisonRow(compared, measured)
    except RankFailure as failure:
        print(f"failed   {compared.name}: {failure}", flush=True)
        return ComparisonRow(compared, failed=str(failure).splitlines()[0])


def _log(run: ComparedRunConfig, layout: Layout, directory: RunDir, rows: Sequence[ComparisonRow]) -> None:
    """Write to the run's metrics.jsonl and to W&B, as a run of its own."""
    from launcher.runtime.metrics.log import MetricsLog

    log = MetricsLog(run, layout, directory, first_step=1)
    for row in metric_rows(rows):
        log.write(row)
    log.close(failed=any(row.failed for row in rows))
    print(f"metrics  {directory.metrics}")
    if where := log.where():
        print(f"W&B      {where}")


def _report(run: ComparedRunConfig, rows: Sequence[ComparisonRow], report: Path | None) -> int:
    print()
    print_comparison(rows)
    if run.compare.figure:
        draw_comparison(rows, Path(run.compare.figure))
        print(f"figure   {run.compare.figure}")
    if report:
        report.write_text(json_text(as_json(rows), indent=2) + "\n")
        print(f"report   {report}")
    bound = TOLERANCE[run.precision.dtype.name]
    differ = {} if run.model.dropout else differing(rows)
    if run.model.dropout:
        print("losses   not compared: with dropout, other ranks drop out other values")
    elif not differ:
        print(f"losses   the same in every layout, within {bound:.1%}")
    for name, worst in differ.items():
        print(f"DIFFERS  {name}: losses up to {worst:.1%} off the first layout's, {bound:.1%} allowed")
    return FAILED if differ or any(row.failed for row in rows) else 0
