"""`launcher plan`: memory, time and traffic of a run on the hardware that it names, without starting it."""

import sys
from pathlib import Path
from typing import Any

from launcher.commands.ready import ReadyRun, ready_elsewhere
from launcher.commands.report_files import check_figure_is_writable, check_files_differ
from launcher.config.compose import compose_jobs
from launcher.config.errors import ConfigError
from launcher.config.finetune_rules import adapter_warnings
from launcher.config.schedule import schedule_warnings
from launcher.config.schema import OutputFormat, PlannedRunConfig
from launcher.launch.exit_codes import FAILED
from launcher.launch.this_machine import this_machine
from launcher.planning.choose.changes import helpful
from launcher.planning.show.plan_figure import check_figure, draw_plan
from launcher.planning.show.plan_report import as_json, print_plan
from launcher.planning.show.search_report import print_search, search_as_json
from launcher.text import json_text


def main(arguments: list[str]) -> int:
    jobs = compose_jobs("plan", PlannedRunConfig, arguments)
    if not jobs:
        return 0
    if jobs[0].config.learn:
        if len(jobs) > 1:
            raise ConfigError("learn", jobs[0].config.learn, "not supported with --multirun", "learn=[]")
        from launcher.commands.learn import learn  # imports numpy, which a plan does not need

        report = learn(jobs[0].config)
        if jobs[0].config.format is OutputFormat.json:
            print(json_text(report, indent=2))
        return 0
    machine = this_machine()
    for job in jobs:
        check_figure(job.config.plan.figure)
        check_figure_is_writable(job.config.plan.figure, "plan.figure")
    check_files_differ([job.config for job in jobs], "plan.figure")
    ready_runs = ready_elsewhere([job.config for job in jobs], machine)
    reports, for_people = [], jobs[0].config.format is OutputFormat.table
    for job, ready_run in zip(jobs, ready_runs, strict=True):
        if for_people:
            job.announce()
        for warning in (*schedule_warnings(job.config, job.origins), *adapter_warnings(job.config)):
            print(warning, file=sys.stderr)
        reports.append(_report(job.config, ready_run))
    if not for_people:
        is_sweep = jobs[0].index is not None
        print(json_text(reports if is_sweep else reports[0], indent=2))
    return 0 if any(ready_run.plan.fits for ready_run in ready_runs) else FAILED


def _report(config: PlannedRunConfig, ready_run: ReadyRun) -> dict[str, Any]:
    plan, changes = ready_run.plan, helpful(ready_run.plan)
    report, for_people = as_json(plan, changes), config.format is OutputFormat.table
    if ready_run.search is not None:
        report["auto"] = search_as_json(ready_run.search)
        if for_people:
            print_search(ready_run.search)
    if config.plan.trace:
        from launcher.tracing.formula_check import compare_with_trace

        report["trace"] = compare_with_trace(plan)
    if for_people:
        print_plan(plan, changes, report.get("trace"))
    if config.plan.figure:
        draw_plan(plan, Path(config.plan.figure))
        if for_people:
            print(f"figure   {config.plan.figure}")
    return report
