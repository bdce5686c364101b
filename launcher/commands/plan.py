"""What `launcher plan` does once its config has been composed and checked."""

import json
from pathlib import Path
from typing import Any

from launcher.config.layout import Layout
from launcher.config.schema import OutputFormat, PlannedRunConfig
from launcher.planning.choose.changes import helpful
from launcher.planning.choose.search import Search
from launcher.planning.cost.plan import make_plan, memory_budget
from launcher.planning.show.plan_figure import draw_plan
from launcher.planning.show.plan_report import as_json, print_plan
from launcher.planning.show.search_report import print_search, search_as_json


def plan_and_print(
    run: PlannedRunConfig, layout: Layout, memory_here: int | None, found_by: Search | None
) -> dict[str, Any]:
    """Plan one run, draw and print it as it says; first, what `parallelism=auto` found. As plain values."""
    plan = make_plan(run, layout, budget=memory_budget(run, layout.world_size, memory_here))
    changes = helpful(plan)
    found = as_json(plan, changes)
    if found_by is not None:
        found["auto"] = search_as_json(found_by)
        if run.format is OutputFormat.table:
            print_search(found_by)
    if run.plan.trace:
        from launcher.tracing.formula_check import compare_with_trace

        found["trace"] = compare_with_trace(plan)
    if run.format is OutputFormat.table:
        print_plan(plan, changes, found.get("trace"))
    if run.plan.figure:
        draw_plan(plan, Path(run.plan.figure))
        if run.format is OutputFormat.table:
            print(f"figure   {run.plan.figure}")
    return found


def dump(found: list[dict[str, Any]], *, is_sweep: bool) -> str:
    """One plan as an object, those of a sweep as a list."""
    return json.dumps(found if is_sweep else found[0], indent=2, allow_nan=False)
